"""Writing ArrayRecord shards that a stopped run can go on with. Local folders; NumPy not needed.

OUT/settings.json                          what the shards are made of: another run must agree
OUT/NAME-00000-of-00016.array_record       whole shards; the one being written ends in .partial
OUT/bad_rows.jsonl                         the rows that are in no shard
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

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
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "settings.json")
    if not os.path.exists(path):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(settings, file, indent=2)
        return
    with open(path, encoding="utf-8") as file:
        there = json.load(file)
    for key in settings:
        if there.get(key) != settings[key]:
            raise InputError(
                f"{path}: {key} is {there.get(key)!r}, this run's {settings[key]!r}; shards of two "
                "kinds do not mix: give another output folder"
            )


def write_shard(path: str, records: Iterable[bytes]) -> int:
    """Writes a shard, which appears under its name when it is whole; returns its records."""
    from array_record.python import array_record_module

    partial = f"{path}.partial"
    writer = array_record_module.ArrayRecordWriter(partial, _OPTIONS)
    count = 0
    try:
        for record in records:
            writer.write(record)
            count += 1
    finally:
        writer.close()
    os.replace(partial, path)
    return count
