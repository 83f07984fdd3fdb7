"""Files to records, records to rows: each stage a file, each file whole or not there.

OUT/audio/ID/0000.flac        the segments' sound, 16 kHz
OUT/records/ID.jsonl          the records of one source; ID.json says of what they were made
OUT/segments.jsonl            all records in order
OUT/rows.jsonl                training rows
OUT/dropped.jsonl             what was dropped, repaired or replaced by a default, and why
OUT/manifest.json             config, counts, versions
OUT/index.html                a page to look at it
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

import moss_audio_jax
from moss_audio_jax.annotate import page, tasks
from moss_audio_jax.annotate.annotator import (
    Annotator,
    Done,
    checkpoint_folder,
    read_records,
    run_fingerprint,
)
from moss_audio_jax.annotate.branches import Branches
from moss_audio_jax.annotate.record import Record
from moss_audio_jax.annotate.source import Source
from moss_audio_jax.errors import InputError
from moss_audio_jax.evaluate.journal import write_lines
from moss_audio_jax.weights.convert import read_config
from moss_audio_jax.weights.heads import load_heads

_SPOKEN = 4  # segments with speech before it is judged whether systems agree on them


@dataclasses.dataclass(frozen=True)
class Summary:
    """sources, segments, rows: how many. failed: (path, why). dropped: reason -> how often."""

    sources: int
    segments: int
    rows: int
    seconds: float
    failed: list[tuple[str, str]]
    dropped: Counter[str]
    warnings: list[str]


def annotate(
    sources: Sequence[Source],
    out: Path,
    config: ConfigDict,
    rows_name: str = "rows.jsonl",
    shard: tuple[int, int] = (0, 1),
    workers: int = 1,
    progress: bool = False,
) -> Summary:
    """Annotates files into a folder. What is there already, made of the same, is kept.

    Args:
      sources: of this shard.
      shard: (i, n): with n > 1 the files that tell of many sources carry it in their names. The
        same call on all sources as one shard joins them: it finds every record there.

    Raises:
      InputError: an expert, a checkpoint or the folder cannot be used.
    """
    try:
        (out / "records").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written to ({error.strerror})") from None
    done: dict[str, Done] = {}
    failed: list[tuple[str, str]] = []
    key = run_fingerprint(config)
    began, seconds = time.monotonic(), 0.0
    sizes = {s.id: os.path.getsize(s.path) if os.path.exists(s.path) else 0 for s in sources}
    with (
        tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, disable=not progress) as bar,
        _Pool(workers, config, out, key) as pool,
    ):
        for source, result in pool.map(sources):
            if isinstance(result, str):
                failed.append((source.path, result))
            else:
                done[source.id] = result
                seconds += result["seconds"]
            rate = seconds / max(time.monotonic() - began, 1e-3)
            bar.set_postfix_str(f"{rate:.0f} audio-seconds/s, {len(failed)} failed", refresh=False)
            bar.update(sizes[source.id])
    return _gathered(sources, done, failed, out, config, rows_name, shard)


# --- processes -----------------------------------------------------------------------------------

_annotator: Annotator | None = None  # of a worker process


def _start(config: str, out: Path, key: str) -> None:
    global _annotator
    parent = os.getppid()

    def watch() -> None:  # a worker whose run was killed would wait for ever
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _annotator = Annotator(_unpacked(config), out, key)


def _one(source: Source) -> Done | str:
    return _annotator.file(source)


class _Pool:
    """`map` over so many processes, or here where it is one; results in order."""

    def __init__(self, workers: int, config: ConfigDict, out: Path, key: str):
        self._stack = contextlib.ExitStack()
        if workers > 1:
            # Not forked: JAX holds threads.
            self._pool = self._stack.enter_context(
                concurrent.futures.ProcessPoolExecutor(
                    workers,
                    multiprocessing.get_context("spawn"),
                    _start,
                    (config.to_json_best_effort(), out, key),
                )
            )
            Branches(config, None)  # what is wrong with an expert or the model is said here, once
            if folder := checkpoint_folder(config):
                read_config(folder)
                load_heads(folder)
        else:
            self._pool, self._own = None, Annotator(config, out, key)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def map(self, sources: Sequence[Source]) -> Iterator[tuple[Source, Done | str]]:
        found = self._pool.map(_one, sources) if self._pool else map(self._own.file, sources)
        try:
            yield from zip(sources, found, strict=True)
        except concurrent.futures.process.BrokenProcessPool:
            raise InputError(
                "a worker process was ended from outside, perhaps for want of memory; the same "
                "command with fewer --workers goes on from here"
            ) from None


def _unpacked(text: str) -> ConfigDict:
    return ConfigDict(json.loads(text))


# --- many files ----------------------------------------------------------------------------------


def _gathered(
    sources: Sequence[Source],
    done: dict[str, Done],
    failed: list[tuple[str, str]],
    out: Path,
    config: ConfigDict,
    rows_name: str,
    shard: tuple[int, int],
) -> Summary:
    whole = [source for source in sources if source.id in done]
    dropped: Counter[str] = Counter()
    notes: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()

    def note(**what: Any) -> None:
        notes.append(what)
        dropped[_kind(what["field"], what["reason"])] += 1

    for path, why in failed:
        note(audio=path, start=None, end=None, field="source", reason=f"failed: {why}")
    warnings = []
    for source in whole:
        for each in done[source.id]["notes"]:
            note(**each)
        warnings += [f"{source.path}: {warning}" for warning in done[source.id]["warnings"]]

    def records() -> Iterator[tuple[Source, Record]]:
        for source in whole:
            for record in read_records(out, source):
                yield source, record

    def made(record: Record) -> list[tasks.Row]:
        if record["end"] - record["start"] < config.rows.min_seconds:
            return []
        return [row for row in tasks.rows(record) if row["task"] not in config.rows.skip]

    balance = tasks.Balance()

    def segments() -> Iterator[Record]:
        for _, record in records():
            counts["segments"] += 1
            counts["spoken"] += any(each["text"] for each in record["asr"])
            counts["agreed"] += bool(record["transcript"])
            if record["end"] - record["start"] < config.rows.min_seconds:
                at = {key: record[key] for key in ("audio", "start", "end")}
                why = f"dropped: shorter than {config.rows.min_seconds:g} s"
                note(**at, field="rows", reason=why)
            balance.count(made(record))
            yield record

    def rows() -> Iterator[tasks.Row]:
        for source, record in records():
            for row in made(record):
                why = balance.keeps(row, done[source.id]["content"])
                if why is None:
                    counts["rows"] += 1
                    counts[f"task {row['task']}"] += 1
                    yield row
                else:
                    at = {key: record[key] for key in ("audio", "start", "end")}
                    note(**at, field=f"row {row['id']}", reason=f"dropped: {why}")

    write_lines(out / _named("segments.jsonl", shard), segments())
    if counts["spoken"] >= _SPOKEN and counts["agreed"] < counts["spoken"] / 2:
        warnings.append(
            f"only {counts['agreed']} of {counts['spoken']} segments with speech have a transcript "
            "that the systems agree on: this may be sound that they do not know, and what they say "
            "of its sounds and music a guess. Name experts that know it: experts and "
            "speech.systems of the config (docs/annotate.md)"
        )
    write_lines(out / _named(rows_name, shard), rows())
    write_lines(out / _named("dropped.jsonl", shard), notes)
    seconds = sum(done[source.id]["seconds"] for source in whole)
    manifest = {
        "version": moss_audio_jax.__version__,
        "fingerprint": run_fingerprint(config),
        "config": json.loads(config.to_json_best_effort()),
        "shard": list(shard),
        "sources": len(sources),
        "failed": len(failed),
        "seconds": round(seconds, 3),
        "segments": counts["segments"],
        "rows": counts["rows"],
        "tasks": {
            name.removeprefix("task "): counts[name]
            for name in sorted(counts) if name.startswith("task ")
        },
        "dropped": dict(sorted(dropped.items())),
        "warnings": warnings,
    }  # fmt: skip
    text = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
    _whole(out / _named("manifest.json", shard), text)
    shown = [(s, list(read_records(out, s))) for s in whole[: config.page_clips]]
    _whole(
        out / _named("index.html", shard),
        page.page([records for _, records in shown], out, config.page_seconds, warnings),
    )
    return Summary(
        len(sources), counts["segments"], counts["rows"], seconds, failed, dropped, warnings
    )


def _kind(field: str, reason: str) -> str:
    """A reason without what is particular to one case, so that it can be counted."""
    if field == "source":
        return "source: failed"
    field = field.split()[0]
    action, _, why = reason.partition(": ")
    words = [w for w in why.split() if not any(c.isdigit() or c in "'\"/" for c in w)]
    return f"{field}: {action}: {' '.join(words)[:70]}"


def _named(name: str, shard: tuple[int, int]) -> str:
    if shard[1] == 1:
        return name
    stem, suffix = os.path.splitext(name)
    return f"{stem}-{shard[0]:05d}-of-{shard[1]:05d}{suffix}"


def _whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
