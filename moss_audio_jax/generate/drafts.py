"""Drafts of an answer's next tokens; one pass of the model checks them all.

This is speculative decoding (arXiv 2211.17192) without a second model. `propose` searches the hints
and the answer so far for the place that is most like the answer's end. The tokens that follow there
are the draft (prompt lookup). Hints are tokens that an answer may repeat: the prompt's text and, if
the checkpoint has a CTC head (`weights.helpers`), the transcript from that head without times, with
times of sentences and with times of words.

A drafted token is kept only if the model chooses the same token. So drafts do not change an answer,
greedy or sampled, except for rounding: a pass over several tokens adds in another order.

Letters: B slots, H room for hints, M room for new tokens, W width of a pass, n audio tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moss_audio_jax import devices
from moss_audio_jax.config import Compute, ModelConfig
from moss_audio_jax.sharding import platform
from moss_audio_jax.text.tokenizer import Tokenizer
from moss_audio_jax.text.unsaid import Word

WIDTH = 8  # tokens of a pass: the newest one and a draft of the others
NOTHING = -1  # in hints: no token

_ALIKE = 8  # newest tokens that a place is compared by
_CONTEXT = 2  # tokens before a token that must be the same for it to be the same again
_TRIAL, _REST = 4, 128  # passes to see whether drafts pay; steps without them if not
_LETTERS = "bcdefghjklmnopqrstuvwxyz"
_SECONDS = 0.08  # of an audio token
_PAUSE = 4  # audio tokens without a word that end a sentence


def propose(hints: jax.Array, output: jax.Array, count: jax.Array, width: int) -> jax.Array:
    """Drafts `width` tokens for each row.

    Args:
      hints: int [B, H], padded with NOTHING on the left.
      output: int [B, M], the answers so far.
      count: int [B], how many tokens of it there are, at least 1.

    Returns:
      int [B, width]; NOTHING where nothing is known.
    """
    known = jnp.concatenate([hints, output], axis=1)  # tokens before `end` are in their order
    end = hints.shape[1] + count[:, None]
    place = jnp.arange(known.shape[1])

    def token(at: jax.Array) -> jax.Array:
        return jnp.take_along_axis(known, jnp.maximum(at, 0), axis=1)

    score = jnp.zeros(known.shape, jnp.int32)
    for back in range(1, _ALIKE + 1):
        same = known == token(end - back)
        # The newest tokens count most. One that differs does not end the comparison, because a
        # draft goes on after a digit that was wrong.
        score += jnp.pad(same[:, :-back], ((0, 0), (back, 0))) * (2 * _ALIKE - back)
    score = jnp.where((place < end) & (known != NOTHING), score, -1)
    # If several places are equally alike, take the last one.
    best = known.shape[1] - 1 - jnp.argmax(score[:, ::-1], axis=1, keepdims=True)
    ahead = jnp.arange(-_CONTEXT, width)
    # An answer that repeats itself up to its end is continued in the same way.
    source = token(best + jnp.where(ahead < 0, ahead, ahead % jnp.maximum(end - best, 1)))
    draft = source[:, _CONTEXT:]
    # If the answer had another token where the source had this one, it will have that one again: a
    # word begins at the time at which the last one ended, which may differ by a digit.
    for back in range(_ALIKE, 0, -1):
        there = token(best - back - jnp.arange(_CONTEXT + 1))
        again = [
            source[:, _CONTEXT - i : _CONTEXT - i + width] == there[:, i : i + 1]
            for i in range(_CONTEXT + 1)
        ]
        draft = jnp.where(functools.reduce(jnp.logical_and, again), token(end - back), draft)
    return draft


class Likeliest(NamedTuple):
    """The likeliest word piece at each audio token, int [n], and its probability, float32 [n]."""

    pieces: np.ndarray
    sure: np.ndarray


class CtcHead(NamedTuple):
    """A CTC head on the encoder's features: kernel [D, V + 1], bias [V + 1]; the last: no piece."""

    kernel: np.ndarray
    bias: np.ndarray

    def hear(self, features: np.ndarray) -> Likeliest:
        """What is heard in features [n, D]."""
        scores = features.astype(np.float32) @ self.kernel + self.bias
        top = scores.max(axis=-1, keepdims=True)
        return Likeliest(scores.argmax(axis=-1), 1 / np.exp(scores - top).sum(axis=-1))


