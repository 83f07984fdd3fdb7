"""Bells, alarms, machines and household things, synthesised; see `sounds_living`."""

from __future__ import annotations

import numpy as np

from moss_audio_jax.draw import Draw
from moss_audio_jax.world.dsp import (
    band_noise,
    band_pass,
    decay,
    glide,
    harmonics,
    partials,
    place,
    samples,
    swell,
    times,
    tone,
)
from moss_audio_jax.world.sounds_living import Made, repeated


def paced(draw: Draw, low: int, high: int, period: float, jitter: float, make) -> Made:
    """`low` to `high` pieces make(i), one every `period` seconds, varied by `jitter` of it."""
    pieces = []
    for i in range(draw.integer(low, high)):
        at = (i + (draw.uniform(-jitter, jitter) if i else 0.0)) * period
        pieces.append((samples(at), make(i)))
    return place(pieces), [first for first, _ in pieces]


def bell(draw: Draw) -> Made:
    pitch, ring = draw.log_uniform(280, 900), draw.uniform(1.5, 3.0)
    ratios = (0.5, 1, 1.19, 1.5, 2, 2.51, 2.66, 3.01, 4.1, 5.4)
    weights = [draw.uniform(0.4, 1.0) / (1 + 0.3 * k) for k in range(len(ratios))]
    stroke = partials(
        samples(ring),
        [pitch * r for r in ratios],
        weights,
        [ring / (0.6 + 0.5 * r) for r in ratios],
    )
    return paced(draw, 1, 3, draw.uniform(0.8, 1.2), 0.05, lambda _: stroke * draw.uniform(0.8, 1))


def doorbell(draw: Draw) -> Made:
    high = draw.uniform(620, 820)
    low = high / draw.choice((1.25, 1.26, 1.335))
    gap = samples(draw.uniform(0.4, 0.6))

    def ding_dong(_: int) -> np.ndarray:
        notes = [
            partials(
                samples(1.1), [f, 2 * f, 3.01 * f, 4.2 * f], [1, 0.4, 0.15, 0.1], [1, 0.8, 0.4, 0.2]
            )
            for f in (high, low)
        ]
        return place([(0, notes[0]), (gap, notes[1])])

    return repeated(draw, 1, 2, (0.1, 0.4), ding_dong)


def siren(draw: Draw) -> Made:
    t = times(draw.uniform(2.0, 4.5))
    low, high = draw.uniform(450, 650), draw.uniform(1000, 1500)
    cycle = (t / draw.choice((0.4, 1.2, 2.5)) * draw.uniform(0.9, 1.1)) % 1.0
    if draw.chance(0.35):  # two tones in turn
        low = high / draw.uniform(1.25, 1.4)
        f0 = np.where(cycle < 0.5, low, high)
    else:
        f0 = low + (high - low) * np.where(cycle < 0.6, cycle / 0.6, (1 - cycle) / 0.4)
    return harmonics(f0, t, [1, 0.5, 0.35, 0.2, 0.1]) * swell(len(t), 0.05, 0.15), []


def alarm(draw: Draw) -> Made:
    pitch, length = draw.uniform(1700, 3200), draw.uniform(0.07, 0.18)

    def beep(_: int) -> np.ndarray:
        t = times(length)
        return harmonics(pitch, t, [1, 0, 0.3]) * swell(len(t), 0.004, 0.004)

    return repeated(draw, 3, 8, (0.9 * length, 0.9 * length + 1e-9), beep)


def phone(draw: Draw) -> Made:
    low, rate = draw.uniform(900, 1400), draw.uniform(16, 26)
    high = low * draw.uniform(1.2, 1.4)

    def ring(_: int) -> np.ndarray:
        t = times(draw.uniform(0.7, 1.0))
        first = np.sin(2 * np.pi * rate * t) > 0
        f0 = np.where(first, low, high)
        clap = 0.6 + 0.4 * np.exp(-6 * ((2 * rate * t) % 1.0))
        return harmonics(f0, t, [1, 0.5, 0.3, 0.15]) * clap * swell(len(t), 0.01, 0.05)

    return repeated(draw, 1, 3, (0.5, 0.8), ring)


