"""Any audio file -> mono float32 at 16 kHz.

A file's contents decide how it is read, never its name: `pcm` reads files of plain samples,
`compressed` everything else. Time is counted in decoded samples; start times that containers state
are not used.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soxr

from moss_audio_jax.audio import pcm
from moss_audio_jax.audio.lengths import HOP, SAMPLE_RATE
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.files import brief, open_regular, reason, shown

# How the names of files with sound end: for those who look for them in a folder, and nobody else.
_NAMES = (
    "3gp aac ac3 aif aifc aiff amr ape asf au avi caf eac3 flac flv m2ts m4a m4b m4v mka mkv mov "
    "mp2 mp3 mp4 mpeg mpg mts oga ogg ogv opus ra rf64 snd sph spx ts tta voc w64 wav wave webm "
    "wma wmv wv"
)
SUFFIXES = frozenset(f".{name}" for name in _NAMES.split())
MAX_SECONDS = 12 * 3600.0  # of sound, unless the caller or the environment sets another limit
_LIMIT_KEY = "MOSS_AUDIO_JAX_MAX_SECONDS"
_BLOCK = 1 << 18  # samples of an array that are converted together
_READ = 1 << 20
_MOST_BYTES = 4 << 30  # the largest file object that is held in memory
_RATES = range(1_000, 768_001)
_MOST_CHANNELS = 32  # of an array; a longer axis is time
_HEARD = 0.1  # seconds of bytes behind the samples that may be sound
_OPPOSED = 1e-3  # below this share of the channels' power, their average counts as cancelled

Source = str | Path | BinaryIO | Mapping[str, Any] | tuple[Any, int]


def load_audio(source: Source, max_seconds: float | None = None) -> np.ndarray:
    """Any sound as mono at 16 kHz.

    Args:
      source: one of
        - the path of a regular file, or a file opened in binary mode (anything with `read`; it is
          read from its start if it can seek, and left open): wav, aiff, caf, au, flac, mp3, ogg,
          opus, m4a, mp4, aac, webm, and other formats that FFmpeg decodes;
        - `{"array": samples, "sampling_rate": rate}` or `(samples, rate)`: samples [n],
          [channels, n] or [n, channels] (at most 32 channels and more samples than that), floating
          in about -1..1, or integers of 8, 16 or 32 bits.
        Any rate from 1 to 768 kHz, any number of channels.
      max_seconds: more sound than this is refused. Default: 12 hours, or the value of the
        environment variable MOSS_AUDIO_JAX_MAX_SECONDS.

    Returns:
      float32 [n]: the average of the channels, full scale -1..1 (larger values of float files and
      lossy codecs are kept), resampled by soxr at its HQ setting. m samples at one rate become
      n = ceil(m * 16000 / rate). A long file needs little more memory than the result.

    Raises:
      InputError: names the file, which is missing, a directory, not a regular file, empty, not
        audio, cut short or damaged, longer than the limit, without samples, shorter than one mel
        frame (10 ms), or has samples that are NaN, infinite or too large to resample.

    Warns:
      UserWarning: one of several tracks is used, channels in opposite phase cancel in their
        average, or a part of the file was left out.
    """
    # A bytearray grows in place; joining a list of blocks would hold everything twice.
    out = bytearray()
    for block in audio_blocks(source, max_seconds):
        out += block.tobytes()
    return np.frombuffer(out, np.float32)


def audio_blocks(source: Source, max_seconds: float | None = None) -> Iterator[np.ndarray]:
    """The samples of `load_audio`, in order, some seconds at a time: float32 [n] each.

    Raises:
      InputError: as `load_audio`; some faults are only found at the end of a file.
    """
    limit, name = _limit(max_seconds), "audio"

    def allow(seconds: float) -> None:
        if seconds > limit:
            raise InputError(
                f"holds more than {limit:g} s of sound ({limit / 3600:.3g} h), which is the limit; "
                f"raise it with max_seconds in Python, or {_LIMIT_KEY} in the environment"
            )

    def note(text: str) -> None:
        warnings.warn(f"{name}: {text}", stacklevel=3)

    with contextlib.ExitStack() as stack:
        if isinstance(source, (Mapping, tuple)):
            blocks, name = _of_array(source), "audio array"
        else:
            file, name = _open(source, stack)
            blocks = _decoded(file, allow, note)
        try:
            yield from _mono_16k(blocks, allow, note)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error.__cause__
        except MemoryError:
            raise InputError(f"{name}: decoding it takes more memory than there is") from None
        except Warning:
            raise
        except Exception as error:  # decoders raise anything about a damaged file
            raise InputError(f"{name}: cannot be decoded ({brief(reason(error))})") from error


def resample(wav: np.ndarray, rate: int) -> np.ndarray:
    """Resamples one channel, [n] at `rate` Hz, to 16 kHz as `load_audio` does: float32.

    The result has ceil(n * 16000 / rate) samples. Raises InputError if `rate` is not an integer in
    1000..768000 or `wav` is not one-dimensional.
    """
    wav = np.asarray(wav, np.float32)
    if wav.ndim != 1:
        raise InputError(f"resample: the waveform has shape {list(wav.shape)}; expected [n]")
    _check_rate(rate)
    if rate == SAMPLE_RATE:
        return wav
    resampled = soxr.resample(wav, rate, SAMPLE_RATE, quality="HQ")
    return _of_length(resampled, _resampled_length(len(wav), rate))


def _limit(max_seconds: float | None) -> float:
    key, value = "max_seconds", max_seconds
    if value is None:
        key, value = _LIMIT_KEY, os.environ.get(_LIMIT_KEY, MAX_SECONDS)
    try:
        limit = float(value)
    except (TypeError, ValueError):
        limit = math.nan
    if not limit > 0:
        raise UsageError(f"{key} is {value!r}; expected seconds of sound, more than 0")
    return limit


# --- sources -------------------------------------------------------------------------------------


def _open(source: Any, stack: contextlib.ExitStack) -> tuple[BinaryIO, str]:
    """The source as a seekable file, and its name for messages."""
    if isinstance(source, (str, os.PathLike)):
        return stack.enter_context(open_regular(source, "an audio file")), shown(source)
    name = shown(getattr(source, "name", "audio file object"))
    if isinstance(source, io.TextIOBase):
        raise InputError(f"{name}: opened as text; open it in binary mode ('rb')")
    if not hasattr(source, "read"):
        raise InputError(
            f"load_audio: got {type(source).__name__}; expected a path, a binary file object, or "
            "an array with its sampling rate: (array, rate); a model's methods also take a NumPy "
            "waveform at 16 kHz as it is"
        )
    # Only plain files are read in place: the descriptor of a gzip file gives the packed bytes.
    # FFmpeg gets no name, because it would take the suffix as a hint.
    try:
        if type(source) is io.BytesIO:
            return io.BytesIO(source.getvalue()), name
        if type(source) in (io.BufferedReader, io.BufferedRandom, io.FileIO):
            mode = os.fstat(source.fileno()).st_mode
            if stat.S_ISREG(mode):
                source.seek(0)  # this also writes what is buffered
                return stack.enter_context(os.fdopen(os.dup(source.fileno()), "rb")), name
            if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                raise InputError("is a device; expected an audio file")
        return _contents(source), name
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except Exception as error:  # a foreign object may raise anything
        raise InputError(f"{name}: cannot be read ({brief(reason(error))})") from error


def _contents(file: Any) -> io.BytesIO:
    """All bytes of a file object, from its start if it can seek."""
    seekable = getattr(file, "seekable", None)
    if seekable() if seekable else hasattr(file, "seek"):
        file.seek(0)
    held = io.BytesIO()
    while True:
        piece = file.read(_READ)
        if not isinstance(piece, (bytes, bytearray, memoryview)):
            raise InputError(f"reading it gave {type(piece).__name__}; expected bytes")
        if not piece:
            return held
        held.write(piece)
        if held.tell() > _MOST_BYTES:
            raise InputError(f"gives more than {_MOST_BYTES >> 30} GiB; give the path of a file")


def _decoded(file: BinaryIO, allow, note) -> Iterator[tuple[int, np.ndarray]]:
    """(rate, float32 [n, channels]) of a file."""
    if not file.seek(0, os.SEEK_END):
        raise InputError("is empty (0 bytes); expected an audio file")
    sounds = pcm.sounds(file)
    if all(sound.coding.code for sound in sounds):
        allow(sum((s.samples[1] - s.samples[0]) / s.coding.bytes_a_second for s in sounds))
    if sounds and sounds[-1].coding.code:
        left = file.seek(0, os.SEEK_END) - sounds[-1].stop
        seconds = left / sounds[-1].coding.bytes_a_second
        if seconds >= _HEARD:
            note(
                f"its header states less than it holds: the last {left:,} bytes ({seconds:.2f} s, "
                "if they are sound) are not read"
            )
    for sound in sounds or [None]:
        if sound and sound.more:
            note("holds several chunks of samples; only the first one is read")
        if sound and sound.coding.code:
            yield from pcm.blocks(file, sound)
            continue
        from moss_audio_jax.audio import compressed  # imported here: plain samples need no FFmpeg

        part = file
        if len(sounds) > 1:
            file.seek(sound.start)
            part = io.BytesIO(file.read(sound.stop - sound.start))
        yield from compressed.blocks(part, allow, note)


def _of_array(source: Mapping[str, Any] | tuple) -> Iterator[tuple[int, np.ndarray]]:
    """(rate, float32 [n, channels]) of an array with its sampling rate."""
    if isinstance(source, Mapping):
        if not {"array", "sampling_rate"} <= source.keys():
            keys = brief(sorted(map(str, source)))
            raise InputError(f"has the keys {keys}; expected array and sampling_rate")
        array, rate = source["array"], source["sampling_rate"]
    else:
        if len(source) != 2:
            raise InputError(f"is a tuple of {len(source)}; expected (array, rate)")
        array, rate = source
    number = isinstance(rate, (int, float, np.integer, np.floating))
    if not number or not _RATES[0] <= rate <= _RATES[-1] or rate != int(rate):
        raise InputError(
            f"the sampling rate is {brief(repr(rate))}; expected an integer from 1000 to 768000"
        )
    array = pcm.array_of(array)
    if array.ndim == 2:
        short, long = sorted(array.shape)
        if not short <= _MOST_CHANNELS < long:
            raise InputError(
                f"the array has shape {list(array.shape)}: it does not show which axis is time; "
                f"expected [n], [channels, n] or [n, channels] with at most {_MOST_CHANNELS} "
                "channels and more samples than that"
            )
        array = array.T if array.shape[1] == long else array
    elif array.ndim == 1:
        array = array[:, None]
    else:
        raise InputError(f"the array has shape {list(array.shape)}; expected [n] or two axes")
    if array.dtype.kind not in "iuf" or (array.dtype.kind != "f" and array.itemsize > 4):
        raise InputError(
            f"the array is {array.dtype}; expected floating point in about -1..1, or integers of "
            "8, 16 or 32 bits"
        )
    for start in range(0, max(len(array), 1), _BLOCK):
        yield int(rate), pcm.scaled(array[start : start + _BLOCK])


# --- to mono at 16 kHz ---------------------------------------------------------------------------


def _mono_16k(blocks: Iterator[tuple[int, np.ndarray]], allow, note) -> Iterator[np.ndarray]:
    """Averages, checks and resamples decoded blocks (rate, float32 [n, channels])."""
    stream, seconds, given = None, 0.0, 0
    quiet = loud = 0.0  # power of the average and of the channels
    for rate, block in blocks:
        if stream is None or rate != stream.rate:
            if stream:
                yield stream.rest()
                given += stream.given
            stream = Resampler(rate)
        with np.errstate(over="ignore", invalid="ignore"):
            mono, channels = block[:, 0], block.shape[1]
            if channels > 1:
                mono = block @ np.full(channels, 1 / channels, "f4")
                samples = block.ravel(order="K")
                loud += float(samples @ samples) / channels
                quiet += float(mono @ mono)
            mono = np.ascontiguousarray(mono)
        if not np.isfinite(mono).all():
            second = seconds + np.flatnonzero(~np.isfinite(mono))[0] / rate
            raise InputError(f"holds samples that are NaN or infinite, the first at {second:.3f} s")
        out = stream.push(mono)
        seconds += len(mono) / rate
        allow(seconds)
        yield out
    if not seconds:
        raise InputError("holds no samples")
    rest = stream.rest()
    if given + stream.given < HOP:
        raise InputError(
            f"holds {1000 * seconds:.1f} ms of sound; expected at least 10 ms (one mel frame)"
        )
    yield rest
    if quiet < _OPPOSED * loud:
        note(
            "its channels are in opposite phase, so little or nothing is left of their average, "
            "which is used; invert one channel, or keep only one"
        )


class Resampler:
    """Resamples one channel, piece by piece, from one rate to 16 kHz.

    The pieces that `push` and at last `rest` return are together what `resample` makes of the
    whole, sample for sample.

    Attributes:
      rate: of what is pushed, Hz.
      given: samples returned so far.
    """

    def __init__(self, rate: int):
        _check_rate(rate)
        self.rate, self.given, self._count, self._soxr = rate, 0, 0, None
        if rate != SAMPLE_RATE:
            self._soxr = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")

    def push(self, mono: np.ndarray) -> np.ndarray:
        """float32 [n] at `rate` -> float32 [m] at 16 kHz; soxr holds back some milliseconds."""
        out = _finite(self._soxr.resample_chunk(mono)) if self._soxr else mono
        self._count += len(mono)
        self.given += len(out)
        return out

    def rest(self) -> np.ndarray:
        """The remaining samples; call it once. Then `given` is ceil(count * 16000 / rate)."""
        length = _resampled_length(self._count, self.rate) - self.given
        if not self._soxr:
            return np.zeros(0, np.float32)
        rest = _finite(self._soxr.resample_chunk(np.zeros(0, np.float32), last=True))
        self.given += max(length, 0)
        return _of_length(rest, max(length, 0))


def _finite(resampled: np.ndarray) -> np.ndarray:
    if not np.isfinite(resampled).all():
        raise InputError("holds samples near 3e38, which overflow when resampled; expected -1..1")
    return resampled


def _check_rate(rate: int) -> None:
    if rate not in _RATES:
        raise InputError(f"the sampling rate is {rate} Hz; expected 1000 to 768000")


def _resampled_length(count: int, rate: int) -> int:
    return -(-count * SAMPLE_RATE // rate)


def _of_length(wav: np.ndarray, length: int) -> np.ndarray:
    """Cuts to `length`, or adds zeros if soxr left out the last samples."""
    return np.pad(wav, (0, length - len(wav))) if len(wav) < length else wav[:length]