@dataclasses.dataclass(frozen=True)
class Scribe:
    """Writes what the head hears as the transcripts that models are asked for."""

    head: CtcHead
    tokenizer: Tokenizer

    def write(self, pieces: Sequence[int]) -> list[int]:
        """Ids of all transcripts of int [n] pieces, one after the other."""
        words = self._words(pieces)
        if not words:
            return []
        sentences = [[words[0]]]
        for word in words[1:]:
            if word[0] - sentences[-1][-1][1] >= _PAUSE:
                sentences.append([])
            sentences[-1].append(word)
        joined = [(s[0][0], s[-1][1], " ".join(text for *_, text in s)) for s in sentences]
        plain = " ".join(text for *_, text in joined)
        texts = (plain, self._timed(joined), self._timed(words))
        return [i for text in texts for i in self.tokenizer.encode(text)]

    def _timed(self, spans: Sequence[tuple[int, int, str]]) -> str:
        return "".join(
            f"[{_SECONDS * start:.2f}]{text}[{_SECONDS * end:.2f}]" for start, end, text in spans
        )

    def words(self, heard: Likeliest) -> list[Word]:
        """The words of a clip, with their times."""
        return [
            Word(_SECONDS * start, _SECONDS * end, text, float(heard.sure[start:end].max()))
            for start, end, text in self._words(heard.pieces)
        ]

    def _words(self, pieces: Sequence[int]) -> list[tuple[int, int, str]]:
        """(start, end, text) in audio tokens. A letter that is no word belongs to what follows."""
        edges = [0, *(1 + np.flatnonzero(np.diff(pieces))), len(pieces)]
        words: list[tuple[int, int, str]] = []
        for start, end in itertools.pairwise(edges):
            if start == end or pieces[start] == len(self.head.bias) - 1:
                continue
            text = self.tokenizer.decode([int(pieces[start])]).strip()
            if words and words[-1][1] == start and words[-1][2] in _LETTERS:
                words[-1] = (words[-1][0], int(end), words[-1][2] + text)
            else:
                words.append((int(start), int(end), text))
        return words


def scribe_of(
    params: Mapping[str, Any], config: ModelConfig, tokenizer: Tokenizer
) -> Scribe | None:
    """Of the CTC head among a checkpoint's helpers (`load_helpers`); None without one that fits."""
    kernel, bias = (params.get(f"helpers/pieces/{name}") for name in ("kernel", "bias"))
    shape = config.encoder.output_dim, config.decoder.vocab_size + 1
    if kernel is None or bias is None or kernel.shape != shape:
        return None
    return Scribe(CtcHead(np.asarray(kernel, np.float32), np.asarray(bias, np.float32)), tokenizer)


class Pace:
    """Decides whether the next passes draft.

    They do while a pass adds more tokens than its cost, in steps of one token. Otherwise drafts are
    tried again after a while. No clock is read, so that all processes of a mesh decide alike.

    Args:
      slots: answers that are decoded together.
      compute: by which they are.
    """

    def __init__(self, slots: int, compute: Compute) -> None:
        self._needed = _cost(slots * WIDTH, compute) / _cost(slots, compute)
        self._found: float | None = None  # tokens a pass and answer, of late

    def next(self, limit: int) -> tuple[int, int]:
        """(width of the next passes, how many of them at most); at most `limit` tokens."""
        if self._needed >= WIDTH:
            return 1, limit
        if self._found is None:
            return WIDTH, _TRIAL
        if self._found > self._needed:
            return WIDTH, 4 * _TRIAL
        self._found = None
        return 1, _REST

    def told(self, tokens: int, passes: int) -> None:
        """`passes` of each answer, summed over the answers, added `tokens`."""
        found = tokens / max(passes, 1)
        self._found = found if self._found is None else (self._found + found) / 2


def _cost(rows: int, compute: Compute) -> float:
    """Time of a pass over so many tokens, in that of a pass over one."""
    if platform() == "cpu":  # docs/findings/2026-11-29-drafts.md
        if rows == 1:
            return 1
        converted = compute.dtype == "bfloat16" or compute.quantize != "none"
        # Float32 weights are packed for two rows or more, others are converted for one, too.
        return 1.1 + rows / 7 if converted else 1.9 + rows / 8
    device = devices.of(jax.devices()[0].device_kind)
    bandwidth = device and device.hbm_bandwidth
    # Weights are read once for all rows, which takes as long as computing so many.
    return max(1, rows / (device.peak / bandwidth if bandwidth else 256))
