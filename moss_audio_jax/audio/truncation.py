"""Is a file cut short? Decoders pass silently over a missing end; the container often tells.

Looks at the structure of wav, ogg and mp3 files and decodes nothing. (What flac, mp4 and webm
promise is compared with what they decode to, in `io`.)
"""

from __future__ import annotations

import functools
import mmap

# Kilobits a second for header index 1 to 14, by (MPEG 1 or not, layer).
_MPEG1 = {
    1: (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    2: (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    3: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
_MPEG2_LAYER1 = (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256)
_MPEG2_LAYER23 = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_FIRST_FRAME_BYTES = 1 << 12  # how far to look for the first MPEG frame behind the tags
_RESYNC_BYTES = 1 << 20  # ... and for the next one behind damage or a tag in the middle
_STREAMED_WAV = 0x7FFF0000  # data sizes from here on are placeholders of writers into a pipe


def cut_short(data: bytes | mmap.mmap) -> str | None:
    """How a file is incomplete, as the predicate of a message; None where nothing shows it."""
    head = bytes(data[:4])
    if head in (b"RIFF", b"RF64"):
        return _wav(data)
    if head == b"OggS":
        return _ogg(data)
    if head[:3] == b"ID3" or head[:1] == b"\xff":
        return _mpeg(data)
    return None


def _wav(data: bytes | mmap.mmap) -> str | None:
    pos, bytes_per_second, long_size = 12, 0, 0
    while pos + 8 <= len(data):
        kind, size = data[pos : pos + 4], _little(data, pos + 4)
        pos += 8
        if kind == b"fmt ":
            bytes_per_second = _little(data, pos + 8)
        elif kind == b"ds64":
            long_size = _little(data, pos + 8, 8)
        elif kind == b"data":
            streamed = size >= _STREAMED_WAV
            promised = long_size if streamed else size
            held = len(data) - pos
            if promised <= held:
                return None
            seconds = max(bytes_per_second, 1)
            return _seconds_of(held / seconds, promised / seconds)
        pos += size + size % 2
    return None


def _ogg(data: bytes | mmap.mmap) -> str | None:
    pos = 0
    while 0 <= pos < len(data):
        if data[pos : pos + 4] == b"OggS":
            segments = data[pos + 26] if pos + 26 < len(data) else 0
            body = pos + 27 + segments
            pos = body + sum(data[pos + 27 : body])
            if pos > len(data):
                return "is cut short: it ends in the middle of an Ogg page"
        elif len(data) - pos < 4 and b"OggS".startswith(data[pos:]):
            return "is cut short: it ends in the middle of an Ogg page"
        else:
            pos = data.find(b"OggS", pos)  # -1 behind the last page
    return None


# --- MPEG audio (mp3) --------------------------------------------------------------------------


def _mpeg(data: bytes | mmap.mmap) -> str | None:
    pos = 0
    while data[pos : pos + 3] == b"ID3" and pos + 10 <= len(data):
        footer = 10 if data[pos + 5] & 0x10 else 0
        size = functools.reduce(lambda total, byte: total << 7 | byte, data[pos + 6 : pos + 10])
        pos += 10 + size + footer
    first = pos = _next_frame(data, pos, None, _FIRST_FRAME_BYTES)
    if first < 0:
        return None  # some other format (AAC, say): for the decoders to judge
    kind = _kind(data, first)
    _, samples, rate = _frame(bytes(data[first : first + 4]))
    frames = 0
    while pos >= 0:
        size = _frame_size(data, pos, kind)
        if not size:
            if 0 < len(data) - pos < 4 and data[pos] == 0xFF:
                break
            pos = _next_frame(data, pos, kind, _RESYNC_BYTES)
            continue
        if pos + size > len(data):
            break
        frames += 1
        pos += size
    in_middle = 0 <= pos < len(data)
    promised = _promised_frames(data, first)
    if promised is None:
        if in_middle:
            held = frames * samples / rate
            return f"is cut short: it ends in the middle of an MPEG frame, after {held:.2f} s"
        return None
    frames -= 1  # the frame with the count holds no sound
    held, whole = frames * samples / rate, promised * samples / rate
    # Writers disagree by one on whether the count includes its own frame.
    if in_middle or frames < promised - 1:
        return _seconds_of(max(held, 0.0), max(whole, held))
    if frames > promised + 1:
        return (
            f"holds {held:.2f} s of MPEG frames but its header promises {whole:.2f} s, at which "
            "decoders stop (files joined end to end?)"
        )
    return None


def _promised_frames(data: bytes | mmap.mmap, first: int) -> int | None:
    """The frame count in a Xing, Info or VBRI header inside the first frame."""
    head = bytes(data[first : first + 64])
    for tag in (b"Xing", b"Info"):
        at = head.find(tag, 4, 44)
        if at >= 0:
            has_count = head[at + 7] & 1
            return int.from_bytes(head[at + 8 : at + 12], "big") if has_count else None
    if head[36:40] == b"VBRI":
        return int.from_bytes(head[50:54], "big")
    return None


def _next_frame(data: bytes | mmap.mmap, start: int, kind: bytes | None, reach: int) -> int:
    """Where the next believable frame starts: two in a row, or one that ends the file. -1: none."""
    end = min(len(data), start + reach)
    pos = data.find(b"\xff", start, end)
    while pos >= 0:
        size = _frame_size(data, pos, kind)
        if size and (pos + size == len(data) or _frame_size(data, pos + size, _kind(data, pos))):
            return pos
        pos = data.find(b"\xff", pos + 1, end)
    return -1


def _frame_size(data: bytes | mmap.mmap, pos: int, kind: bytes | None) -> int:
    """Bytes of the frame at pos, 0 where no frame (of that kind) starts."""
    if kind is not None and _kind(data, pos) != kind:
        return 0
    return _frame(bytes(data[pos : pos + 4]))[0]


def _kind(data: bytes | mmap.mmap, pos: int) -> bytes:
    """What all frames of a stream share: MPEG version, layer, sampling rate."""
    header = data[pos : pos + 3]
    return bytes((header[0], header[1] & 0xFE, header[2] & 0x0C)) if len(header) == 3 else b""


@functools.lru_cache(maxsize=4096)
def _frame(header: bytes) -> tuple[int, int, int]:
    """(bytes, samples, rate) of the frame with these four header bytes; zeros if it is none."""
    if len(header) < 4 or header[0] != 0xFF or header[1] < 0xE0:
        return 0, 0, 0
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    bitrate, rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:
        return 0, 0, 0
    mpeg1 = version == 3
    hertz = (44100, 48000, 32000)[rate] // {3: 1, 2: 2, 0: 4}[version]
    table = _MPEG1[layer] if mpeg1 else _MPEG2_LAYER1 if layer == 1 else _MPEG2_LAYER23
    bits = table[bitrate - 1] * 1000
    padding = header[2] >> 1 & 1
    if layer == 1:
        return (12 * bits // hertz + padding) * 4, 384, hertz
    samples = 1152 if mpeg1 or layer == 2 else 576
    return samples // 8 * bits // hertz + padding, samples, hertz


def _little(data: bytes | mmap.mmap, pos: int, size: int = 4) -> int:
    return int.from_bytes(data[pos : pos + size], "little")


def _seconds_of(held: float, promised: float) -> str:
    return f"is cut short: it holds {held:.2f} s of the {promised:.2f} s that its header promises"
