"""Measures voices: pitch, rate and loudness of a span, and which speaker speaks when."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moss_audio_jax.annotate.features import COARSE, FINE, ClipFeatures

# Lowest mean pitch in Hz of each class. Men speak at about 85-155 Hz, women at 165-255.
PITCH_WORDS = ((0.0, "low-pitched"), (130.0, "medium-pitched"), (220.0, "high-pitched"))
# Lowest words per minute of each class.
RATE_WORDS = ((0.0, "slow"), (140.0, "normal"), (205.0, "fast"))
LOUDNESS_WORDS = ((-200.0, "quiet"), (-35.0, "normal"), (-17.0, "loud"))  # dBFS


@dataclasses.dataclass(frozen=True)
class SpeakerOptions:
    """harmonicity: the lowest of a voiced frame. turn_distance: the least between two speakers."""

    harmonicity: float = 0.6
    turn_distance: float = 1.0


def describe_voice(
    features: ClipFeatures,
    start: float,
    end: float,
    words: int | None = None,
    options: SpeakerOptions = SpeakerOptions(),
) -> dict[str, Any]:
    """Measures a voice between two times in seconds.

    Args:
      words: the number of words, if a transcript gives it.

    Returns:
      {"pitch_hz", "pitch_range_semitones", "words_per_minute", "syllables_per_second",
      "level_dbfs", "pitch", "rate", "loudness"}: numbers, then words for them. A value is None if
      there is nothing to measure (whispering has no pitch).
    """
    span = features.span(start, end)
    level = 10 * np.log10(np.exp(span.bands * (np.log(10) / 10)).sum(axis=1) + 1e-10)
    loud = level > level.max() - 25
    voiced = loud & (span.harmonicity > options.harmonicity)
    enough = voiced.sum() >= 0.15 * COARSE and voiced.sum() >= 0.15 * loud.sum()
    pitch = float(np.median(span.pitch[voiced])) if enough else None
    spread = None
    if enough:
        low, high = np.percentile(12 * np.log2(span.pitch[voiced] / pitch), [10, 90])
        spread = round(float(high - low), 1)
    seconds = max(end - start, 1e-3)
    per_minute = round(60 * words / seconds, 1) if words else None
    syllables = round(_syllables(span) / seconds, 2)
    loudness = round(float(10 * np.log10(np.mean(10 ** (level[loud] / 10)))), 1)
    silent = level.max() < -75
    return {
        "pitch_hz": round(pitch, 1) if pitch else None,
        "pitch_range_semitones": spread,
        "words_per_minute": per_minute,
        "syllables_per_second": syllables,
        "level_dbfs": loudness,
        "pitch": _word(pitch, PITCH_WORDS),
        # English has about 1.4 syllables per word.
        "rate": None if silent else _word(per_minute or 60 * syllables / 1.4, RATE_WORDS),
        "loudness": _word(loudness, LOUDNESS_WORDS),
    }


def measured_speakers(
    features: ClipFeatures,
    sentences: Sequence[tuple[float, float]],
    options: SpeakerOptions = SpeakerOptions(),
) -> list[int]:
    """The speaker of each sentence, numbered in the order in which they first speak.

    Sentences, (start, end) in seconds, are grouped by the distance between their voices: pitch in
    octaves, and the mean spectrum of voiced frames. A sentence belongs to the nearest speaker; if
    none is nearer than `turn_distance`, to a new one.
    """
    speakers: list[list[np.ndarray]] = []
    who = []
    for start, end in sentences:
        voice = _voice(features.span(start, end), options)
        far = [float(np.linalg.norm(np.mean(known, axis=0) - voice)) for known in speakers]
        near = int(np.argmin(far)) if far and min(far) < options.turn_distance else len(speakers)
        if near == len(speakers):
            speakers.append([])
        speakers[near].append(voice)
        who.append(near)
    return who


def told_speakers(
    turns: Sequence[Mapping[str, Any]], sentences: Sequence[tuple[float, float]]
) -> list[int]:
    """The speaker of each sentence by a plug-in's turns, numbered in order of first speaking.

    A sentence belongs to the speaker who speaks longest during it; if nobody does, to the speaker
    of the nearest turn.

    Args:
      turns: {"speaker", "start", "end"} on the sentences' clock; at least one.
    """
    who: list[str] = []
    for start, end in sentences:
        shared = [min(end, turn["end"]) - max(start, turn["start"]) for turn in turns]
        spoken: dict[str, float] = {}
        for turn, seconds in zip(turns, shared, strict=True):
            spoken[turn["speaker"]] = spoken.get(turn["speaker"], 0.0) + max(seconds, 0.0)
        most = max(spoken, key=spoken.__getitem__)
        # Where nobody speaks, `shared` is minus the time to the turn.
        who.append(most if spoken[most] > 0 else turns[int(np.argmax(shared))]["speaker"])
    numbers = {speaker: number for number, speaker in enumerate(dict.fromkeys(who))}
    return [numbers[speaker] for speaker in who]


def _voice(span: ClipFeatures, options: SpeakerOptions) -> np.ndarray:
    """A vector of log pitch and the spectrum's shape; those of two speakers are about 1 apart."""
    level = span.bands.max(axis=1)
    loud = level > level.max() - 25
    voiced = loud & (span.harmonicity > options.harmonicity)
    chosen = voiced if voiced.sum() >= 4 else loud
    octave = float(np.median(np.log2(span.pitch[voiced]))) if voiced.sum() >= 4 else 0.0
    mean = span.bands[chosen].mean(axis=0)
    mean = np.maximum(mean, mean.max() - 45)
    # Four broad bands, because finer ones depend on what is said rather than on who says it.
    shape = (mean - mean.mean())[:28].reshape(4, 7).mean(axis=1) / 25
    return np.array([2.2 * octave, *shape])


def _syllables(span: ClipFeatures) -> int:
    """Number of peaks of the smoothed energy that rise 2 dB above the dips around them."""
    if len(span.energy) < 10:
        return 0
    window = np.hanning(13)
    smooth = np.convolve(np.maximum(span.energy, span.energy.max() - 30), window / window.sum())
    smooth = smooth[6 : 6 + len(span.energy)]
    slope = np.diff(smooth)
    turns = np.flatnonzero((slope[:-1] > 0) & (slope[1:] <= 0)) + 1
    peaks: list[int] = []
    for at in turns:
        if smooth[at] < span.energy.max() - 22:
            continue
        if peaks:
            dip = smooth[peaks[-1] : at].min()
            if min(smooth[peaks[-1]], smooth[at]) - dip < 2 or at - peaks[-1] < 0.08 * FINE:
                if smooth[at] > smooth[peaks[-1]]:
                    peaks[-1] = int(at)
                continue
        peaks.append(int(at))
    return len(peaks)


def _word(value: float | None, words: tuple[tuple[float, str], ...]) -> str | None:
    if value is None:
        return None
    return next((name for least, name in reversed(words) if value >= least), None)
