"""Files of rows, local or remote, as lists that any row can be read from at once.

A `Source` knows where each row lies and keeps only that in memory; `read_location` fetches a row
from anywhere, a worker process included, without the index.
"""

from __future__ import annotations

import functools
import io
import os
import re
import threading
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from moss_audio_jax.data.records import AudioFile, Row, parse_row
from moss_audio_jax.errors import InputError

ARRAY_RECORD = (".array_record", ".arrayrecord")
_BLOCK = 1 << 24  # bytes read at a time while lines are counted
_OPEN_FILES = 256
_BLANK = re.compile(rb"\n\r?(?=\n)")  # an empty line, from the end of the line before it on


class Location(NamedTuple):
    """Where a row lies: bytes start..stop of a JSONL file, or record `start` of a shard.

    `line` counts from 1, blank lines of a JSONL file included.
    """

    path: str
    line: int
    start: int
    stop: int


class Source:
    """The rows of several files, one after the other.

    `len(source)` rows; `source[i]` is the i-th, parsed (InputError where it is bad).
    """

    def __init__(self, paths: str | Sequence[str]):
        """Args:
        paths: *.jsonl and *.array_record files, local or remote (gs://, s3://, ...); `*` and `?`
          in a name stand for every match, sorted.

        Raises:
          InputError: a file that is missing, empty or of another kind; no path at all.
        """
        self.paths = expand([paths] if isinstance(paths, (str, os.PathLike)) else paths)
        self._files = [_open(path) for path in self.paths]
        for path, file in zip(self.paths, self._files, strict=True):
            # A shard may be empty: all of its rows were bad.
            if not len(file) and not (_is_array_record(path) and len(self.paths) > 1):
                raise InputError(f"{path}: holds no rows; expected at least one")
        self._ends = np.cumsum([len(file) for file in self._files])
        if not self._ends[-1]:
            raise InputError(f"{self.paths[0]} ...: the shards hold no rows; expected at least one")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def location(self, index: int) -> Location:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        return self._files[number].location(index - start)

    def __getitem__(self, index: int) -> Row:
        return parse_row(read_location(self.location(index)))


def read_location(location: Location) -> bytes:
    """The bytes of a row: a line of JSON or a record (`records.parse_row`)."""
    if _is_array_record(location.path):
        return _array_record(location.path).read([location.start])[0]
    return _read_range(location.path, location.start, location.stop)


def clip_file(path: str, row_path: str) -> str | AudioFile:
    """The audio file that a row names, ready for `audio.load_audio`.

    Args:
      path: as the row has it: absolute, remote, or relative to the folder of the row's file.
        `shard.array_record#12` is the first clip of that shard's record 12 (counted from 0).
      row_path: the file that holds the row.

    Returns:
      A local path, or the bytes of a remote file or record.

    Raises:
      InputError: a record that holds no audio file. OSError: a remote file that cannot be read.
    """
    if "://" not in path and not os.path.isabs(path):
        path = _join(row_path, path)
    shard, _, number = path.rpartition("#")
    if _is_array_record(shard) and number.isdecimal():
        reader = _array_record(shard)
        if int(number) >= reader.num_records():
            raise InputError(f"{path}: no such record; the shard holds {reader.num_records()}")
        clips = parse_row(reader.read([int(number)])[0]).clips
        if not clips or not isinstance(clips[0], AudioFile):
            raise InputError(f"{path}: the record holds no audio file")
        return clips[0]
    if "://" not in path:
        return path
    return AudioFile(_epath(path).read_bytes(), path)


def as_file(clip: str | AudioFile) -> str | BinaryIO:
    """What `load_audio` takes; its messages name the clip either way."""
    if isinstance(clip, str):
        return clip
    file = io.BytesIO(clip.data)
    file.name = clip.name
    return file


