"""`train --check-data`: what a run's rows hold, and which cannot be used, before a pod is rented.

Every row of `data.train` or `data.mixture`, and of `data.eval`, is read and made into an example
once, on all cores; no device of JAX is used.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from tqdm import tqdm

from moss_audio_jax import files
from moss_audio_jax.data.augment import Augment
from moss_audio_jax.data.examples import rejected
from moss_audio_jax.data.loader_config import LoaderConfig
from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.data.pipeline import example_maker
from moss_audio_jax.data.records import Rejected, id_of
from moss_audio_jax.data.sources import read_location
from moss_audio_jax.data.survey import Packed, Reader, Survey, packed
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.train.check import check
from moss_audio_jax.train.data_page import Bars, Section, as_text, page
from moss_audio_jax.train.setup import loader_config_of
from moss_audio_jax.train.source import source_of
from moss_audio_jax.train.start import Start, read_start

_log = logging.getLogger(__name__)

_NAMED = 3  # rows of each reason
_GROUPS = 30  # reasons, tasks, languages; the rest as one
_QUANTILES = (0, 0.05, 0.5, 0.95, 0.99, 1)
_AXES = ("data", "fsdp", "tensor", "sequence")


def check_data(config: Any, report: Path, progress: bool = False) -> int:
    """Prints tables, and writes them with plots to `report` and unusable rows to a JSONL beside it.

    Returns:
      The exit code: 1 if some row is bad, else 0.

    Raises:
      InputError, UsageError: a key, a file or a folder that a run could not use, either.
    """
    listing = report.with_suffix(".jsonl")
    if listing == report:
        raise UsageError(f"--report {report}: is the name of the list of rows; expected *.html")
    start = read_start(config)
    # A machine without the run's devices: the mesh is for `plan` to judge.
    check(config, start.model, jax.sharding.AbstractMesh((1,) * len(_AXES), _AXES))
    rows = loader_config_of(config, start)
    rows.validate(start.model.encoder)
    sets = {"train": Mixture(tuple(config.data.train) or config.data.mixture, config.train.seed)}
    if config.data.eval:
        sets["eval"] = Mixture(tuple(config.data.eval))
    with files.writing(listing) as file:
        surveys, unusable = _read(config, start, rows, sets, file, progress)
        found = _findings(surveys, file)
    train = surveys["train"]
    fill, reason = _packed(config, start, rows, train, progress)
    sections = [
        _rows(surveys, rows, bool(config.train.source)),
        _unusable(unusable),
        _lengths(surveys),
        _packing(config, rows, train, fill, reason),
        _parts(train.mixture),
        _shares("Tasks of data.train", "task", "conversations", train.tasks),
        _shares("Languages and scripts of data.train", "language", "rows", train.languages),
        found,
    ]
    sections = [section for section in sections if section.rows or section.notes]
    print(as_text(sections))
    title = f"Data of a run: {train.mixture.rows:,} rows"
    files.write_whole(report, page(title, sections))
    _log.info(f"wrote {files.shown(report)}, and each row named above to {files.shown(listing)}")
    return int(any(survey.bad.any() for survey in surveys.values()))


def _read(
    config: Any,
    start: Start,
    rows: LoaderConfig,
    sets: Mapping[str, Mixture],
    file: IO[str],
    progress: bool,
) -> tuple[dict[str, Survey], dict[tuple[str, str], list[str]]]:
    """Reads every row; unusable ones by (kind, reason)."""
    plain = dataclasses.replace(rows, augment=Augment())
    maker = example_maker(start.tokenizer, start.model.encoder, plain)
    source = source_of(config)
    reader = Reader(maker, source.asks(config, maker) if source else None)
    surveys: dict[str, Survey] = {}
    unusable: dict[tuple[str, str], list[str]] = {}
    total = sum(mixture.rows for mixture in sets.values())
    with tqdm(total=total, unit="row", desc="reading", disable=not progress) as bar:
        for name, mixture in sets.items():
            survey = surveys[name] = Survey(mixture)
            for rejected in survey.read(reader, rows.row_seconds):
                bar.update()
                if rejected is None:
                    continue
                kind = "bad" if rejected.bad else "over-long"
                _list(file, name, kind, rejected)
                where = f"{rejected.source} line {rejected.line}"
                unusable.setdefault((kind, _group(rejected.reason)), []).append(where)
    return surveys, unusable


def _list(file: IO[str], name: str, kind: str, row: Rejected) -> None:
    """Adds a line to the JSONL."""
    found = {"set": name, "kind": kind, "source": row.source, "line": row.line, "row": row.row_id}
    if row.id is not None:
        found["id"] = row.id
    line = json.dumps({**found, "reason": row.reason}, ensure_ascii=False)
    # A lone surrogate becomes \udxxx, which is how JSON writes it.
    file.write(line.encode("utf-8", "backslashreplace").decode() + "\n")


def _group(reason: str) -> str:
    """A reason without what differs from row to row: the file at its start, quotes and numbers."""
    head, colon, rest = reason.partition(": ")
    if colon and ("/" in head or "." in head):
        reason = rest
    reason = re.sub(r"'[^']*'|\"[^\"]*\"", "...", reason)
    return re.sub(r"\d+(?:[.,]\d+)*", "N", reason)[:120]


def _findings(surveys: Mapping[str, Survey], file: IO[str]) -> Section:
    """Duplicates and leaks, which are listed, too."""
    lines, notes = [], []

    def tell(name: str, kind: str, found: Mapping[int, tuple[str, str]], said: str) -> None:
        """found: {row: (the row that it is like, the reason)}."""
        survey = surveys[name]
        for row, (_, reason) in found.items():
            job = survey.jobs[row]
            known = id_of(read_location(job.location))
            _list(file, name, kind, rejected(job, reason, known, bad=False))
        pairs = (f"{survey.name(row)} = {like}" for row, (like, _) in found.items())
        lines.append((said, f"{len(found):,}", _few(pairs, len(found))))

    for name, survey in surveys.items():
        again = {
            row: (survey.name(first), f"the same conversation as {survey.name(first)}")
            for row, first in survey.repeats().items()
        }
        tell(name, "duplicate", again, f"data.{name}: rows that repeat another, sound and all")
        sounds = f"{survey.heard_again():,}"
        lines.append((f"data.{name}: clips with the sound of an earlier one", sounds, "not listed"))
    if "eval" in surveys:
        train = surveys["train"]
        leaks = {
            row: (train.name(there), f"the same {what} as {train.name(there)} of data.train")
            for row, (there, what) in surveys["eval"].leaks(train).items()
        }
        tell("eval", "leak", leaks, "data.eval: rows whose sound or conversation data.train has")
        if leaks:
            notes.append(
                f"LEAK: {len(leaks):,} held-out rows are also trained on; the held-out loss will "
                "look better than it is."
            )
    return Section("Duplicates and leaks", notes, ("", "count", "the first"), lines)


def _packed(
    config: Any, start: Start, rows: LoaderConfig, train: Survey, progress: bool
) -> tuple[Packed | None, str]:
    """How an epoch is packed, or why that cannot be told."""
    if config.train.source:
        return None, (
            f"{config.train.source} makes the batches of these rows, so neither their packing nor "
            "the steps of an epoch are known."
        )
    if not train.usable.any():
        return None, "No row can be packed."
    try:
        total = train.mixture.rows
        with tqdm(total=total, unit="row", desc="packing", disable=not progress) as bar:
            return packed(train, start.model.encoder, rows, bar.update), ""
    except InputError as error:
        return None, f"The run would stop: {error}"


# --- tables --------------------------------------------------------------------------------------


def _rows(surveys: Mapping[str, Survey], rows: LoaderConfig, asked: bool) -> Section:
    lines, notes = [], []
    for name, survey in surveys.items():
        bad, seen = int(survey.bad.sum()), survey.mixture.rows
        hours = float(survey.seconds.sum(dtype=np.float64)) / 3600
        tokens, labels = (int(x.sum(dtype=np.int64)) for x in (survey.tokens, survey.labels))
        counts = seen, int(survey.usable.sum()), bad, int(survey.overlong.sum())
        cells = (*(f"{n:,}" for n in counts), f"{hours:,.2f}", f"{tokens:,}", f"{labels:,}")
        lines.append((f"data.{name}", *cells))
        if bad > rows.max_bad_share * seen:
            notes.append(
                f"data.{name}: {bad / seen:.1%} of the rows are bad; data.max_bad_share allows "
                f"{rows.max_bad_share:.1%}, so the run would stop."
            )
    if rows.augment.speeds:
        notes.append(
            "data.augment.speeds is set: with another speed a row has other lengths, and may be "
            "over-long, at each visit."
        )
    if any(survey.branched for survey in surveys.values()):
        notes.append(
            "Of a row with branches, the one is read that the first visit asks; later visits draw "
            "others."
            if asked
            else "Of a row with branches, tokens are those of one visit, which draws "
            f"{rows.branches} of them (data.branches). All are read, and counted as tasks."
        )
    head = ("", "rows", "usable", "bad", "over-long", "hours", "tokens", "label tokens")
    return Section("Rows", notes, head, lines)


def _unusable(unusable: Mapping[tuple[str, str], Sequence[str]]) -> Section:
    ordered = sorted(unusable.items(), key=lambda item: (item[0][0], -len(item[1])))
    lines = [
        (kind, f"{len(rows):,}", reason, _few(rows, len(rows)))
        for (kind, reason), rows in ordered[:_GROUPS]
    ]
    notes = _left_out(len(ordered), "reasons")
    return Section("Rows that cannot be used", notes, ("", "rows", "reason", "the first"), lines)


def _lengths(surveys: Mapping[str, Survey]) -> Section:
    lines, plots = [], []
    for name, survey in surveys.items():
        usable = survey.usable
        heard = survey.seconds[survey.seconds > 0]
        for what, values in (
            ("tokens", survey.tokens[usable]),
            ("label tokens", survey.labels[usable]),
            ("other tokens (the prompt)", (survey.tokens - survey.labels)[usable]),
            ("seconds of sound, where there is any", heard),
        ):
            if len(values):
                cells = (f"{value:,.4g}" for value in np.quantile(values, _QUANTILES))
                lines.append((f"data.{name}: {what}", *cells))
        if name == "train" and usable.any():
            plots.append(_histogram("Tokens of a row", survey.tokens[usable]))
            plots += [_histogram("Seconds of sound of a row", heard)] if len(heard) else []
    head = ("of a row", "least", "5%", "median", "95%", "99%", "most")
    return Section("Lengths", [], head, lines, plots)


def _packing(
    config: Any, rows: LoaderConfig, train: Survey, fill: Packed | None, reason: str
) -> Section:
    if fill is None:
        return Section("Packing", [reason], (), [])
    fresh = rows.batch // config.data.echo
    steps = train.mixture.rows / fill.visits * fill.rows / fresh
    lines = [
        ("examples in a packed row", f"{fill.examples / fill.rows:.2f}"),
        (f"filled of its {rows.length:,} tokens", f"{fill.tokens.mean():.1%}"),
    ]
    plots = [_histogram("Filled tokens of a packed row, %", 100 * fill.tokens)]
    if rows.chunks:
        lines.append((f"used of its {rows.chunks:,} strips", f"{fill.strips.mean():.1%}"))
        plots.append(_histogram("Used strips of a packed row, %", 100 * fill.strips))
    lines += [
        (f"steps of an epoch, at {fresh:,} new packed rows a step", f"{steps:,.2f}"),
        (f"epochs in train.steps {config.train.steps:,}", f"{config.train.steps / steps:,.2f}"),
    ]
    note = f"An epoch is {train.mixture.rows:,} visits of rows; {fill.visits:,} were packed here."
    return Section("Packing", [note], ("", ""), lines, plots)


def _parts(mixture: Mixture) -> Section:
    if len(mixture.parts) == 1:
        return Section("Parts", [], (), [])
    lines = []
    for part in mixture.parts:
        rows = len(part.source)
        visits = part.share * mixture.rows / rows
        lines.append((part.name, f"{rows:,}", f"{part.share:.1%}", f"{visits:.2f}"))
    head = ("part", "rows", "share of the visits", "visits of each row in an epoch")
    return Section("Parts of data.mixture", [], head, lines)


def _shares(title: str, what: str, counted: str, found: Mapping[str, Sequence[int]]) -> Section:
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    whole = [max(1, sum(counts[n] for counts in found.values())) for n in (0, 1)]
    lines, shares = [], {}
    for name, (count, labels) in ordered[:_GROUPS]:
        cells = f"{count:,}", f"{count / whole[0]:.1%}", f"{labels:,}", f"{labels / whole[1]:.1%}"
        lines.append((name, *cells))
        shares[name] = 100 * labels / whole[1]
    head = (what, counted, "share", "label tokens", "share")
    bars = [Bars("Share of the label tokens, %", shares, level=True)] if shares else []
    return Section(title, _left_out(len(ordered), "kinds"), head, lines, bars)


def _left_out(count: int, what: str) -> list[str]:
    return [f"Only {_GROUPS} of {count:,} {what} are shown."] if count > _GROUPS else []


def _few(names: Iterable[str], count: int) -> str:
    shown: Iterator[str] = itertools.islice(map(files.shown, names), _NAMED)
    return ", ".join(shown) + (" ..." if count > _NAMED else "")


def _histogram(title: str, values: np.ndarray) -> Bars:
    counts, edges = np.histogram(values, bins=40)
    spans = (f"{low:,.4g} to {high:,.4g}" for low, high in itertools.pairwise(edges))
    return Bars(title, dict(zip(spans, counts.astype(float), strict=True)))
