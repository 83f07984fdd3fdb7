"""Packs a JSONL and its audio into ArrayRecord shards, so that training reads a few large files.

    python tools/make/arrayrecord.py rows.jsonl OUT                       audio files unchanged
    python tools/make/arrayrecord.py rows.jsonl OUT --audio mel --shards 64 --workers 16

Train on them with --config.data.train="('OUT/*.array_record',)". Every clip is decoded once as a
check; unusable rows are left out and listed in OUT/bad_rows.jsonl. If a run was stopped, run the
same command again: complete shards are kept, the unfinished one is made again. The layout of a
record: moss_audio_jax/data/records.py.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import multiprocessing
import os
from collections.abc import Iterator

import ml_dtypes  # noqa: F401  gives np.dtype the name bfloat16
import numpy as np

from moss_audio_jax.audio import load_audio, log_mel
from moss_audio_jax.data import shards
from moss_audio_jax.data.records import (
    MEL_DTYPES,
    AudioFile,
    Rejected,
    encode_record,
    parse_json,
    parse_row,
    reason_of,
)
from moss_audio_jax.data.reports import RowReport
from moss_audio_jax.data.sources import (
    Location,
    Source,
    SourceError,
    as_file,
    clip_file,
    read_location,
)
from moss_audio_jax.errors import InputError
from moss_audio_jax.runtime import end_with_parent


def make_arrayrecord(
    paths: list[str],
    output: str,
    *,
    audio: str = "bytes",
    mel_dtype: str = "bfloat16",
    shard_count: int | None = None,
    rows_per_shard: int = 1000,
    workers: int = 0,
) -> tuple[int, int]:
    """Writes the shards; returns (rows, bad rows) of those that this call wrote.

    Args:
      paths: JSONL files (or shards of plain rows), see `sources.Source`.
      output: a local folder.
      audio: "bytes" stores the files unchanged, "mel" their log-mel.
      mel_dtype: one of records.MEL_DTYPES.
      shard_count: number of shards; None: as `rows_per_shard` gives.
      workers: number of processes; each writes one shard at a time.

    Raises:
      InputError: there are no rows, a file is missing, or `output` has shards of another kind.
    """
    source = Source(paths)
    ranges = shards.plan(len(source), shard_count, rows_per_shard)
    settings = {"paths": list(source.paths), "rows": len(source), "shards": len(ranges)}
    settings |= {"audio": audio} | ({"mel_dtype": mel_dtype} if audio == "mel" else {})
    shards.prepare(output, settings)
    todo = []
    for index, rows in enumerate(ranges):
        path = shards.shard_path(output, "rows", index, len(ranges))
        if not os.path.exists(path):
            todo.append((path, [source.location(row) for row in rows]))
    write = functools.partial(
        _write, output=output, mel_dtype=mel_dtype if audio == "mel" else None
    )
    if workers < 2:
        written = [write(*each) for each in todo]
    else:
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(workers, context, end_with_parent)
        with pool:
            written = list(pool.map(write, *zip(*todo, strict=True))) if todo else []
    total = sum(len(locations) for _, locations in todo)
    return sum(written), total - sum(written)


def _write(path: str, locations: list[Location], output: str, mel_dtype: str | None) -> int:
    report = RowReport(os.path.join(output, "bad_rows.jsonl"))

    def records() -> Iterator[bytes]:
        for location in locations:
            try:
                yield _record(location, mel_dtype)
            except SourceError:
                raise
            except Exception as error:
                name = f"{os.path.basename(location.path)}:{location.line}"
                report.add(Rejected(True, location.path, location.line, name, reason_of(error)))

    return shards.write_shard(path, records())


def _record(location: Location, mel_dtype: str | None) -> bytes:
    data = read_location(location)
    row = parse_row(data)
    clips = []
    for clip in row.clips:
        if not isinstance(clip, str):
            raise InputError("the row already contains audio; give the JSONL it was made from")
        file = clip_file(clip, location.path)
        wav = load_audio(as_file(file))
        if mel_dtype is not None:
            clips.append(log_mel(wav).astype(np.dtype(mel_dtype)))
        elif isinstance(file, AudioFile):
            clips.append(file.data)
        else:
            with open(file, "rb") as opened:
                clips.append(opened.read())
    return encode_record(parse_json(data), clips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", help="JSONL files, local or remote")
    parser.add_argument("output", help="local folder of the shards")
    parser.add_argument("--audio", choices=("bytes", "mel"), default="bytes")
    parser.add_argument("--mel-dtype", choices=MEL_DTYPES, default="bfloat16")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shards", type=int, help="number of shards")
    size.add_argument("--rows-per-shard", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=0, help="processes")
    args = parser.parse_args()
    try:
        rows, bad = make_arrayrecord(
            args.rows,
            args.output,
            audio=args.audio,
            mel_dtype=args.mel_dtype,
            shard_count=args.shards,
            rows_per_shard=args.rows_per_shard,
            workers=args.workers,
        )
    except InputError as error:
        raise SystemExit(f"make_arrayrecord: {error}") from None
    print(f"{args.output}: {rows} rows written, {bad} bad")
    if bad:
        print(f"bad rows: {os.path.join(args.output, 'bad_rows.jsonl')}")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
