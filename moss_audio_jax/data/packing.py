"""Which examples share a row: tokens and audio chunks packed together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Size(NamedTuple):
    """What an example takes of a row."""

    tokens: int
    chunks: int


def pack(sizes: Sequence[Size], room: Size, together: int = 0, most: int = 0) -> list[list[int]]:
    """Best-fit decreasing over two resources.

    Args:
      sizes: of each example; none may exceed `room`.
      room: what one row holds.
      together: so many examples at the start go into the first row, whatever else (they must fit).
      most: examples that a row may hold; 0: any number.

    Returns:
      For each row the examples in it, rising. The largest examples are placed first, each into the
      row with the least room left that can hold it.
    """
    rows: list[list[int]] = []
    left: list[Size] = []

    def put(row: int, example: int) -> None:
        size = sizes[example]
        left[row] = Size(left[row].tokens - size.tokens, left[row].chunks - size.chunks)
        rows[row].append(example)

    if together:
        rows.append([])
        left.append(room)
        for example in range(together):
            put(0, example)
    order = sorted(
        range(together, len(sizes)), key=lambda i: (-_share(sizes[i], room), -sizes[i].tokens, i)
    )
    for example in order:
        size = sizes[example]
        fitting = [
            row
            for row, free in enumerate(left)
            if free.tokens >= size.tokens
            and free.chunks >= size.chunks
            and (not most or len(rows[row]) < most)
        ]
        if not fitting:
            rows.append([])
            left.append(room)
            fitting = [len(rows) - 1]
        put(min(fitting, key=lambda row: left[row].tokens), example)
    if any(free.tokens < 0 or free.chunks < 0 for free in left) or 0 < most < together:
        raise ValueError("pack: an example, or those that must stand together, exceed a row")
    return [sorted(row) for row in rows]


def emptiest(rows: Sequence[Sequence[int]], sizes: Sequence[Size], room: Size) -> int:
    """The row that is least full, by the resource it has most of; not the first row."""

    def fullness(row: int) -> float:
        used = [sizes[example] for example in rows[row]]
        return _share(Size(sum(s.tokens for s in used), sum(s.chunks for s in used)), room)

    return min(range(1, len(rows)), key=fullness)


def _share(size: Size, room: Size) -> float:
    return max(size.tokens / room.tokens, size.chunks / room.chunks if room.chunks else 0.0)
