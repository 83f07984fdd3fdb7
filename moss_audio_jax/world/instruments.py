"""Instruments: a note's pitch and length -> float64 at 16 kHz, peak about 1."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import signal

from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.draw import Draw
from moss_audio_jax.text.labels import DRUMS, INSTRUMENTS
from moss_audio_jax.world.dsp import (
    band_noise,
    band_pass,
    decay,
    glide,
    harmonics,
    partials,
    samples,
    swell,
    times,
)


def frequency(midi: int) -> float:
    """Hz of a MIDI note number; A4, 440 Hz, is 69."""
    return 440.0 * 2 ** ((midi - 69) / 12)


def guitar(draw: Draw, hertz: float, seconds: float) -> np.ndarray:
    """Karplus-Strong: a burst of noise circulates in a delay line that damps it."""
    n = samples(seconds + 0.08)
    delay = SAMPLE_RATE / hertz - 0.5  # the damping filter [1, 1] / 2 adds half a sample
    whole = int(delay)
    part = delay - whole
    keep = 0.5 * 10 ** (-3 / (hertz * max(1.2, 2.2 - hertz / 500)))  # 60 dB in that many seconds
    line = np.zeros(whole + 3)
    line[0] = 1.0
    line[whole : whole + 3] -= keep * np.array([1 - part, 1.0, part])
    burst = np.zeros(n)
    size = whole + 1
    burst[:size] = band_pass(draw.noise(size), 0, 5000, 1)
    burst[:size] -= burst[:size].mean()
    wav = signal.lfilter([1.0], line, burst)
    return wav / np.abs(wav).max() * swell(n, 0.001, 0.08)


def piano(draw: Draw, hertz: float, seconds: float) -> np.ndarray:
    n = samples(seconds + 0.1)
    k = np.arange(1, 13)
    stretched = hertz * k * np.sqrt(1 + 0.0004 * k**2)  # a stiff string's partials run sharp
    weights = np.sin(np.pi * k * 0.13) / k**1.1  # struck at 13% of its length
    wav = partials(n, stretched, weights, [3.0 / (1 + 0.35 * i) for i in k])
    size = min(samples(0.03), n)
    wav[:size] += 0.08 * band_noise(draw, size, 200, 2500) * decay(size, 0.03)
    return wav / np.abs(wav).max() * swell(n, 0.002, 0.1)


def organ(draw: Draw, hertz: float, seconds: float) -> np.ndarray:
    t = times(seconds)
    tremble = 1 + 0.04 * np.sin(2 * np.pi * 6 * t)
    wav = harmonics(hertz, t, [1, 0.8, 0.3, 0.6, 0, 0.25, 0, 0.35]) * tremble
    return 0.4 * wav * swell(len(t), 0.02, 0.04)


def flute(draw: Draw, hertz: float, seconds: float) -> np.ndarray:
    t = times(seconds)
    vibrato = 1 + 0.006 * np.sin(2 * np.pi * 5.2 * t) * glide([0, 0.5, 1, 1], len(t))
    wav = harmonics(hertz * vibrato, t, [1, 0.28, 0.1, 0.03])
    breath = 0.05 * band_noise(draw, len(t), 0.9 * hertz, min(3 * hertz, 7000), 1)
    return 0.8 * (wav + breath) * swell(len(t), 0.045, 0.06)


def strings(draw: Draw, hertz: float, seconds: float) -> np.ndarray:
    t = times(seconds)
    weights = [1 / k for k in range(1, 16)]
    vibrato = 0.004 * np.sin(2 * np.pi * draw.uniform(5.0, 6.0) * t)
    wav = sum(harmonics(hertz * (d + vibrato), t, weights) for d in (0.997, 1.003))
    return 0.3 * wav * swell(len(t), 0.07, 0.1)


def trumpet(draw: Draw, hertz: float, seconds: float) -> np.ndarray:
    t = times(seconds)
    dull = harmonics(hertz, t, [1, 0.5, 0.25, 0.1])
    bright = harmonics(hertz, t, [0.7, 1, 1, 0.9, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1])
    blare = glide([0, 1, 0.8, 0.7, 0.3], len(t))
    return 0.3 * (dull * (1 - blare) + bright * blare) * swell(len(t), 0.03, 0.05)


def bass(draw: Draw, hertz: float, seconds: float) -> np.ndarray:
    n = samples(seconds)
    k = np.arange(1, 9)
    wav = partials(n, hertz * k, 1 / k**1.3, 1.6 / (1 + 0.3 * k))
    return wav / np.abs(wav).max() * swell(n, 0.004, 0.05)


def marimba(draw: Draw, hertz: float, seconds: float) -> np.ndarray:
    n = samples(min(seconds + 0.2, 0.9))
    wav = partials(n, [hertz, 3.93 * hertz, 9.5 * hertz], [1, 0.35, 0.12], [0.7, 0.18, 0.06])
    return wav / np.abs(wav).max() * swell(n, 0.002, 0.05)


MELODIC: dict[str, Callable[[Draw, float, float], np.ndarray]] = dict(
    zip(INSTRUMENTS, (guitar, piano, organ, flute, strings, trumpet, marimba), strict=True)
)


def kick(draw: Draw) -> np.ndarray:
    t = times(0.22)
    return np.sin(2 * np.pi * np.cumsum(45 + 110 * np.exp(-35 * t)) / SAMPLE_RATE) * decay(
        len(t), 0.25
    )


def snare(draw: Draw) -> np.ndarray:
    n = samples(0.18)
    wires = band_noise(draw, n, 1200, 7000, 1) * decay(n, 0.18)
    return 0.4 * wires + 0.5 * partials(n, [185, 330], [1, 0.6], [0.12, 0.1])


def hihat(draw: Draw) -> np.ndarray:
    n = samples(0.06)
    return 0.3 * band_noise(draw, n, 5500, 8000) * decay(n, 0.06)


PERCUSSION: dict[str, Callable[[Draw], np.ndarray]] = dict(
    zip(DRUMS, (kick, snare, hihat), strict=True)
)