def expand(paths: Sequence[str]) -> tuple[str, ...]:
    """The files that paths and patterns name."""
    found: list[str] = []
    for path in map(os.fspath, paths):
        if not isinstance(path, str) or not path:
            raise InputError(f"data: {path!r} is no path; expected *.jsonl or *.array_record")
        if "*" not in path and "?" not in path:
            found.append(path)
            continue
        folder, _, pattern = path.rpartition("/")
        matches = sorted(str(match) for match in _epath(folder or ".").glob(pattern))
        if not matches:
            raise InputError(f"{path}: no file matches; expected at least one")
        found += matches
    if not found:
        raise InputError("data: no paths; expected at least one *.jsonl or *.array_record file")
    return tuple(found)


# --- JSONL ---------------------------------------------------------------------------------------


class _Jsonl:
    """Where the lines of a file begin and end; blank lines are no rows."""

    def __init__(self, path: str):
        self.path = path
        ends, blank, size, before = [], [], 0, b"\n"
        try:
            with _epath(path).open("rb") as file:
                while block := file.read(_BLOCK):
                    ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + size)
                    joined = before + block
                    blank += [
                        size - len(before) + found.start() + 1 for found in _BLANK.finditer(joined)
                    ]
                    size, before = size + len(block), joined[-2:]
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; expected rows of JSON") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
        if before[-1:] != b"\n":  # the last line need not be ended
            ends.append(np.array([size]))
        stops = np.concatenate([np.zeros(0, np.int64), *ends])
        starts = np.concatenate([np.zeros(1, np.int64), stops[:-1] + 1])[: len(stops)]
        rows = np.flatnonzero(~np.isin(starts, blank))
        self._starts, self._stops = starts[rows], stops[rows]
        self._lines = None if len(rows) == len(stops) else rows

    def __len__(self) -> int:
        return len(self._starts)

    def location(self, index: int) -> Location:
        line = index if self._lines is None else int(self._lines[index])
        return Location(self.path, line + 1, int(self._starts[index]), int(self._stops[index]))


def _read_range(path: str, start: int, stop: int) -> bytes:
    file, lock = _opened(path)
    if lock is None:
        return os.pread(file.fileno(), stop - start, start)
    with lock:
        file.seek(start)
        return file.read(stop - start)


@functools.lru_cache(_OPEN_FILES)
def _opened(path: str) -> tuple[BinaryIO, threading.Lock | None]:
    """A file that stays open; remote ones have one position, hence a lock."""
    if "://" in path:
        return _epath(path).open("rb"), threading.Lock()
    return open(path, "rb"), None


# --- ArrayRecord ---------------------------------------------------------------------------------


class _ArrayRecord:
    def __init__(self, path: str):
        self.path = path
        reader = _array_record(path)
        self._count = reader.num_records()
        if not reader.ok():  # it counts no records then
            raise InputError(f"{path}: cut short or no ArrayRecord file; make or copy it again")

    def __len__(self) -> int:
        return self._count

    def location(self, index: int) -> Location:
        return Location(self.path, index + 1, index, index + 1)


@functools.lru_cache(_OPEN_FILES)
def _array_record(path: str):
    from array_record.python import array_record_module

    if "://" not in path and not os.path.isfile(path):
        raise InputError(f"{path}: no such file; expected an ArrayRecord shard")
    # Rows are read one by one and out of order: reading ahead would be wasted.
    return array_record_module.ArrayRecordReader(
        path, options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15
    )


def _is_array_record(path: str) -> bool:
    return path.endswith(ARRAY_RECORD)


def _open(path: str) -> _Jsonl | _ArrayRecord:
    if _is_array_record(path):
        return _ArrayRecord(path)
    if path.endswith((".jsonl", ".json")):
        return _Jsonl(path)
    raise InputError(f"{path}: expected a file *.jsonl or *.array_record")


def _join(row_path: str, path: str) -> str:
    folder = row_path.rpartition("/")[0]
    return f"{folder}/{path}" if folder or row_path.startswith("/") else path


def _epath(path: str):
    from etils import epath  # here, because a worker of local files does without it

    return epath.Path(path)
