"""Event timelines: event-based F1 as sed_eval computes it, temporal IoU and recall.

An estimated event is right if it has the label of a reference event, its onset is within 0.2 s, and
its offset is within 0.2 s or half of the reference's length, whichever is more. This tolerance is
called the collar. Each event is matched at most once, so that as many as possible are right.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moss_audio_jax.evaluate import text_norm

COLLAR = 0.2
OFFSET_SHARE = 0.5


class Event(NamedTuple):
    """A sound: start and end in seconds, and its label."""

    start: float
    end: float
    label: str


def event(start: float, end: float, text: str) -> Event:
    """An event labelled by its description; case, spacing and a final stop do not count."""
    return Event(start, end, text_norm.key(text))


def count(
    reference: Sequence[Event], estimated: Sequence[Event]
) -> dict[str, tuple[int, int, int]]:
    """label -> (right, reference, estimated) of one file.

    Summed over labels and files, they equal the overall counts of sed_eval's EventBasedMetrics with
    its default settings. F1 is 2 right / (reference + estimated).
    """
    found = {}
    for label in {e.label for e in [*reference, *estimated]}:
        true = [e for e in reference if e.label == label]
        said = [e for e in estimated if e.label == label]
        near = np.array([[_near(a, b) for b in said] for a in true], bool)
        found[label] = (_matched(near) if near.any() else 0, len(true), len(said))
    return found


def label_average(
    scenes: Iterable[Mapping[str, tuple[int, int, int]]], skip_unfound: bool
) -> float | None:
    """Mean F1 of the labels in the reference, from the `count` of every file.

    Args:
      skip_unfound: leaves out labels that were never estimated, as sed_eval does by default;
        otherwise they count as 0.
    """
    sums: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(3, int))
    for scene in scenes:
        for label, counts in scene.items():
            sums[label] += counts
    values = [
        2 * right / (true + said)
        for right, true, said in sums.values()
        if true and (said or not skip_unfound)
    ]
    return float(np.mean(values)) if values else None


def ious(reference: Sequence[Event], estimated: Sequence[Event]) -> list[float]:
    """Temporal IoU of each reference event with the event matched to it; 0 without one.

    Events of one label are matched one to one so that the sum of their IoUs is largest.
    """
    from scipy.optimize import linear_sum_assignment

    best = [0.0] * len(reference)
    for label in {e.label for e in reference}:
        rows = [i for i, e in enumerate(reference) if e.label == label]
        found = [e for e in estimated if e.label == label]
        if not found:
            continue
        table = np.array([[_iou(reference[i], e) for e in found] for i in rows])
        for row, column in zip(*linear_sum_assignment(table, maximize=True), strict=True):
            best[rows[row]] = float(table[row, column])
    return best


def _near(true: Event, found: Event) -> bool:
    length = true.end - true.start
    return abs(true.start - found.start) <= COLLAR and abs(true.end - found.end) <= max(
        COLLAR, OFFSET_SHARE * length
    )


def _iou(a: Event, b: Event) -> float:
    shared = min(a.end, b.end) - max(a.start, b.start)
    union = max(a.end, b.end) - min(a.start, b.start)
    if union == 0:
        return 1.0  # the same point in time
    return max(shared, 0.0) / union


def _matched(near: np.ndarray) -> int:
    """The most pairs of events, each used once; near is bool [reference, estimated]."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    return int((maximum_bipartite_matching(csr_array(near)) >= 0).sum())
