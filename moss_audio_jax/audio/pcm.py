"""Files of plain samples: WAV (RIFF, RIFX, RF64, BW64, W64), AIFF, CAF and AU.

The header states how many bytes of samples follow. A file with fewer bytes is cut short, unless the
number is a placeholder. Killed recorders and programs that write into a pipe leave placeholders;
then everything that follows is sound.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from moss_audio_jax.audio.structure import read_at
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import brief

_BLOCK_BYTES = 1 << 20
_W64 = b"riff\x2e\x91\xcf\x11"
_AU = (b".snd", b"dns.")
_UNKNOWN_32, _UNKNOWN_64 = 0x7FFF0000, 1 << 48  # sizes from here on are placeholders
# ... and so are multiples of these round numbers, if larger than nearly every real file.
_ROUND, _ROUND_FROM = (1_000_000, 1 << 16), 1_000_000_000
_MOST_CHUNKS = 10_000
_WIDTHS = {"u": (1, 2), "i": (1, 2, 3, 4, 8), "f": (2, 4, 8)}  # bytes of a sample
_AU_CODES = {2: ("i", 1), 3: ("i", 2), 4: ("i", 3), 5: ("i", 4), 6: ("f", 4), 7: ("f", 8)}
_AIFC_KINDS = {
    b"NONE": "i>",
    b"twos": "i>",
    b"in24": "i>",
    b"in32": "i>",
    b"sowt": "i<",
    b"raw ": "u>",
    b"fl32": "f>",
    b"FL32": "f>",
    b"fl64": "f>",
    b"FL64": "f>",
}


class Coding(NamedTuple):
    """The encoding of samples."""

    rate: int
    channels: int
    code: str  # "i2<": kind (i, u, f), bytes, byte order; "" for a codec that FFmpeg knows

    @property
    def bytes_a_second(self) -> int:
        return self.rate * self.channels * int(self.code[1])


class Sound(NamedTuple):
    """One file, or one of several that were joined end to end. Positions are bytes."""

    start: int
    stop: int
    samples: tuple[int, int]  # start and stop
    coding: Coding
    more: bool = False  # another chunk of samples follows, which is not read


class _Layout(NamedTuple):
    """The form of a container's chunks."""

    first: int  # bytes before the first chunk
    head: str  # struct of a chunk's name and size
    own: int  # bytes of the head that the size includes
    align: int


def sounds(file: BinaryIO) -> list[Sound]:
    """The sounds of a file: several if files were joined end to end, none in other formats.

    Raises:
      InputError: it is cut short, or has no samples or no usable description of them.
    """
    size, start, found = file.seek(0, os.SEEK_END), 0, []
    while _layout(head := read_at(file, start, 24)):
        try:
            sound = (_au if head[:4] in _AU else _chunked)(file, start, size)
        except InputError:
            raise
        except (struct.error, OverflowError, ValueError):
            raise InputError("is cut short or damaged: its header cannot be read") from None
        found.append(sound)
        start = sound.stop
    return found


def blocks(file: BinaryIO, sound: Sound) -> Iterator[tuple[int, np.ndarray]]:
    """Reads plain samples: (rate, float32 [n, channels]), integers scaled to -1..1."""
    (start, stop), (rate, channels, code) = sound.samples, sound.coding
    frame = channels * int(code[1])
    count, step = (stop - start) // frame, max(1, _BLOCK_BYTES // frame)
    file.seek(start)
    while count > 0:
        data = file.read(min(step, count) * frame)
        frames = len(data) // frame
        if not frames:
            raise InputError("became shorter while it was read")
        yield rate, _values(data[: frames * frame], code).reshape(frames, channels)
        count -= frames


