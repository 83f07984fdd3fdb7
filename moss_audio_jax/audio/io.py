"""Any audio file -> mono float32 at 16 kHz.

libsndfile decodes wav, flac, mp3, ogg and opus; PyAV what libsndfile does not know (m4a, mp4, aac,
webm). Time is counted in decoded samples: the start times that containers claim are not used.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from moss_audio_jax.audio.lengths import HOP, SAMPLE_RATE
from moss_audio_jax.audio.truncation import cut_short
from moss_audio_jax.errors import InputError

_BLOCK = 1 << 18  # samples a channel that are decoded at a time
_SMALL_STEP = 1 << 10
_RATES = range(1_000, 768_001)
_MPEG_FRAME = 1152  # samples; libsndfile's count of an mp3 may be off by the encoder's delay
# What FFmpeg may take a file for. Its playlist formats would open other files and addresses.
_AV_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,aac,ac3,aiff,amr,asf,avi,caf,flac,flv,"
    "mp3,mpeg,mpegts,ogg,wav,wv"
)


def load_audio(source: str | Path | BinaryIO) -> np.ndarray:
    """Decodes a file to mono at 16 kHz.

    Args:
      source: a path, or a file opened in binary mode (read from its start, left open): wav, flac,
        mp3, ogg, opus, m4a, mp4, aac, webm; any rate from 1 to 768 kHz, any number of channels.

    Returns:
      float32 [ceil(n * 16000 / rate)]: the channels' average, full scale -1..1 (values beyond, as
      float files and lossy codecs give them, are kept), resampled by soxr at its HQ setting. A
      long file needs little more memory than the result.

    Raises:
      InputError: one line that names the file: missing, a directory, empty, not audio, cut short or
        damaged, without samples, shorter than one mel frame (10 ms), or with samples that are NaN
        or infinite.
    """
    # A bytearray grows in place; joining a list of blocks would hold everything twice.
    out = bytearray()
    for block in audio_blocks(source):
        out += block.tobytes()
    return np.frombuffer(out, np.float32)


def audio_blocks(source: str | Path | BinaryIO) -> Iterator[np.ndarray]:
    """The samples of `load_audio`, in order, some seconds at a time: float32 [n] each.

    Raises:
      InputError: what `load_audio` raises; what is wrong with a file may show at its end.
    """
    with contextlib.ExitStack() as stack:
        file, name = _open(source, stack)
        try:
            yield from _mono_16k(_decoded(file))
        except InputError as error:
            raise InputError(f"{name}: {error}") from error.__cause__


def resample(wav: np.ndarray, rate: int) -> np.ndarray:
    """One channel, [n] at `rate` Hz, to 16 kHz as `load_audio` does it: float32.

    The result has ceil(n * 16000 / rate) samples. Raises InputError where `rate` is not an integer
    in 1000..768000 or `wav` is not one-dimensional.
    """
    wav = np.asarray(wav, np.float32)
    if wav.ndim != 1:
        raise InputError(f"resample: the waveform has shape {list(wav.shape)}; expected [n]")
    _check_rate(rate)
    if rate == SAMPLE_RATE:
        return wav
    resampled = soxr.resample(wav, rate, SAMPLE_RATE, quality="HQ")
    return _of_length(resampled, _resampled_length(len(wav), rate))


def _open(source: str | Path | BinaryIO, stack: contextlib.ExitStack) -> tuple[BinaryIO, str]:
    """The source as a seekable binary file at its start, and its name for messages."""
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        try:
            file = stack.enter_context(open(source, "rb"))  # noqa: SIM115
        except FileNotFoundError:
            raise InputError(f"{name}: no such file") from None
        except IsADirectoryError:
            raise InputError(f"{name}: is a directory; expected an audio file") from None
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{name}: cannot be opened ({reason})") from None
    else:
        file, name = source, str(getattr(source, "name", "audio file object"))
    if isinstance(file, io.TextIOBase):
        raise InputError(f"{name}: opened as text; open it in binary mode ('rb')")
    if not hasattr(file, "read"):
        raise InputError(
            f"load_audio: got {type(source).__name__}; expected a path or a binary file object"
        )
    if not file.seekable():  # a pipe: both decoders need to seek
        return io.BytesIO(file.read()), name
    file.seek(0)
    return file, name


def _mono_16k(blocks: Iterator[tuple[int, np.ndarray]]) -> Iterator[np.ndarray]:
    """Averages, checks and resamples decoded blocks (rate, float32 [n, channels])."""
    rate, count, given, stream = 0, 0, 0, None
    for block_rate, block in blocks:
        if not rate:
            rate = block_rate
            _check_rate(rate)
            if rate != SAMPLE_RATE:
                stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        elif block_rate != rate:
            raise InputError(f"the sampling rate changes from {rate} to {block_rate} Hz within it")
        channels = block.shape[1]
        mono = block[:, 0] if channels == 1 else block @ np.full(channels, 1 / channels, "f4")
        mono = np.ascontiguousarray(mono)
        bad = np.flatnonzero(~np.isfinite(mono))
        if len(bad):
            second = (count + bad[0]) / rate
            raise InputError(f"holds samples that are NaN or infinite, the first at {second:.3f} s")
        count += len(mono)
        out = stream.resample_chunk(mono) if stream else mono
        given += len(out)
        yield out
    if not count:
        raise InputError("holds no samples")
    length = _resampled_length(count, rate)
    if length < HOP:
        raise InputError(
            f"holds {1000 * count / rate:.1f} ms of sound; expected at least 10 ms (one mel frame)"
        )
    if stream:
        rest = stream.resample_chunk(np.zeros(0, np.float32), last=True)
        yield _of_length(rest, max(length - given, 0))


def _check_rate(rate: int) -> None:
    if rate not in _RATES:
        raise InputError(f"the sampling rate is {rate} Hz; expected 1000 to 768000")


def _resampled_length(count: int, rate: int) -> int:
    return -(-count * SAMPLE_RATE // rate)


def _of_length(wav: np.ndarray, length: int) -> np.ndarray:
    """soxr may leave out the last sample: zeros stand in."""
    return np.pad(wav, (0, length - len(wav))) if len(wav) < length else wav[:length]


# --- decoders: yield (rate, float32 [n, channels]) -----------------------------------------------


def _decoded(file: BinaryIO) -> Iterator[tuple[int, np.ndarray]]:
    with contextlib.ExitStack() as stack:
        complaint = cut_short(_contents(file, stack))
    if complaint:
        raise InputError(complaint)
    file.seek(0)
    try:
        sound = soundfile.SoundFile(file)
    except TypeError:  # soundfile goes by the name "*.raw" and asks for a rate
        raise InputError("raw samples have no header; convert them to wav") from None
    except soundfile.LibsndfileError as error:
        file.seek(0)
        yield from _decoded_by_av(file, str(error.error_string).rstrip("."))
        return
    with sound:
        yield from _decoded_by_soundfile(sound)


def _contents(file: BinaryIO, stack: contextlib.ExitStack) -> bytes | mmap.mmap:
    try:
        return stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, AttributeError, ValueError):  # in memory, not on disk; or empty
        data = file.read()
    if not data:
        raise InputError("is empty (0 bytes); expected an audio file")
    if not isinstance(data, bytes):
        raise InputError(f"reading it gave {type(data).__name__}; expected bytes")
    return data


def _decoded_by_soundfile(sound: soundfile.SoundFile) -> Iterator[tuple[int, np.ndarray]]:
    rate, promised, count, step = sound.samplerate, sound.frames, 0, _BLOCK
    while True:
        try:
            if step == _SMALL_STEP:
                sound.seek(count)
            block = sound.read(step, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError:
            # flac raises where its data ends, and keeps the samples before that from us: in small
            # steps it tells how far it comes. The count below makes the complaint.
            if step == _SMALL_STEP:
                break
            step = _SMALL_STEP
            continue
        if not len(block):
            break
        count += len(block)
        yield rate, block
    unknown = promised > 1 << 60  # flac written into a pipe
    slack = _MPEG_FRAME if sound.format == "MP3" else 0
    if count + slack < promised and not unknown:
        raise InputError(_stopped(count / rate, promised / rate))


def _decoded_by_av(file: BinaryIO, refusal: str) -> Iterator[tuple[int, np.ndarray]]:
    """PyAV, for what libsndfile refused to open (`refusal` says why)."""
    import av  # here, because most files do without it

    try:
        with av.open(file, options={"format_whitelist": _AV_FORMATS}) as container:
            if not container.streams.audio:
                raise InputError("holds no audio stream")
            stream = container.streams.audio[0]
            promised = _promised_seconds(container, stream)
            seconds = 0.0
            try:
                for frame in container.decode(stream):
                    seconds += frame.samples / frame.sample_rate
                    yield frame.sample_rate, _samples(frame)
            except av.FFmpegError as error:
                if promised is None:
                    reason = error.strerror or error
                    raise InputError(f"is damaged after {seconds:.2f} s ({reason})") from None
                raise InputError(_stopped(seconds, promised)) from None
            # The promise includes what the decoder needs to start, and may be coarsely rounded.
            if promised is not None and seconds < promised - 0.1:
                raise InputError(_stopped(seconds, promised))
    except av.FFmpegError:
        raise InputError(
            f"is not audio that can be decoded (libsndfile: {refusal}; FFmpeg knows it neither)"
        ) from None


def _promised_seconds(container, stream) -> float | None:
    """The length that the header states. Other formats' is FFmpeg's guess from the bit rate."""
    if "mp4" in container.format.name and stream.duration:
        return float(stream.duration * stream.time_base)
    # Matroska states the longest stream's length only.
    if "webm" in container.format.name and len(container.streams) == 1 and container.duration:
        return container.duration / 1e6
    return None


def _samples(frame) -> np.ndarray:
    """An av.AudioFrame as float32 [n, channels], integers scaled to -1..1 as libsndfile does."""
    data = frame.to_ndarray()  # [channels, n], or [1, n * channels] where interleaved
    if frame.format.is_planar:
        data = data.T
    else:
        data = data.reshape(-1, frame.layout.nb_channels)
    if data.dtype == np.uint8:
        return (data.astype(np.float32) - 128) / 128
    if np.issubdtype(data.dtype, np.integer):
        return data.astype(np.float32) / -float(np.iinfo(data.dtype).min)
    return np.ascontiguousarray(data, np.float32)


def _stopped(held: float, promised: float) -> str:
    return (
        f"is cut short or damaged: {held:.2f} s could be decoded of the {promised:.2f} s that its "
        "header promises"
    )
