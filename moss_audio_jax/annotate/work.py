"""A segment on its way to a record."""

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
    """A segment on its way to a record."""

    wav: np.ndarray
    record: Record
    path: str  # of its clip
    heard: Heard | None = None
    tags: Posteriors | None = None  # of the small model, or of the detector given, from `start` on
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
        """The latest time on the grid within the segment."""
        return int(100 * self.end + 1e-6) / 100

    def span(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """An item on the clip's clock as one on the file's."""
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
    """A detector's frames from one time to another, at least one of them."""
    first = min(round(start * given.fps), len(given.frames) - 1)
    last = max(min(round(end * given.fps), len(given.frames)), first + 1)
    return Posteriors(given.frames[first:last], given.fps, given.labels)
