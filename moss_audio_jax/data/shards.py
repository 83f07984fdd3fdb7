"""Writing ArrayRecord shards that a stopped run can go on with. Local folders; NumPy not needed.

OUT/settings.json                          what the shards are made of: another run must agree
OUT/NAME-00000-of-00016.array_record       whole shards; the one being written ends in .partial
OUT/bad_rows.jsonl                         the rows that are in no shard
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from moss_audio_jax import files
from moss_audio_jax.errors import InputError

# Every record can be read without its neighbours; light compression halves a log-mel.
_OPTIONS = "group_size:1,zstd:1"


def plan(rows: int, shards: int | None, rows_per_shard: int) -> list[range]:
    """The rows of each shard: `shards` of them, evenly, or as few as hold `rows_per_shard`."""
    if rows < 1:
        raise InputError("no rows to write; expected at least one")
    if shards is None:
        shards = -(-rows // rows_per_shard)
    if not 1 <= shards <= rows:
        raise InputError(f"{shards} shards for {rows} rows; expected 1 to {rows}")
    return [range(rows * i // shards, rows * (i + 1) // shards) for i in range(shards)]


def shard_path(folder: str, name: str, index: int, count: int) -> str:
    return os.path.join(folder, f"{name}-{index:05d}-of-{count:05d}.array_record")


def prepare(folder: str, settings: Mapping[str, Any]) -> None:
    """Makes the folder, or sees to it that what is there was made with the same settings.

    Raises:
      InputError: another run's shards lie there.
    """
    path = os.path.join(folder, "settings.json")
    if not os.path.exists(path):
        files.write_whole(path, json.dumps(settings, indent=2))
        return
    there = files.read_json(path)
    if not isinstance(there, dict):
        raise InputError(f"{path}: expected the settings of a run that wrote shards here")
    for key in settings:
        if there.get(key) != settings[key]:
            raise InputError(
                f"{path}: {key} is {there.get(key)!r}, this run's {settings[key]!r}; shards of two "
                "kinds do not mix: give another output folder"
            )


def write_shard(path: str, records: Iterable[bytes]) -> int:
    """Writes a shard, which appears under its name when it is whole; returns its records.

    Raises:
      InputError: it cannot be written; a full disk is said to be one.
    """
    from array_record.python import array_record_module

    partial = f"{path}.partial"
    with _writes(path):
        writer = array_record_module.ArrayRecordWriter(partial, _OPTIONS)
    count = 0
    try:
        for record in records:
            with _writes(path):
                writer.write(record)
            count += 1
    finally:
        with _writes(path):  # the writer works behind: it may learn only here that a write failed
            writer.close()
    with _writes(path):
        os.replace(partial, path)
    return count


@contextlib.contextmanager
def _writes(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise files.not_written(path, error) from None
    except RuntimeError as error:  # the writer's, with the system's words in it
        full = os.strerror(errno.ENOSPC) in str(error)
        number = errno.ENOSPC if full else errno.EIO
        raise files.not_written(path, OSError(number, files.brief(error))) from None
