"""The targets of an encoder's helper losses: the word piece and the tags at each token.

    heard_pieces  int32 [B, C * S]     the piece that is said at an audio token; NOTHING; IGNORE
                                       beyond a chunk's frames
    heard_before  int32 [B, C * S]     where a piece is said, the piece before it; IGNORE elsewhere,
                                       and where that was said in another chunk
    heard_order   int32 [B, C, W]      the pieces said in a chunk, in order; NOTHING behind them. A
                                       chunk whose pieces are not known, or cannot be aligned,
                                       holds IGNORE alone
    heard_tags    uint8 [B, C * S, K]  1 where a tag holds; UNKNOWN where a row does not say

S = F / 8 tokens a chunk, 80 ms each. And one of the answers:

    time_places   int8 [B, T]          at a label that is a digit of a time: its place, the power of
                                       ten that it counts in seconds (`timestamps.digits`); IGNORE
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moss_audio_jax.audio import lengths
from moss_audio_jax.data.records import Row, Span
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import quoted
from moss_audio_jax.text import timestamps
from moss_audio_jax.text.tokenizer import Tokenizer

IGNORE, NOTHING, UNKNOWN = -100, -1, 2
_TOKEN = lengths.FRAMES_PER_TOKEN * lengths.HOP / lengths.SAMPLE_RATE  # seconds


class Heard(NamedTuple):
    """What a clip's n tokens, in their chunks, are to teach; see above. None: no such targets."""

    pieces: np.ndarray | None  # int32 [n]
    before: np.ndarray | None  # int32 [n]
    order: np.ndarray | None  # int32 [chunks, W]
    tags: np.ndarray | None  # uint8 [n, K]


