"""Files of rows, local or remote, as lists that any row can be read from at once.

A `Source` knows where each row lies and keeps only that in memory; `read_location` fetches a row
from anywhere, a worker process included, without the index.
"""

from __future__ import annotations

import codecs
import concurrent.futures
import contextlib
import functools
import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from moss_audio_jax import bucket_clients, buckets, files
from moss_audio_jax.data.records import AudioFile, Row, parse_row
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import shown

ARRAY_RECORD = (".array_record", ".arrayrecord")
_BLOCK = 1 << 24  # bytes read at a time while lines are counted
_LONGEST_LINE = 1 << 26  # bytes of JSON that one row may have
_WHOLE = 1 << 22  # a shard of at most so many bytes is digested whole
_EDGE, _SAMPLE, _SAMPLES = 1 << 16, 1 << 12, 64  # bytes and blocks that are sampled of a larger one
_OPEN_FILES = 256
_BLANK = re.compile(rb"\n[^\S\n]*(?=\n)")  # a line, from the end of the line before it on


class SourceError(InputError):
    """A file of rows cannot be read, not just one of its rows."""


class Location(NamedTuple):
    """The location of a row: bytes start..stop of a JSONL file, or record `start` of a shard.

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
        self._files: list[Any] = [_open(path) for path in self.paths]
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

    @functools.cached_property
    def digests(self) -> list[str]:
        """16 hex digits for each file, which identify its rows.

        SHA-256 of all bytes of a JSONL, and of a shard of up to 4 MiB; of a larger one of its size,
        its first and last 64 KiB and 64 blocks of 4 KiB, evenly spread; of a remote shard of the
        number of its records, the first of them and the last.
        """
        # Shards may be thousands, on storage that is slow to answer.
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda file: file.digest(), self._files))


def read_location(location: Location) -> bytes:
    """The bytes of a row: a line of JSON or a record (`records.parse_row`).

    Raises:
      SourceError: the file is gone, or no longer what it was. Any other: it is this row's fault.
    """
    path, _, start, stop = location
    try:
        opened = _array_record(path) if _is_array_record(path) else _opened(path)
    except InputError as error:
        raise SourceError(str(error)) from None
    if _is_array_record(path):
        return opened.read([start])[0]
    if stop - start > _LONGEST_LINE:
        raise InputError(f"the row is {stop - start} bytes of JSON; at most {_LONGEST_LINE} fit")
    data = os.pread(opened.fileno(), stop - start, start)
    if len(data) < stop - start:
        raise SourceError(f"{shown(path)}: became shorter while it was in use; start again")
    return data


def clip_file(path: str, row_path: str) -> str | AudioFile:
    """The audio file that a row names, ready for `audio.load_audio`.

    Args:
      path: as the row has it: absolute, remote, or relative to the folder of the row's file.
        `shard.array_record#12` is the first clip of that shard's record 12 (counted from 0).
      row_path: the file that holds the row.

    Returns:
      A local path, or the bytes of a remote file or record.

    Raises:
      InputError: a record that holds no audio file, a remote file that cannot be read.
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
    return AudioFile(buckets.read(path), path)


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
        with _reached(folder or ".") as place:
            matches = sorted(str(match) for match in place.glob(pattern))
        if not matches:
            raise InputError(f"{path}: no file matches; expected at least one")
        found += matches
    if not found:
        raise InputError("data: no paths; expected at least one *.jsonl or *.array_record file")
    return tuple(found)


# --- JSONL ---------------------------------------------------------------------------------------


