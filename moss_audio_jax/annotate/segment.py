"""Cuts a clip where one coherent event ends and another begins, not at fixed windows.

Many cuts are proposed: change points of band statistics at 5 Hz, and pauses. Each is scored by how
much its two sides differ, and the weakest are removed one by one, which makes the sides of the
others longer. Pauses within a sentence and between ticks of a clock are removed, because their two
sides are alike; a change of source stays.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
import scipy.ndimage

from moss_audio_jax.annotate.boundary import Sides
from moss_audio_jax.annotate.features import COARSE, FINE, GROUP, ClipFeatures
from moss_audio_jax.annotate.spans import DEFAULT, SegmentOptions, cover
from moss_audio_jax.errors import InputError, extra

if TYPE_CHECKING:
    from moss_audio_jax.annotate.tags import Sources

_LONG_PAUSE = 1.0  # seconds; such a pause is a segment
_PAUSE = 0.2
_NOISE_LEFT = np.float32(0.02)  # share of the power of steady noise that is kept


def segment(
    features: ClipFeatures, options: SegmentOptions = DEFAULT, sources: Sources | None = None
) -> list[dict[str, float]]:
    """Segments {"start", "end"} in seconds, rounded to ms: in order, no gap, no overlap.

    `sources`: a model's tags of the clip; without them only the signal decides.
    """
    cuts = change_points(features, options, sources)
    edges = [0.0, *cuts, features.seconds]
    for start, end in itertools.pairwise([0.0, *cuts, features.seconds]):
        while end - start > options.max_seconds:
            low = start + max(options.max_seconds / 2, options.min_seconds)
            high = min(start + options.max_seconds, end - options.min_seconds)
            start = _quietest(features, low, high)
            edges.append(start)
    return cover(edges, features.seconds, options)


def change_points(
    features: ClipFeatures, options: SegmentOptions = DEFAULT, sources: Sources | None = None
) -> list[float]:
    """Times of the cuts between coherent events in seconds, before limits on length."""
    features = without_noise(features)
    places = proposals(features, options, sources)
    return [at / FINE for at in kept(Sides(features, sources), places, options)]


def without_noise(features: ClipFeatures) -> ClipFeatures:
    """Features without the clip's steady noise, which is the 5th percentile of each band.

    At most _NOISE_LEFT of its power stays, so that pauses are as deep as in a quiet room.
    """

    def less(level: np.ndarray) -> np.ndarray:
        power = np.exp(level * np.float32(np.log(10) / 10))
        noise = np.percentile(power, 5, axis=0).astype(np.float32)
        power = np.maximum(power - noise, _NOISE_LEFT * noise)
        return 10 * np.log10(np.maximum(power, np.float32(1e-10)))

    energy, bands = less(features.energy), less(features.bands)
    return dataclasses.replace(features, energy=energy, bands=bands)


# --- proposals -----------------------------------------------------------------------------------


def proposals(
    features: ClipFeatures, options: SegmentOptions, sources: Sources | None = None
) -> list[int]:
    """Possible cuts, as fine frames: pauses, change points outside them, edges of sources."""
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
    for at in sources.places() if sources else ():
        i = bisect.bisect(places, at)
        if all(abs(at - other) >= 0.25 * FINE for other in places[max(i - 1, 0) : i + 1]):
            places.insert(i, at)
    least = round(0.3 * FINE)
    return [at for at in places if least <= at <= len(features.energy) - least]


def quiet_runs(features: ClipFeatures) -> list[tuple[int, int]]:
    """Pauses: runs of fine frames, 0.2 s or longer, near the level of the quietest around them."""
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
    """Change points of the bands' means, in coarse frames; searched in blocks of ten minutes."""
    try:
        import ruptures
    except ImportError as error:
        raise InputError(f"segmentation needs ruptures: {extra('annotate')}") from error
    group, block, settle = COARSE // 5, 3000, 150
    count = len(features.bands) // group
    if count < 10:
        return []
    x = features.bands[: count * group].reshape(count, group, -1).mean(axis=1)
    # Levels 70 dB below the loudest are not heard; the unit of the cost is (10 dB)^2.
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
    # One sound ends at a dip within 0.2 s or, without a dip, at the steepest 10 ms.
    middle = where * GROUP
    first = max(middle - FINE // 5, 0)
    smooth = scipy.ndimage.uniform_filter1d(features.energy[first : middle + FINE // 5], 3)
    around = features.energy[max(middle - FINE // 2, 0) : middle + FINE // 2]
    if smooth.min() < np.median(around) - 10:
        return first + int(np.argmin(smooth))
    first = max(middle - GROUP, 0)
    return first + int(np.argmax(np.abs(np.diff(features.energy[first : middle + GROUP + 1])))) + 1


# --- scoring -------------------------------------------------------------------------------------


def kept(sides: Sides, places: list[int], options: SegmentOptions) -> list[int]:
    """Removes the weakest proposal until all that remain are likely enough; returns those."""
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
            score -= 100.0  # a segment is too short: the weaker of its two edges is removed
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


def _quietest(features: ClipFeatures, low: float, high: float) -> float:
    """The middle of the quietest 0.3 s between two times."""
    first, last = round(low * FINE), round(high * FINE)
    smooth = scipy.ndimage.uniform_filter1d(features.energy[first:last], 30)
    return (first + int(np.argmin(smooth))) / FINE
