"""Signals of which sounds and instruments are built. float64 at 16 kHz; times are seconds."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from scipy import signal

from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.draw import Draw

# Relative to a sound's loudest 5 ms. A sound starts and ends where it crosses this level.
AUDIBLE = 10 ** (-40 / 20)


def samples(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE)


def times(seconds: float) -> np.ndarray:
    return np.arange(samples(seconds)) / SAMPLE_RATE


def tone(frequency: np.ndarray | float, t: np.ndarray, phase: float = 0.0) -> np.ndarray:
    """A sine whose frequency, in Hz, may change over t [n]."""
    if np.ndim(frequency) == 0:
        return np.sin(2 * np.pi * (frequency * t + phase))
    return np.sin(2 * np.pi * (np.cumsum(frequency) / SAMPLE_RATE + phase))


def harmonics(
    frequency: np.ndarray | float, t: np.ndarray, weights: Sequence[float] | np.ndarray
) -> np.ndarray:
    """Sines at 1, 2, 3, ... times the frequency; those above 7.5 kHz are left out."""
    cycles = frequency * t if np.ndim(frequency) == 0 else np.cumsum(frequency) / SAMPLE_RATE
    # e^(ikx) by repeated multiplication: one sine and one cosine instead of one for each harmonic.
    step = np.exp(2j * np.pi * cycles)
    turn, out = step.copy(), np.zeros(len(t))
    highest = np.max(frequency)
    for k, weight in enumerate(weights, 1):
        if k * highest > 7500:
            break
        if weight:
            out += weight * turn.imag
        turn *= step
    return out


def formants(
    count: int, base: float, peaks: Sequence[tuple[float, float]], tilt: float = 1.0
) -> np.ndarray:
    """Weights of harmonics of `base` Hz under resonances (centre, width) in Hz; [count]."""
    f = base * np.arange(1, count + 1)
    shape = sum(1 / (1 + ((f - centre) / width) ** 2) for centre, width in peaks)
    return shape / np.arange(1, count + 1) ** tilt


def glide(points: Sequence[float], n: int) -> np.ndarray:
    """A smooth curve [n] through evenly spaced points."""
    at = np.linspace(0, len(points) - 1, n)
    low = np.minimum(at.astype(int), len(points) - 2)
    part = at - low
    part = part * part * (3 - 2 * part)
    values = np.asarray(points, np.float64)
    return values[low] * (1 - part) + values[low + 1] * part


def decay(n: int, seconds: float) -> np.ndarray:
    """An exponential decay [n] that falls by 60 dB in `seconds`."""
    return np.exp(-6.907755 / (seconds * SAMPLE_RATE) * np.arange(n))


def swell(n: int, attack: float, release: float) -> np.ndarray:
    """1, with half-cosine ramps at the ends; [n]."""
    out = np.ones(n)
    for seconds, at in ((attack, slice(None)), (release, slice(None, None, -1))):
        size = min(max(samples(seconds), 1), n)
        ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(size) + 0.5) / size)
        out[at][:size] *= ramp
    return out


def band_noise(draw: Draw, n: int, low: float, high: float, order: int = 2) -> np.ndarray:
    """Noise [n] between two frequencies in Hz; 0 and 8000 mean no bound. Variance about 1."""
    wav = band_pass(draw.noise(n), low, high, order)
    return wav / np.sqrt(np.mean(wav**2) + 1e-20)


def band_pass(wav: np.ndarray, low: float, high: float, order: int = 2) -> np.ndarray:
    """A Butterworth filter; 0 and 8000 Hz mean no bound."""
    # Rounded (to 100 Hz above 1 kHz, which nobody hears), so that the cached filters are reused:
    # designing a filter takes longer than applying it.
    low, high = (round(f) if f < 1000 else round(f / 100) * 100 for f in (low, high))
    return signal.sosfilt(_band(low, high, order), wav)


@functools.lru_cache(4096)
def _band(low: int, high: int, order: int) -> np.ndarray:
    if low <= 0:
        return signal.butter(order, min(high, 7900), "low", fs=SAMPLE_RATE, output="sos")
    if high >= 8000:
        return signal.butter(order, low, "high", fs=SAMPLE_RATE, output="sos")
    return signal.butter(order, (low, high), "band", fs=SAMPLE_RATE, output="sos")


def partials(
    n: int, frequencies: Sequence[float], weights: Sequence[float], t60: Sequence[float]
) -> np.ndarray:
    """Struck metal, wood or glass: sines that decay, each at its own rate; [n]."""
    t = np.arange(n) / SAMPLE_RATE
    out = np.zeros(n)
    for frequency, weight, seconds in zip(frequencies, weights, t60, strict=True):
        if frequency < 7800:
            size = min(n, samples(1.2 * seconds))
            out[:size] += weight * np.sin(2 * np.pi * frequency * t[:size]) * decay(size, seconds)
    return out


def place(pieces: Sequence[tuple[int, np.ndarray]], n: int | None = None) -> np.ndarray:
    """The sum of pieces (first sample, wav), in n samples; None: as many as they need."""
    total = max(at + len(wav) for at, wav in pieces) if n is None else n
    out = np.zeros(total)
    for at, wav in pieces:
        wav = wav[: max(total - at, 0)]
        out[at : at + len(wav)] += wav
    return out


def moving_rms(wav: np.ndarray, seconds: float, hop: int) -> np.ndarray:
    """RMS of windows of `seconds` that begin every `hop` samples; at least one window."""
    size = min(samples(seconds), len(wav))
    power = np.concatenate([np.zeros(1), np.cumsum(wav * wav)])
    starts = np.arange(0, len(wav) - size + 1, hop)
    return np.sqrt(np.maximum(power[starts + size] - power[starts], 0) / size)


def audible(wav: np.ndarray, threshold: float = AUDIBLE) -> tuple[int, int]:
    """First and last sample (exclusive) where |wav| exceeds `threshold` times its loudest 5 ms."""
    level = threshold * moving_rms(wav, 0.005, 16).max()
    heard = np.flatnonzero(np.abs(wav) > level)
    return (int(heard[0]), int(heard[-1]) + 1) if len(heard) else (0, len(wav))


def loudest(wav: np.ndarray) -> float:
    """RMS of the loudest 50 ms, by which the levels of sounds are compared."""
    return float(moving_rms(wav, 0.05, 80).max())


def median_f0(wav: np.ndarray, low: float = 60.0, high: float = 450.0) -> float:
    """The pitch of a voice in Hz by autocorrelation; 0 if it has none.

    The median over frames of 50 ms, 25 ms apart, that are loud and periodic.
    """
    size, hop = 800, 400
    if len(wav) < size:
        wav = np.pad(wav, (0, size - len(wav)))
    frames = np.lib.stride_tricks.sliding_window_view(wav, size)[::hop]
    power = (frames**2).mean(1)
    frames = frames[power > 0.05 * power.max()]
    spectrum = np.fft.rfft(frames - frames.mean(1, keepdims=True), 2 * size)
    correlation = np.fft.irfft(np.abs(spectrum) ** 2)[:, :size]
    correlation /= (correlation[:, :1] + 1e-12) * (1 - np.arange(size) / size)
    first, last = int(SAMPLE_RATE / high), int(SAMPLE_RATE / low)
    lags = first + np.argmax(correlation[:, first:last], axis=1)
    strong = correlation[np.arange(len(lags)), lags] > 0.6
    return float(SAMPLE_RATE / np.median(lags[strong])) if strong.sum() > 2 else 0.0
