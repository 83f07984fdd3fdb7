"""Animals, people and weather, synthesised. Each maker: Draw -> (wav, onsets of its units)."""

from __future__ import annotations

import numpy as np

from moss_audio_jax.draw import Draw
from moss_audio_jax.world.dsp import (
    band_noise,
    band_pass,
    decay,
    formants,
    glide,
    harmonics,
    place,
    samples,
    swell,
    times,
    tone,
)

Made = tuple[np.ndarray, list[int]]


def repeated(draw: Draw, low: int, high: int, gap: tuple[float, float], make) -> Made:
    """`low` to `high` pieces make(i), each `gap` seconds after the end of the one before."""
    pieces, at = [], 0
    for i in range(draw.integer(low, high)):
        wav = make(i)
        pieces.append((at, wav))
        at += len(wav) + samples(draw.uniform(*gap))
    return place(pieces), [first for first, _ in pieces]


def dog(draw: Draw) -> Made:
    size = draw.log_uniform(0.7, 1.5)  # a large dog is low and slow

    def bark(_: int) -> np.ndarray:
        t = times(draw.uniform(0.13, 0.2) * size)
        f0 = glide([320 / size, 620 / size, 420 / size, 260 / size], len(t)) * draw.uniform(
            0.9, 1.1
        )
        voice = harmonics(f0, t, formants(14, 450 / size, [(800 / size, 250), (1700, 400)], 0.3))
        rough = band_noise(draw, len(t), 500, 3500)
        wav = voice * (1 + 0.4 * rough) + 0.12 * np.abs(voice).max() * rough
        return wav * swell(len(t), 0.008, 0.09 * size)

    return repeated(draw, 1, 4, (0.12, 0.35), bark)


def cat(draw: Draw) -> Made:
    def meow(_: int) -> np.ndarray:
        t = times(draw.uniform(0.55, 1.0))
        base = draw.uniform(380, 620)
        f0 = glide([0.85 * base, 1.25 * base, 1.15 * base, 0.8 * base], len(t))
        narrow = harmonics(f0, t, formants(10, base, [(600, 200), (2600, 500)], 0.4))
        wide = harmonics(f0, t, formants(10, base, [(1100, 350), (1900, 400)], 0.4))
        opening = glide([0, 0.7, 1, 0.4, 0], len(t))
        wav = narrow * (1 - opening) + wide * opening + 0.03 * band_noise(draw, len(t), 2000, 6000)
        return wav * swell(len(t), 0.08, 0.2)

    return repeated(draw, 1, 2, (0.4, 0.8), meow)


def bird(draw: Draw) -> Made:
    centre, shape = draw.uniform(2600, 4800), draw.integer(0, 2)
    length = draw.uniform(0.05, 0.12)

    def chirp(i: int) -> np.ndarray:
        t = times(length * draw.uniform(0.85, 1.15))
        low, high = 0.8 * centre, 1.25 * centre
        points = ([low, high], [high, low], [low, high, low])[shape]
        wobble = 1 + 0.04 * np.sin(2 * np.pi * draw.uniform(25, 45) * t)
        return tone(glide(points, len(t)) * wobble, t) * swell(len(t), 0.01, 0.02)

    return repeated(draw, 4, 9, (0.05, 0.16), chirp)


def cow(draw: Draw) -> Made:
    def moo(_: int) -> np.ndarray:
        t = times(draw.uniform(1.0, 1.7))
        base = draw.uniform(95, 150)
        f0 = glide([0.85 * base, base, 1.08 * base, base, 0.75 * base], len(t))
        closed = harmonics(f0, t, formants(20, base, [(260, 90)], 0.3))
        opened = harmonics(f0, t, formants(20, base, [(450, 120), (900, 150), (2200, 300)], 0.2))
        mouth = glide([0, 0.6, 1, 0.8, 0.2], len(t))
        wav = closed * (1 - mouth) + opened * mouth
        return wav * (1 + 0.15 * band_noise(draw, len(t), 20, 120)) * swell(len(t), 0.15, 0.3)

    return repeated(draw, 1, 2, (0.4, 0.9), moo)


