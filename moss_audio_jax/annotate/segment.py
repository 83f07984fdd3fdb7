"""Cutting a clip where one coherent event ends and another begins, never at fixed windows.

Places to cut are proposed generously (change points of 5 Hz band statistics, and pauses); each is
weighed by how much what lies on its two sides differs, and the weakest are struck out one by one,
the sides growing as they go. So a sentence's pauses and a clock's silences vanish, for both their
sides are the same, and a change of source stays.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math

import numpy as np
import scipy.ndimage

from moss_audio_jax.annotate.features import COARSE, FINE, GROUP, ClipFeatures
from moss_audio_jax.errors import InputError, UsageError

_CONTEXT = 8 * COARSE  # coarse frames looked at on either side of a cut
_LONG_PAUSE = 1.0  # seconds: a pause as long is a segment of its own
_PAUSE = 0.2
_NOISE_LEFT = np.float32(0.02)  # of the power of steady noise


@dataclasses.dataclass(frozen=True)
class SegmentOptions:
    """How to cut.

    Attributes:
      min_seconds: no segment is shorter, unless the clip is.
      max_seconds: a longer segment is cut again where it is quietest in its second half.
      penalty: of a change point, times dimensions times ln(frames), in units of (10 dB)^2.
      threshold: the probability from which a proposed cut is kept; higher means fewer segments.
      on, off: hysteresis of posteriors: an event begins at `on` and lasts while above `off`.
      merge_seconds: two events of a class closer than this are one.
      event_seconds: shorter events of posteriors are dropped.
      long_seconds: a longer event that is not speech sets no boundary.
    """

    min_seconds: float = 1.0
    max_seconds: float = 180.0
    penalty: float = 0.2
    threshold: float = 0.5
    on: float = 0.5
    off: float = 0.3
    merge_seconds: float = 0.5
    event_seconds: float = 0.1
    long_seconds: float = 60.0

    def __post_init__(self):
        if not 0.1 <= self.min_seconds <= self.max_seconds / 2:
            raise UsageError(
                f"segments of {self.min_seconds:g} to {self.max_seconds:g} s; expected a minimum "
                "of 0.1 s or more, and a maximum of twice the minimum or more"
            )
        if not 0 <= self.off <= self.on <= 1:
            raise UsageError(
                f"hysteresis from {self.on:g} down to {self.off:g}; expected 0 <= off <= on <= 1"
            )


DEFAULT = SegmentOptions()


def segment(features: ClipFeatures, options: SegmentOptions = DEFAULT) -> list[dict[str, float]]:
    """Segments {"start", "end"} in seconds, rounded to ms: in order, no gap, no overlap."""
    cuts = change_points(features, options)
    edges = [0.0, *cuts, features.seconds]
    for start, end in itertools.pairwise([0.0, *cuts, features.seconds]):
        while end - start > options.max_seconds:
            low = start + max(options.max_seconds / 2, options.min_seconds)
            high = min(start + options.max_seconds, end - options.min_seconds)
            start = _quietest(features, low, high)
            edges.append(start)
    return cover(edges, features.seconds, options)


def change_points(features: ClipFeatures, options: SegmentOptions = DEFAULT) -> list[float]:
    """Times of the cuts between coherent events, seconds, before any limit on length."""
    features = without_noise(features)
    places = proposals(features, options)
    return [at / FINE for at in _kept(_Sides(features), places, options)]


def without_noise(features: ClipFeatures) -> ClipFeatures:
    """Features whose levels lack the clip's steady noise, the 5th percentile of each band.

    What is left of it lies _NOISE_LEFT below or lower: pauses are as deep as in a quiet room.
    """

    def less(level: np.ndarray) -> np.ndarray:
        power = np.exp(level * np.float32(np.log(10) / 10))
        noise = np.percentile(power, 5, axis=0).astype(np.float32)
        power = np.maximum(power - noise, _NOISE_LEFT * noise)
        return 10 * np.log10(np.maximum(power, np.float32(1e-10)))

    energy, bands = less(features.energy), less(features.bands)
    return dataclasses.replace(features, energy=energy, bands=bands)


# --- proposals -----------------------------------------------------------------------------------


def proposals(features: ClipFeatures, options: SegmentOptions) -> list[int]:
    """Fine frames where a cut might be: the pauses, and the change points outside them."""
    places = []
    pauses = quiet_runs(features)
    for start, stop in pauses:
        if stop - start >= _LONG_PAUSE * FINE:
            places += [start, stop]
        else:
            places.append((start + stop) // 2)
    near = np.array(sorted([0, len(features.energy), *places]))
    for at in _changes(features, options.penalty):
        fine = _refined(features, at)
        if np.abs(near - fine).min() >= 0.4 * FINE:
            places.append(fine)
    places = sorted(set(places))
    least = round(0.3 * FINE)
    return [at for at in places if least <= at <= len(features.energy) - least]


def quiet_runs(features: ClipFeatures) -> list[tuple[int, int]]:
    """Pauses: runs of 0.2 s and more of fine frames near the level of the quietest around them."""
    energy = scipy.ndimage.uniform_filter1d(features.energy, 5)
    reach = 4 * FINE + 1
    low = scipy.ndimage.minimum_filter1d(energy, reach)
    high = scipy.ndimage.maximum_filter1d(energy, reach)
    quiet = energy < low + np.clip(0.3 * (high - low), 3, 15)
    quiet &= high - low > 8
    edges = np.flatnonzero(np.diff(np.r_[False, quiet, False].astype(np.int8)))
    return [
        (int(a), int(b))
        for a, b in zip(edges[::2], edges[1::2], strict=True)
        if b - a >= _PAUSE * FINE
    ]


def _changes(features: ClipFeatures, penalty: float) -> list[int]:
    """Change points of the bands' means, in coarse frames; blocks of ten minutes."""
    try:
        import ruptures
    except ImportError as error:
        raise InputError(
            "segmentation needs ruptures; install it with: pip install 'moss_audio_jax[annotate]'"
        ) from error
    group, block, settle = COARSE // 5, 3000, 150
    count = len(features.bands) // group
    if count < 10:
        return []
    x = features.bands[: count * group].reshape(count, group, -1).mean(axis=1)
    # What lies 70 dB below the loudest is not heard; (10 dB)^2 is the unit of the cost.
    x = np.maximum(x, x.max(initial=-100.0) - 70) / 10
    found, start = [], 0
    while count - start >= 10:
        stop = min(start + block, count)
        cost = penalty * x.shape[1] * math.log(min(count, block))
        model = ruptures.KernelCPD(kernel="linear", min_size=4).fit(x[start:stop])
        ends = [start + end for end in model.predict(pen=cost)[:-1]]
        if stop == count:
            found += ends
            break
        settled = [end for end in ends if end < stop - settle]
        found += settled
        start = settled[-1] if settled else stop - settle
    return [at * group for at in found]