def horn(draw: Draw) -> Made:
    pitch = draw.uniform(330, 460)

    def honk(_: int) -> np.ndarray:
        t = times(draw.uniform(0.25, 0.6))
        weights = [1, 0.9, 0.8, 0.6, 0.5, 0.35, 0.25, 0.2]
        wav = harmonics(pitch, t, weights) + harmonics(1.26 * pitch, t, weights)
        return wav * swell(len(t), 0.015, 0.03)

    return repeated(draw, 1, 3, (0.15, 0.4), honk)


def train(draw: Draw) -> Made:
    pitch = draw.uniform(280, 400)

    def blast(_: int) -> np.ndarray:
        t = times(draw.uniform(0.9, 1.6))
        bend = glide([0.9, 1, 1, 1, 0.93], len(t))
        chord = sum(harmonics(r * pitch * bend, t, [1, 0.3, 0.12]) for r in (1, 1.19, 1.5, 1.68))
        return (chord + 0.5 * band_noise(draw, len(t), 700, 4000)) * swell(len(t), 0.12, 0.25)

    return repeated(draw, 1, 2, (0.2, 0.4), blast)


def engine(draw: Draw) -> Made:
    t = times(draw.uniform(2.0, 4.5))
    base = draw.uniform(22, 38)
    revs = glide([base * draw.uniform(0.85, 1.9) for _ in range(5)], len(t))
    cycle = np.cumsum(revs) / 16000
    strokes = np.exp(-5 * (cycle % 1.0)) + 0.5 * np.exp(-5 * ((cycle + 0.5) % 1.0))
    wav = strokes * band_noise(draw, len(t), 40, 700) + harmonics(2 * revs, t, [1, 0.8, 0.6, 0.4])
    return wav * swell(len(t), 0.15, 0.3), []


def helicopter(draw: Draw) -> Made:
    t = times(draw.uniform(2.0, 4.5))
    rate = draw.uniform(9, 14)
    chop = np.exp(-7 * ((rate * t) % 1.0))
    whine = 0.15 * harmonics(draw.uniform(250, 500), t, [1, 0.5, 0.5, 0.3])
    wav = chop * band_noise(draw, len(t), 60, 1400, 1) + whine * (0.5 + chop)
    distance = glide([draw.uniform(0.3, 1) for _ in range(4)], len(t))
    return wav * distance * swell(len(t), 0.2, 0.3), []


def knock(draw: Draw) -> Made:
    pitch = draw.log_uniform(130, 330)

    def hit(_: int) -> np.ndarray:
        n = samples(0.12)
        body = partials(n, [pitch, 1.9 * pitch, 3.3 * pitch], [1, 0.6, 0.3], [0.12, 0.08, 0.05])
        return (body + 0.3 * band_noise(draw, n, 600, 3000) * decay(n, 0.03)) * draw.uniform(0.8, 1)

    return paced(draw, 2, 5, draw.uniform(0.2, 0.34), 0.04, hit)


def clap(draw: Draw) -> Made:
    low, high = draw.uniform(700, 1100), draw.uniform(2200, 3400)

    def hit(_: int) -> np.ndarray:
        n = samples(0.12)
        burst = band_noise(draw, n, low, high) * decay(n, 0.1)
        early = samples(0.008)
        return place([(0, 0.5 * burst), (early, burst)], n)

    return paced(draw, 1, 5, draw.uniform(0.3, 0.5), 0.06, hit)


def applause(draw: Draw) -> Made:
    n = samples(draw.uniform(2.0, 4.5))
    pieces = []
    hands = [(draw.integer(7, 15) * 100, draw.integer(25, 45) * 100) for _ in range(8)]
    for _ in range(round(n / 16000 * draw.uniform(35, 70))):
        size = samples(0.04)
        burst = band_noise(draw, size, *draw.choice(hands))
        at = draw.integer(0, n - size)
        pieces.append((at, burst * decay(size, 0.05) * draw.uniform(0.2, 1)))
    return place(pieces, n) * swell(n, 0.4, 0.8), []


def footsteps(draw: Draw) -> Made:
    pitch, scuff = draw.uniform(75, 130), draw.uniform(1500, 3000)

    def step(i: int) -> np.ndarray:
        n = samples(0.16)
        heel = partials(n, [pitch * (1.1 if i % 2 else 1)], [1.0], [0.1])
        heel += 0.35 * band_noise(draw, n, 200, 900) * decay(n, 0.05)
        toe = 0.25 * band_noise(draw, n, scuff, 5500) * decay(n, 0.07)
        return place([(0, heel), (samples(0.055), toe)], n)

    return paced(draw, 3, 8, draw.uniform(0.38, 0.62), 0.03, step)


