"""Decodes audio with tensorflow-io into ArrayRecord shards that training reads.

It runs in a separate environment, because tensorflow-io needs TensorFlow 2.16 and NumPy 1:

    python3.11 -m venv tfio && tfio/bin/pip install -r tools/make/requirements-tfio.txt
    PYTHONPATH=. tfio/bin/python tools/make/tfio_decode.py gs://bucket/rows.jsonl OUT
    PYTHONPATH=. tfio/bin/python tools/make/tfio_decode.py FOLDER OUT

The input is a JSONL of training rows, a text file with one audio path per line, or a folder, which
is searched recursively; files are wav, flac, mp3 or ogg, at any path that tf.io.gfile reads. Each
clip is written losslessly as a mono wav at its own rate; training resamples it like any other file.
Rows of a JSONL are kept whole. For a list or a folder each clip is one record, and
SHARD.clips.jsonl lists the "content" by which a training row names it. Resuming and bad files are
as in tools/make/arrayrecord.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_io as tfio

from moss_audio_jax.data import shards
from moss_audio_jax.data.records import (
    Rejected,
    audio_names,
    encode_record,
    parse_json,
    reason_of,
)
from moss_audio_jax.data.reports import RowReport
from moss_audio_jax.errors import InputError

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
_OF_GRAPHS = re.compile(r"\{\{.*?\}\}|\[Op:.*?\]")  # what TensorFlow adds to its messages


def tfio_decode(
    source: str, output: str, shard_count: int | None = None, rows_per_shard: int = 1000
) -> tuple[int, int]:
    """Writes the shards; returns (rows, bad rows) of those that this call wrote.

    Raises:
      InputError: there is nothing at `source`, or `output` has shards of another kind.
    """
    rows, folder = read_source(source)
    ranges = shards.plan(len(rows), shard_count, rows_per_shard)
    settings = {"source": source, "rows": len(rows), "shards": len(ranges), "audio": "tfio"}
    shards.prepare(output, settings)
    report = RowReport(os.path.join(output, "bad_rows.jsonl"))
    good = total = 0
    for index, here in enumerate(ranges):
        path = shards.shard_path(output, "rows", index, len(ranges))
        if os.path.exists(path):
            continue
        records = _records([rows[number] for number in here], source, folder, path, report)
        good += shards.write_shard(path, records)
        total += len(here)
    return good, total - good


def _records(
    rows: Sequence[tuple[int, bytes | dict[str, Any]]],
    source: str,
    folder: str,
    path: str,
    report: RowReport,
) -> Iterator[bytes]:
    """The records of one shard; writes the list of its single clips when all are written."""
    clips: list[str] = []
    for line, row in rows:
        try:
            raw = parse_json(row) if isinstance(row, bytes) else row
            names = audio_names(raw.get("conversation") or ())
            yield encode_record(raw, [decode(_join(folder, name)) for name in names])
            clips += names if isinstance(row, dict) else []
        except Exception as error:
            report.add(Rejected(True, source, line, f"{source}:{line}", reason_of(error)))
    if clips:
        _write_index(path, clips)


def read_source(source: str) -> tuple[Sequence[tuple[int, bytes | dict[str, Any]]], str]:
    """(line, row) of every row, and the folder of its paths.

    A row is a line of JSON, or the row made for a single clip.
    """
    gfile = tf.io.gfile
    if gfile.isdir(source):
        found = [
            os.path.relpath(os.path.join(folder, name), source)
            for folder, _, names in gfile.walk(source)
            for name in names
            if name.lower().endswith(SUFFIXES)
        ]
        if not found:
            raise InputError(f"{source}: no file ending in {', '.join(SUFFIXES)}")
        return [(line, _clip_row(name)) for line, name in enumerate(sorted(found), 1)], source
    try:
        with gfile.GFile(source, "rb") as file:
            lines = file.read().splitlines()
    except tf.errors.OpError as error:
        raise InputError(f"{source}: cannot be read ({error.message})") from None
    kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not source.endswith(".jsonl"):
        kept = [(number, _clip_row(line.decode().strip())) for number, line in kept]
    return kept, os.path.dirname(source)


def decode(path: str) -> bytes:
    """A file as a mono wav at its own rate: 16-bit if that is lossless, else float32.

    Raises:
      InputError: no such file, or tensorflow-io cannot decode it.
    """
    try:
        tensor = tfio.audio.AudioIOTensor(path)
        rate, sound = int(tensor.rate), tensor.to_tensor().numpy()
    except (tf.errors.OpError, ValueError) as error:
        reason = getattr(error, "message", None) or str(error)
        reason = _OF_GRAPHS.sub("", reason).strip()
        raise InputError(f"{path}: tensorflow-io cannot decode it ({reason})") from None
    if not len(sound):
        raise InputError(f"{path}: holds no samples")
    if sound.dtype == np.int16 and sound.shape[1] == 1:
        return _wav(sound[:, 0], rate)
    if sound.dtype == np.uint8:
        sound = (sound.astype(np.float32) - 128) / 128
    elif np.issubdtype(sound.dtype, np.integer):
        sound = sound.astype(np.float64) / -float(np.iinfo(sound.dtype).min)
    return _wav(sound.mean(axis=1, dtype=np.float64).astype(np.float32), rate)


def _wav(samples: np.ndarray, rate: int) -> bytes:
    """int16 or float32 [n] as a wav file."""
    data, width = samples.tobytes(), samples.itemsize
    kind = 1 if samples.dtype == np.int16 else 3
    form = struct.pack("<HHIIHH", kind, 1, rate, rate * width, width, 8 * width)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form
    if kind == 3:
        chunks += b"fact" + struct.pack("<II", 4, len(samples))
    chunks += b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def _clip_row(name: str) -> dict[str, Any]:
    return {"conversation": [{"role": "user", "message_type": "audio", "content": name}]}


def _write_index(path: str, clips: list[str]) -> None:
    with open(f"{path.removesuffix('.array_record')}.clips.jsonl", "w", encoding="utf-8") as file:
        for record, clip in enumerate(clips):
            content = f"{os.path.basename(path)}#{record}"
            file.write(json.dumps({"clip": clip, "content": content}, ensure_ascii=False) + "\n")


def _join(folder: str, name: str) -> str:
    return name if "://" in name or os.path.isabs(name) else os.path.join(folder, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="JSONL of rows, list of audio files, or folder")
    parser.add_argument("output", help="local folder of the shards")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shards", type=int, help="number of shards")
    size.add_argument("--rows-per-shard", type=int, default=1000)
    args = parser.parse_args()
    try:
        rows, bad = tfio_decode(args.source, args.output, args.shards, args.rows_per_shard)
    except InputError as error:
        raise SystemExit(f"tfio_decode: {error}") from None
    print(f"{args.output}: {rows} rows written, {bad} bad")
    if bad:
        print(f"bad rows: {os.path.join(args.output, 'bad_rows.jsonl')}")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
