"""Frame features of a clip, computed once and shared by segmentation, profile and speakers.

One pass over blocks of samples. Features of a second of sound take 3.5 kB (of two hours, 25 MB).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import numpy as np
import scipy.fft
from numpy.lib.stride_tricks import sliding_window_view

from moss_audio_jax.audio.features import N_FFT, hann_window, mel_filters
from moss_audio_jax.audio.lengths import HOP, SAMPLE_RATE
from moss_audio_jax.errors import InputError

FINE = SAMPLE_RATE // HOP  # 100 fine frames per second
GROUP = 5  # fine frames per coarse frame
COARSE = FINE // GROUP  # 20 coarse frames per second
BANDS = 32  # groups of four of the encoder's 128 mel filters
FLOOR_DB = -100.0  # of full scale: digital silence
PITCH_RANGE = (60.0, 500.0)  # Hz
_PITCH_WINDOW = 1024  # samples: 64 ms, nearly four periods of the lowest pitch
_STEP = GROUP * HOP  # samples per coarse frame
_BATCH = 256  # coarse frames processed together: 12.8 s


@dataclasses.dataclass(frozen=True)
class ClipFeatures:
    """Features of one clip of `samples` samples at 16 kHz.

    Fine frames last 10 ms and coarse ones 50 ms; frame i starts at i times that. There are
    T = ceil(samples / 160) fine and C = ceil(samples / 800) coarse frames. Levels are dB relative
    to full scale.

    Attributes:
      samples: length of the clip.
      peak: the largest absolute sample.
      energy: float32 [T], mean power of the samples above 40 Hz.
      onset: float32 [T], mean rise of the bands since the frame before, dB.
      bands: float32 [C, 32], power of mel bands from 0 to 8 kHz.
      harmonicity: float32 [C], 0..1, the largest normalised autocorrelation at the lag of a pitch.
      pitch: float32 [C], Hz, of that lag; meaningful if harmonicity is high.
      flatness: float32 [C], 0..1, geometric over arithmetic mean of the bands' power per Hz.
    """

    samples: int
    peak: float
    energy: np.ndarray
    onset: np.ndarray
    bands: np.ndarray
    harmonicity: np.ndarray
    pitch: np.ndarray
    flatness: np.ndarray

    @property
    def seconds(self) -> float:
        return self.samples / SAMPLE_RATE

    def span(self, start: float, end: float) -> ClipFeatures:
        """The frames between two times in seconds; at least one."""
        first = min(int(start * COARSE), max(len(self.bands) - 1, 0))
        last = max(min(round(end * COARSE), len(self.bands)), first + 1)
        fine, coarse = slice(first * GROUP, last * GROUP), slice(first, last)
        return ClipFeatures(
            min(last * _STEP, self.samples) - first * _STEP,
            self.peak,
            self.energy[fine],
            self.onset[fine],
            self.bands[coarse],
            self.harmonicity[coarse],
            self.pitch[coarse],
            self.flatness[coarse],
        )


def clip_features(wav: np.ndarray | Iterable[np.ndarray]) -> ClipFeatures:
    """Features of a waveform, whole or in blocks.

    Args:
      wav: floating [n], 16 kHz mono, samples in about -1..1; or consecutive pieces of it, of any
        lengths. The result does not depend on how it is cut into pieces.

    Raises:
      InputError: a piece is not one-dimensional or not finite, or there is no sample at all.
    """
    pieces = _pieces(wav) if isinstance(wav, np.ndarray) else wav
    counter = _Counter(pieces)
    rows = [_block(block) for block in _framed(counter)]
    if not counter.samples:
        raise InputError("annotate: the waveform has no sample; expected at least one")
    fine, coarse = -(-counter.samples // HOP), -(-counter.samples // _STEP)
    energy, bands, harmonicity, pitch, flatness, onset = (
        np.concatenate(column) for column in zip(*rows, strict=True)
    )
    onset[0] = 0.0
    return ClipFeatures(
        counter.samples,
        counter.peak,
        energy[:fine],
        onset[:fine],
        bands[:coarse],
        harmonicity[:coarse],
        pitch[:coarse],
        flatness[:coarse],
    )


class _Counter:
    """Passes pieces on as float32; checks them and counts their samples."""

    def __init__(self, pieces: Iterable[np.ndarray]):
        self._source = pieces
        self.samples = 0
        self.peak = 0.0

    def __iter__(self) -> Iterator[np.ndarray]:
        for piece in self._source:
            piece = np.asarray(piece)
            if piece.ndim != 1:
                raise InputError(
                    f"annotate: the waveform has shape {list(piece.shape)}; expected [n], "
                    "one channel at 16 kHz"
                )
            piece = piece.astype(np.float32, copy=False)
            if len(piece):
                peak = float(np.abs(piece).max())
                if not peak < 1e6:  # also true of NaN
                    raise InputError(
                        f"annotate: the waveform's samples reach {peak}; expected finite values "
                        "in about -1..1"
                    )
                self.peak = max(self.peak, peak)
                self.samples += len(piece)
                yield piece


def _pieces(wav: np.ndarray) -> Iterator[np.ndarray]:
    if wav.ndim != 1:
        yield wav  # the check reports it
        return
    for start in range(0, len(wav), 1 << 19):
        yield wav[start : start + (1 << 19)]


_BEFORE = 600  # samples of context before a block: a pitch window, and a fine frame for the onset
_AFTER = 600


def _framed(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Blocks of _BATCH coarse frames (the last may be shorter) with their context."""
    held = np.zeros(_BEFORE, np.float32)
    size = _BATCH * _STEP
    for piece in pieces:
        held = np.concatenate([held, piece])
        while len(held) >= _BEFORE + size + _AFTER:
            yield held[: _BEFORE + size + _AFTER]
            held = held[size:]
    while (rest := len(held) - _BEFORE) > 0:
        now = min(-(-rest // _STEP) * _STEP, size)
        block = held[: _BEFORE + now + _AFTER]
        yield np.pad(block, (0, _BEFORE + now + _AFTER - len(block)))
        held = held[now:]


def _block(block: np.ndarray) -> tuple[np.ndarray, ...]:
    count = (len(block) - _BEFORE - _AFTER) // _STEP
    # Starts one fine frame early, for the first rise; frames are centred on their hop.
    first = _BEFORE - HOP + HOP // 2 - N_FFT // 2
    frames = sliding_window_view(block, N_FFT)[first::HOP][: count * GROUP + 1]
    spectrum = scipy.fft.rfft(frames * _hann(N_FFT), axis=1)
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    power *= np.float32(1 / np.square(_hann(N_FFT)).sum() / N_FFT * 2)  # sums to the mean square
    bands = power @ _bank()
    level = _db(bands)
    onset = np.maximum(np.diff(np.maximum(level, -80.0), axis=0), 0).mean(axis=1)
    energy = _db(power[1:, 1:].sum(axis=1))
    coarse = bands[1:].reshape(count, GROUP, BANDS).mean(axis=1)
    density = coarse / _widths() + np.float32(1e-14)
    flatness = np.exp(np.log(density).mean(axis=1)) / density.mean(axis=1)
    harmonicity, pitch = _pitch(block, count)
    return energy, _db(coarse), harmonicity, pitch, flatness, onset


def _pitch(block: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(harmonicity, pitch) of each coarse frame: autocorrelation divided by the window's."""
    first = _BEFORE + _STEP // 2 - _PITCH_WINDOW // 2
    frames = sliding_window_view(block, _PITCH_WINDOW)[first::_STEP][:count]
    frames = (frames - frames.mean(axis=1, keepdims=True)) * _hann(_PITCH_WINDOW)
    size = 2 * _PITCH_WINDOW
    spectrum = scipy.fft.rfft(frames, size, axis=1)
    acf = scipy.fft.irfft(np.square(spectrum.real) + np.square(spectrum.imag), size, axis=1)
    low, high = (int(SAMPLE_RATE / hertz) for hertz in reversed(PITCH_RANGE))
    normal = acf[:, : high + 2] / (acf[:, :1] + np.float32(1e-9)) / _window_acf()[: high + 2]
    inner = normal[:, low : high + 1]
    peaks = (inner >= normal[:, low - 1 : high]) & (inner >= normal[:, low + 1 : high + 2])
    # Multiples of a period correlate as well, so take the shortest lag that is nearly the best.
    best = np.where(peaks, inner, 0).max(axis=1, keepdims=True)
    at = np.argmax(peaks & (inner >= 0.93 * best), axis=1)
    rows = np.arange(count)
    left, mid, right = (normal[rows, low + at + shift] for shift in (-1, 0, 1))
    bend = left - 2 * mid + right
    shift = np.where(bend < 0, 0.5 * (left - right) / np.where(bend < 0, bend, 1), 0)
    lag = low + at + np.clip(shift, -0.5, 0.5)
    return np.clip(best[:, 0], 0, 1), (SAMPLE_RATE / lag).astype(np.float32)


def _db(power: np.ndarray) -> np.ndarray:
    return 10 * np.log10(np.maximum(power, np.float32(10 ** (FLOOR_DB / 10))))


@functools.lru_cache(maxsize=2)
def _hann(size: int) -> np.ndarray:
    if size == N_FFT:
        return hann_window().astype(np.float32)
    return np.hanning(size + 1)[:-1].astype(np.float32)


@functools.lru_cache(maxsize=1)
def _window_acf() -> np.ndarray:
    spectrum = np.abs(scipy.fft.rfft(_hann(_PITCH_WINDOW).astype(float), 2 * _PITCH_WINDOW)) ** 2
    acf = scipy.fft.irfft(spectrum)
    return (acf / acf[0]).astype(np.float32)


@functools.lru_cache(maxsize=1)
def _bank() -> np.ndarray:
    """float32 [201, 32]: each bin's power is shared among bands, so that they sum to the total."""
    bank = mel_filters() / mel_filters().sum(axis=1, keepdims=True)
    grouped = bank.reshape(BANDS, -1, bank.shape[1]).sum(axis=1)
    grouped /= np.maximum(grouped.sum(axis=0), 1e-9)
    return np.ascontiguousarray(grouped.T, np.float32)


@functools.lru_cache(maxsize=1)
def _widths() -> np.ndarray:
    """The number of bins in each band, float32 [32]."""
    return np.maximum(_bank().sum(axis=0), np.float32(0.25))
