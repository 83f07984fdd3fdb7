"""Turns files into records, and records into rows. Output files are written whole or not at all.

OUT/audio/ID/0000.flac        the segments' sound, 16 kHz
OUT/records/ID.jsonl          the records of one source; ID.json says what they were made from
OUT/segments.jsonl            all records in order
OUT/rows.jsonl                training rows
OUT/dropped.jsonl             what was dropped, repaired or replaced by a default, and why
OUT/manifest.json             config, counts, versions
OUT/index.html                a page that shows and plays it
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import textwrap
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

import moss_audio_jax
from moss_audio_jax import command
from moss_audio_jax.annotate import doubt, experts, page, tasks
from moss_audio_jax.annotate.annotator import (
    Annotator,
    Done,
    check_parts,
    read_records,
    run_fingerprint,
)
from moss_audio_jax.annotate.bucket import Mirror
from moss_audio_jax.annotate.record import Record
from moss_audio_jax.annotate.source import Source
from moss_audio_jax.buckets import is_remote
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import Lock, not_written, open_regular, shown, write_whole
from moss_audio_jax.journal import write_lines
from moss_audio_jax.remote import redact
from moss_audio_jax.runtime import deaf_workers

_SPOKEN = 4  # agreement is judged only with this many segments with speech


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
    """Annotates files into a folder. Existing results with the same inputs are kept.

    Args:
      sources: those of this shard.
      shard: (i, n). With n > 1, the names of files about several sources contain it. The same call
        with all sources and one shard joins the shards, because it finds all records.

    Raises:
      InputError: an expert, a checkpoint or the folder cannot be used.
      UsageError: another process annotates into the folder.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(Lock(out, "annotate", shared=shard[1] > 1))
        if shard[1] > 1:  # shards may run together, but each only once, and not during a whole run
            stack.enter_context(Lock(out, "annotate", _named("shard", shard)))
        if not is_remote(out):
            _check_free(out, outputs(rows_name, shard))
            done, failed = _annotated(sources, out, config, workers, progress)
            return _gathered(sources, done, failed, out, config, rows_name, shard)
        mirror = stack.enter_context(Mirror(out, sources, config.page_clips))
        here = mirror.folder
        done, failed = _annotated(sources, here, config, workers, progress, mirror.keep)
        summary = _gathered(sources, done, failed, here, config, rows_name, shard)
        mirror.finish()
        return summary


def outputs(rows_name: str, shard: tuple[int, int]) -> list[str]:
    """The names of the files about several sources."""
    names = ("segments.jsonl", rows_name, "dropped.jsonl", "manifest.json", "index.html")
    return [_named(name, shard) for name in names]


def _check_free(out: Path, names: Sequence[str]) -> None:
    """Raises InputError if a file would take the place of one that no run has made."""
    if (out / "records").is_dir():  # the folder of a run
        return
    for name in names:
        if (out / name).exists():
            raise InputError(
                f"{shown(out / name)}: exists, and is not of a run of annotate; choose another "
                "folder, or move it"
            )


def _annotated(
    sources: Sequence[Source],
    out: Path,
    config: ConfigDict,
    workers: int,
    progress: bool,
    keep: Callable[[Source], None] = lambda source: None,
) -> tuple[dict[str, Done], list[tuple[str, str]]]:
    """(results of the sources that could be used, (path, why) of the others).

    `keep` is called when a source's results are complete.
    """
    try:
        (out / "records").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(out / "records", error) from None
    done: dict[str, Done] = {}
    failed: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for source in sources:  # before a model is loaded
        try:
            if source.problem:
                raise InputError(source.problem)
            with open_regular(source.path, "an audio file") as file:
                sizes[source.id] = file.seek(0, os.SEEK_END)
        except InputError as error:
            failed[source.id] = redact(str(error).removeprefix(f"{shown(source.path)}: "))
    usable = [source for source in sources if source.id in sizes]
    check_parts(config)
    began, seconds, before = time.monotonic(), 0.0, 0
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, disable=not progress) as bar:

        def tick(share: float) -> None:
            bar.update(before + int(share * size) - bar.n)

        with _Pool(min(workers, max(len(usable), 1)), config, out, tick) as pool:
            size = sizes[usable[0].id] if usable else 0
            for number, (source, result) in enumerate(pool.map(usable), 1):
                if isinstance(result, str):
                    failed[source.id] = result
                else:
                    done[source.id] = result
                    keep(source)
                    seconds += result["seconds"]
                rate = seconds / max(time.monotonic() - began, 1e-3)
                told = f"{rate:.0f} audio-seconds/s, {len(failed)} failed"
                bar.set_postfix_str(told, refresh=False)
                tick(1.0)
                before += size
                size = sizes[usable[number].id] if number < len(usable) else 0
    return done, [(s.path, failed[s.id]) for s in sources if s.id in failed]


# --- processes -----------------------------------------------------------------------------------

_annotator: Annotator | None = None  # in a worker process


def _start(config: str, out: Path, key: str, alive: Connection, told: Any) -> None:
    """Prepares a worker process.

    Args:
      alive: the main process holds the other end; when that closes, this process ends.
      told: a shared byte: whether a worker has warned.
    """
    global _annotator

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            alive.recv()
        experts.end_commands()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    # The main process handles Ctrl-C. Not SIG_IGN, which commands would inherit.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def warn(message: str) -> None:
        if not told.value:
            told.value = 1
            command.say(f"warning: {message}")

    _annotator = Annotator(ConfigDict(json.loads(config)), out, key, warn)


