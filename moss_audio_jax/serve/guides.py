"""Answers that are JSON: which tokens may come next, from llguidance."""

from __future__ import annotations

import functools
import json
from typing import Any

import llguidance
import numpy as np
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from moss_audio_jax.serve.errors import invalid
from moss_audio_jax.text.tokenizer import Tokenizer

# One space after a colon and a comma, none elsewhere: where a grammar allows any, a model may write
# spaces for ever.
_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Guides:
    """Makes the guides of one model's answers.

    Args:
      tokenizer: the model's.
      vocab_size: V, of the model's logits.
      stop_ids: the tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: tuple[int, ...]) -> None:
        self._tokenizer, self._vocab_size, self._stop_ids = tokenizer, vocab_size, stop_ids

    def of(self, schema: dict[str, Any] | None, where: str = "response_format") -> JsonGuide:
        """A guide to a JSON value of this schema; None allows every object. It takes up to a
        second.

        Raises:
          ApiError: the schema is wrong, too large, or has what llguidance cannot do.
        """
        try:
            text = json.dumps({"type": "object"} if schema is None else schema)
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_FORM)
        except ValueError as error:
            raise invalid(f"{where}: {error}", where, "invalid_schema") from None
        limits = llguidance.LLParserLimits(max_grammar_size=100_000, verbose_errors=False)
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise invalid(f"{where}: {matcher.get_error()}", where, "invalid_schema")
        return JsonGuide(matcher, self._vocab_size, self._stop_ids)

    @functools.cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size)),
            n_vocab=self._vocab_size,
            eos_token=list(self._stop_ids),
        )


class JsonGuide:
    """A `Guide` to one JSON value. Where nothing more is allowed, the answer ends."""

    def __init__(self, matcher: llguidance.LLMatcher, size: int, stop_ids: tuple[int, ...]) -> None:
        self._matcher, self._size, self._stop_ids = matcher, size, list(stop_ids)
        self._bits = allocate_token_bitmask(1, size)

    def allowed(self) -> np.ndarray:
        """Bool [V]: the tokens that may come next."""
        if self._matcher.is_stopped():  # complete, or the grammar is too complex to go on
            allowed = np.zeros(self._size, bool)
            allowed[self._stop_ids] = True
            return allowed
        fill_next_token_bitmask(self._matcher, self._bits)
        bits = np.unpackbits(self._bits[0].view(np.uint8), bitorder="little")
        return bits[: self._size].astype(bool)

    def push(self, token: int) -> None:
        """Says which one came."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class _Vocabulary:
    """A tokenizer as llguidance takes it."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.turn_end_id, None
        self.tokens = [tokenizer.token_bytes(index) for index in range(size)]
        # Without bytes no text needs them: they are control tokens, and stay out of the grammar.
        hidden = {index for index, piece in enumerate(self.tokens) if not piece}
        self.special_token_ids = sorted(hidden | {*(tokenizer.think_ids or ())})

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._tokenizer.encode(text)
