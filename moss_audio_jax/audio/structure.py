"""Reads facts from the structure of a compressed file that decoders ignore.

These are the borders of files that were joined (FLAC, chained Ogg streams), the number of samples
that a header promises, and whether the end of the file is missing. Nothing is decoded here.
"""

from __future__ import annotations

import math
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from moss_audio_jax.errors import InputError

_PIECE = 1 << 16  # bytes searched at a time
_MASTERS = (b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75")  # Matroska's segment and cluster
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass
class Link:
    """A file, or one of several that were joined end to end."""

    start: int  # its first byte
    stop: int
    format: str | None = None  # FFmpeg's name of the format, if it is certain
    samples: int | None = None  # what the header of a FLAC file promises, if anything
    # For Ogg with a single stream. A granule is a position in samples.
    first_granule: int = 0  # at the end of the first page with sound
    first_packets: int = 0  # packets up to there
    last_granule: int | None = None
    ended: bool = True  # its last page is marked as the last


def links(file: BinaryIO) -> list[Link]:
    """The files in a file, one after the other.

    Raises:
      InputError: the end or the middle of an Ogg file is missing or damaged.
    """
    size, start = file.seek(0, os.SEEK_END), after_id3(file)
    kind = read_at(file, start, 4)
    if kind == b"fLaC":
        return _flac_links(file, start, size)
    if read_at(file, 0, 4) == b"OggS":
        return _ogg_links(file, size)
    return [Link(0, size)]


def after_id3(file: BinaryIO) -> int:
    """The first byte after any ID3v2 tags."""
    pos = 0
    while (head := read_at(file, pos, 10))[:3] == b"ID3" and len(head) == 10:
        length = 0
        for byte in head[6:]:
            length = length << 7 | byte
        pos += 10 + length + (10 if head[5] & 0x10 else 0)
    return pos


def read_at(file: BinaryIO, pos: int, count: int) -> bytes:
    file.seek(pos)
    return file.read(count)


# --- flac ----------------------------------------------------------------------------------------


def _flac_links(file: BinaryIO, start: int, size: int) -> list[Link]:
    # The start of a file; the four-byte mark alone may also occur in the data.
    described = (b"fLaC\0\0\0\x22", b"fLaC\x80\0\0\x22")
    starts = [p for p in _find_all(file, b"fLaC", start + 4) if read_at(file, p, 8) in described]
    starts.insert(0, start)
    found = []
    for first, stop in zip(starts, [*starts[1:], size], strict=True):
        samples = int.from_bytes(read_at(file, first + 18, 8), "big") & (1 << 36) - 1
        found.append(Link(first, stop, "flac", samples or None))
    found[0].start = 0
    return found


def _find_all(file: BinaryIO, mark: bytes, start: int, most: int | None = None) -> list[int]:
    """The positions of a mark of four bytes, from `start` on."""
    found, kept = [], b""
    file.seek(start)
    while (most is None or len(found) < most) and (data := file.read(_PIECE)):
        data = kept + data
        at = data.find(mark)
        while at >= 0:
            found.append(start + at)
            at = data.find(mark, at + 1)
        kept = data[-3:]
        start += len(data) - len(kept)
    return found[:most]


# --- ogg -----------------------------------------------------------------------------------------


def _ogg_links(file: BinaryIO, size: int) -> list[Link]:
    found: list[Link] = []
    sounding, packets = False, 0
    numbers: dict[bytes, int] = {}  # number of the last page of each stream with sound in this link
    serials: set[bytes] = set()
    for start, head, lacing in _ogg_pages(file, size):
        flags, serial = head[5], head[14:18]
        granule = int.from_bytes(head[6:14], "little", signed=True)
        number = int.from_bytes(head[18:22], "little")
        if not found or (flags & 2 and sounding):
            if found:
                found[-1].stop = start
            found.append(Link(start, size, "ogg"))
            sounding, packets, numbers, serials = False, 0, {}, set()
        link = found[-1]
        serials.add(serial)
        # A listener who joins a broadcast gets the headers and then pages with later numbers.
        if numbers.get(serial, number - 1) + 1 & 0xFFFFFFFF != number:
            raise InputError(f"is damaged: an Ogg page is missing before byte {start}")
        packets += sum(length < 255 for length in lacing)
        if granule > 0:
            numbers[serial] = number
            if not sounding:
                link.first_granule, link.first_packets, sounding = granule, packets, True
            link.last_granule = granule
        elif serial in numbers:
            numbers[serial] = number
        if len(serials) > 1:
            link.last_granule = None  # which stream counts depends on the track
        link.ended = bool(flags & 4)
    return found


def _ogg_pages(file: BinaryIO, size: int) -> Iterator[tuple[int, bytes, bytes]]:
    """(first byte, head, lengths of the parts of packets) of each page; raises if one is cut."""
    pos = 0
    while head := read_at(file, pos, 27):
        if head[:4] != b"OggS"[: len(head)]:
            pos = next(iter(_find_all(file, b"OggS", pos, most=1)), size)  # skip other data
            continue
        lacing = file.read(head[26]) if len(head) == 27 else b""
        body = file.read(sum(lacing))
        stop = pos + 27 + len(lacing) + sum(lacing)
        if len(head) < 27 or len(lacing) < head[26] or stop > size:
            raise InputError("is cut short: it ends in the middle of an Ogg page")
        # Ogg's CRC has zlib's polynomial, but reads the bits of each byte in reverse.
        page = head[:22] + bytes(4) + head[26:] + lacing + body
        crc = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
        if crc.to_bytes(4, "big").translate(_REVERSED) != head[22:26]:
            raise InputError(f"is damaged: the checksum of the Ogg page at byte {pos} is wrong")
        yield pos, head, lacing
        pos = stop


# --- boxes, elements, blocks ---------------------------------------------------------------------


def cut(file: BinaryIO) -> str | None:
    """Says how a file is cut short, as the predicate of a message; None if that cannot be seen.

    It can be seen in MP4, Matroska, AVI, FLV, ASF, IFF, VOC and NIST files, whose parts state their
    lengths.
    """
    size, head = file.seek(0, os.SEEK_END), read_at(file, 0, 1024)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp", b"moof"):
        parts, kind = _mp4_boxes(file, size), "an MP4 box"
    elif head[:4] == b"\x1a\x45\xdf\xa3":
        parts, kind = _elements(file), "a Matroska element"
    elif head[:3] == b"FLV":
        parts, kind = _flv_tags(file, head), "its FLV tags"
    elif head[:16] == _ASF_HEADER:
        parts, kind = _asf_objects(file, head), "an ASF object"
    elif head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        parts, kind = [8 + int.from_bytes(head[4:8], "little")], "its AVI chunk"
    elif head[:4] == b"FORM":
        parts, kind = [8 + int.from_bytes(head[4:8], "big")], "its IFF chunk"
    elif head[:19] == b"Creative Voice File":
        parts, kind = _voc_blocks(file, int.from_bytes(head[20:22], "little"), size), "a VOC block"
    elif head[:7] == b"NIST_1A":
        parts, kind = _nist(head), "its samples"
    else:
        return None
    stop = max(parts, default=0)
    if stop <= size:
        return None
    return f"is cut short: it ends in the middle of {kind} ({size} bytes of {stop})"


def _mp4_boxes(file: BinaryIO, size: int) -> Iterator[int]:
    pos = 0
    while pos + 8 <= size:
        head = read_at(file, pos, 16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8 or not re.fullmatch(rb"[ -~\xa9]{4}", head[4:8]):
            return  # a length of 0 means up to the end of the file
        pos += length
        yield pos


def _elements(file: BinaryIO) -> Iterator[int]:
    pos = 0
    while len(head := read_at(file, pos, 12)) > 4 and head[0]:
        name = 9 - head[0].bit_length()  # bytes of the name
        width = 9 - head[min(name, 4)].bit_length()
        if name > 4 or width > 8:
            return
        length = int.from_bytes(head[name : name + width], "big") & (1 << 7 * width) - 1
        unknown = length == (1 << 7 * width) - 1
        pos += name + width
        # A file that was written while recording does not state its total length; its parts do.
        if not (unknown and head[:name] in _MASTERS):
            pos += length
            yield pos


def _flv_tags(file: BinaryIO, head: bytes) -> Iterator[int]:
    if stated := re.search(rb"(?s:\0\x08filesize\0(.{8}))", head):  # by its first tag
        size = struct.unpack(">d", stated[1])[0]
        yield int(size) if 0 < size < math.inf else 0
    pos = int.from_bytes(head[5:9], "big") + 4
    while len(head := read_at(file, pos, 4)) == 4 and head[0] in (8, 9, 18):
        pos += 11 + int.from_bytes(head[1:], "big")
        yield pos
        pos += 4


def _asf_objects(file: BinaryIO, head: bytes) -> Iterator[int]:
    pos = int.from_bytes(head[16:24], "little")  # after the header come the packets
    yield pos
    if _asf_properties(file):
        yield pos + int.from_bytes(read_at(file, pos + 16, 8), "little")


def _asf_properties(file: BinaryIO) -> bytes | None:
    """What the header states of the whole file; None for a broadcast, which cannot know it."""
    head = read_at(file, 0, _PIECE)
    found = head[head.find(_ASF_PROPERTIES) :][:104]
    return None if len(found) < 104 or found[88] & 1 else found


def _voc_blocks(file: BinaryIO, pos: int, size: int) -> Iterator[int]:
    # Some writers state a block eight bytes too short, so a rest this small is not a block.
    while size - pos > 16 and (head := read_at(file, pos, 4))[0]:
        pos += 4 + int.from_bytes(head[1:], "little")
        yield pos


def _nist(head: bytes) -> Iterator[int]:
    def number(name: bytes) -> int:
        found = re.search(name + rb" -i (\d{1,12})\s", head)
        return int(found[1]) if found else 0

    length = re.match(rb"NIST_1A\s+(\d{1,9})\s", head)
    if length and re.search(rb"sample_coding -s\d+ (pcm|ulaw|alaw|mu-law)\s", head):
        size = number(b"sample_n_bytes") * number(b"channel_count") * number(b"sample_count")
        yield int(length[1]) + size


def asf_seconds(file: BinaryIO) -> float | None:
    """How long the longest stream of an ASF file plays, if its header states it."""
    stated = _asf_properties(file)
    if not stated:
        return None
    play, silent = (int.from_bytes(stated[at : at + 8], "little") for at in (64, 80))
    return max(0, play - 10_000 * silent) / 1e7  # 100 ns, and ms before the first sound


# --- mpeg ----------------------------------------------------------------------------------------


def mpeg_promise(file: BinaryIO, stop: int) -> tuple[int, int] | None:
    """(frames, samples of padding in them) from a Xing, Info or VBRI header before byte `stop`."""
    start = max(0, stop - 2048)
    near = read_at(file, start, stop - start)
    tags = list(re.finditer(rb"(?s:(Xing|Info)\0\0\0(.)(....)|VBRI.{10}(....))", near))
    if not tags:
        return None
    tag = tags[-1]
    if not tag[1]:
        return int.from_bytes(tag[4], "big"), 0
    if not tag[2][0] & 1:
        return None
    # These writers state the encoder's delay and the padding of the last frame; FFmpeg uses both.
    info = near[tag.start() + 120 : tag.start() + 144]
    padding = 0
    if tag[2][0] & 15 == 15 and info[:4] in (b"LAME", b"Lavf", b"Lavc"):
        padding = int.from_bytes(info[21:24], "big")
    return int.from_bytes(tag[3], "big"), (padding >> 12) + (padding & 0xFFF)
