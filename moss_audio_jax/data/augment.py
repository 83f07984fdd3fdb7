"""Optional changes to a clip, each a pure function of (seed, index in the mixture)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import soxr

from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Augment:
    """The changes that clips may get; the defaults change nothing.

    Attributes:
      speeds: speed factors to choose from (1.1: 10% faster and higher). A row keeps its speed where
        a text it teaches, a chosen branch included, has a digit, since that may be a time; so does
        a clip given as a mel. The times of a row's words and tags move with its clip.
      freq_masks: SpecAugment: so many bands of mel bins are blanked,
      freq_width: each of 0 to this many bins.
      time_masks: so many stretches of time are blanked,
      time_width: each of 0 to this many frames,
      time_share: but of no more than this share of the clip.
      warp: the mel axis is stretched by up to this share up or down, as a longer or shorter throat
        would (vocal tract length perturbation, Jaitly and Hinton 2013): other voices.
    """

    speeds: tuple[float, ...] = ()
    freq_masks: int = 0
    freq_width: int = 27
    time_masks: int = 0
    time_width: int = 100
    time_share: float = 0.1
    warp: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "speeds", tuple(self.speeds))
        for speed in self.speeds:
            if not 0.5 <= speed <= 2:
                raise InputError(f"augment.speeds holds {speed!r}; expected factors from 0.5 to 2")
        for key in ("freq_masks", "freq_width", "time_masks", "time_width"):
            if getattr(self, key) < 0:
                raise InputError(f"augment.{key} is {getattr(self, key)!r}; expected 0 or more")
        for key, most in (("time_share", 1.0), ("warp", 0.5)):
            if not 0 <= getattr(self, key) <= most:
                raise InputError(f"augment.{key} is {getattr(self, key)!r}; expected 0 to {most:g}")

    @property
    def masked(self) -> bool:
        return bool(self.freq_masks or self.time_masks)


def rng_for(seed: int, index: int) -> np.random.Generator:
    """The generator of one example's random choices."""
    return np.random.default_rng([seed, index])


def change_speed(wav: np.ndarray, speed: float) -> np.ndarray:
    """float32 [n] -> [about n / speed] at the same rate: tempo and pitch change together."""
    if speed == 1:
        return wav
    return soxr.resample(wav, SAMPLE_RATE * speed, SAMPLE_RATE, quality="HQ")


def mask_mel(mel: np.ndarray, augment: Augment, rng: np.random.Generator) -> np.ndarray:
    """SpecAugment on a log-mel [bins, frames]: a copy with bands and stretches at its minimum."""
    if not augment.masked:
        return mel
    bins, frames = mel.shape
    blank = mel.min()
    mel = mel.copy()
    for _ in range(augment.freq_masks):
        width = int(rng.integers(0, min(augment.freq_width, bins) + 1))
        start = int(rng.integers(0, bins - width + 1))
        mel[start : start + width] = blank
    longest = min(augment.time_width, math.floor(frames * augment.time_share))
    for _ in range(augment.time_masks):
        width = int(rng.integers(0, longest + 1))
        start = int(rng.integers(0, frames - width + 1))
        mel[:, start : start + width] = blank
    return mel


def warp_mel(mel: np.ndarray, augment: Augment, rng: np.random.Generator) -> np.ndarray:
    """A log-mel [bins, frames] whose bin b holds what bin b * f did, f from 1 - warp to 1 + warp.

    Bins beyond the last repeat it. The mel scale is near a logarithm over most of its bins, so a
    stretch of it is not quite one of frequencies.
    """
    if not augment.warp:
        return mel
    bins = len(mel)
    source = np.arange(bins) * (1 + rng.uniform(-augment.warp, augment.warp))
    below = np.minimum(source.astype(int), bins - 1)
    above = np.minimum(below + 1, bins - 1)
    share = (source - below).clip(0, 1).astype(np.float32)
    # Frame by frame and in place, as records hold mels: this is much of what a worker does.
    frames = mel.T.astype(np.float32)
    warped = np.take(frames, below, axis=1)
    frames = np.take(frames, above, axis=1)
    frames -= warped
    frames *= share
    warped += frames
    return warped.T
