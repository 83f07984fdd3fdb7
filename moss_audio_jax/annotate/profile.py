"""Which of nine coarse classes a segment contains: scores from 0 to 1, several may be high."""

from __future__ import annotations

import dataclasses

import numpy as np

from moss_audio_jax.annotate.features import COARSE, FINE, ClipFeatures
from moss_audio_jax.annotate.posteriors import Posteriors
from moss_audio_jax.errors import InputError

CLASSES = (
    "speech",
    "human voice",
    "singing",
    "music",
    "natural sound",
    "source-ambiguous",
    "sounds of things",
    "environment",
    "animal",
)
EVIDENCE = (
    "voiced",
    "level spread",
    "syllable modulation",
    "pitch",
    "pitch range",
    "pitch steadiness",
    "flatness",
    "flatness spread",
    "centroid",
    "bandwidth",
    "pauses",
    "onsets",
    "lows",
    "highs",
    "spectral change",
    "longest voice",
)
# Logistic weights: a bias, then a weight for each entry of EVIDENCE.
WEIGHTS: dict[str, tuple[float, tuple[float, ...]]] = {
    "speech": (
        -5.483,
        (
            2.169,
            0.822,
            1.007,
            -0.372,
            -0.372,
            -0.313,
            1.769,
            -0.736,
            0.022,
            0.945,
            -1.075,
            -0.167,
            0.530,
            -0.682,
            1.527,
            -1.052,
        ),
    ),
    "human voice": (
        -4.857,
        (
            -1.577,
            0.044,
            -1.060,
            0.783,
            -0.710,
            -0.280,
            0.486,
            0.924,
            0.086,
            0.696,
            0.640,
            1.152,
            -0.103,
            -0.373,
            -0.220,
            1.019,
        ),
    ),
    "music": (
        -0.816,
        (
            0.659,
            -0.267,
            -0.526,
            0.030,
            1.067,
            0.462,
            -1.172,
            -0.542,
            0.700,
            0.794,
            -1.557,
            -0.650,
            0.685,
            0.124,
            -0.209,
            0.106,
        ),
    ),
    "natural sound": (
        -0.300,
        (
            -1.835,
            0.319,
            -2.796,
            0.175,
            0.716,
            0.067,
            -0.213,
            0.113,
            0.110,
            0.531,
            0.071,
            0.056,
            0.542,
            0.221,
            -0.634,
            0.353,
        ),
    ),
    "sounds of things": (
        -4.732,
        (
            -0.642,
            -0.162,
            -2.138,
            0.020,
            0.784,
            0.542,
            0.465,
            0.282,
            0.977,
            0.896,
            0.860,
            0.960,
            -0.369,
            -0.280,
            -0.459,
            0.622,
        ),
    ),
    "environment": (
        2.664,
        (
            -0.044,
            -2.715,
            -0.051,
            0.152,
            0.235,
            -0.125,
            -0.521,
            -0.213,
            -1.413,
            0.001,
            0.874,
            1.045,
            -0.963,
            0.127,
            0.938,
            -0.216,
        ),
    ),
    "animal": (
        -3.671,
        (
            -0.817,
            0.031,
            -0.108,
            0.049,
            0.512,
            0.077,
            -0.115,
            0.884,
            0.688,
            0.326,
            0.808,
            0.360,
            -0.373,
            0.711,
            -0.666,
            0.539,
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class ProfileOptions:
    """silence_dbfs: a segment whose loudest 50 ms is below this is only "environment"."""

    silence_dbfs: float = -70.0


def profile(
    features: ClipFeatures, start: float, end: float, options: ProfileOptions = ProfileOptions()
) -> dict[str, float]:
    """Scores of the nine CLASSES between two times in seconds; each is an independent probability.

    Logistic weights on signal statistics, fitted to synthetic scenes, not to recordings. The scenes
    have no singing: the score of singing is that of a voice that holds its pitch, with music. A
    sound that no other class claims is source-ambiguous. The posteriors of a real tagger are far
    better.
    """
    span = features.span(start, end)
    if span.bands.max() < options.silence_dbfs:
        return {name: float(name == "environment") for name in CLASSES}
    facts = evidence(span)
    scores = {
        name: float(1 / (1 + np.exp(-(bias + facts @ np.array(weights)))))
        for name, (bias, weights) in WEIGHTS.items()
    }
    steady = facts[EVIDENCE.index("pitch steadiness")] * facts[EVIDENCE.index("voiced")]
    scores["singing"] = scores["music"] * scores["human voice"] * float(np.clip(steady, 0, 1))
    scores["human voice"] = max(scores["human voice"], scores["speech"], scores["singing"])
    scores["source-ambiguous"] = 1 - max(scores.values())
    return {name: round(scores[name], 3) for name in CLASSES}


def profile_posteriors(
    posteriors: Posteriors, classes: dict[str, str], start: float, end: float
) -> dict[str, float]:
    """Scores from a detector: for each class, the 90th percentile over frames of its best label.

    Args:
      classes: the detector's label -> one of CLASSES; labels that are not in it are ignored.

    Raises:
      InputError: a class is not one of the nine.
    """
    scores = dict.fromkeys(CLASSES, 0.0)
    first = int(start * posteriors.fps)
    frames = posteriors.frames[first : max(round(end * posteriors.fps), first + 1)]
    for label, column in zip(posteriors.labels, frames.T, strict=True):
        name = classes.get(label)
        if name is None:
            continue
        if name not in scores:
            raise InputError(
                f"profile: label {label!r} is mapped to {name!r}; expected one of "
                f"{', '.join(CLASSES)}"
            )
        if len(column):
            scores[name] = max(scores[name], round(float(np.percentile(column, 90)), 3))
    return scores


def evidence(span: ClipFeatures) -> np.ndarray:
    """Statistics of a span, float64 [len(EVIDENCE)], each of about unit size."""
    power = np.exp(span.bands.astype(np.float64) * (np.log(10) / 10))
    level = 10 * np.log10(power.sum(axis=1) + 1e-10)
    loud = level > level.max() - 25
    voiced = loud & (span.harmonicity > 0.6)
    pitch = 12 * np.log2(span.pitch)
    known = pitch[voiced]
    jumps = np.abs(np.diff(pitch))[voiced[1:] & voiced[:-1]]
    bands = span.bands[loud]
    share = power[loud].mean(axis=0)
    share /= share.sum() + 1e-12
    index = np.arange(len(share))
    centroid = float(share @ index)
    envelope = np.maximum(span.energy, span.energy.max() - 40)
    envelope = envelope - envelope.mean()
    fluctuation = np.square(np.abs(np.fft.rfft(envelope * np.hanning(len(envelope)))))
    hertz = np.fft.rfftfreq(len(envelope), 1 / FINE)
    syllabic = fluctuation[(hertz >= 2.5) & (hertz <= 8)].sum() / (fluctuation.sum() + 1e-9)
    runs = np.diff(np.flatnonzero(np.diff(np.r_[False, voiced, False].astype(np.int8))))[::2]
    facts = [
        voiced.sum() / loud.sum() * 2,
        level.std() / 8,
        syllabic * 3,
        (np.median(known) - 90) / 12 if len(known) else 0.0,
        known.std() / 4 if len(known) else 0.0,
        float(np.mean(jumps < 0.35)) if len(jumps) else 0.0,
        np.log(span.flatness[loud].mean() + 1e-4) / 2 + 2,
        np.log(span.flatness[loud] + 1e-4).std(),
        centroid / 10,
        float(np.sqrt(share @ (index - centroid) ** 2)) / 5,
        float(np.mean(~loud)) * 3,
        float(np.mean(span.onset > 4)) * 10,
        10 * np.log10(share[:3].sum() + 1e-4) / 10,
        10 * np.log10(share[24:].sum() + 1e-4) / 10,
        float(np.abs(np.diff(bands, axis=0)).mean()) / 4 if len(bands) > 1 else 0.0,
        np.log1p(runs.max(initial=0) / COARSE) * 2,
    ]
    return np.clip(np.array(facts, np.float64), -4, 4)
