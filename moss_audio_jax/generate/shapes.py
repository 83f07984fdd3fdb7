"""The sizes of the programs of the engine.

Each size is a program of its own, which takes seconds, or for a large model a minute, to compile.

`Tight` sizes are near to what the requests of one call need, and are compiled when they are met.
`Few` sizes are known before any request comes, so that a server compiles all of them at its start.
"""

from __future__ import annotations

from typing import NamedTuple

from moss_audio_jax.data.batch import bucket

TOGETHER = 8  # prompts that are prefilled in one row, at most
STEPS_AHEAD = 32  # room beyond the longest answer, so that the device loop does not return at once
LEAST_REACH = 128  # tokens of the smallest table of pages
_SMALLEST = 64  # tokens of a row


class Tight(NamedTuple):
    """Attributes:
    piece: tokens of prompts that are prefilled together in one row, at most.
    most: tokens that one answer may hold, prompt included.
    """

    piece: int
    most: int

    def packed(self, tokens: int, prompts: int) -> tuple[int, int]:
        """Tokens and prompts of a row that holds so many."""
        return -(-tokens // _SMALLEST) * _SMALLEST, 1 if prompts == 1 else TOGETHER

    def row(self, left: int) -> tuple[int, int]:
        """Tokens of a row for the rest of a prompt or a piece of it, and how many rows at most."""
        width = _SMALLEST
        while width < min(left, self.piece):
            width *= 2
        return width, max(1, self.piece // width)

    def rows(self, count: int, width: int) -> int:
        """Rows for so many pieces."""
        return bucket(count)

    def reach_before(self, top: int) -> int:
        """Tokens that pieces read, themselves included, if the longest prompt needs `top`."""
        return self.reach(top, False)

    def reach(self, top: int, guided: bool) -> int:
        """Tokens that the next steps may hold and read, if the longest answer has `top` of them.

        A step reads what it may reach, and most answers end long before their limit.
        """
        return bucket(min(top + STEPS_AHEAD, self.most), LEAST_REACH)


class Few(NamedTuple):
    """As `Tight`, in few sizes: rows of 1, or as many as make a whole piece; reaches that double,
    and where a program is rare or large anyway, grow by four."""

    piece: int
    most: int

    def packed(self, tokens: int, prompts: int) -> tuple[int, int]:
        return _first(tokens, LEAST_REACH, self.piece, 2), TOGETHER

    def row(self, left: int) -> tuple[int, int]:
        width = next((w for w in (_SMALLEST, self.piece // 2) if left <= w), self.piece)
        return width, self.piece // width if width == _SMALLEST else 1

    def rows(self, count: int, width: int) -> int:
        return 1 if count == 1 else self.piece // width

    def reach_before(self, top: int) -> int:
        return _first(top, self.piece, self.most, 4)

    def reach(self, top: int, guided: bool) -> int:
        top += STEPS_AHEAD
        if guided:
            return _first(top, self.piece, self.most, 4)
        return _first(top, LEAST_REACH, self.most, 2)

    # --- all of them ---

    def all_packed(self) -> list[int]:
        """Tokens of rows of whole prompts."""
        return _steps(LEAST_REACH, self.piece, 2)

    def all_pieces(self) -> list[tuple[int, int, int]]:
        """Rows, tokens and reach of what continues prompts."""
        whole = self.piece // _SMALLEST, _SMALLEST
        rows = (1, _SMALLEST), whole, (1, self.piece // 2), (1, self.piece)
        return [(*row, reach) for reach in _steps(self.piece, self.most, 4) for row in rows]

    def all_reaches(self, guided: bool) -> list[int]:
        """Of what decodes."""
        return _steps(self.piece if guided else LEAST_REACH, self.most, 4 if guided else 2)


def _steps(smallest: int, most: int, factor: int) -> list[int]:
    """smallest, smallest * factor and so on; the last one is `most`."""
    steps = []
    while smallest < most:
        steps.append(smallest)
        smallest *= factor
    return [*steps, most]


def _first(n: int, smallest: int, most: int, factor: int) -> int:
    """The first step that is >= n, or the last one."""
    return next((step for step in _steps(smallest, most, factor) if step >= n), most)