def _one(source: Source) -> Done | str:
    return _annotator.file(source)


class _Pool:
    """`map` over `workers` processes, with one in this process; results in order."""

    def __init__(self, workers: int, config: ConfigDict, out: Path, tick: Callable[[float], None]):
        key = run_fingerprint(config)
        self._pool = None
        if workers > 1:
            context = multiprocessing.get_context("spawn")  # not forked, because JAX has threads
            self._alive, self._run = context.Pipe(duplex=False)
            told = context.RawValue("b", 0)
            self._pool = concurrent.futures.ProcessPoolExecutor(
                workers,
                context,
                _start,
                (config.to_json_best_effort(), out, key, self._alive, told),
            )
        else:
            self._own = Annotator(config, out, key, _warn, tick)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._pool:
            if kind is not None:
                self._run.close()  # the workers end at once
            self._pool.shutdown(cancel_futures=True)
            self._run.close()
            self._alive.close()

    def map(self, sources: Sequence[Source]) -> Iterator[tuple[Source, Done | str]]:
        if self._pool is None:
            for source in sources:
                yield source, self._own.file(source)
            return
        with deaf_workers():  # until `_start` has set a worker's handler
            found = [self._pool.submit(_one, source) for source in sources]
        try:
            for source, result in zip(sources, found, strict=True):
                yield source, result.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise InputError(
                "a worker process was killed, perhaps because memory ran out; run the same "
                "command with fewer --workers, it continues from here"
            ) from None


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


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
    told = []
    for source in whole:
        for each in done[source.id]["notes"]:
            note(**each)
        told += [f"{shown(source.path)}: {each}" for each in done[source.id]["warnings"]]

    def records() -> Iterator[tuple[Source, Record]]:
        for source in whole:
            for record in read_records(out, source):
                yield source, record

    def all_rows(record: Record) -> list[tasks.Row]:
        if record["end"] - record["start"] < config.rows.min_seconds:
            return []
        return [row for row in tasks.rows(record) if row["task"] not in config.rows.skip]

    def made(record: Record) -> list[tasks.Row]:
        if config.rows.keep_doubtful:
            return all_rows(record)
        return [
            row
            for row in all_rows(record)
            if doubt.trusted(row["provenance"]["field"], record["doubtful"])
        ]

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
            kept = made(record)
            balance.count(kept)
            if record["doubt"]:
                left_out = len(all_rows(record)) - len(kept)
                counts["doubtful segments"] += 1
                counts["doubtful rows"] += left_out
                if left_out:
                    at = {key: record[key] for key in ("audio", "start", "end")}
                    why = f"left out: {record['doubt']} ({left_out} rows)"
                    note(**at, field="rows", reason=why)
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
    if counts["doubtful segments"]:
        kept = config.rows.keep_doubtful
        rests = "row(s) that depend on it are left out (--keep-doubtful keeps them)"
        what = "their rows are kept" if kept else f"{counts['doubtful rows']} {rests}"
        told.append(
            f"{counts['doubtful segments']} of {counts['segments']} segments are foreign to the "
            f"small model, which knows only synthetic sound: {what}. Use experts that know such "
            "sound (docs/annotate.md)"
        )
    elif counts["spoken"] >= _SPOKEN and counts["agreed"] < counts["spoken"] / 2:
        told.append(
            f"only {counts['agreed']} of {counts['spoken']} segments with speech have a transcript "
            "that the systems agree on. They may not know this kind of sound, and may only guess "
            "its events and music. Use experts that know it: set experts and speech.systems in the "
            "config (docs/annotate.md)"
        )
    write_lines(out / _named(rows_name, shard), rows())
    write_lines(out / _named("dropped.jsonl", shard), notes)
    seconds = sum(done[source.id]["seconds"] for source in whole)
    manifest = {
        "version": moss_audio_jax.__version__,
        "fingerprint": run_fingerprint(config),
        "config": redact(json.loads(config.to_json_best_effort())),
        "shard": list(shard),
        "sources": len(sources),
        "failed": len(failed),
        "seconds": round(seconds, 3),
        "segments": counts["segments"],
        "rows": counts["rows"],
        "tasks": {
            name.removeprefix("task "): counts[name]
            for name in sorted(counts)
            if name.startswith("task ")
        },
        "doubtful": {"segments": counts["doubtful segments"], "rows": counts["doubtful rows"]},
        "dropped": dict(sorted(dropped.items())),
        "warnings": told,
    }
    text = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
    write_whole(out / _named("manifest.json", shard), text)
    first = [list(read_records(out, source)) for source in whole[: config.page_clips]]
    unread = [(shown(redact(path)), why) for path, why in failed]
    shows = page.page(first, out, config.page_seconds, made, told, len(whole), unread)
    write_whole(out / _named("index.html", shard), shows)
    return Summary(len(sources), counts["segments"], counts["rows"], seconds, failed, dropped, told)


def _kind(field: str, reason: str) -> str:
    """A reason without the details of one case, so that equal reasons can be counted."""
    if field == "source":
        return "source: failed"
    field = field.split()[0]
    action, _, why = reason.partition(": ")
    words = [w for w in why.split() if not any(c.isdigit() or c in "'\"/" for c in w)]
    return f"{field}: {action}: {textwrap.shorten(' '.join(words), 70, placeholder=' ...')}"


def _named(name: str, shard: tuple[int, int]) -> str:
    if shard[1] == 1:
        return name
    stem, suffix = os.path.splitext(name)
    return f"{stem}-{shard[0]:05d}-of-{shard[1]:05d}{suffix}"