class _Jsonl:
    """The beginnings and ends of a file's lines; blank lines are not rows."""

    def __init__(self, path: str):
        self.path = path
        ends, blank, size = [], [], 0
        before = b"\n"  # a line break and the white space behind it, if no more has come
        read = hashlib.sha256()
        with _open_rows(path) as file:
            while block := _read_block(file, path):
                read.update(block)
                ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + size)
                joined = before + (block if size else _unmarked(block))
                blank += [
                    size - len(before) + found.start() + 1 for found in _BLANK.finditer(joined)
                ]
                last = joined[joined.rfind(b"\n") :] if b"\n" in joined else b""
                size, before = size + len(block), last if last.isspace() else b""
        self._digest = read.hexdigest()[:16]
        if not before:  # the last line need not be ended
            ends.append(np.array([size]))
        stops = np.concatenate([np.zeros(0, np.int64), *ends])
        starts = np.concatenate([np.zeros(1, np.int64), stops[:-1] + 1])[: len(stops)]
        rows = np.flatnonzero(~np.isin(starts, blank))
        self._starts, self._stops = starts[rows], stops[rows]
        self._lines = None if len(rows) == len(stops) else rows

    def __len__(self) -> int:
        return len(self._starts)

    def digest(self) -> str:
        return self._digest

    def location(self, index: int) -> Location:
        line = index if self._lines is None else int(self._lines[index])
        return Location(self.path, line + 1, int(self._starts[index]), int(self._stops[index]))


def _unmarked(block: bytes) -> bytes:
    """The beginning of a file with spaces for a byte order mark."""
    mark = len(codecs.BOM_UTF8) if block.startswith(codecs.BOM_UTF8) else 0
    return b" " * mark + block[mark:]


def _open_rows(path: str) -> BinaryIO:
    # All of a remote file is read once to find its rows, and then rows of it in any order.
    return files.open_regular(buckets.local_copy(path), "rows of JSON")


def _read_block(file: BinaryIO, path: str) -> bytes:
    with _reached(path):
        return file.read(_BLOCK)


@functools.lru_cache(_OPEN_FILES)
def _opened(path: str) -> BinaryIO:
    """A file that stays open."""
    return _open_rows(path)


# --- ArrayRecord ---------------------------------------------------------------------------------


class _ArrayRecord:
    def __init__(self, path: str):
        self.path = path
        self._count = _array_record(path).num_records()

    def __len__(self) -> int:
        return self._count

    def digest(self) -> str:
        if "://" not in self.path:
            return _sampled(self.path)
        digest = hashlib.sha256(self._count.to_bytes(8, "little"))
        for index in (0, self._count - 1) if self._count else ():
            try:
                digest.update(_array_record(self.path).read([index])[0])
            except RuntimeError:
                digest.update(b"damaged")
        return digest.hexdigest()[:16]

    def location(self, index: int) -> Location:
        return Location(self.path, index + 1, index, index + 1)


@functools.lru_cache(_OPEN_FILES)
def _array_record(path: str):
    from array_record.python import array_record_module

    place = path
    if not buckets.is_remote(path):
        files.open_regular(path, "an ArrayRecord shard").close()
    elif not path.startswith("gs://"):  # where ArrayRecord reads by ranges itself
        place = buckets.local_copy(path)
    else:
        buckets.size(path)  # whose errors are clearer
    # Rows are read one by one and out of order: reading ahead would be wasted.
    reader = array_record_module.ArrayRecordReader(
        place, options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15
    )
    reader.num_records()  # which shows whether it is one
    if not reader.ok():
        raise InputError(f"{shown(path)}: cut short or no ArrayRecord file; make or copy it again")
    return reader


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


def _sampled(path: str) -> str:
    """A digest of a local file; see `Source.digests`."""
    with files.open_regular(path) as file, _reached(path):
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        if size <= _WHOLE:
            digest.update(file.read())
        else:
            digest.update(file.read(_EDGE))
            last = size - _SAMPLE
            for number in range(_SAMPLES):
                digest.update(os.pread(file.fileno(), _SAMPLE, last * number // (_SAMPLES - 1)))
            digest.update(os.pread(file.fileno(), _EDGE, size - _EDGE))
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _reached(path: str) -> Iterator[Any]:
    """The path, for reading through etils.epath. Raises InputError if that fails in any way."""
    try:
        yield buckets.as_path(path)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{shown(path)}: no such file; expected one that can be read") from None
    except OSError as error:
        raise InputError(f"{shown(path)}: cannot be read ({files.reason(error)})") from None
    except Exception as error:  # each kind of remote storage has its own
        raise InputError(f"{shown(path)}: cannot be read ({bucket_clients.told(error)})") from None
