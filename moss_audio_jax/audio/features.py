"""Log-mel features of a 16 kHz waveform, in NumPy: the input of the audio encoder.

The same features as Whisper's with 128 mel bins, without its padding to 30 s.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from moss_audio_jax.audio.lengths import HOP, SAMPLE_RATE, mel_frames
from moss_audio_jax.audio.pcm import array_of
from moss_audio_jax.errors import InputError

N_FFT = 400  # samples per frame: 25 ms
MEL_BINS = 128
POWER_FLOOR = 1e-10  # the least power of a mel bin, before the logarithm
DYNAMIC_RANGE = 8.0  # decades kept below the clip's own maximum
_HALF = N_FFT // 2  # frames are centred: frame t covers samples 160 t - 200 .. 160 t + 199
PEAK_LIMIT = 1e12  # larger samples could overflow the power spectrum in float32
_BLOCK = 256  # frames processed together; their spectra fit into the processor's cache
_BANK_PARTS = 8  # such small products stay on one thread, which is faster here


def log_mel(wav: np.ndarray) -> np.ndarray:
    """Log-mel spectrogram of one clip.

    Args:
      wav: floating [n], mono at 16 kHz, samples in about -1..1, n >= 160.

    Returns:
      float32 [128, n // 160], 100 frames a second: (max(log10 mel power, the clip's maximum - 8)
      + 4) / 4. The floor is global to the clip, so the features of a piece of a clip are not a
      piece of the clip's features. Working memory beyond the result does not grow with n.

    Raises:
      InputError: wav is not one-dimensional or not floating point, is shorter than one frame, or
        holds samples that are masked, not finite or absurdly large.
    """
    wav = _checked(wav)
    mel = np.empty((MEL_BINS, mel_frames(len(wav))), np.float32)
    for start, rows in _blocks(wav):
        mel[:, start : start + len(rows)] = rows.T
    return np.maximum(mel, _floor(float(mel.max())), out=mel)


def rounded(mel: np.ndarray, dtype: str) -> np.ndarray:
    """Float32, with values that `dtype`, such as "bfloat16", can hold."""
    return mel.astype(ml_dtypes.finfo(dtype).dtype).astype(np.float32)


class GrowingMel:
    """The log-mel of a clip that grows: `rounded(log_mel(wav), dtype)` to the last bit.

    Only the floor and the frames at the end depend on what comes later. So a block of frames whose
    samples have all come is computed and rounded once, and kept as it is before the floor.

    Attributes:
      frames: computed so far.
    """

    def __init__(self, dtype: str) -> None:
        self.frames = 0
        self._dtype = dtype
        self._kept: list[tuple[np.ndarray, float]] = []  # [128, 256], the maximum before rounding
        self._lock = threading.Lock()

    def of(self, wav: np.ndarray) -> np.ndarray:
        """The log-mel of a beginning of the clip; raises what `log_mel` does. Any thread may ask,
        also for less than before."""
        wav = _checked(wav)
        mel = np.empty((MEL_BINS, mel_frames(len(wav))), np.float32)
        final = ((len(wav) - _HALF) // HOP + 1) // _BLOCK  # blocks that see no sample to come
        with self._lock:
            blocks = self._kept[:final]
            for start, rows in _blocks(wav, len(blocks) * _BLOCK):
                blocks.append((rounded(rows.T, self._dtype), float(rows.max())))
                self.frames += len(rows)
                if start < final * _BLOCK:
                    self._kept.append(blocks[-1])
        for number, (block, _) in enumerate(blocks):
            mel[:, number * _BLOCK : (number + 1) * _BLOCK] = block
        # Rounding keeps order, so a rounded maximum is the maximum of what is rounded.
        return np.maximum(mel, rounded(_floor(max(top for _, top in blocks)), self._dtype), out=mel)


def _checked(wav: np.ndarray) -> np.ndarray:
    """The waveform as float32; raises what `log_mel` does."""
    wav = one_channel(wav)
    if not np.issubdtype(wav.dtype, np.floating):
        raise InputError(
            f"log_mel: the waveform is {wav.dtype}; expected floating point in about -1..1 "
            "(divide 16-bit integers by 32768)"
        )
    if len(wav) < HOP:
        raise InputError(
            f"log_mel: the waveform holds {len(wav)} samples; expected at least {HOP} (one frame)"
        )
    top = peak(wav)
    if not top <= PEAK_LIMIT:  # also true of NaN
        raise InputError(
            f"log_mel: the waveform's samples reach {top}; expected finite values in about -1..1"
        )
    return wav.astype(np.float32, copy=False)


def one_channel(wav: np.ndarray) -> np.ndarray:
    """The waveform as an array [n]; raises what `log_mel` does if it has not this shape."""
    wav = array_of(wav)
    if wav.ndim != 1:
        raise InputError(
            f"log_mel: the waveform has shape {list(wav.shape)}; expected [n], one channel"
        )
    return wav


def peak(wav: np.ndarray) -> float:
    """The largest absolute value of samples, at least one; NaN if one of them is NaN."""
    return max(-float(wav.min()), float(wav.max()))


def _blocks(wav: np.ndarray, first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """(first frame, float32 [up to 256, 128] before the floor) of each block from frame `first` on,
    a multiple of 256; the next block overwrites it."""
    frames = mel_frames(len(wav))
    # The transform runs in float64: float32 rounding of a loud component (an offset, a tone near
    # 8 kHz) would move bins that lie eight decades below it by up to 1e-3. Buffers are allocated
    # once: fresh pages would cost as much as the arithmetic.
    size = min(frames, _BLOCK)
    samples = np.empty((size - 1) * HOP + N_FFT)
    framed = sliding_window_view(samples, N_FFT)[::HOP]  # [size, 400]
    windowed = np.empty((size, N_FFT))
    spectrum = np.empty((size, _HALF + 1), np.complex64)
    power, squares = np.empty((2, size, _HALF + 1), np.float32)
    block = np.empty((size, MEL_BINS), np.float32)
    for start in range(first, frames, _BLOCK):
        n = min(_BLOCK, frames - start)
        used = (n - 1) * HOP + N_FFT
        samples[:used] = _reflected(wav, start * HOP - _HALF, start * HOP - _HALF + used)
        np.multiply(framed[:n], hann_window(), out=windowed[:n])
        spectrum[:n] = np.fft.rfft(windowed[:n], axis=1)
        np.square(spectrum.real[:n], out=power[:n])
        power[:n] += np.square(spectrum.imag[:n], out=squares[:n])
        rows = block[:n]
        for filters, bins, weights in _bank_parts():
            np.matmul(power[:n, bins], weights, out=rows[:, filters])
        np.maximum(rows, POWER_FLOOR, out=rows)
        np.log(rows, out=rows)  # NumPy has a vectorised log on more processors than log10
        rows *= np.float32(0.25 / np.log(10.0))
        rows += 1  # (log10 + 4) / 4
        yield start, rows


def _floor(top: float) -> np.ndarray:
    """The least value of a log-mel whose maximum is `top`."""
    return np.array(top - DYNAMIC_RANGE / 4, np.float32)


@functools.lru_cache(maxsize=1)
def hann_window() -> np.ndarray:
    """The periodic Hann window, float64 [400]. Its first value is 0; the 401st would be 0 again."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)
    window.flags.writeable = False
    return window