def frog(draw: Draw) -> Made:
    rate, pitch = draw.uniform(28, 48), draw.uniform(450, 900)

    def croak(_: int) -> np.ndarray:
        t = times(draw.uniform(0.25, 0.4))
        pulses = np.exp(-9 * ((t * rate) % 1.0))
        wav = (
            tone(pitch, t) + 0.6 * tone(2.1 * pitch, t) + 0.3 * band_noise(draw, len(t), 300, 3000)
        )
        return wav * pulses * swell(len(t), 0.02, 0.06)

    return repeated(draw, 1, 4, (0.2, 0.45), croak)


def cricket(draw: Draw) -> Made:
    pitch, pulse, rest = (
        draw.uniform(3900, 5300),
        draw.uniform(0.014, 0.02),
        draw.uniform(0.15, 0.35),
    )
    at, pieces, end = 0, [], samples(draw.uniform(1.5, 3.5))
    while at < end:
        for i in range(3):
            t = times(pulse)
            pieces.append(
                (at + i * samples(1.7 * pulse), tone(pitch, t) * swell(len(t), 0.004, 0.004))
            )
        at += samples(5 * pulse + rest)
    return place(pieces), []


def owl(draw: Draw) -> Made:
    pitch, breath = draw.uniform(310, 480), draw.uniform(0.02, 0.06)

    def hoot(i: int) -> np.ndarray:
        t = times(draw.uniform(0.25, 0.4) * (1.5 if i == 1 else 1.0))
        f0 = glide([0.93 * pitch, pitch, 0.95 * pitch], len(t))
        wav = harmonics(f0, t, [1, 0.08, 0.04]) + breath * band_noise(draw, len(t), 250, 900)
        return wav * swell(len(t), 0.06, 0.12)

    return repeated(draw, 2, 4, (0.2, 0.4), hoot)


def bee(draw: Draw) -> Made:
    t = times(draw.uniform(1.5, 3.5))
    base = draw.uniform(170, 260)
    path = [base * draw.uniform(0.85, 1.15) for _ in range(6)]
    wav = harmonics(glide(path, len(t)), t, [1 / k**0.7 for k in range(1, 20)])
    near = glide([draw.uniform(0.3, 1.0) for _ in range(5)], len(t))
    return wav * near * (1 + 0.2 * band_noise(draw, len(t), 5, 60)) * swell(len(t), 0.2, 0.3), []


def duck(draw: Draw) -> Made:
    base = draw.uniform(170, 240)

    def quack(_: int) -> np.ndarray:
        t = times(draw.uniform(0.16, 0.26))
        f0 = glide([1.1 * base, base, 0.8 * base], len(t))
        weights = formants(24, base, [(1150, 160), (2400, 220), (3300, 300)], -0.1)
        wav = harmonics(f0, t, weights) * (1 + 0.3 * band_noise(draw, len(t), 100, 500))
        return wav * swell(len(t), 0.012, 0.07)

    return repeated(draw, 1, 5, (0.1, 0.25), quack)


def whistle(draw: Draw) -> Made:
    """A person whistling: two to four long notes that slide into each other."""
    t = times(draw.uniform(0.9, 2.0))
    base = draw.uniform(1000, 1900)
    path = [base * 2 ** (draw.integer(-4, 7) / 12) for _ in range(draw.integer(2, 4))]
    path = [p for p in path for _ in range(2)]  # held, then slid
    f0 = glide(path, len(t)) * (1 + 0.008 * np.sin(2 * np.pi * 5.5 * t))
    wav = harmonics(f0, t, [1, 0.05]) + 0.03 * band_noise(draw, len(t), 0.8 * base, 2 * base)
    return wav * swell(len(t), 0.04, 0.08), []


def heartbeat(draw: Draw) -> Made:
    pitch, beat = draw.uniform(48, 75), draw.uniform(0.65, 1.0)

    def lub_dub(_: int) -> np.ndarray:
        t = times(0.14)
        thud = harmonics(pitch, t, [1, 0.5, 0.3, 0.2]) * swell(len(t), 0.012, 0.11)
        second = samples(0.28)
        return place([(0, thud), (second, 0.7 * thud)], samples(beat))

    return repeated(draw, 2, 5, (0.0, 0.02), lub_dub)


