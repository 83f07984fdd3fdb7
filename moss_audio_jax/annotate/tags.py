"""Evidence about a cut from a model's tags: which sources sound before, after and across it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from moss_audio_jax.annotate.ears import Ears
from moss_audio_jax.annotate.features import COARSE, FINE, GROUP
from moss_audio_jax.annotate.posteriors import Posteriors, segment_posteriors
from moss_audio_jax.annotate.spans import SegmentOptions
from moss_audio_jax.audio.lengths import SAMPLE_RATE

_PIECE = 256.0  # seconds that the model gets at a time
_CONTEXT = 8 * COARSE  # coarse frames examined on each side of a cut
_NEAR, _CLOSE, _AT = COARSE, COARSE // 2, 3  # coarse frames next to a cut
_SOURCES = ("sound:", "speech", "music")
_SURROUNDINGS = {
    "background": ("background:",),
    "instruments": ("instrument:",),
    "voice": ("sex:", "pitch:", "speed:", "accent:", "intonation:", "whispered"),
}
# Hysteresis whose edges are proposed as cuts: on, off, seconds of the shortest event.
_LEVELS = ((0.35, 0.2, 0.15), (0.5, 0.3, 0.2), (0.8, 0.3, 0.3))
EVIDENCE = (
    *(f"{which} {what}" for what in ("mean", "top", "near") for which in ("most apart", "apart")),
    "in common, top",
    "in common, mean",
    "across",
    "close to both",
    "least close",
    "most close",
    *_SURROUNDINGS,
    "least active",
    "most active",
    "active here",
    *(f"{what} edge, level {i}" for i in range(len(_LEVELS)) for what in ("near", "within")),
)


class Sources:
    """Probabilities of tags along a clip, on the coarse frames of its `ClipFeatures`.

    Attributes:
      edges: for each of three thresholds, the times in seconds where events begin and end.
    """

    def __init__(self, tags: np.ndarray, labels: Sequence[str]):
        """`tags`: uint8 [C, K], 255ths; `labels`: the K names, those of `world.TAGS`."""

        def columns(starts: tuple[str, ...]) -> list[int]:
            return [i for i, label in enumerate(labels) if label.startswith(starts)]

        self._sounding = tags[:, chosen := columns(_SOURCES)]
        self._surroundings = [tags[:, columns(starts)] for starts in _SURROUNDINGS.values()]
        self._active = self._sounding.max(axis=1, initial=0)
        self._memo: dict[tuple[int, int], tuple[np.ndarray, ...]] = {}
        given = Posteriors(_float(self._sounding), COARSE, tuple(labels[i] for i in chosen))
        seconds = len(tags) / COARSE
        self.edges = []
        for on, off, least in _LEVELS:
            options = SegmentOptions(on=on, off=off, event_seconds=least, merge_seconds=1.0)
            cut = segment_posteriors(given, seconds, options)
            self.edges.append(np.array([each["start"] for each in cut[1:]]))

    def places(self) -> list[int]:
        """Possible cuts, as fine frames: edges, and changes from one source to another."""
        found = {round(edge * FINE) for edges in self.edges for edge in edges}
        best = self._sounding.argmax(axis=1)
        for at in np.flatnonzero(np.diff(best)) + 1:
            before = self._sounding[max(at - 6, 0) : at, best[at - 1]]
            after = self._sounding[at : at + 6, best[at]]
            if min(before.mean(), after.mean()) > 0.4 * 255:
                found.add(int(at) * GROUP)
        return sorted(found)

    def evidence(self, before: int, at: int, after: int) -> list[float]:
        """[len(EVIDENCE)] for a cut at fine frame `at`, between the cuts `before` and `after`.

        The cut is at least 0.1 s from the ends of the clip.
        """
        middle = at // GROUP
        first = min(max(before // GROUP, middle - _CONTEXT), middle - 1)
        last = max(min(after // GROUP, middle + _CONTEXT), middle + 1)
        one, two = self._side(first, middle), self._side(middle, last)
        sides = {
            "mean": (one[0], two[0]),
            "top": (one[1], two[1]),
            "near": [_mean(part) for part in self._beside(middle, _NEAR)],
        }
        apart = [np.abs(a - b) for a, b in sides.values()]
        common = [np.minimum(*sides["top"]).max(), np.minimum(*sides["mean"]).sum()]
        left, right = (_float(part.max(axis=0)) for part in self._beside(middle, _CLOSE))
        here = slice(max(middle - _AT, 0), middle + _AT)
        close = float(left.max()), float(right.max())
        active = float(one[-1]), float(two[-1])
        time = at / FINE
        gaps = [np.abs(edges - time).min(initial=9.0) for edges in self.edges]
        return [
            *(float(f(each)) for each in apart for f in (np.max, np.sum)),
            *map(float, common),
            float(_float(self._sounding[here].min(axis=0)).max()),
            float(np.minimum(left, right).max()),
            min(close),
            max(close),
            *(float(np.abs(a - b).sum()) for a, b in zip(one[2:-1], two[2:-1], strict=True)),
            min(active),
            max(active),
            float(_float(self._active[max(middle - 1, 0) : middle + 1]).mean()),
            *itertools.chain(*((float(np.exp(-gap / 0.15)), float(gap < 0.5)) for gap in gaps)),
        ]

    def _beside(self, middle: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources' tags in up to `width` frames before and after a frame."""
        return self._sounding[max(middle - width, 0) : middle], self._sounding[middle:][:width]

    def _side(self, first: int, last: int) -> tuple[np.ndarray, ...]:
        """(mean and 85th percentile of each source, means of the surroundings, activity)."""
        key = (first, last)
        if key not in self._memo:
            if len(self._memo) >= 4096:
                self._memo.clear()
            sounding = self._sounding[first:last]
            rank = int(0.85 * (len(sounding) - 1))
            self._memo[key] = (
                _mean(sounding),
                _float(np.partition(sounding, rank, axis=0)[rank]),
                *(_mean(tags[first:last]) for tags in self._surroundings),
                np.float32(self._active[first:last].mean() / 255),
            )
        return self._memo[key]


def hear_sources(
    ears: Ears, read: Callable[[float, float], np.ndarray], samples: int
) -> Sources | None:
    """Tags of a clip of `samples` samples; None if the model has no head for tags.

    Args:
      read: samples between two times in seconds, float32 at 16 kHz.
    """
    if "tags" not in ears.has:
        return None
    count = -(-samples * COARSE // SAMPLE_RATE)
    tags = np.zeros((count, len(ears.tags)), np.uint8)
    for first in range(0, count, piece := round(_PIECE * COARSE)):
        here = tags[first : first + piece]
        heard = ears.hear([read(first / COARSE, (first + len(here)) / COARSE)])[0]
        if len(heard.starts):
            middle = (np.arange(len(here)) + 0.5) / COARSE
            at = np.searchsorted(heard.starts, middle, side="right") - 1
            here[:] = np.round(255 * heard.tags[np.maximum(at, 0)])
    return Sources(tags, ears.tags)


def _float(tags: np.ndarray) -> np.ndarray:
    return tags.astype(np.float32) / 255


def _mean(tags: np.ndarray) -> np.ndarray:
    return tags.mean(axis=0, dtype=np.float32) / 255
