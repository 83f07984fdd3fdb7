"""A segment while its record is being made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from moss_audio_jax.annotate.ears import Heard
from moss_audio_jax.annotate.posteriors import Posteriors
from moss_audio_jax.annotate.profile import CLASSES
from moss_audio_jax.annotate.record import Record, centi


@dataclasses.dataclass
class Work:
    """A segment, its sound and its evidence, while its record is being made."""

    wav: np.ndarray
    record: Record
    path: str  # of the clip's file
    heard: Heard | None = None
    tags: Posteriors | None = None  # of the small model or the given detector, starting at `start`
    notes: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def start(self) -> float:
        return self.record["start"]

    @property
    def end(self) -> float:
        return self.record["end"]

    @property
    def silent(self) -> bool:
        return self.record["level"]["silent"]

    def request(self, **evidence: Any) -> dict[str, Any]:
        keys = ("audio", "start", "end")
        return {
            "clip": self.path,
            **{key: self.record[key] for key in keys},
            "duration": round(self.end - self.start, 3),
            "evidence": evidence,
        }

    def told(self, field: str, system: str) -> None:
        self.record["provenance"].append({"field": field, "system": system})

    def last(self) -> float:
        """The last multiple of 10 ms within the segment."""
        return int(100 * self.end + 1e-6) / 100

    def span(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """An item with times of the clip, converted to times of the file."""
        start = min(centi(self.start + item["start"]), self.last())
        return {
            **item,
            "start": start,
            "end": max(start, min(centi(self.start + item["end"]), self.last())),
        }


def new_record(name: str, audio: str, clip: str, start: float, end: float) -> Record:
    return {
        "id": name,
        "audio": audio,
        "start": start,
        "end": end,
        "clip": clip,
        "profile": dict.fromkeys(CLASSES, 0.0),
        "level": {"peak_dbfs": None, "silent": False, "clipped": 0.0},
        "familiarity": None,
        "doubt": None,
        "doubtful": [],
        "language": None,
        "asr": [],
        "wer_agreement": None,
        "transcript": None,
        "words": [],
        "sentences": [],
        "speakers": [],
        "music": {},
        "events": [],
        "absent": [],
        "anchor": None,
        "captions": {"speech": None, "music": None, "sound": None},
        "unified": "",
        "provenance": [],
    }


def part(given: Posteriors, start: float, end: float) -> Posteriors:
    """A detector's frames between two times; at least one."""
    first = min(round(start * given.fps), len(given.frames) - 1)
    last = max(min(round(end * given.fps), len(given.frames)), first + 1)
    return Posteriors(given.frames[first:last], given.fps, given.labels)