def _values(data: bytes, code: str) -> np.ndarray:
    kind, width, order = code[0], int(code[1]), code[2]
    if width == 3:  # read three bytes and the next one, which is then dropped
        wide = np.ndarray(len(data) // 3, f"{order}i4", data + b"\0", strides=(3,))
        return scaled(wide << 8 if order == "<" else wide & -256)
    return scaled(np.frombuffer(data, f"{order}{kind}{width}"))


def array_of(values: Any) -> np.ndarray:
    """Samples from any library as a NumPy array. Raises InputError if that cannot be done."""
    if np.ma.is_masked(values):
        raise InputError("the array has masked samples; fill them first (numpy.ma.filled)")
    try:
        return np.asarray(values)
    except Exception as error:  # a foreign object may raise anything
        raise InputError(
            f"NumPy cannot read the {type(values).__name__} ({brief(error)}); expected an array of "
            "numbers (of a torch tensor: .float().cpu().numpy())"
        ) from error


def scaled(values: np.ndarray) -> np.ndarray:
    """Samples as float32. The full range of integers becomes -1..1 (unsigned: 128 becomes 0)."""
    if values.dtype.kind == "f":
        # Values that are not finite are refused later.
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(np.float32, copy=False)
    scale = np.float32(2.0 ** (1 - 8 * values.itemsize))
    out = np.multiply(values, scale, dtype=np.float32, casting="unsafe")
    return out - 1 if values.dtype.kind == "u" else out


# --- containers ----------------------------------------------------------------------------------


def _layout(head: bytes) -> _Layout | None:
    kind, form = head[:4], head[8:12]
    if kind in (b"RIFF", b"RF64", b"BW64") and form == b"WAVE":
        return _Layout(12, "<4sI", 0, 2)
    if (kind == b"RIFX" and form == b"WAVE") or (kind == b"FORM" and form in (b"AIFF", b"AIFC")):
        return _Layout(12, ">4sI", 0, 2)
    if kind == b"caff":
        return _Layout(8, ">4sq", 0, 1)
    if head[:8] == _W64:
        return _Layout(40, "<4s12xQ", 24, 8)
    return _Layout(24, "", 0, 1) if kind in _AU else None


def _au(file: BinaryIO, start: int, size: int) -> Sound:
    head = read_at(file, start, 24)
    order = ">" if head[:4] == b".snd" else "<"
    offset, promised, encoding, rate, channels = struct.unpack(f"{order}5I", head[4:24])
    kind, width = _AU_CODES.get(encoding, ("", 1))
    coding = _coding(rate, channels, kind, width, order)
    data = min(start + offset, size)
    stop = _stop(file, data, size, promised, _UNKNOWN_32, coding)
    return Sound(start, stop, (data, stop), coding)


def _chunked(file: BinaryIO, start: int, size: int) -> Sound:
    layout = _layout(read_at(file, start, 24))
    coding = data = long_size = None
    for kind, body, length, _ in _chunks(file, layout, start, start + layout.first, size):
        if kind in _CODINGS:
            coding = _CODINGS[kind](read_at(file, body, min(max(length, 0), 64)), layout.head[0])
        elif kind == b"ds64":
            (long_size,) = struct.unpack("<Q", read_at(file, body + 8, 8))
        elif kind in _SAMPLES:
            unknown = _UNKNOWN_64 if layout.own or layout.head[-1] == "q" else _UNKNOWN_32
            if long_size is not None and length >= _UNKNOWN_32:
                length, unknown = long_size, _UNKNOWN_64
            before = 4 if layout.head[-1] == "q" else 0  # bytes of the chunk before the samples
            if kind == b"SSND":
                before = 8 + struct.unpack(">I", read_at(file, body, 4))[0]
            data, promised = min(body + before, size), max(length - before, -1)
        if coding and data:
            break
    if coding is None or data is None:
        raise InputError("is cut short or damaged: it ends before its samples")
    if promised == 0 and _end_of_chunks(file, layout, start, data, size)[1]:
        stop = data
    else:
        stop = _stop(file, data, size, promised, unknown, coding)
    end, more = stop, False
    if not _layout(read_at(file, stop, 24)):  # other chunks follow the samples
        padded = stop + -(stop - start) % layout.align
        end, _ = _end_of_chunks(file, layout, start, padded, size)
        more = any(kind in _SAMPLES for kind, *_ in _chunks(file, layout, start, padded, size))
    return Sound(start, end, (data, stop), coding, more)


def _chunks(
    file: BinaryIO, layout: _Layout, start: int, pos: int, size: int
) -> Iterator[tuple[bytes, int, int, int]]:
    """(name, first byte, length, start of the next chunk) for each chunk from `pos` on."""
    length_of_head = struct.calcsize(layout.head)
    for _ in range(_MOST_CHUNKS):
        if pos >= size:
            return
        head = read_at(file, pos, max(24, length_of_head))
        if len(head) < length_of_head or _layout(head):
            return
        kind, length = struct.unpack(layout.head, head[:length_of_head])
        if not (kind.isascii() and kind.decode("ascii").isprintable()):
            return
        body, length = pos + length_of_head, length - layout.own
        pos = body + max(length, 0)
        pos += -(pos - start) % layout.align
        yield kind, body, length, pos


def _end_of_chunks(
    file: BinaryIO, layout: _Layout, start: int, pos: int, size: int
) -> tuple[int, bool]:
    """The end of the chunks from `pos` on, and whether only chunks (or a joined file) are there."""
    for *_, following in _chunks(file, layout, start, pos, size):
        if following > size + layout.align:  # not a chunk, or not all of one
            break
        pos = following
    only_chunks = size <= pos <= size + layout.align or bool(_layout(read_at(file, pos, 24)))
    return min(pos, size), only_chunks


def _stop(file: BinaryIO, data: int, size: int, promised: int, unknown: int, coding: Coding) -> int:
    """The end of the samples that start at byte `data`, in a file of `size` bytes."""
    if 0 < promised <= size - data:
        return data + promised
    rounded = promised >= _ROUND_FROM and any(promised % number == 0 for number in _ROUND)
    if 0 < promised < unknown and not rounded:
        held, unit = [size - data, promised], "bytes"
        if coding.code:
            held, unit = [f"{n / coding.bytes_a_second:.2f}" for n in held], "s"
        raise InputError(
            f"is cut short: it holds {held[0]} {unit} of the {held[1]} {unit} that its header "
            "promises"
        )
    return _next_wave(file, data) or size  # a placeholder: all that follows is sound


def _next_wave(file: BinaryIO, start: int) -> int | None:
    """The first byte of a WAV header after `start`: files were joined. None if there is none."""
    mark, kept = b"WAVEfmt ", b""
    file.seek(start)
    while data := file.read(_BLOCK_BYTES):
        data = kept + data
        found = data.find(mark, 8)
        if found >= 0 and _layout(data[found - 8 : found + 16]):
            return start + found - 8
        kept = data[-16:]
        start += len(data) - len(kept)
    return None


# --- descriptions of samples ---------------------------------------------------------------------


def _coding(rate: int, channels: int, kind: str, width: int, order: str) -> Coding:
    if not rate or not channels:
        raise InputError(f"its header states {rate} Hz and {channels} channels")
    if width not in _WIDTHS.get(kind, ()):
        return Coding(rate, channels, "")
    return Coding(rate, channels, f"{kind}{width}{order}")


def _wav(data: bytes, order: str) -> Coding:
    tag, channels, rate, _, align, bits = struct.unpack(f"{order}HHIIHH", data[:16])
    if tag == 0xFFFE:  # "extensible": the tag comes later
        (tag,) = struct.unpack(f"{order}H", data[24:26])
    width = -(-bits // 8)
    if channels and align % channels == 0 and align // channels >= width:
        width = align // channels  # such as 24 bits in the upper bytes of 4
    kind = {1: "u" if width == 1 else "i", 3: "f"}.get(tag, "")
    return _coding(rate, channels, kind, width, order)


def _aiff(data: bytes, _: str) -> Coding:
    channels, _, bits, exponent, mantissa = struct.unpack(">HIHHQ", data[:18])
    rate = round(mantissa * 2.0 ** ((exponent & 0x7FFF) - 16383 - 63))
    name = data[18:22] or b"NONE"
    kind, order = _AIFC_KINDS.get(name, ("", ">"))
    return _coding(rate, channels, kind, -(-bits // 8), order)


def _caf(data: bytes, _: str) -> Coding:
    rate, name, flags, size, frames, channels, _ = struct.unpack(">d4sIIIII", data[:32])
    kind, rate = "", round(rate)
    if name == b"lpcm" and channels and size % channels == 0 and frames == 1:
        kind = "f" if flags & 1 else "i"
    order = "<" if flags & 2 else ">"
    return _coding(rate, channels, kind, size // max(channels, 1), order)


_CODINGS = {b"fmt ": _wav, b"COMM": _aiff, b"desc": _caf}
_SAMPLES = (b"data", b"SSND")