@functools.lru_cache(maxsize=1)
def mel_filters() -> np.ndarray:
    """The mel filter bank, float64 [128, 201]: weights of the power spectrum's bins.

    Triangles whose corners are 130 points from 0 to 8000 Hz, evenly spaced on the mel scale of
    M. Slaney's Auditory Toolbox (Interval Research technical report 1998-010): linear up to 1 kHz,
    mel = 3 f / 200, then logarithmic, mel = 15 + 27 ln(f / 1000) / ln 6.4. Each triangle has unit
    area (height 2 / width in Hz), which is that toolbox's normalisation.
    """
    log_step = np.log(6.4) / 27
    top_mel = 15 + np.log(SAMPLE_RATE / 2 / 1000) / log_step
    mels = np.linspace(0, top_mel, MEL_BINS + 2)
    hertz = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(log_step * (mels - 15)))
    low, centre, high = (hertz[i : i + MEL_BINS, None] for i in range(3))
    bins = np.arange(N_FFT // 2 + 1) * SAMPLE_RATE / N_FFT
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    bank = np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)
    bank.flags.writeable = False
    return bank


@functools.lru_cache(maxsize=1)
def _bank_parts() -> tuple[tuple[slice, slice, np.ndarray], ...]:
    """The filter bank in groups of neighbours: (filters, bins they touch, float32 [bins, filters]).

    98% of the bank is zeros. Eight products, each over the bins of one group, cost a fifth of one
    product over all bins.
    """
    parts = []
    size = MEL_BINS // _BANK_PARTS
    for first in range(0, MEL_BINS, size):
        filters = slice(first, first + size)
        touched = np.flatnonzero(mel_filters()[filters].any(axis=0))
        bins = slice(int(touched[0]), int(touched[-1]) + 1)
        weights = np.ascontiguousarray(mel_filters()[filters, bins].T, np.float32)
        parts.append((filters, bins, weights))
    return tuple(parts)


def _reflected(wav: np.ndarray, start: int, stop: int) -> np.ndarray:
    """wav[start:stop], mirrored about its first and last sample as often as the range needs."""
    if start >= 0 and stop <= len(wav):
        return wav[start:stop]
    period = 2 * (len(wav) - 1)
    index = np.arange(start, stop) % period
    return wav[np.minimum(index, period - index)]
