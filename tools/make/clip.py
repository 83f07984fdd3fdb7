"""Writes the bundled clip, moss_audio_jax/assets/bell_knocks_chirp.flac, for a first question.

It is made with NumPy, always with the same samples, and free of any rights. Its content, 6.00 s,
mono, 16 kHz, 16 bits:

    0.00 - 6.00   soft brown noise, like a quiet room (about 45 dB below full scale)
    0.50 - 2.30   one stroke of a bell: inharmonic partials above 660 Hz that decay
    2.70 - 3.50   three knocks on wood, at 2.70, 3.00 and 3.30 s
    4.00 - 5.50   a whistle that rises from 400 to 3200 Hz

    python tools/make/clip.py [FILE.flac]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import soundfile

RATE = 16_000
SECONDS = 6.0
TARGET = Path(__file__).parents[2] / "moss_audio_jax" / "assets" / "bell_knocks_chirp.flac"


def room(rng: np.random.Generator) -> np.ndarray:
    """Brown noise: leaky sums of white noise, float64 [6 s]."""
    white = rng.standard_normal(int(SECONDS * RATE))
    brown = np.empty_like(white)
    level = 0.0
    for i, step in enumerate(white):
        level = 0.98 * level + step
        brown[i] = level
    return 0.005 * brown / brown.std()


def bell(seconds: float = 1.8) -> np.ndarray:
    """A struck bell: partials at the ratios of a minor-third bell; high ones decay first."""
    t = np.arange(int(seconds * RATE)) / RATE
    partials = (
        (0.5, 0.3, 1.6),
        (1, 1, 2.2),
        (1.2, 0.7, 2.8),
        (1.5, 0.4, 3.5),
        (2, 0.8, 4),
        (2.7, 0.3, 7),
    )
    sound = sum(
        level * np.exp(-decay * t) * np.sin(2 * np.pi * 660 * ratio * t)
        for ratio, level, decay in partials
    )
    return _faded(0.14 * sound, 0.002, 0.3)


def knock(rng: np.random.Generator) -> np.ndarray:
    """A knock: a short burst and two damped resonances of a board."""
    t = np.arange(int(0.2 * RATE)) / RATE
    board = np.sin(2 * np.pi * 180 * t) + 0.6 * np.sin(2 * np.pi * 410 * t)
    burst = rng.standard_normal(len(t)) * np.exp(-220 * t)
    return _faded(0.4 * (board * np.exp(-28 * t) + 0.5 * burst), 0.001, 0.05)


def whistle(seconds: float = 1.5, low: float = 400.0, high: float = 3200.0) -> np.ndarray:
    """A sine whose pitch rises at a constant rate in octaves per second."""
    t = np.arange(int(seconds * RATE)) / RATE
    growth = np.log(high / low) / seconds
    phase = 2 * np.pi * low * (np.exp(growth * t) - 1) / growth
    return _faded(0.3 * np.sin(phase), 0.05, 0.1)


def clip() -> np.ndarray:
    """The whole clip, float64 [96000] in -1..1."""
    rng = np.random.default_rng(6)
    sound = room(rng)
    events = [(0.5, bell()), *((at, knock(rng)) for at in (2.7, 3.0, 3.3)), (4.0, whistle())]
    for second, event in events:
        start = round(second * RATE)
        sound[start : start + len(event)] += event
    return sound


def _faded(sound: np.ndarray, fade_in: float, fade_out: float) -> np.ndarray:
    """Linear fades of `fade_in` and `fade_out` seconds, to avoid clicks."""
    n = np.arange(len(sound))
    rise = (n + 1) / (fade_in * RATE)
    fall = (len(sound) - n) / (fade_out * RATE)
    return sound * np.minimum(1, np.minimum(rise, fall))


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.round(clip() * 32767).astype(np.int16)
    soundfile.write(path, samples, RATE, format="FLAC", subtype="PCM_16")
    print(f"{path}: {len(samples) / RATE:.2f} s, {path.stat().st_size} bytes")
