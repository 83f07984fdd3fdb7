"""Makes a sound event of a kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moss_audio_jax.draw import Draw
from moss_audio_jax.text.labels import KINDS
from moss_audio_jax.world import sounds_living as living
from moss_audio_jax.world import sounds_things as things
from moss_audio_jax.world.dsp import audible, loudest


class Sound(NamedTuple):
    """wav float64 [n], first to last audible sample; the RMS of its loudest 50 ms is 1.

    `file` names the recording, if it is one.
    """

    wav: np.ndarray
    onsets: list[int]  # of its units (barks, knocks), in samples; [] if they cannot be counted
    file: str | None = None


# A function with the kind's name makes it: Draw -> (wav float64 [n], first samples of units).
_MAKERS: dict[str, Callable[[Draw], living.Made]] = {
    kind: getattr(living, kind, None) or getattr(things, kind) for kind in KINDS
}


def make(kind: str, draw: Draw) -> Sound:
    """One sound of a kind; `kind` is a key of KINDS."""
    wav, onsets = _MAKERS[kind](draw)
    first, last = audible(wav)
    wav = wav[first:last]
    if KINDS[kind].unit is None:
        onsets = []
    return Sound(wav / loudest(wav), [max(onset - first, 0) for onset in onsets])
