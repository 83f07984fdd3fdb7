"""Another generator of clips with known boundaries: pieces of sound, only NumPy, no world code."""

from __future__ import annotations

import numpy as np

RATE = 16_000
KINDS = ("chord", "noise", "babble", "clicks", "sweeps", "hum")


def clip(seed: int, pieces: tuple[int, int] = (4, 9)) -> tuple[np.ndarray, list[float]]:
    """(wav float32 [n], true boundaries in seconds).

    Pieces of 2 to 8 s, no two neighbours of one kind, butted together or 0.05 to 0.4 s apart (the
    boundary is then the middle of the gap), at levels 30 dB apart at most, over faint noise.
    """
    rng = np.random.default_rng(seed)
    parts, edges, at, kind = [], [], 0, None
    count = rng.integers(*pieces)
    for i in range(count):
        kind = rng.choice([k for k in KINDS if k != kind])
        wav = piece(str(kind), rng, int(rng.uniform(2, 8) * RATE))
        wav *= 10 ** (rng.uniform(-35, -12) / 20) / np.sqrt(np.mean(wav**2))
        ramp = int(0.01 * RATE)
        wav[:ramp] *= np.linspace(0, 1, ramp)
        wav[-ramp:] *= np.linspace(1, 0, ramp)
        parts.append(wav)
        at += len(wav)
        if i + 1 < count:
            gap = int(rng.uniform(0.05, 0.4) * RATE) if rng.random() < 0.5 else 0
            edges.append((at + gap / 2) / RATE)
            parts.append(np.zeros(gap))
            at += gap
    wav = np.concatenate(parts)
    wav += 10 ** (rng.uniform(-80, -60) / 20) * rng.standard_normal(len(wav))
    return (wav / max(1.0, np.abs(wav).max())).astype(np.float32), edges


def noisy(wav: np.ndarray, snr_db: float, seed: int) -> np.ndarray:
    """White noise at an SNR over the whole clip; float32."""
    rng = np.random.default_rng(seed)
    scale = np.sqrt(np.mean(wav.astype(float) ** 2) * 10 ** (-snr_db / 10))
    return (wav + scale * rng.standard_normal(len(wav))).astype(np.float32)


def piece(kind: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """float64 [n] of one kind, with one timbre throughout."""
    t = np.arange(n) / RATE
    if kind == "chord":
        root = 110 * 2 ** rng.uniform(0, 2.5)
        tones = [(r, h) for r in rng.choice([1, 1.2, 1.25, 1.5, 2], 3, False) for h in range(1, 5)]
        vibrato = 0.004 * np.sin(2 * np.pi * rng.uniform(4, 6) * t) / 5
        return sum(np.sin(2 * np.pi * root * r * h * (t + vibrato)) / h**1.5 for r, h in tones)
    if kind == "noise":
        low = 100 * 2 ** rng.uniform(0, 4.5)
        return shaped(rng, n, [(low, low * rng.uniform(0.3, 1.5), 1.0)])
    if kind == "babble":
        return babble(rng, n)
    if kind == "clicks":
        wav = np.zeros(n)
        length, hertz = int(0.06 * RATE), rng.uniform(300, 5000)
        u = np.arange(length) / RATE
        for first in np.arange(0.05, n / RATE - 0.1, 1 / rng.uniform(2, 7)):
            click = np.sin(2 * np.pi * hertz * u) + 0.5 * rng.standard_normal(length)
            at = int(first * RATE)
            wav[at : at + length] += (click * np.exp(-u / 0.012))[: n - at]
        return wav
    if kind == "sweeps":
        low, ratio, rate = rng.uniform(300, 900), rng.uniform(1.5, 3), rng.uniform(0.7, 2)
        hertz = low * ratio ** ((t * rate) % 1.0)
        return np.sin(2 * np.pi * np.cumsum(hertz) / RATE)
    base = rng.uniform(45, 120)
    wav = sum(np.sin(2 * np.pi * base * h * t + h) / h for h in range(1, 12))
    return wav * (1 + 0.4 * np.sin(2 * np.pi * rng.uniform(3, 12) * t))


def babble(rng: np.random.Generator, n: int) -> np.ndarray:
    """Syllables of glottal pulses or breath through two formants, four a second, with pauses."""
    wav, at, pitch = np.zeros(n), 0, rng.uniform(90, 240)
    while at < n:
        length = min(int(rng.uniform(0.13, 0.28) * RATE), n - at)
        t = np.arange(length) / RATE
        if rng.random() < 0.8:
            f0 = pitch * (1 + rng.uniform(-0.1, 0.1) + rng.uniform(-0.15, 0.15) * t / 0.2)
            f1, f2 = rng.uniform(300, 800), rng.uniform(900, 2400)
            phase = 2 * np.pi * np.cumsum(f0) / RATE
            gain = lambda f, f1=f1, f2=f2: (  # noqa: E731
                1 / (1 + ((f - f1) / 90) ** 2) + 0.4 / (1 + ((f - f2) / 140) ** 2) + 0.01
            )
            voice = sum(gain(pitch * h) * np.sin(h * phase) for h in range(1, int(4000 / pitch)))
        else:
            voice = 0.2 * shaped(rng, length, [(rng.uniform(3000, 5000), 1500, 1.0)])
        wav[at : at + length] = voice * np.hanning(length) ** 0.5
        at += length
        at += int((rng.uniform(0.25, 0.5) if rng.random() < 0.12 else 0.02) * RATE)
    return wav


def shaped(rng, n: int, peaks: list[tuple[float, float, float]]) -> np.ndarray:
    """Noise with spectral peaks of (Hz, width in Hz, gain)."""
    hertz = np.fft.rfftfreq(n, 1 / RATE)
    gain = sum(g * np.exp(-(((hertz - f) / w) ** 2)) for f, w, g in peaks)
    wav = np.fft.irfft(np.fft.rfft(rng.standard_normal(n)) * gain, n)
    return wav / (np.sqrt(np.mean(wav**2)) + 1e-12)