def _refined(features: ClipFeatures, coarse: int) -> int:
    """The fine frame of a change near a coarse one."""
    bands, width = features.bands, 8
    best, where = -1.0, coarse
    for at in range(max(coarse - 6, 1), min(coarse + 7, len(bands) - 1)):
        left = bands[max(at - width, 0) : at].mean(axis=0)
        right = bands[at : at + width].mean(axis=0)
        if (gap := float(np.abs(left - right).sum())) > best:
            best, where = gap, at
    # A dip within 0.2 s is where one sound ends; without one, the steepest 10 ms is.
    middle = where * GROUP
    first = max(middle - FINE // 5, 0)
    smooth = scipy.ndimage.uniform_filter1d(features.energy[first : middle + FINE // 5], 3)
    around = features.energy[max(middle - FINE // 2, 0) : middle + FINE // 2]
    if smooth.min() < np.median(around) - 10:
        return first + int(np.argmin(smooth))
    first = max(middle - GROUP, 0)
    return first + int(np.argmax(np.abs(np.diff(features.energy[first : middle + GROUP + 1])))) + 1


# --- weighing ------------------------------------------------------------------------------------

# Log-odds of a true boundary, a logistic regression on concatenations of world scenes and of other
# sounds: weights of each piece of evidence, of its saturating form, and of that between speech.
WEIGHTS = {
    "spectrum": (-0.559, 1.821, 0.487),
    "spread": (-0.426, 1.226, 3.293),
    "level": (-0.063, -0.293, 3.167),
    "harmonicity": (-0.505, 2.531, -1.845),
    "pitch": (0.346, -0.220, 3.494),
    "flatness": (0.830, -0.295, 0.838),
    "background": (-0.281, 0.096, -0.914),
    "depth": (0.259, -0.249, -0.505),
    "gap": (-1.621, 1.260, 4.225),
    "speech": (-2.197, -13.683, 1.705),
    "shorter": (0.337, 0.690, -0.355),
    "longer": (1.498, -1.028, 0.666),
    "gain": (0.060, 1.231, -1.249),
    "rhythm": (-0.065, 0.577, -0.051),
    "local": (0.423, -0.019, 3.336),
}
BIAS = -5.073
EVIDENCE = tuple(WEIGHTS)
_WEIGHTS = np.array(list(WEIGHTS.values())).T.ravel()


class _Sides:
    """Evidence of a cut between two segments of one clip."""

    def __init__(self, features: ClipFeatures):
        self.bands = features.bands
        power = np.exp(features.bands * np.float32(np.log(10) / 10)).sum(axis=1)
        self.level = 10 * np.log10(power + 1e-10)
        self.energy = scipy.ndimage.uniform_filter1d(features.energy, 3)
        self.harmonicity = features.harmonicity
        self.pitch = np.log2(features.pitch)
        self.flatness = np.log(features.flatness + 1e-3)
        self.onset = features.onset

    def evidence(self, before: int, at: int, after: int) -> np.ndarray:
        """float64 [len(EVIDENCE)] of a cut at a fine frame between those before and after it."""
        middle = at // GROUP
        a, b = max(before // GROUP, middle - _CONTEXT), min(after // GROUP, middle + _CONTEXT)
        left, right = slice(min(a, middle - 1), middle), slice(middle, max(b, middle + 1))
        one, two = self._side(left), self._side(right)
        top = max(one["bands"].max(), two["bands"].max()) - 50
        x, y = np.maximum(one["bands"], top), np.maximum(two["bands"], top)
        shift = x - y
        level = one["level"] - two["level"]
        n, m = left.stop - left.start, right.stop - right.start
        whole = np.maximum(one["all"], top) - np.maximum(two["all"], top)
        reach = FINE
        near = self.energy[max(at - 10, 0) : at + 10].min()
        tops = [
            float(self.energy[max(at - reach, before) : max(at, before + 1)].max()),
            float(self.energy[at : max(min(at + reach, after), at + 1)].max()),
        ]
        limit = min(tops) - 12
        here = self.energy[max(at - reach, 0) : at + reach] < limit
        gap = _run(here, min(at, reach)) / FINE if near < limit else 0.0
        return np.array(
            [
                np.sqrt(np.mean((shift - shift.mean()) ** 2)) / 10,
                np.sqrt(np.mean((one["spread"] - two["spread"]) ** 2)) / 5,
                abs(level) / 10,
                abs(one["harmonicity"] - two["harmonicity"]) * 3,
                abs(one["pitch"] - two["pitch"]) * min(one["voiced"], two["voiced"]) * 3,
                abs(one["flatness"] - two["flatness"]) / 2,
                np.sqrt(np.mean((one["floor"] - two["floor"]) ** 2)) / 10,
                min(max(min(tops) - near, 0), 50) / 20,
                min(gap, 1.5),
                min(one["speech"], two["speech"]),
                math.log(min(n, m) / COARSE),
                math.log(max(n, m) / COARSE),
                math.log1p(n * m / (n + m) * np.mean(whole**2) / 100),
                abs(one["rhythm"] - two["rhythm"]) / 5,
                np.sqrt(np.mean((self._local(left, -1) - self._local(right, 1)) ** 2)) / 10,
            ]
        )

    def _side(self, span: slice) -> dict:
        level, bands = self.level[span], self.bands[span]
        loud = level > level.max() - 25
        quiet = level <= np.partition(level, len(level) // 10)[len(level) // 10]
        voiced = loud & (self.harmonicity[span] > 0.6)
        active = bands[loud]
        return {
            "all": bands.mean(axis=0),
            "bands": active.mean(axis=0),
            "spread": active.std(axis=0),
            "floor": np.maximum(bands[quiet].mean(axis=0), -95),
            "level": float(level[loud].mean()),
            "harmonicity": float(self.harmonicity[span][loud].mean()),
            "voiced": float(voiced.sum() / loud.sum()),
            "pitch": float(np.median(self.pitch[span][voiced])) if voiced.any() else 7.0,
            "flatness": float(self.flatness[span][loud].mean()),
            "speech": float(voiced.mean() * min(level.std() / 10, 1.5)),
            "rhythm": float(level.std()),
        }

    def _local(self, span: slice, way: int) -> np.ndarray:
        """Mean bands of the loud frames of the second next to the cut, at their own level."""
        near = slice(-COARSE, None) if way < 0 else slice(0, COARSE)
        bands, level = self.bands[span][near], self.level[span][near]
        mean = bands[level > level.max() - 20].mean(axis=0)
        mean = np.maximum(mean, mean.max() - 50)
        return mean - mean.mean()

    def log_odds(self, before: int, at: int, after: int) -> float:
        return BIAS + float(expanded(self.evidence(before, at, after)) @ _WEIGHTS)


def expanded(evidence: np.ndarray) -> np.ndarray:
    """Evidence, its saturating form, and that between stretches of speech: [..., 45]."""
    bent = np.tanh(2 * evidence)
    speech = bent[..., EVIDENCE.index("speech")][..., None]
    return np.concatenate([evidence, bent, bent * speech], axis=-1)


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


def _kept(sides: _Sides, places: list[int], options: SegmentOptions) -> list[int]:
    """Proposals left when the weakest have been struck out until all are likely enough."""
    total = len(sides.energy)
    before = dict(zip(places, [0, *places], strict=False))
    after = dict(zip(places, [*places[1:], total], strict=False))
    limit = math.log(options.threshold / (1 - options.threshold))
    least = options.min_seconds * FINE
    scores: dict[int, float] = {}
    heap: list[tuple[float, int]] = []

    def weigh(at: int) -> None:
        score = sides.log_odds(before[at], at, after[at])
        if min(at - before[at], after[at] - at) < least:
            score -= 100.0  # too short a segment: the weaker of its two edges goes
        scores[at] = score
        heapq.heappush(heap, (score, at))

    for at in places:
        weigh(at)
    while heap:
        score, at = heapq.heappop(heap)
        if scores.get(at) != score:
            continue
        if score >= limit:
            break
        del scores[at]
        left, right = before[at], after[at]
        if right in scores:
            before[right] = left
            weigh(right)
        if left in scores:
            after[left] = right
            weigh(left)
    return sorted(scores)


# --- limits --------------------------------------------------------------------------------------


def cover(cuts: list[float], seconds: float, options: SegmentOptions) -> list[dict[str, float]]:
    """Segments from one cut to the next; a cut that leaves less than `min_seconds` is left out."""
    edges = [0.0]
    for cut in sorted(cuts):
        if cut - edges[-1] >= options.min_seconds and seconds - cut >= options.min_seconds:
            edges.append(round(cut, 3))
    edges.append(round(seconds, 3))
    return [{"start": a, "end": b} for a, b in itertools.pairwise(edges)]


def _quietest(features: ClipFeatures, low: float, high: float) -> float:
    """The middle of the quietest 0.3 s between two times."""
    first, last = round(low * FINE), round(high * FINE)
    smooth = scipy.ndimage.uniform_filter1d(features.energy[first:last], 30)
    return (first + int(np.argmin(smooth))) / FINE
