"""Effects on a sound: a room, a band-limited line, background noise. float64 at 16 kHz."""

from __future__ import annotations

import numpy as np
from scipy import signal

from moss_audio_jax.draw import Draw
from moss_audio_jax.world.dsp import band_noise, band_pass, decay, harmonics, samples

BANDS = {"telephone": (300.0, 3400.0), "muffled": (60.0, 2400.0)}
NOISES = ("hiss", "rumble", "hum")


def reverberate(draw: Draw, wav: np.ndarray, rt60: float, wet_db: float) -> np.ndarray:
    """Adds a room's reverberation; the length and the time of the direct sound do not change.

    Args:
      rt60: seconds in which the reverberation falls by 60 dB.
      wet_db: power of the reverberation relative to the direct sound.
    """
    n = samples(rt60)
    tail = band_noise(draw, n, 100, 5000, 1) * decay(n, rt60)
    tail[: samples(draw.uniform(0.004, 0.012))] = 0  # nothing comes back before the first wall
    tail *= 10 ** (wet_db / 20) / np.sqrt(np.sum(tail**2))
    tail[0] += 1
    return signal.oaconvolve(wav, tail)[: len(wav)]


def band_limit(wav: np.ndarray, band: str) -> np.ndarray:
    return band_pass(wav, *BANDS[band], order=4)


def noise(draw: Draw, kind: str, n: int) -> np.ndarray:
    """Steady background noise [n] with RMS 1; `kind` is one of NOISES."""
    if kind == "hiss":
        wav = band_noise(draw, n, draw.choice((100, 400)), 8000, 1)
    elif kind == "rumble":
        wav = band_noise(draw, n, 0, draw.choice((150, 250)), 1)
    else:
        mains = draw.choice((50.0, 60.0))
        t = np.arange(n) / 16000
        weights = [draw.uniform(0.1, 1.0) / (1 + 0.15 * k) for k in range(12)]
        wav = harmonics(mains, t, weights) + 0.02 * draw.noise(n)
    return wav / np.sqrt(np.mean(wav**2))
