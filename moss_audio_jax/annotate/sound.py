"""The branch of general sound: events with times, the dominant sound, absent sounds."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moss_audio_jax.annotate import posteriors
from moss_audio_jax.annotate.posteriors import Posteriors
from moss_audio_jax.annotate.profile import CLASSES
from moss_audio_jax.annotate.record import centi
from moss_audio_jax.annotate.spans import SegmentOptions
from moss_audio_jax.text.labels import ALL_KINDS, Kind

Event = dict[str, Any]
_SOUND, _INSTRUMENT = "sound:", "instrument:"
_CATEGORY = {kind.category: kind.category for kind in ALL_KINDS.values()} | {
    "human sound": "sounds of things"  # claps and steps are not voices
}
SPOKEN = ("speech", "human voice", "singing", "music")  # other branches handle these


@functools.cache
def kinds_by_label() -> dict[str, Kind]:
    return {kind.label: kind for kind in ALL_KINDS.values()}


def clause(label: str) -> str:
    """ "a dog barks" if the label is a known kind of sound, else "LABEL is heard"."""
    kind = kinds_by_label().get(label)
    return kind.clause if kind else f"{label} is heard"


def tag_events(given: Posteriors) -> Posteriors:
    """The columns of the small model's tags that are sound events, named by their labels."""
    columns = [
        i
        for i, name in enumerate(given.labels)
        if name.removeprefix(_SOUND) in ALL_KINDS and name.startswith(_SOUND)
    ]
    labels = tuple(ALL_KINDS[given.labels[i].removeprefix(_SOUND)].label for i in columns)
    return Posteriors(given.frames[:, columns], given.fps, labels)


def tag_classes(given: Posteriors) -> dict[str, str]:
    """label -> coarse class of the small model's tags, for `profile_posteriors`."""
    found = {"speech": "speech", "music": "music"}
    for name in given.labels:
        kind = ALL_KINDS.get(name.removeprefix(_SOUND)) if name.startswith(_SOUND) else None
        if kind:
            found[name] = _CATEGORY[kind.category]
        elif name.startswith("background:"):
            found[name] = "environment"
    return found


def tag_instruments(given: Posteriors, least: float) -> list[str]:
    """Instruments whose tag reaches `least` in a tenth of the frames, the likeliest first."""
    found = {}
    for name, column in zip(given.labels, given.frames.T, strict=True):
        if name.startswith(_INSTRUMENT):
            found[name.removeprefix(_INSTRUMENT)] = float(np.percentile(column, 90))
    return [name for name in sorted(found, key=lambda n: (-found[n], n)) if found[name] >= least]


def tag_sex(given: Posteriors, spans: Sequence[tuple[float, float]]) -> str | None:
    """ "female" or "male" if the tags are sure about it in a speaker's turns; else None.

    Args:
      spans: seconds from the first frame.
    """
    parts = [given.frames[round(a * given.fps) : round(b * given.fps)] for a, b in spans]
    frames = np.concatenate(parts)
    if not len(frames):
        return None
    mean = dict(zip(given.labels, frames.mean(axis=0), strict=True))
    female, male = (float(mean.get(f"sex:{name}", 0.0)) for name in ("female", "male"))
    if max(female, male) < _SURE or min(female, male) > 1 - _SURE:
        return None
    return "female" if female > male else "male"


def without_branches(given: Posteriors, classes: Mapping[str, str]) -> Posteriors:
    """A detector's columns except speech, voices and music, which other branches handle."""
    columns = [i for i, name in enumerate(given.labels) if classes.get(name) not in SPOKEN]
    labels = tuple(given.labels[i] for i in columns)
    return Posteriors(given.frames[:, columns], given.fps, labels)


def events(given: Posteriors, start: float, end: float, options: SegmentOptions) -> list[Event]:
    """Events of posteriors, in order, in seconds of the file; the first frame is at `start`."""
    found = []
    for event in posteriors.events(given, options):
        first, last = centi(start + event["start"]), centi(min(start + event["end"], end))
        if first < last:
            found.append({**event, "start": first, "end": last})
    return found


def absent(given: Posteriors, heard: Sequence[Event], most: float) -> list[str]:
    """Labels whose score always stays below `most`, the least likely first."""
    top = dict(zip(given.labels, given.frames.max(axis=0).tolist(), strict=True))
    here = {event["label"] for event in heard}
    return [n for n in sorted(top, key=lambda n: (top[n], n)) if top[n] < most and n not in here]


def anchor(record: Mapping[str, Any]) -> str | None:
    """The dominant sound: the largest product of seconds and score; None without evidence."""
    seconds: dict[str, float] = {}
    for event in record["events"]:
        length = (event["end"] - event["start"]) * event["score"]
        seconds[event["label"]] = seconds.get(event["label"], 0.0) + length
    profile = record["profile"]
    turns = [turn for speaker in record["speakers"] for turn in speaker["turns"]]
    if turns:
        spoken = sum(turn["end"] - turn["start"] for turn in turns)
        seconds["speech"] = spoken * max(profile["speech"], 0.5)
    if record["music"]:
        length = record["music"]["end"] - record["music"]["start"]
        seconds["music"] = length * max(profile["music"], 0.5)
    return max(sorted(seconds), key=seconds.get) if seconds else None


def mixed(signal: Mapping[str, float], tags: Mapping[str, float]) -> dict[str, float]:
    """A profile that combines the scores of the tags and of the signal statistics.

    On synthetic scenes the tags are reliable about speech and music, and the signal statistics are
    not. The tags know less about real voices and music.
    """
    known = ("speech", "music", "animal", "natural sound", "sounds of things", "environment")
    scores = {n: (_TAGS * tags[n] + (1 - _TAGS) * signal[n]) for n in known}
    # Background noise under another sound is not the subject of the segment.
    scores["environment"] *= 1 - max(scores[n] for n in known if n != "environment") / 2
    scores["singing"] = signal["singing"]
    scores["human voice"] = max(scores["speech"], scores["singing"])
    scores["source-ambiguous"] = 1 - max(scores.values())
    return {name: round(scores[name], 3) for name in CLASSES}


_TAGS = 0.75  # weight of the tags in a mixed profile
_SURE = 0.6  # from this mean over all turns, pauses included, a tag counts as sure
