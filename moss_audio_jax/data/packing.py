"""Which examples share a row: tokens and sound are packed together.

A row has room for T tokens and for C strips of S audio tokens each. Sound comes in pieces: a chunk
of 4 s or less (`chunked` attention) or a whole clip. Several pieces may lie in one strip, with one
empty token between them, so that the encoder's convolutions see zeros at their edges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple


class Size(NamedTuple):
    """What an example takes of a row: its tokens, and the audio tokens of each of its pieces."""

    tokens: int
    pieces: tuple[int, ...] = ()


class Place(NamedTuple):
    """Where a piece lies: the number of its strip, and its first audio token in there."""

    strip: int
    start: int


@dataclasses.dataclass(frozen=True)
class Room:
    """What one row holds: `tokens`, and `strips` of `length` audio tokens each.

    With `share`, several pieces may lie in one strip. Otherwise each has a strip of its own.
    `examples` limits how many share a row; 0: any number.
    """

    tokens: int
    strips: int
    length: int
    share: bool = True
    examples: int = 0

    def holds(self, sizes: Sequence[Size]) -> bool:
        """Whether examples of these sizes fit into one row."""
        if sum(size.tokens for size in sizes) > self.tokens:
            return False
        if self.examples and len(sizes) > self.examples:
            return False
        return strips_of([n for size in sizes for n in size.pieces], self) <= self.strips

    def share_of(self, size: Size) -> float:
        """The share of a row that an example takes, by the resource it needs most of."""
        if not self.strips:
            return size.tokens / self.tokens
        taken = sum(n + 1 for n in size.pieces) if self.share else len(size.pieces) * self.length
        return max(size.tokens / self.tokens, taken / (self.strips * self.length))


def place(pieces: Sequence[int], room: Room) -> list[Place]:
    """Lays pieces of so many audio tokens each into strips, as many as it takes.

    The longest come first, each into the first strip that has room (first-fit decreasing), so that
    the number of strips does not depend on the pieces' order.
    """
    if not room.share:
        return [Place(strip, 0) for strip in range(len(pieces))]
    places = [Place(0, 0)] * len(pieces)
    ends: list[int] = []  # of each strip: where the next piece may start
    for index in sorted(range(len(pieces)), key=lambda i: -pieces[i]):
        n = pieces[index]
        strip = next((s for s, end in enumerate(ends) if end + n <= room.length), len(ends))
        if strip == len(ends):
            ends.append(0)
        places[index] = Place(strip, ends[strip])
        ends[strip] += n + 1
    return places


def strips_of(pieces: Sequence[int], room: Room) -> int:
    """How many strips pieces of so many audio tokens each take."""
    return 1 + max((each.strip for each in place(pieces, room)), default=-1)


def pack(sizes: Sequence[Size], room: Room, together: int = 0) -> list[list[int]]:
    """Best-fit decreasing over tokens and strips.

    Args:
      sizes: of each example; `room` must hold each by itself.
      room: what one row holds.
      together: so many examples at the start go into the first row, whatever else (they must fit).

    Returns:
      For each row the examples in it, rising. The largest examples are placed first, each into the
      row with the fewest tokens left that can hold it.
    """
    rows: list[list[int]] = [[*range(together)]] if together else []
    left = [room.tokens - sum(size.tokens for size in sizes[:together])] if together else []
    order = sorted(
        range(together, len(sizes)),
        key=lambda i: (-room.share_of(sizes[i]), -sizes[i].tokens, i),
    )
    for example in order:
        size = sizes[example]
        for row in sorted(range(len(rows)), key=left.__getitem__):
            if left[row] >= size.tokens and room.holds([sizes[i] for i in (*rows[row], example)]):
                break
        else:
            row = len(rows)
            rows.append([])
            left.append(room.tokens)
        rows[row].append(example)
        left[row] -= size.tokens
    if not all(room.holds([sizes[i] for i in row]) for row in rows):
        raise ValueError("pack: an example, or those that must stand together, exceed a row")
    return [sorted(row) for row in rows]


def emptiest(rows: Sequence[Sequence[int]], sizes: Sequence[Size], room: Room) -> int:
    """The row that is least full, by the resource it has most of; not the first row."""

    def fullness(row: int) -> float:
        used = [sizes[example] for example in rows[row]]
        whole = Size(sum(s.tokens for s in used), tuple(n for s in used for n in s.pieces))
        return room.share_of(whole)

    return min(range(1, len(rows)), key=fullness)
