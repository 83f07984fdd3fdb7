"""How likely a cut is a true boundary: evidence of what lies on its two sides, and its log-odds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.ndimage

from moss_audio_jax.annotate.features import COARSE, FINE, GROUP, ClipFeatures

_CONTEXT = 8 * COARSE  # coarse frames looked at on either side of a cut
_MEMO = 4096  # sides remembered
# What is said of each side by itself; the lesser and the greater of the two are evidence.
OF_SIDE = (
    "harmonicity", "voiced", "flatness", "rhythm", "speech", "roughness", "onset", "flux", "loud",
    "pitch spread", "harmonicity spread", "peaks", "contrast",
)  # fmt: skip
EVIDENCE = (
    "spectrum", "spread", "level", "harmonicity", "pitch", "flatness", "background", "depth", "gap",
    "shorter", "longer", "gain", "rhythm", "local",
    *(f"{which} {name}" for name in OF_SIDE for which in ("least", "most")),
    "novelty", "novelty other way", "novelty of shape", "novelty of shape other way",
    "wide novelty", "wide novelty other way", "wide novelty of shape",
    "wide novelty of shape other way", "from start", "to end",
)  # fmt: skip
# tools/fit_segment.py: mean and deviation of each piece of evidence, its weight, and that of its
# saturating form in the log-odds of a true boundary.
# fitted
WEIGHTS: dict[str, tuple[float, float, float, float]] = {
    "spectrum": (0.725, 0.545, 0.266, 0.073),
    "spread": (0.903, 0.639, 0.121, -0.504),
    "level": (0.688, 0.883, -0.156, 0.465),
    "harmonicity": (0.559, 0.614, -0.015, -0.022),
    "pitch": (0.524, 1.107, 0.250, 1.276),
    "flatness": (0.482, 0.613, -0.243, 0.764),
    "background": (0.742, 0.820, -0.144, -0.097),
    "depth": (1.439, 0.862, 0.232, 0.881),
    "gap": (0.292, 0.293, -0.179, 0.720),
    "shorter": (0.198, 0.835, 0.265, 0.362),
    "longer": (0.935, 0.810, 0.536, 0.226),
    "gain": (2.296, 1.601, 0.402, -0.676),
    "rhythm": (0.822, 0.973, 0.012, 0.605),
    "local": (0.808, 0.584, -0.418, 0.912),
    "least harmonicity": (0.442, 0.269, 0.251, -0.016),
    "most harmonicity": (0.628, 0.264, 0.244, -1.285),
    "least voiced": (0.340, 0.359, -0.978, -0.451),
    "most voiced": (0.601, 0.365, 0.318, 0.443),
    "least flatness": (-2.830, 2.104, -0.167, -0.126),
    "most flatness": (-1.865, 1.837, -0.353, -0.294),
    "least rhythm": (8.242, 7.245, 0.255, -0.002),
    "most rhythm": (12.354, 7.955, 0.240, -1.265),
    "least speech": (0.200, 0.274, -0.211, 0.611),
    "most speech": (0.446, 0.386, 0.155, -0.328),
    "least roughness": (4.115, 4.693, -1.758, -0.786),
    "most roughness": (6.672, 5.842, 0.632, -0.339),
    "least onset": (2.188, 1.492, -0.451, -0.310),
    "most onset": (3.188, 2.087, 0.205, 0.672),
    "least flux": (5.887, 4.091, 0.582, -0.547),
    "most flux": (8.089, 4.961, 0.857, -0.427),
    "least loud": (0.739, 0.290, 0.033, 0.297),
    "most loud": (0.859, 0.236, 0.063, -0.781),
    "least pitch spread": (0.414, 0.311, -0.315, 0.338),
    "most pitch spread": (0.666, 0.317, -0.013, -0.064),
    "least harmonicity spread": (0.101, 0.083, -1.169, 1.393),
    "most harmonicity spread": (0.192, 0.099, 0.147, -0.248),
    "least peaks": (6.137, 4.130, 0.574, -1.086),
    "most peaks": (8.749, 5.032, 0.251, -1.160),
    "least contrast": (2.443, 2.125, -0.194, -1.135),
    "most contrast": (3.710, 2.812, -0.260, 0.239),
    "novelty": (0.777, 0.419, 0.142, -0.651),
    "novelty other way": (1.036, 0.542, 0.297, -0.152),
    "novelty of shape": (0.614, 0.293, -0.448, 1.921),
    "novelty of shape other way": (0.768, 0.338, -0.451, 1.265),
    "wide novelty": (0.786, 0.283, -0.431, 0.916),
    "wide novelty other way": (1.054, 0.355, -0.092, -0.093),
    "wide novelty of shape": (0.654, 0.221, -0.148, 0.071),
    "wide novelty of shape other way": (0.828, 0.226, 0.400, -0.309),
    "from start": (1.918, 0.441, 0.484, -0.330),
    "to end": (1.920, 0.429, 0.480, -0.527),
}
BIAS = -0.543
# end of fitted


class Sides:
    """Evidence of a cut between two segments of one clip."""

    def __init__(self, features: ClipFeatures):
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
        """float64 [len(EVIDENCE)] of a cut at a fine frame between those before and after it."""
        middle, count = at // GROUP, len(self.bands)
        a, b = max(before // GROUP, middle - _CONTEXT), min(after // GROUP, middle + _CONTEXT)
        left, right = slice(min(a, middle - 1), middle), slice(middle, max(b, middle + 1))
        # As far as there is sound, whatever other cuts lie there: music comes back to its chords.
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
            ]
        )

    def log_odds(self, before: int, at: int, after: int) -> float:
        return float(expanded(self.evidence(before, at, after)) @ _WEIGHTS) + BIAS

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
        """How deep and how long a dip the cut lies in."""
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
        """Mean distance of a loud frame to the nearest on the other side, for either side.

        The lesser and the greater of the two; with the level, and without it.
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
        """Mean bands of the loud frames of the second next to the cut, at their own level."""
        near = slice(-COARSE, None) if way < 0 else slice(0, COARSE)
        bands, level = self.bands[span][near], self.level[span][near]
        mean = bands[level > level.max() - 20].mean(axis=0)
        mean = np.maximum(mean, mean.max() - 50)
        return mean - mean.mean()


def expanded(evidence: np.ndarray) -> np.ndarray:
    """Evidence in deviations from its mean, and its saturating form: [..., 2 len(EVIDENCE)]."""
    z = np.clip((evidence - _MEAN) / _DEVIATION, -6, 6)
    return np.concatenate([z, np.tanh(z)], axis=-1)


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


_MEAN, _DEVIATION, *_BOTH = np.array([WEIGHTS[name] for name in EVIDENCE]).T
_WEIGHTS = np.concatenate(_BOTH)