def rain(draw: Draw) -> Made:
    n = samples(draw.uniform(2.0, 5.0))
    hiss = band_noise(draw, n, draw.uniform(900, 1600), 8000, 1)
    drops = np.where(draw.uniforms(n) < draw.log_uniform(0.004, 0.015), draw.noise(n), 0)
    patter = band_pass(drops, 1500, 6000)
    wav = hiss + draw.uniform(1.0, 2.0) * patter / np.sqrt(np.mean(patter**2) + 1e-12)
    return wav * swell(n, draw.uniform(0.2, 0.8), draw.uniform(0.3, 0.8)), []


def wind(draw: Draw) -> Made:
    n = samples(draw.uniform(2.0, 5.0))
    howl = glide([draw.uniform(0, 1) for _ in range(7)], n)
    low, high = draw.uniform(180, 300), draw.uniform(500, 900)
    wav = (1.2 - howl) * band_noise(draw, n, low, 1.35 * low) + howl * band_noise(
        draw, n, high, 1.2 * high
    )
    gusts = 0.35 + glide([draw.uniform(0, 1) for _ in range(6)], n)
    return (wav + 0.3 * band_noise(draw, n, 80, 600)) * gusts * swell(n, 0.4, 0.5), []


def waves(draw: Draw) -> Made:
    period, count = draw.uniform(1.7, 2.8), draw.integer(1, 2)
    pieces = []
    for i in range(count):
        n = samples(period * draw.uniform(0.95, 1.1))
        surge = glide([0.02, 0.35, 1, 0.45, 0.12, 0.02], n)
        deep = band_noise(draw, n, 0, 500)
        foam = band_noise(draw, n, 800, 5000, 1)
        pieces.append((samples(i * period * 0.9), surge * deep + 0.7 * surge**2 * foam))
    return place(pieces), []


def thunder(draw: Draw) -> Made:
    n = samples(draw.uniform(2.0, 4.0))
    rumble = band_noise(draw, n, 30, draw.uniform(140, 260))
    rolls = place(
        [
            (at, decay(n - at, draw.uniform(1.0, 2.5)) * draw.uniform(0.3, 1.0))
            for at in (0, *(samples(draw.uniform(0.1, 1.0)) for _ in range(draw.integer(1, 4))))
        ],
        n,
    )
    crack = band_noise(draw, n, 300, 3000) * decay(n, draw.uniform(0.25, 0.6))
    return (rumble * rolls + draw.uniform(0.2, 0.7) * crack) * swell(n, 0.004, 0.3), []


def fire(draw: Draw) -> Made:
    n = samples(draw.uniform(2.0, 4.5))
    hiss = 0.05 * band_noise(draw, n, 200, 1500, 1)
    pieces = [(0, hiss)]
    for _ in range(round(n / 16000 * draw.uniform(8, 18))):
        size = samples(draw.uniform(0.003, 0.012))
        pop = band_noise(draw, size, draw.integer(8, 20) * 100, 6000) * decay(size, 0.012)
        pieces.append((draw.integer(0, n - size), draw.log_uniform(0.15, 1.0) * pop))
    return place(pieces, n), []


def drops(draw: Draw) -> Made:
    def drop(_: int) -> np.ndarray:
        t = times(draw.uniform(0.05, 0.09))
        base = draw.uniform(650, 1500)
        wav = tone(base * (1 + 0.9 * (t / t[-1]) ** 2), t) * decay(len(t), 0.09)
        return wav * swell(len(t), 0.002, 0.01)

    return repeated(draw, 2, 6, (0.2, 0.6), drop)


def stream(draw: Draw) -> Made:
    n = samples(draw.uniform(2.0, 4.5))
    pieces = [(0, 0.08 * band_noise(draw, n, 400, 3000, 1))]
    for _ in range(round(n / 16000 * draw.uniform(45, 80))):
        t = times(draw.uniform(0.015, 0.05))
        base = draw.log_uniform(350, 1800)
        bubble = tone(base * (1 + 0.4 * t / t[-1]), t) * swell(len(t), 0.003, 0.012)
        pieces.append((draw.integer(0, n - len(t)), draw.uniform(0.1, 0.6) * bubble))
    return place(pieces, n) * swell(n, 0.1, 0.2), []
