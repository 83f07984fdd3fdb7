"""What comes between a voice and a file: how a speaker speaks, microphones, codecs."""

from __future__ import annotations

import functools
import io
from typing import NamedTuple

import av
import numpy as np
import soxr
from scipy import signal

from moss_audio_jax.audio.io import load_audio
from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.draw import Draw
from moss_audio_jax.world.espeak import SpokenWord, cut_out
from moss_audio_jax.world.recordings.source import Line


class Codec(NamedTuple):
    """A codec of FFmpeg, its container, sample rate, and bit rates (none: it has one)."""

    codec: str
    container: str
    rate: int
    bits: tuple[int, ...] = ()


CODECS = {
    "opus": Codec("libopus", "ogg", 48000, (8000, 12000, 16000, 24000, 32000)),
    "mp3": Codec("libmp3lame", "mp3", 16000, (16000, 24000, 32000, 48000)),
    "telephone": Codec("pcm_mulaw", "wav", 8000),
    "g722": Codec("g722", "wav", 16000),
}


class Manner(NamedTuple):
    """How a speaker differs from the recorded one: ratios of pitch, formants and speed."""

    pitch: float = 1.0
    formants: float = 1.0
    speed: float = 1.0


def draw_manner(draw: Draw) -> Manner:
    """Within what leaves the sex of a voice as it is."""
    pitch = draw.log_uniform(0.9, 1.12)
    return Manner(pitch, draw.log_uniform(0.92, 1.1), draw.log_uniform(0.85, 1.2))


def spoken_so(line: Line, manner: Manner) -> Line:
    """The line as another speaker says it; the times of words and phones follow."""
    if manner == Manner():
        return line
    # Played faster, a sound has a higher pitch and higher formants; the rest is put right after.
    wav = soxr.resample(line.wav, SAMPLE_RATE, SAMPLE_RATE / manner.pitch)
    wav = move_formants(wav, manner.formants / manner.pitch)
    n = round(len(line.wav) / manner.speed)
    wav = stretched(wav, n)

    def moved(items: list[SpokenWord] | None) -> list[SpokenWord] | None:
        ratio = n / len(line.wav)
        return items and [
            SpokenWord(i.text, round(i.start * ratio), round(i.stop * ratio)) for i in items
        ]

    wav = cut_out(wav, 0, n)
    return Line(wav, line.text, moved(line.words), moved(line.phones), line.file)


def stretched(wav: np.ndarray, n: int) -> np.ndarray:
    """The sound made to last n samples at its own pitch, by overlapping similar pieces (WSOLA)."""
    size, hop, search = 512, 256, 128
    window = signal.windows.hann(size, sym=False)
    count = -(-n // hop) + 1
    source = np.pad(wav, (size, 2 * size + search))
    places = np.linspace(0, len(wav), count).astype(int) + size - hop
    out = np.zeros(count * hop + size)
    at = places[0]
    for number, place in enumerate(places):
        if number:
            follows = source[at + hop : at + hop + size]  # what would come next, unstretched
            low = max(place - search, 0)
            near = source[low : place + search + size]
            at = low + int(np.argmax(np.correlate(near, follows)))
        out[number * hop : number * hop + size] += window * source[at : at + size]
    return out[hop : hop + n]


def move_formants(wav: np.ndarray, ratio: float) -> np.ndarray:
    """The sound with the resonances of its spectrum at `ratio` times their frequency."""
    size, hop, lags = 512, 128, 30  # lags below the period of the highest voices
    at, _, spectrum = signal.stft(wav, SAMPLE_RATE, nperseg=size, noverlap=size - hop)
    level = np.log(np.abs(spectrum) + 1e-6)
    cepstrum = np.fft.irfft(level, axis=0)
    cepstrum[lags : size - lags + 1] = 0
    smooth = np.fft.rfft(cepstrum, axis=0).real
    bins = np.arange(len(at), dtype=float)
    moved = np.stack([np.interp(bins / ratio, bins, column) for column in smooth.T], axis=1)
    gain = np.exp(np.clip(moved - smooth, -4, 4))
    _, back = signal.istft(spectrum * gain, SAMPLE_RATE, nperseg=size, noverlap=size - hop)
    return np.pad(back, (0, max(len(wav) - len(back), 0)))[: len(wav)]


def microphone(draw: Draw, wav: np.ndarray) -> np.ndarray:
    """An uneven response of up to 8 dB, a lowest and a highest frequency; no delay."""
    low, high = draw.log_uniform(30, 250), draw.log_uniform(3400, 7800)
    edges = np.geomspace(60, 7600, 9)
    level = np.array([draw.uniform(-4, 4) for _ in edges])
    at = np.linspace(0, SAMPLE_RATE / 2, 129)
    response = 10 ** (np.interp(np.log(at + 1), np.log(edges), level) / 20)
    response /= np.sqrt(1 + (low / np.maximum(at, 1)) ** 6)
    response /= np.sqrt(1 + (at / high) ** 12)
    taps = signal.firwin2(513, at, response, fs=SAMPLE_RATE)
    return signal.oaconvolve(wav, taps, mode="same")


def coded(wav: np.ndarray, name: str, bits: int | None = None) -> np.ndarray:
    """The sound after a codec of CODECS and back; same length, no delay.

    Args:
      bits: a second, for codecs that have the choice.
    """
    codec = CODECS[name]
    peak = np.abs(wav).max() * 1.05 + 1e-9  # lossy codecs overshoot
    given = soxr.resample(wav / peak, SAMPLE_RATE, codec.rate)
    pcm = np.rint(np.clip(given, -1, 1) * 32767).astype(np.int16)[None]
    file = io.BytesIO()
    with av.open(file, "w", format=codec.container) as container:
        stream = container.add_stream(codec.codec, rate=codec.rate, layout="mono")
        if bits:
            stream.bit_rate = bits
        frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
        frame.sample_rate = codec.rate
        resampler = av.AudioResampler(stream.format, "mono", codec.rate)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    file.seek(0)
    back = load_audio(file).astype(np.float64) * peak
    return _aligned(back, wav)


def _aligned(back: np.ndarray, wav: np.ndarray) -> np.ndarray:
    """`back` moved to where it fits `wav` best: codecs delay by up to 0.1 s."""
    most = SAMPLE_RATE // 10
    fit = signal.correlate(np.pad(back, (0, len(wav))), wav, mode="valid", method="fft")
    delay = int(np.argmax(fit[: most + 1]))
    piece = back[delay : delay + len(wav)]
    return np.pad(piece, (0, len(wav) - len(piece)))


def channel(draw: Draw, wav: np.ndarray, whole_band: bool) -> tuple[np.ndarray, str | None]:
    """A microphone and a codec, each in some scenes.

    Args:
      whole_band: keep high frequencies: neither a microphone nor a telephone.

    Returns:
      (the sound, the codec's name or None).
    """
    if not whole_band and draw.chance(0.6):
        wav = microphone(draw, wav)
    if not draw.chance(0.5) or not np.abs(wav).max():
        return wav, None
    name = draw.choice([name for name in _encoders() if not whole_band or name != "telephone"])
    bits = CODECS[name].bits
    return coded(wav, name, draw.choice(bits) if bits else None), name


@functools.cache
def _encoders() -> tuple[str, ...]:
    """The codecs that this build of FFmpeg can write."""
    return tuple(name for name, codec in CODECS.items() if codec.codec in av.codecs_available)
