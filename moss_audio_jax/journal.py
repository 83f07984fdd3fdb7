"""JSONL files that are written row by row, and whose rows survive the end of the process."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moss_audio_jax.buckets import is_remote
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import append, brief, not_written, read_bytes, write_whole, writing

_SECONDS, _SYNC_SECONDS = 60.0, 10.0  # after which a bucket's file is written anew


class Log:
    """Text that is added to the end of a file. Threads may share it.

    On a disk each addition is there at once. A bucket cannot add to an object: the file is written
    anew when `flush` is called, and by an addition a minute after the last time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._text: bytearray | None = None
        self._written, self._at = 0, time.monotonic()

    def append(self, text: str) -> None:
        """Raises InputError if the file cannot be written."""
        if not is_remote(self.path):
            append(self.path, text)
            return
        with self._lock:
            if self._text is None:
                self._text = bytearray(read_bytes(self.path) if self.path.exists() else b"")
                self._written = len(self._text)
            self._text += text.encode("utf-8", "backslashreplace")
        if time.monotonic() - self._at > _SECONDS:
            self.flush()

    def flush(self, after: float = 0.0) -> None:
        """Writes what a bucket's file lacks, if `after` seconds have gone since the last time.

        Raises InputError if that fails.
        """
        if time.monotonic() - self._at < after:
            return
        with self._lock:
            if self._text is not None and len(self._text) > self._written:
                write_whole(self.path, bytes(self._text))
                self._written = len(self._text)
            self._at = time.monotonic()


class Journal:
    """Appends rows to a file, each as a whole line. It is a context manager.

    The file is made at the first row. A line that a killed process left half-written is removed
    first. Without a path nothing is written, for processes that leave writing to another.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._file = path, None
        self._log = Log(path) if path is not None and is_remote(path) else None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._log:
            self._log.flush()
        if self._file:
            self.sync()
            self._file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row. It stays in the file if the process is killed afterwards; in a bucket that
        is so from the next `sync` on, which writes there every ten seconds at most."""
        if self._path is None:
            return
        if self._log:
            self._log.append(line(row).decode())
            return
        if self._file is None:
            self._open()
        try:
            self._file.write(line(row))
            self._file.flush()
        except OSError as error:
            raise not_written(self._path, error) from error

    def sync(self) -> None:
        """Flushes all rows, so that they also survive a crash of the machine."""
        if self._log:
            self._log.flush(_SYNC_SECONDS)
        if self._file:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise not_written(self._path, error) from error

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                with open(self._path, "rb+") as file:
                    file.truncate(file.read().rfind(b"\n") + 1)
            self._file = open(self._path, "ab")  # noqa: SIM115
        except OSError as error:
            raise not_written(self._path, error) from None


def line(row: Mapping[str, Any]) -> bytes:
    """A row as JSON in UTF-8. A lone surrogate, such as in a file name, is escaped."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    except RecursionError:
        raise InputError(f"{brief(row.get('id'))}: the row nests too deeply") from None


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes the whole file, or leaves the old one unchanged."""
    with writing(path, "wb") as file:
        file.writelines(map(line, rows))