@dataclasses.dataclass(frozen=True)
class Targets:
    """Which targets are made. `words` is W above; `tags` names the K tags; `times`: of answers."""

    words: int
    tags: tuple[str, ...]
    times: bool = False

    @property
    def share(self) -> bool:
        """Whether pieces of sound may share a strip. Words are aligned strip by strip."""
        return not self.words

    def heard(self, row: Row, tokenizer: Tokenizer, chunks: Sequence[int]) -> Heard:
        """What a row says of its clip, whose chunks have so many tokens each."""
        said = self._said(row, tokenizer, chunks) if self.words else (None, None, None)
        return Heard(*said, self._tagged(row, sum(chunks)) if self.tags else None)

    def _said(self, row: Row, tokenizer: Tokenizer, chunks: Sequence[int]) -> tuple:
        length = sum(chunks)
        order = np.full((len(chunks), self.words), IGNORE, np.int32)
        pieces, before = np.full((2, length), IGNORE, np.int32)
        if row.words is None:
            return pieces, before, order
        pieces[:] = NOTHING
        chunk_of = np.repeat(np.arange(len(chunks)), chunks)
        in_chunk: list[list[int]] = [[] for _ in chunks]
        last, last_chunk = IGNORE, -1
        for piece, start, end in _spread(row.words, tokenizer):
            here = _covered(start, end, length)
            pieces[here] = piece
            before[here] = np.where(chunk_of[here] == last_chunk, last, IGNORE)
            last, last_chunk = piece, int(chunk_of[_middle(start, end, length)])
            in_chunk[last_chunk].append(piece)
        for chunk, said in enumerate(in_chunk):
            twice = sum(a == b for a, b in itertools.pairwise(said))
            if len(said) <= self.words and len(said) + twice <= chunks[chunk]:
                order[chunk] = NOTHING
                order[chunk, : len(said)] = said
        return pieces, before, order

    def _tagged(self, row: Row, length: int) -> np.ndarray:
        if row.tags is None:
            return np.full((length, len(self.tags)), UNKNOWN, np.uint8)
        held = np.zeros((length, len(self.tags)), np.uint8)
        known = {name: index for index, name in enumerate(self.tags)}
        for tag in row.tags:
            index = known.get(tag.text)
            if index is not None:
                held[_covered(tag.start / _TOKEN, tag.end / _TOKEN, length), index] = 1
        return held

    def empty(self, rows: int, chunks: int, tokens: int) -> dict[str, np.ndarray]:
        """The arrays of a batch in which nothing is to be learned; `tokens` a chunk."""
        arrays = {}
        if self.words:
            arrays["heard_pieces"] = np.full((rows, chunks * tokens), IGNORE, np.int32)
            arrays["heard_before"] = np.full((rows, chunks * tokens), IGNORE, np.int32)
            arrays["heard_order"] = np.full((rows, chunks, self.words), IGNORE, np.int32)
        if self.tags:
            shape = (rows, chunks * tokens, len(self.tags))
            arrays["heard_tags"] = np.zeros(shape, np.uint8)
        return arrays

    def fill(
        self, arrays: Mapping[str, np.ndarray], row: int, heard: Heard, places: np.ndarray
    ) -> None:
        """Writes a clip's targets.

        Args:
          places: int [n], where the clip's audio tokens stand among the row's C * S.
        """
        if self.words:
            arrays["heard_pieces"][row, places] = heard.pieces
            arrays["heard_before"][row, places] = heard.before
            size = arrays["heard_pieces"].shape[1] // arrays["heard_order"].shape[1]
            chunks = list(dict.fromkeys(places // size))  # each has a strip of its own
            arrays["heard_order"][row, chunks] = heard.order
        if self.tags:
            arrays["heard_tags"][row, places] = heard.tags


def time_places(ids: Sequence[int], answers: Sequence[bool], tokenizer: Tokenizer) -> np.ndarray:
    """The `time_places` of one example.

    Args:
      ids: [L].
      answers: [L], which of them are labels; a time lies within a run of them.

    Returns:
      int8 [L].

    Raises:
      InputError: a token is more than one digit of a time.
    """
    places = np.full(len(ids), IGNORE, np.int8)
    labelled = np.flatnonzero(answers)
    for run in np.split(labelled, np.flatnonzero(np.diff(labelled) > 1) + 1):
        pieces = [(int(at), tokenizer.token_bytes(int(ids[at]))) for at in run]
        # One character a byte, so that an index in the text is one in the pieces.
        text = b"".join(piece for _, piece in pieces).decode("latin-1")
        owner = [at for at, piece in pieces for _ in piece]
        for index, place in timestamps.digits(text):
            at = owner[index]
            if ids[at] != tokenizer.digit_ids[int(text[index])]:
                raise InputError(
                    f"{tokenizer.files[0]}: {quoted(tokenizer.decode([ids[at]]))} of the time "
                    f"{quoted(text[max(index - 6, 0) : index + 6])} is one piece; helpers.times "
                    "needs a tokenizer with a piece for each digit"
                )
            places[at] = place
    return places


def check_digits(tokenizer: Tokenizer) -> None:
    """Raises InputError if a tokenizer writes two digits of a time as one piece."""
    text = "".join(f"[{n:02d}.{n:02d}]" for n in range(100)) + "\n12.34 - 120.56: a"
    ids = tokenizer.encode(text)
    time_places(ids, [True] * len(ids), tokenizer)


def _spread(words: Sequence[Span], tokenizer: Tokenizer) -> Iterator[tuple[int, float, float]]:
    """(id, start, end) in tokens of the clip, fractions included; pieces share a word evenly."""
    for word in sorted(words, key=lambda word: word.start):
        ids = tokenizer.encode(word.text)
        start, end = word.start / _TOKEN, word.end / _TOKEN
        step = (end - start) / max(len(ids), 1)
        for number, piece in enumerate(ids):
            yield piece, start + number * step, start + (number + 1) * step


def _middle(start: float, end: float, length: int) -> int:
    return min(int((start + end) / 2), length - 1)


def _covered(start: float, end: float, length: int) -> slice:
    """Tokens whose centre a span covers; of a short one, the token it is in."""
    first, last = max(round(start), 0), max(round(end), 0)
    if last <= first:
        first = _middle(start, end, length)
        last = first + 1
    return slice(first, last)
