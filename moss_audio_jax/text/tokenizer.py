"""Text to token ids and back: the interface of every tokenizer.

A user's text is text: `encode` recognises special tokens only if the caller asks for it, and no
text ever encodes to the ids that stand for audio.
"""

from __future__ import annotations

import abc
import codecs
import functools
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from moss_audio_jax import config
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import quoted

PAD = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
THINK = ("<think>", "</think>")
AUDIO, AUDIO_START, AUDIO_END = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"
# Special in every vocabulary that has these strings, even if no file says so.
SPECIAL_STRINGS = frozenset({PAD, TURN_START, TURN_END, *THINK, AUDIO, AUDIO_START, AUDIO_END})

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer(abc.ABC):
    """Text to ids and back. Make one with `loading.load_tokenizer`.

    Attributes:
      files: the tokenizer's files, for copying; processor_config.json is not among them.
      processor: ids of the audio tokens, time markers, mel dtype.
    """

    files: tuple[Path, ...]
    processor: config.ProcessorConfig

    def __init__(
        self,
        vocab: Mapping[str, int],
        special: Collection[str],
        hidden: Collection[str],
        files: Iterable[Path],
        processor: config.ProcessorConfig | None,
    ):
        """Args:
        vocab: every piece and added token to its id.
        special: the strings of `vocab` that `encode(special=True)` recognises in a text.
        hidden: the strings of `vocab` that `decode(skip_special=True)` leaves out.
        files: the tokenizer's files.
        processor: processor_config.json. Without it the audio ids are those of the pieces
          `<|AUDIO|>`, `<|audio_bos|>` and `<|audio_eos|>`, or else those of the released models.

        Raises:
          InputError: two pieces share an id.
        """
        self._vocab = dict(vocab)
        self._pieces = {index: piece for piece, index in vocab.items()}
        if len(self._pieces) != len(vocab):
            first, second = _same_id(vocab)
            raise InputError(
                f"{_where(files)}: id {vocab[first]} is both {quoted(first)} and {quoted(second)}; "
                "expected one piece for each id"
            )
        if processor is None:
            ids = zip(
                ("audio_token_id", "audio_start_id", "audio_end_id"),
                (vocab.get(piece) for piece in (AUDIO, AUDIO_START, AUDIO_END)),
                strict=True,
            )
            known = {key: index for key, index in ids if index is not None}
            processor = config.ProcessorConfig(**known)
        self.files = tuple(files)
        self.processor = processor
        audio = {processor.audio_token_id, processor.audio_start_id, processor.audio_end_id}
        self._clashes = [
            (index, self._pieces[index])
            for index in sorted(audio & self._pieces.keys())
            if self._pieces[index] not in special
        ]
        self._special = {
            s: vocab[s]
            for s in special
            if vocab[s] not in audio and s not in (AUDIO, AUDIO_START, AUDIO_END)
        }
        # Longest first, because one special string may be the beginning of another.
        strings = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, strings))) if strings else None
        # Thinking is part of the answer: `split_thinking` removes it, `decode` never does.
        self._hidden = {vocab[s] for s in hidden if s not in THINK}
        self._bytes_of: dict[int, bytes] = {}

    @abc.abstractmethod
    def _encode_plain(self, text: str) -> list[int]:
        """Ids of a text; special tokens are not recognised."""

    @abc.abstractmethod
    def _piece_bytes(self, piece: str) -> bytes:
        """The UTF-8 bytes that a piece stands for (they may be part of a character)."""

    def _normalize(self, text: str) -> str:
        return text

    @property
    def vocab_size(self) -> int:
        """The largest id + 1, added tokens included.

        Audio ids without a piece (the hub's Qwen tokenizer has two of these) do not count.
        """
        return max(self._pieces) + 1

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
          text: any string; lone surrogates become U+FFFD.
          special: recognise special tokens (`<|im_end|>`, ...) in it. The audio placeholder,
            start and end stay plain text even then.
        """
        if not isinstance(text, str):
            raise InputError(f"cannot tokenise a {type(text).__name__}; expected a string")
        text = self._normalize(LONE_SURROGATE.sub("\ufffd", text))
        if not special or self._special_pattern is None:
            return self._encode_plain(text)
        ids: list[int] = []
        cursor = 0
        for match in self._special_pattern.finditer(text):
            ids += self._encode_plain(text[cursor : match.start()])
            ids.append(self._special[match.group()])
            cursor = match.end()
        return ids + self._encode_plain(text[cursor:])

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`.

        Ids without a piece decode to nothing, invalid UTF-8 to U+FFFD. With `skip_special` the
        special tokens are left out, except `<think>` and `</think>`.
        """
        joined = b"".join(self.token_bytes(int(index), skip_special) for index in ids)
        return joined.decode("utf-8", errors="replace")

    def token_bytes(self, index: int, skip_special: bool = True) -> bytes:
        """The bytes that one id adds to a text, or b"". They may be a part of a character."""
        if skip_special and index in self._hidden:
            return b""
        found = self._bytes_of.get(index)
        if found is None:
            piece = self._pieces.get(index)
            found = b"" if piece is None else self._piece_bytes(piece)
            self._bytes_of[index] = found
        return found

    def token_id(self, string: str) -> int | None:
        """The id of a piece as the vocabulary writes it, or None."""
        return self._vocab.get(string)

    @functools.cached_property
    def pad_id(self) -> int:
        return self._need(PAD)

    @functools.cached_property
    def turn_start_id(self) -> int:
        return self._need(TURN_START)

    @functools.cached_property
    def turn_end_id(self) -> int:
        return self._need(TURN_END)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the end of a turn, then the end of a text."""
        return (self.turn_end_id, self.pad_id)

    @functools.cached_property
    def think_ids(self) -> tuple[int, int] | None:
        """Ids of `<think>` and `</think>`, or None if the vocabulary lacks them."""
        if any(tag not in self._special for tag in THINK):
            return None
        return self._special[THINK[0]], self._special[THINK[1]]

    @functools.cached_property
    def digit_ids(self) -> tuple[int, ...]:
        """Ids of "0" to "9", for time markers."""
        ids = [self._encode_plain(digit) for digit in "0123456789"]
        for digit, found in enumerate(ids):
            if len(found) != 1:
                raise InputError(
                    f"{_where(self.files)}: the digit {digit} is not a separate piece; "
                    "time markers need one for each of 0-9"
                )
        return tuple(found[0] for found in ids)

    def check(self, vocab_size: int | None = None) -> None:
        """Raises InputError if an id exceeds a model's vocabulary, or is both audio and text."""
        if vocab_size is not None:
            check_fits(self, self.processor, vocab_size, str(self.files[0].parent))
        for index, piece in self._clashes:
            raise InputError(
                f"{_where(self.files)}: id {index} is the ordinary piece {quoted(piece)} "
                "but processor_config.json (or its defaults) makes it an audio id; "
                "give audio ids that no text can produce"
            )

    def _need(self, string: str) -> int:
        index = self._special.get(string)
        if index is None:
            raise InputError(
                f"{_where(self.files)}: no token {string}; add it to the vocabulary or the added "
                "tokens"
            )
        return index


