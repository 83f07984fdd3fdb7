"""Praat's TextGrids: writes the long text form, reads the long and the short one."""

from __future__ import annotations

import heapq
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moss_audio_jax.errors import InputError
from moss_audio_jax.files import brief, read_text, shown
from moss_audio_jax.text.timestamps import LATEST, Segment, checked


class Tier(NamedTuple):
    """Rows of a tier: (start, end, text) of intervals, (time, time, text) of points; seconds."""

    name: str
    is_intervals: bool
    rows: list[tuple[float, float, str]]


def read_tiers(file: Path) -> list[Tier]:
    """All tiers, in the order of the file.

    Raises:
      InputError: the file is not a TextGrid in text form, or ends early.
    """
    values = list(_values(read_text(file, "a TextGrid"), shown(file)))
    if values[:1] == ["ooBinaryFile"] or values[1:2] != ["TextGrid"] or values[0] not in _HEADERS:
        raise InputError(f"{shown(file)}: not a TextGrid in text format")
    tiers = []
    try:
        at = 5  # after the header: xmin, xmax, number of tiers
        for _ in range(_count(values[4])):
            kind, name, size = values[at], values[at + 1], _count(values[at + 4])
            width = {"IntervalTier": 3, "TextTier": 2}[kind]
            body, at = values[at + 5 : at + 5 + width * size], at + 5 + width * size
            texts, starts, ends = body[width - 1 :: width], body[::width], body[width - 2 :: width]
            rows = [
                (start, end, text.strip())
                for start, end, text in zip(starts, ends, texts, strict=True)
            ]
            times = [*starts, *ends]
            if len(rows) != size or not all(isinstance(time, float) for time in times):
                raise ValueError
            if not isinstance(name, str):
                raise ValueError
            tiers.append(Tier(name, kind == "IntervalTier", rows))
        if at != len(values):
            raise ValueError
    except (IndexError, KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{shown(file)}: the TextGrid ends early or is broken") from None
    return tiers


def read_intervals(file: Path, tiers: str | Iterable[str]) -> list[dict[str, Any]]:
    """Intervals {"text", "start", "end"} of one interval tier, pauses included; times in seconds.

    If several tiers have the name, the first is taken, with a warning.

    Args:
      tiers: the tier's name, or several possible names; letter case does not count.

    Raises:
      InputError: the file has no such tier (its tiers are named), or is not a TextGrid.
    """
    wanted = [tiers] if isinstance(tiers, str) else [*tiers]
    found = read_tiers(file)
    names = {name.lower() for name in wanted}
    fitting = [tier for tier in found if tier.is_intervals and tier.name.lower() in names]
    if not fitting:
        there = brief(", ".join(tier.name for tier in found)) or "none"
        raise InputError(
            f"{shown(file)}: no interval tier {' or '.join(wanted)}; it has {there} (--tier)"
        )
    same = sum(tier.name == fitting[0].name for tier in fitting)
    if same > 1:
        warnings.warn(
            f"{shown(file)}: {same} tiers are named {fitting[0].name!r}; the first is taken",
            stacklevel=2,
        )
    return [{"text": text, "start": start, "end": end} for start, end, text in fitting[0].rows]


_HEADERS = ("ooTextFile", "ooTextFile short")
_NUMBER = re.compile(r"[-+]?(?:\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})(?:[eE][-+]?\d{1,3})?", re.ASCII)
_PIECE = re.compile(r'"|![^\n]*|[^\s"!]+')


def _values(text: str, where: str) -> Iterator[str | float]:
    """Yields strings and free-standing numbers, whose order is the same in both forms.

    Everything else is a label (`xmin =`, `intervals [1]:`, `<exists>`); ! starts a comment.
    """
    at = 0
    while (piece := _PIECE.search(text, at)) is not None:
        at = piece.end()
        if piece[0] != '"':
            word = piece[0].rpartition("=")[2]  # "xmin=0" stands for "xmin = 0"
            if _NUMBER.fullmatch(word):
                yield float(word)
            continue
        string = []
        while True:
            end = text.find('"', at)
            if end < 0:
                raise InputError(f"{where}: the TextGrid ends early or is broken")
            string.append(text[at:end])
            at = end + 1
            if not text.startswith('"', at):
                break
            at += 1  # a doubled quote is a quote within the string
        yield '"'.join(string)


def _count(value: str | float) -> int:
    if not isinstance(value, float) or not value.is_integer() or value < 0:
        raise ValueError
    return int(value)


# --- writing --------------------------------------------------------------------------------------


def to_textgrid(segments: Iterable[Segment], duration: float | None = None) -> str:
    """A Praat TextGrid in the long text format; times are rounded to microseconds.

    The intervals of a tier must touch each other, so gaps become empty intervals, and a segment
    that overlaps goes to another tier. A segment without a length becomes a point of the tier
    "points".

    Args:
      segments: in any order.
      duration: seconds of the recording; by default, and at least, the last segment's end.

    Raises:
      InputError: a segment or the duration is not finite, negative or beyond LATEST, or a segment
        ends before it starts.
    """
    if duration is not None and not 0 <= duration <= LATEST:
        raise InputError(f"the duration is {duration} s; expected 0 to {LATEST:.0f}")
    rows = sorted((round(s.start, 6), round(s.end, 6), s.text) for s in checked(segments))
    end = max([round(duration or 0.0, 6), *(stop for _, stop, _ in rows)])
    end = end or 1.0  # Praat refuses a TextGrid of no length
    tiers: list[list[tuple[float, float, str]]] = [[]]
    free, busy = [0], []  # heaps of tiers: by number; by the end of their last segment
    for row in rows:
        if row[0] == row[1]:
            continue
        while busy and busy[0][0] <= row[0]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            free.append(len(tiers))
            tiers.append([])
        number = heapq.heappop(free)
        tiers[number].append(row)
        heapq.heappush(busy, (row[1], number))
    points = [(start, text) for start, stop, text in rows if start == stop]

    lines = [
        'File type = "ooTextFile"',
        'Object class = "TextGrid"',
        "",
        "xmin = 0",
        f"xmax = {_decimal(end)}",
        "tiers? <exists>",
        f"size = {len(tiers) + bool(points)}",
        "item []:",
    ]
    for number, tier in enumerate(tiers, 1):
        intervals: list[tuple[float, float, str]] = []
        reached = 0.0
        for start, stop, text in [*tier, (end, end, "")]:
            if start > reached:
                intervals.append((reached, start, ""))
            if stop > start:
                intervals.append((start, stop, text))
            reached = stop
        name = "segments" if number == 1 else f"segments {number}"
        lines += _tier_head(number, "IntervalTier", name, end)
        lines.append(f"        intervals: size = {len(intervals)}")
        for index, (start, stop, text) in enumerate(intervals, 1):
            lines += [
                f"        intervals [{index}]:",
                f"            xmin = {_decimal(start)}",
                f"            xmax = {_decimal(stop)}",
                f"            text = {_quoted(text)}",
            ]
    if points:
        lines += _tier_head(len(tiers) + 1, "TextTier", "points", end)
        # Praat allows one point at a time.
        merged: dict[float, list[str]] = {}
        for time, text in points:
            merged.setdefault(time, []).append(text)
        lines.append(f"        points: size = {len(merged)}")
        for index, (time, texts) in enumerate(merged.items(), 1):
            lines += [
                f"        points [{index}]:",
                f"            number = {_decimal(time)}",
                f"            mark = {_quoted(' '.join(texts))}",
            ]
    return "\n".join(lines) + "\n"


def _tier_head(number: int, kind: str, name: str, end: float) -> list[str]:
    return [
        f"    item [{number}]:",
        f'        class = "{kind}"',
        f'        name = "{name}"',
        "        xmin = 0",
        f"        xmax = {_decimal(end)}",
    ]


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _decimal(value: float) -> str:
    """A number with at most six decimals, never as 1e-05, because some readers cannot read that."""
    return f"{value:.6f}".rstrip("0").rstrip(".")