def keyboard(draw: Draw) -> Made:
    at, pieces, end = 0, [], samples(draw.uniform(1.2, 3.0))
    while at < end:
        n = samples(0.03)
        key = partials(n, [draw.uniform(1800, 3500)], [0.5], [0.02])
        key += band_noise(draw, n, 2500, 7000) * decay(n, 0.012)
        pieces.append((at, key * draw.uniform(0.5, 1)))
        at += samples(draw.uniform(0.07, 0.2))
    return place(pieces), []


def glass(draw: Draw) -> Made:
    n = samples(draw.uniform(0.8, 1.4))
    crash = band_noise(draw, n, 2000, 7800) * decay(n, 0.12)
    pieces = [(0, 1.5 * crash)]
    for _ in range(draw.integer(14, 26)):  # shards
        at = samples(0.55 * n / 16000 * draw.uniform() ** 2)
        shards = [draw.uniform(2200, 7500) for _ in range(3)]
        size = min(samples(0.3), n - at)
        pieces.append(
            (at, draw.uniform(0.2, 0.8) * partials(size, shards, [1, 0.7, 0.5], [0.25] * 3))
        )
    return place(pieces, n), []


def clock(draw: Draw) -> Made:
    pitch = draw.uniform(1500, 2600)

    def tick(i: int) -> np.ndarray:
        n, f = samples(0.06), pitch * (0.75 if i % 2 else 1.0)
        wav = partials(n, [f, 1.8 * f, 2.7 * f], [1, 0.6, 0.4], [0.04, 0.03, 0.02])
        return wav + 0.3 * band_noise(draw, n, 1000, 7000) * decay(n, 0.006)

    return paced(draw, 4, 9, draw.choice((0.4, 0.5, 0.6)), 0.0, tick)


def hammer(draw: Draw) -> Made:
    pitch = draw.uniform(900, 1700)
    ratios = (1, 1.52, 2.28, 2.93, 3.71, 4.6)

    def hit(_: int) -> np.ndarray:
        n = samples(0.45)
        ring = partials(n, [pitch * r for r in ratios], [1, 0.8, 0.8, 0.6, 0.5, 0.4], [0.4] * 6)
        return (ring + 1.5 * band_noise(draw, n, 500, 7000) * decay(n, 0.03)) * draw.uniform(0.8, 1)

    return paced(draw, 2, 5, draw.uniform(0.42, 0.7), 0.05, hit)


def saw(draw: Draw) -> Made:
    stroke, teeth = draw.uniform(0.28, 0.45), draw.uniform(70, 130)

    def pull(i: int) -> np.ndarray:
        t = times(stroke)
        rasp = np.exp(-3 * ((teeth * t) % 1.0))
        centre = 1300 if i % 2 else 2100
        wav = band_noise(draw, len(t), 0.6 * centre, 2.2 * centre) * rasp
        return wav * swell(len(t), 0.35 * stroke, 0.35 * stroke)

    return repeated(draw, 4, 8, (0.0, 0.03), pull)[0], []


def drill(draw: Draw) -> Made:
    t = times(draw.uniform(1.2, 3.0))
    base = draw.uniform(140, 210)
    f0 = base * glide([0.35, 1, 1, draw.uniform(0.8, 1), draw.uniform(0.8, 1), 1, 0.5], len(t))
    wav = harmonics(f0, t, [0.3, 0.5, 0.8, 1, 0.8, 1, 0.7, 0.9, 0.6, 0.7, 0.5, 0.5, 0.4, 0.4, 0.3])
    wav = band_pass(wav, 400, 7000, 1)
    return (wav + 0.8 * band_noise(draw, len(t), 2500, 7500)) * swell(len(t), 0.05, 0.1), []


def laser(draw: Draw) -> Made:
    """The falling zap of an arcade game."""
    high, low = draw.uniform(2500, 4500), draw.uniform(150, 400)

    def zap(_: int) -> np.ndarray:
        t = times(draw.uniform(0.18, 0.35))
        f0 = high * (low / high) ** (t / t[-1])
        return np.sign(tone(f0, t)) * 0.5 * swell(len(t), 0.002, 0.03) + 0.5 * tone(f0, t)

    return repeated(draw, 1, 4, (0.1, 0.3), zap)
