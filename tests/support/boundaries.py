"""Defines true boundaries, and scores found ones."""

from __future__ import annotations

import itertools
from typing import Any

PAUSE = 1.0  # seconds: a longer pause is a segment, with a boundary at each end
SHORTEST = 1.0  # seconds: what is shorter goes to the neighbour across the smaller gap


Block = tuple[float, float, str, str]  # start, end, kind of its first source, of its last


def blocks(labels: dict[str, Any], offset: float = 0.0) -> list[Block]:
    """Spans of a world scene that a cut must not part.

    Sources that overlap are one block, for a cut anywhere between would part one of them. So are
    sentences of one talk, and sounds of one kind, less than PAUSE apart.
    """
    units = [(s["start"], s["end"], "speech") for s in labels["sentences"]]
    units += [(e["start"], e["end"], e["kind"]) for e in labels["events"]]
    if music := labels["music"]:
        units.append((music["start"], music["end"], "music"))
    merged: list[list[Any]] = []
    for start, end, kind in sorted(units):
        last = merged[-1] if merged else None
        if last and (start < last[1] or (last[2] == kind and start - last[1] < PAUSE)):
            last[2] = kind if end > last[1] else last[2]
            last[1] = max(last[1], end)
        else:
            merged.append([start, end, kind, kind])  # last kind, first kind
    return [(offset + start, offset + end, first, last) for start, end, last, first in merged]


def optional(labels: dict[str, Any], offset: float, spans: list[Block]) -> list[float]:
    """Where a cut is neither asked for nor wrong: two ways to see it, both of them sensible.

    Those are the turns of a talk between two speakers, and the joins of two scenes whose
    neighbours are less than PAUSE apart and of one kind (speech against speech: as good as a turn).
    """
    turns = []
    for one, two in itertools.pairwise(labels["sentences"]):
        if one["speaker"] != two["speaker"]:
            turns.append(offset + (one["end"] + two["start"]) / 2)
    for one, two in itertools.pairwise(spans):
        if one[3] == two[2] and 0 <= two[0] - one[1] < PAUSE:
            turns.append((one[1] + two[0]) / 2)
    return turns


def boundaries(spans: list[Block], seconds: float) -> list[float]:
    """True boundaries of a clip whose blocks are `spans`: between two, in the middle of the gap."""
    spans = [span[:2] for span in spans]
    while True:
        cells = _cells(spans, seconds)
        short = [i for i, (a, b) in enumerate(cells) if b - a < SHORTEST]
        if not short or len(spans) < 2:
            break
        i = min(short, key=lambda i: cells[i][1] - cells[i][0])
        gaps = {
            j: spans[max(i, j)][0] - spans[min(i, j)][1]
            for j in (i - 1, i + 1)
            if 0 <= j < len(spans)
        }
        j = min(gaps, key=gaps.get)
        if gaps[j] >= PAUSE:
            break
        low, high = sorted((i, j))
        spans[low : high + 1] = [(spans[low][0], max(spans[low][1], spans[high][1]))]
    edges = []
    for (_, end), (start, _) in itertools.pairwise([(0.0, 0.0), *spans, (seconds, seconds)]):
        if start - end >= PAUSE:
            edges += [end, start]
        elif end > 0 and start < seconds:
            edges.append((end + start) / 2)
    return [edge for edge in edges if 0.3 < edge < seconds - 0.3]


def _cells(spans, seconds):
    """Each block, extended by half of the short gaps around it."""
    cells = []
    for i, (start, end) in enumerate(spans):
        before = start - (spans[i - 1][1] if i else 0.0)
        after = (spans[i + 1][0] if i + 1 < len(spans) else seconds) - end
        left = start if before >= PAUSE else start - (before / 2 if i else before)
        right = end if after >= PAUSE else end + (after / 2 if i + 1 < len(spans) else after)
        cells.append((left, right))
    return cells


def matched(found: list[float], true: list[float], tolerance: float = 0.5) -> int:
    """Pairs of a one-to-one matching, both in order."""
    i = j = pairs = 0
    while i < len(found) and j < len(true):
        if abs(found[i] - true[j]) <= tolerance:
            pairs, i, j = pairs + 1, i + 1, j + 1
        elif found[i] < true[j]:
            i += 1
        else:
            j += 1
    return pairs


def lenient(
    found: list[float], true: list[float], free: list[float], tolerance: float = 0.5
) -> tuple[list[float], list[float]]:
    """(found, true) boundaries without those in the optional spans `free`."""
    true = [t for t in true if all(abs(t - f) > 0.01 for f in free)]
    kept = []
    for at in found:
        owed = any(abs(at - t) <= tolerance for t in true)
        if owed or all(abs(at - f) > tolerance for f in free):
            kept.append(at)
    return kept, true


def f1(clips: list[tuple[list[float], list[float]]]) -> tuple[float, float, float]:
    """(F1, precision, recall) over (found, true) boundaries of many clips."""
    pairs = sum(matched(found, true) for found, true in clips)
    found, true = sum(len(a) for a, _ in clips), sum(len(b) for _, b in clips)
    return 2 * pairs / max(found + true, 1), pairs / max(found, 1), pairs / max(true, 1)
