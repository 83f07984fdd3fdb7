"""Files in which games keep many sounds: Qt's resources (.rcc) and OpenTTD's sets (.cat)."""

from __future__ import annotations

import functools
import struct
import zlib
from pathlib import Path

from moss_audio_jax.errors import InputError

_FOLDER, _ZLIB, _ZSTD = 2, 1, 4  # flags of an entry of Qt's resources


@functools.lru_cache(4)
def members(path: Path) -> dict[str, bytes]:
    """The contents of a box by name: paths in Qt's resources, numbers in OpenTTD's sets.

    Raises:
      InputError: the file is no such box, or is cut short.
    """
    data = path.read_bytes()
    try:
        return _qt(data) if data.startswith(b"qres") else _openttd(data)
    except (struct.error, IndexError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path}: expected Qt resources or an OpenTTD set: {error}") from None


def _qt(data: bytes) -> dict[str, bytes]:
    """Big-endian: a tree of entries that point to names (UTF-16) and to lengths and contents."""
    version, tree, contents, names = struct.unpack_from(">4I", data, 4)
    size = 14 if version < 2 else 22
    found: dict[str, bytes] = {}
    entries = [(0, "")]
    while entries:
        number, folder = entries.pop()
        name_at, flags, first, second = struct.unpack_from(">IHII", data, tree + size * number)
        if flags & _FOLDER:  # first: how many entries it has; second: the number of the first one
            inside = f"{folder}{_name(data, names + name_at)}/" if number else ""
            entries += [(second + i, inside) for i in range(first)]
            continue
        at = contents + second
        length = struct.unpack_from(">I", data, at)[0]
        body = data[at + 4 : at + 4 + length]
        if flags & _ZLIB:
            body = zlib.decompress(body[4:])
        if not flags & _ZSTD:  # no sound is packed with Zstandard, which gains nothing on sound
            found[folder + _name(data, names + name_at)] = body
    return found


def _name(data: bytes, at: int) -> str:
    length = struct.unpack_from(">H", data, at)[0]
    return data[at + 6 : at + 6 + 2 * length].decode("utf-16-be")


def _openttd(data: bytes) -> dict[str, bytes]:
    """Little-endian: offset and length of each sound; a title comes before each."""
    count = (struct.unpack_from("<I", data)[0] & 0x7FFFFFFF) // 8
    found = {}
    for number in range(count):
        at, length = struct.unpack_from("<II", data, 8 * number)
        at = (at & 0x7FFFFFFF) + 1 + data[at & 0x7FFFFFFF]
        if at + length > len(data):
            raise struct.error(f"sound {number} ends beyond the file")
        found[str(number)] = data[at : at + length]
    return found
