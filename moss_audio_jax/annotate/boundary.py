"""Estimates whether a cut is a true boundary, from evidence on its two sides."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.ndimage

from moss_audio_jax.annotate.features import COARSE, FINE, GROUP, ClipFeatures

if TYPE_CHECKING:
    from moss_audio_jax.annotate.tags import Sources

NETWORKS = Path(__file__).parents[1] / "assets" / "boundary.npz"
_CONTEXT = 8 * COARSE  # coarse frames examined on each side of a cut
_MEMO = 4096  # cached sides
# Measures of one side; the smaller and the larger of the two sides' values are evidence.
OF_SIDE = (
    "harmonicity",
    "voiced",
    "flatness",
    "rhythm",
    "speech",
    "roughness",
    "onset",
    "flux",
    "loud",
    "pitch spread",
    "harmonicity spread",
    "peaks",
    "contrast",
)
EVIDENCE = (
    "spectrum",
    "spread",
    "level",
    "harmonicity",
    "pitch",
    "flatness",
    "background",
    "depth",
    "gap",
    "shorter",
    "longer",
    "gain",
    "rhythm",
    "local",
    *(f"{which} {name}" for name in OF_SIDE for which in ("least", "most")),
    "novelty",
    "novelty other way",
    "novelty of shape",
    "novelty of shape other way",
    "wide novelty",
    "wide novelty other way",
    "wide novelty of shape",
    "wide novelty of shape other way",
    "from start",
    "to end",
)


class Judge(NamedTuple):
    """A network with one hidden layer of H tanh units over E pieces of evidence.

    mean, deviation: float32 [E], of the evidence in training; kernel [E, H]; bias [H]; weights [H];
    offset [1].
    """

    mean: np.ndarray
    deviation: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray
    weights: np.ndarray
    offset: np.ndarray

    def log_odds(self, evidence: np.ndarray) -> np.ndarray:
        """[..., E] -> [...]: the log-odds of a true boundary."""
        z = np.clip((evidence - self.mean) / self.deviation, -4, 4)
        return np.tanh(z @ self.kernel + self.bias) @ self.weights + self.offset[0]


@functools.cache
def judges() -> dict[str, Judge]:
    """The judge "signal" reads only EVIDENCE, "sources" also a model's tags.

    tools/small/fit_segment.py fits both.
    """
    with np.load(NETWORKS) as stored:
        return {
            name: Judge(*(stored[f"{name}/{field}"] for field in Judge._fields))
            for name in ("signal", "sources")
        }


class Sides:
    """Evidence for cuts between segments of one clip, with a model's tags if they are given."""

    def __init__(self, features: ClipFeatures, sources: Sources | None = None):
        self.sources = sources
        self.bands = features.bands
        power = np.exp(features.bands * np.float32(np.log(10) / 10)).sum(axis=1)
        self.level = 10 * np.log10(power + 1e-10)
        self.energy = scipy.ndimage.uniform_filter1d(features.energy, 3)
        self.harmonicity = features.harmonicity
        self.pitch = np.log2(features.pitch)
        self.flatness = np.log(features.flatness + 1e-3)
        whole = np.zeros(len(self.bands) * GROUP, np.float32)
        whole[: len(features.onset)] = features.onset[: len(whole)]
        self.onset = whole.reshape(-1, GROUP).max(axis=1)
        self._memo: dict[tuple[int, int], dict[str, Any]] = {}

    def evidence(self, before: int, at: int, after: int) -> np.ndarray:
        """float64 [E] for a cut at fine frame `at`, between the cuts `before` and `after`.

        EVIDENCE names the entries, and `tags.EVIDENCE` those after them if there are tags.
        """
        middle, count = at // GROUP, len(self.bands)
        a, b = max(before // GROUP, middle - _CONTEXT), min(after // GROUP, middle + _CONTEXT)
        left, right = slice(min(a, middle - 1), middle), slice(middle, max(b, middle + 1))
        # Across other cuts too, because music returns to its chords.
        wide_left = slice(max(middle - _CONTEXT, 0), middle)
        wide_right = slice(middle, max(min(middle + _CONTEXT, count), middle + 1))
        one, two = self._side(left), self._side(right)
        each = [f(one[name], two[name]) for name in OF_SIDE for f in (min, max)]
        return np.array(
            [
                *self._differences(one, two, left, right),
                *self._pause(before, at, after),
                *self._lengths(one, two, left, right),
                abs(one["rhythm"] - two["rhythm"]) / 5,
                _rms(self._local(left, -1) - self._local(right, 1)) / 10,
                *each,
                *self._novelty(left, right),
                *self._novelty(wide_left, wide_right),
                math.log((middle - wide_left.start + 1) / COARSE),
                math.log((wide_right.stop - middle + 1) / COARSE),
                *(self.sources.evidence(before, at, after) if self.sources else ()),
            ]
        )

    def log_odds(self, before: int, at: int, after: int) -> float:
        judge = judges()["sources" if self.sources else "signal"]
        return float(judge.log_odds(self.evidence(before, at, after)))

    def _differences(self, one: dict, two: dict, left: slice, right: slice) -> list[float]:
        top = max(one["bands"].max(), two["bands"].max()) - 50
        shift = np.maximum(one["bands"], top) - np.maximum(two["bands"], top)
        return [
            _rms(shift - shift.mean()) / 10,
            _rms(one["spread"] - two["spread"]) / 5,
            abs(one["level"] - two["level"]) / 10,
            abs(one["harmonicity"] - two["harmonicity"]) * 3,
            abs(one["pitch"] - two["pitch"]) * min(one["voiced"], two["voiced"]) * 3,
            abs(one["flatness"] - two["flatness"]) / 2,
            _rms(one["floor"] - two["floor"]) / 10,
        ]

    def _pause(self, before: int, at: int, after: int) -> list[float]:
        """The depth and the length of the dip in level at the cut."""
        near = self.energy[max(at - 10, 0) : at + 10].min()
        tops = [
            float(self.energy[max(at - FINE, before) : max(at, before + 1)].max()),
            float(self.energy[at : max(min(at + FINE, after), at + 1)].max()),
        ]
        limit = min(tops) - 12
        here = self.energy[max(at - FINE, 0) : at + FINE] < limit
        gap = _run(here, min(at, FINE)) / FINE if near < limit else 0.0
        return [min(max(min(tops) - near, 0), 50) / 20, min(gap, 1.5)]

    def _lengths(self, one: dict, two: dict, left: slice, right: slice) -> list[float]:
        n, m = left.stop - left.start, right.stop - right.start
        top = max(one["bands"].max(), two["bands"].max()) - 50
        whole = np.maximum(one["all"], top) - np.maximum(two["all"], top)
        return [
            math.log(min(n, m) / COARSE),
            math.log(max(n, m) / COARSE),
            math.log1p(n * m / (n + m) * np.mean(whole**2) / 100),
        ]

    def _side(self, span: slice) -> dict[str, Any]:
        key = (span.start, span.stop)
        if key not in self._memo:
            if len(self._memo) >= _MEMO:
                self._memo.clear()
            self._memo[key] = self._described(span)
        return self._memo[key]

    def _described(self, span: slice) -> dict[str, Any]:
        level, bands = self.level[span], self.bands[span]
        loud = level > level.max() - 25
        quiet = level <= np.partition(level, len(level) // 10)[len(level) // 10]
        harmonicity, pitch = self.harmonicity[span], self.pitch[span]
        voiced = loud & (harmonicity > 0.6)
        active = bands[loud]
        mean = active.mean(axis=0)
        shape = np.maximum(mean, mean.max() - 50)
        return {
            "all": bands.mean(axis=0),
            "bands": mean,
            "spread": active.std(axis=0),
            "floor": np.maximum(bands[quiet].mean(axis=0), -95),
            "level": float(level[loud].mean()),
            "harmonicity": float(harmonicity[loud].mean()),
            "voiced": float(voiced.sum() / loud.sum()),
            "pitch": float(np.median(pitch[voiced])) if voiced.any() else 7.0,
            "flatness": float(self.flatness[span][loud].mean()),
            "speech": float(voiced.mean() * min(level.std() / 10, 1.5)),
            "rhythm": float(level.std()),
            "roughness": float(np.abs(np.diff(level)).mean()) if len(level) > 1 else 0.0,
            "onset": float(self.onset[span].mean()),
            "flux": float(np.abs(np.diff(bands, axis=0)).mean()) if len(level) > 1 else 0.0,
            "loud": float(loud.mean()),
            "pitch spread": float(pitch[loud].std()),
            "harmonicity spread": float(harmonicity[loud].std()),
            "peaks": float(shape.std()),
            "contrast": float(np.abs(np.diff(shape)).mean()),
        }

    def _novelty(self, left: slice, right: slice) -> list[float]:
        """For each side, the mean distance of its loud frames to the nearest on the other side.

        Returns the smaller and the larger of the two, with level and without it.
        """
        x, y = (self._loud(span, 20) for span in (left, right))
        top = max(x.max(), y.max()) - 50
        found = []
        for p, q in (
            (np.maximum(x, top), np.maximum(y, top)),
            (_shapes(x), _shapes(y)),
        ):
            square = np.square(p).sum(axis=1)[:, None] + np.square(q).sum(axis=1) - 2 * p @ q.T
            distance = np.sqrt(np.maximum(square, 0) / p.shape[1]) / 10
            ways = float(distance.min(axis=0).mean()), float(distance.min(axis=1).mean())
            found += [min(ways), max(ways)]
        return found

    def _loud(self, span: slice, depth: float) -> np.ndarray:
        level = self.level[span]
        return self.bands[span][level > level.max() - depth]

    def _local(self, span: slice, way: int) -> np.ndarray:
        """Mean bands of the loud frames within a second of the cut, relative to their level."""
        near = slice(-COARSE, None) if way < 0 else slice(0, COARSE)
        bands, level = self.bands[span][near], self.level[span][near]
        mean = bands[level > level.max() - 20].mean(axis=0)
        mean = np.maximum(mean, mean.max() - 50)
        return mean - mean.mean()


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def _shapes(bands: np.ndarray) -> np.ndarray:
    floored = np.maximum(bands, bands.max(axis=1, keepdims=True) - 35)
    return floored - floored.mean(axis=1, keepdims=True)


def _run(mask: np.ndarray, at: int) -> int:
    """Length of the run of True nearest to `at`, within 10 frames."""
    for start in sorted(range(max(at - 10, 0), min(at + 10, len(mask))), key=lambda i: abs(i - at)):
        if mask[start]:
            low = high = start
            while low > 0 and mask[low - 1]:
                low -= 1
            while high + 1 < len(mask) and mask[high + 1]:
                high += 1
            return high - low + 1
    return 0
