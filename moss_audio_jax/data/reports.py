"""Counts rows that were left out, lists them as JSON lines, and stops the run if there are too
many."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from moss_audio_jax import files
from moss_audio_jax.buckets import as_path, is_remote
from moss_audio_jax.data.records import Rejected
from moss_audio_jax.errors import InputError
from moss_audio_jax.journal import Log

COUNTS = ("seen", "bad", "overlong")
_LONGEST = 200  # characters of a row's own id


class RowReport:
    """Appends {"source", "line", "row", "id", "reason"} to a file, each row once.

    Processes may share a local file. A remote file cannot be appended to: each needs its own.
    """

    def __init__(self, path: str | None):
        self.path = path
        self._listed: set[tuple[str, int]] = set()
        self._read = 0  # bytes of the file that _listed covers
        self._log = None
        if path is not None and is_remote(path):
            self._log = Log(as_path(path))
            if self._log.path.exists():
                self._learn(files.read_bytes(path))
        elif path is not None:
            try:
                os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            except OSError as error:
                raise files.not_written(path, error) from None

    def add(self, row: Rejected) -> None:
        key = (row.source, row.line)
        if self.path is None or key in self._listed:
            return
        record = {"source": row.source, "line": row.line, "row": row.row_id}
        if row.id is not None:
            record["id"] = row.id if len(row.id) <= _LONGEST else f"{row.id[:_LONGEST]} ..."
        line = json.dumps({**record, "reason": row.reason}, ensure_ascii=False) + "\n"
        # A lone surrogate becomes \udxxx, which is how JSON writes it.
        data = line.encode("utf-8", "backslashreplace")
        if self._log:
            self._log.append(data.decode())
            self._listed.add(key)
            return
        try:
            self._append(key, data)
        except OSError as error:
            raise files.not_written(self.path, error) from None

    def flush(self) -> None:
        """Writes what a bucket's file lacks."""
        if self._log:
            self._log.flush()

    def _append(self, key: tuple[str, int], line: bytes) -> None:
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(self._read)
            new = file.read()
            # A process that was killed may have left half a line.
            whole = new[: new.rfind(b"\n") + 1]
            if len(whole) < len(new):
                file.truncate(self._read + len(whole))
            self._learn(whole)
            if key not in self._listed:
                file.write(line)
                whole += line
                self._listed.add(key)
            self._read += len(whole)

    def _learn(self, data: bytes) -> None:
        for line in data.split(b"\n"):
            # A machine that went down may have left a damaged line: its row is listed again.
            with contextlib.suppress(InputError, KeyError, TypeError):
                record = files.parse_json(line, self.path)
                self._listed.add((record["source"], record["line"]))


class Reports:
    """Counts and lists the rows that give no example.

    Args:
      rows: how many there are; if they are few, `judge` waits until so many were seen.
      prefix: of the files' names.
    """

    def __init__(self, folder: str | None, process_index: int, rows: int, prefix: str = ""):
        def path(name: str) -> str | None:
            if folder is None:
                return None
            own = f"-{process_index}" if is_remote(folder) and process_index else ""
            return f"{str(folder).rstrip('/')}/{prefix}{name}{own}.jsonl"

        self._bad = RowReport(path("bad_rows"))
        self._overlong = RowReport(path("overlong_rows"))
        self._last: Rejected | None = None
        self._rows = rows

    def count(self, made: Iterable[Any], counts: dict[str, int]) -> None:
        for each in made:
            counts["seen"] += 1
            if not isinstance(each, Rejected):
                continue
            counts["bad" if each.bad else "overlong"] += 1
            (self._bad if each.bad else self._overlong).add(each)
            if each.bad:
                self._last = each

    def flush(self) -> None:
        """Writes what files in a bucket lack."""
        self._bad.flush()
        self._overlong.flush()

    def judge(self, counts: Mapping[str, int], max_bad_share: float, min_seen: int) -> None:
        """Raises InputError if too many rows are bad."""
        seen, bad = counts["seen"], counts["bad"]
        if seen < min(min_seen, self._rows) or bad <= max_bad_share * seen:
            return
        last = (
            f"{self._last.source} line {self._last.line}: {self._last.reason}; "
            if self._last
            else ""
        )
        raise InputError(
            f"{bad} of {seen} rows ({bad / seen:.1%}) are bad, data.max_bad_share allows "
            f"{max_bad_share:.1%}; the last: {last}see {self._bad.path or 'report_dir'}"
        )
