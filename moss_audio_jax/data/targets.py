"""What an encoder's helper losses learn from: which piece of a word, which tags, at each token.

    heard_pieces  int32 [B, C * S]     the piece that is said at an audio token; NOTHING; IGNORE
                                       beyond a chunk's frames
    heard_before  int32 [B, C * S]     where a piece is said, the piece before it; IGNORE elsewhere,
                                       and where that was said in another chunk
    heard_order   int32 [B, C, W]      the pieces said in a chunk, in order; NOTHING behind them. A
                                       chunk whose pieces are not known, or cannot be aligned,
                                       holds IGNORE alone
    heard_tags    uint8 [B, C * S, K]  1 where a tag holds; UNKNOWN where a row does not say

S = F / 8 tokens a chunk, 80 ms each.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from moss_audio_jax.audio import lengths
from moss_audio_jax.data.records import Row
from moss_audio_jax.text.tokenizer import Tokenizer

IGNORE, NOTHING, UNKNOWN = -100, -1, 2
_TOKEN = lengths.FRAMES_PER_TOKEN * lengths.HOP / lengths.SAMPLE_RATE  # seconds


class Heard(NamedTuple):
    """(id, start, end) in tokens of the clip, fractions included, by start; None: not known."""

    pieces: list[tuple[int, float, float]] | None
    tags: list[tuple[int, float, float]] | None


@dataclasses.dataclass(frozen=True)
class Targets:
    """Which targets are made. `words` is W above; `tags` names the K tags."""

    words: int
    tags: tuple[str, ...]

    def heard(self, row: Row, tokenizer: Tokenizer) -> Heard:
        """What a row says of its clip; a word's pieces share its time evenly."""
        pieces = None if row.words is None else []
        for word in sorted(row.words or (), key=lambda word: word.start):
            ids = tokenizer.encode(word.text)
            edges = np.linspace(word.start / _TOKEN, word.end / _TOKEN, len(ids) + 1)
            pieces += [(i, *span) for i, span in zip(ids, itertools.pairwise(edges), strict=True)]
        known = {name: index for index, name in enumerate(self.tags)}
        tags = (
            None
            if row.tags is None
            else [
                (known[tag.text], tag.start / _TOKEN, tag.end / _TOKEN)
                for tag in row.tags
                if tag.text in known
            ]
        )
        return Heard(pieces, tags)

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
        if self.words and heard.pieces is not None:
            at = np.full(len(places), NOTHING, np.int32)
            tokens = arrays["heard_pieces"].shape[1] // arrays["heard_order"].shape[1]
            before, last, last_chunk = np.full(len(places), IGNORE, np.int32), IGNORE, -1
            chunk_of = places // tokens
            order: dict[int, list[int]] = {int(c): [] for c in np.unique(chunk_of)}
            for piece, start, end in heard.pieces:
                here = _covered(start, end, len(at))
                at[here] = piece
                before[here] = np.where(chunk_of[here] == last_chunk, last, IGNORE)
                last, last_chunk = piece, int(chunk_of[_middle(start, end, len(at))])
                order[last_chunk].append(piece)
            arrays["heard_pieces"][row, places] = at
            arrays["heard_before"][row, places] = before
            for chunk, pieces in order.items():
                length = int(np.sum(chunk_of == chunk))
                twice = sum(a == b for a, b in itertools.pairwise(pieces))
                if len(pieces) <= self.words and len(pieces) + twice <= length:
                    arrays["heard_order"][row, chunk] = NOTHING
                    arrays["heard_order"][row, chunk, : len(pieces)] = pieces
        if self.tags and heard.tags is None:
            arrays["heard_tags"][row, places] = UNKNOWN
        for tag, start, end in (self.tags and heard.tags) or ():
            inside = places[_covered(start, end, len(places))]
            arrays["heard_tags"][row, inside, tag] = 1


def _middle(start: float, end: float, length: int) -> int:
    return min(int((start + end) / 2), length - 1)


def _covered(start: float, end: float, length: int) -> slice:
    """Tokens whose centre a span covers; of a short one, the token it is in."""
    here = slice(max(round(start), 0), max(round(end), 0))
    middle = _middle(start, end, length)
    return here if here.stop > here.start else slice(middle, middle + 1)
