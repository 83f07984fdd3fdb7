"""Cutting long audio at quiet places."""

from __future__ import annotations

import math
from numbers import Real

import numpy as np

from moss_audio_jax.audio.features import one_channel
from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.errors import UsageError
from moss_audio_jax.files import brief

_FRAME = SAMPLE_RATE // 50  # 20 ms
_SMOOTH = 15  # frames (0.3 s): a pause between words, not a dip within one


def quiet_windows(wav: np.ndarray, seconds: float) -> list[tuple[int, int]]:
    """Splits a waveform into windows of at most `seconds`, cut where it is quietest.

    Each cut lies in the last third of what its window could hold.

    Args:
      wav: float [n], 16 kHz mono.
      seconds: the longest a window may be, at least 1.

    Returns:
      (start, end) samples of each window; together they cover everything, without overlap.

    Raises:
      UsageError: `seconds` is below 1 or not finite.
      InputError: wav is not one-dimensional, or holds masked samples.
    """
    if not isinstance(seconds, Real) or not 1 <= seconds < math.inf:
        raise UsageError(f"windows of {brief(repr(seconds))} s; expected a number, at least 1 s")
    wav = one_channel(wav)
    limit = int(min(seconds, len(wav)) * SAMPLE_RATE)  # a huge number stays an integer
    windows, start = [], 0
    while len(wav) - start > limit:
        earliest = start + limit * 2 // 3
        cut = earliest + _quietest(wav[earliest : start + limit])
        windows.append((start, cut))
        start = cut
    return [*windows, (start, len(wav))]


def _quietest(wav: np.ndarray) -> int:
    """The sample in the middle of the quietest 0.3 s (of the whole, if it is shorter)."""
    frames = len(wav) // _FRAME
    if frames < _SMOOTH:
        return len(wav) // 2
    power = np.mean(np.square(wav[: frames * _FRAME]).reshape(frames, _FRAME), axis=1)
    smooth = np.convolve(power, np.ones(_SMOOTH), mode="valid")
    return int((np.argmin(smooth) + _SMOOTH / 2) * _FRAME)