class StreamDecoder:
    """Decodes one id at a time and holds back the bytes of an incomplete character.

    The pieces that `push` and `flush` return join to `tokenizer.decode(ids, skip_special)`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, index: int) -> str:
        """The text that this id completes: usually all of its bytes, sometimes ""."""
        return self._decoder.decode(self._tokenizer.token_bytes(int(index), self._skip_special))

    @property
    def holds(self) -> bool:
        """Whether bytes are held back."""
        return bool(self._decoder.getstate()[0])

    def flush(self) -> str:
        """Ends the text and returns its rest: "", or U+FFFD for an incomplete character."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def check_fits(
    tokenizer: Tokenizer | None, processor: config.ProcessorConfig, vocab_size: int, where: str
) -> None:
    """Raises InputError, naming the folder `where`, if an id exceeds a model's vocabulary."""
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"{where}: the tokenizer does not fit the model: its ids go up to "
            f"{tokenizer.vocab_size - 1}, but the model's vocabulary has {vocab_size} entries"
        )
    for key in ("audio_token_id", "audio_start_id", "audio_end_id"):
        if getattr(processor, key) >= vocab_size:
            raise InputError(
                f"{where}: {key} {getattr(processor, key)} does not fit the model: its vocabulary "
                f"has {vocab_size} entries; name the right id in processor_config.json"
            )


def _where(files: Iterable[Path]) -> str:
    """The file that a message about the vocabulary names."""
    return str(next(iter(files), "tokenizer"))


def _same_id(vocab: Mapping[str, int]) -> tuple[str, str]:
    seen: dict[int, str] = {}
    for piece, index in vocab.items():
        if index in seen:
            return seen[index], piece
        seen[index] = piece
    raise AssertionError("no two pieces share an id")
