"""Scores predictions by the official rule, with its bugs, and by a strict rule.

example:
  moss-audio-jax evaluate score --benchmark mmau-mini --data mmau-test-mini.json \\
      --predictions predictions.jsonl --output score.json

--predictions is a file that `evaluate infer` wrote, or one that the benchmark's official script
reads. The official rule of multiple choice is that of the script; by the strict rule an answer must
name exactly one choice, by letter, text or both. An item without a prediction is wrong, except if
all answers came from `evaluate infer --limit N`: then only the first N items count, and the score
says so. Captions and open answers need --judgements, a file that `evaluate judge` wrote. DATE and
FENSE of MECAT need --text-encoder, a folder with the models that its package loads; without it they
are left out. Exit code 1: a prediction is missing, unknown, repeated or broken; each is named.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moss_audio_jax import command
from moss_audio_jax.buckets import as_path
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.evaluate import benchmarks, mecat, text_norm
from moss_audio_jax.evaluate.benchmarks import CAPTION_FIELDS, Item
from moss_audio_jax.evaluate.metrics import bootstrap, events
from moss_audio_jax.evaluate.metrics.rows import Scored, Scorer
from moss_audio_jax.evaluate.official_files import official_texts
from moss_audio_jax.evaluate.predictions import (
    Prediction,
    by_id,
    mixed,
    read_judgements,
    read_predictions,
)
from moss_audio_jax.files import brief, read_bytes, write_whole
from moss_audio_jax.runtime import code_version

Ratio = tuple[str, str, float]  # column of the numerator, of the denominator, factor

_BOTH: dict[str, Ratio | str] = {  # a ratio of two sums, or a sum
    "wer": ("word_errors", "words", 100),
    "cer": ("character_errors", "characters", 100),
    "substitutions": "substitutions",
    "deletions": "deletions",
    "insertions": "insertions",
    "reference_words": "words",
    "rows_in_words": "rows_in_words",  # rows in which `wer` counts words; see text_norm
    "rows_in_characters": "rows_in_characters",
    "character_substitutions": "character_substitutions",
    "character_deletions": "character_deletions",
    "character_insertions": "character_insertions",
    "reference_characters": "characters",
    "aas_slot_ms": ("slot_shift", "slots", 1000),
    "aas_token_ms": ("token_shift", "tokens", 1000),
    "coverage": ("slots", "reference_slots", 1),
    "bias_ms": ("bias", "slots", 1000),
    "order_violations": "order_violations",
    "event_f1": ("event_twice_right", "event_all", 1),
    "event_precision": ("event_right", "event_estimated", 1),
    "event_recall": ("event_right", "event_reference", 1),
    "miou": ("iou", "event_reference", 1),
    "r@0.5": ("iou_0.5", "event_reference", 1),
    "r@0.7": ("iou_0.7", "event_reference", 1),
    "any_label/event_f1": ("any_twice_right", "event_all", 1),
    "any_label/miou": ("any_iou", "event_reference", 1),
    "unparsed_share": ("timed_unparsed", "timed_rows", 1),
    "open_accuracy": ("open_right", "open_rows", 100),
    "time_accuracy": ("time_right", "time_rows", 100),
    "tempo_accuracy": ("tempo_right", "tempo_rows", 100),
    "sources_named": ("sources_named", "sources", 1),
    "judged/mean": ("judged_points", "judged_fields", 1),
    **{f"judged/{name}": (f"judged_{name}", f"judged_{name}_rows", 1) for name in CAPTION_FIELDS},
}
METRICS: dict[str, dict[str, Ratio | str]] = {
    "official": {
        "accuracy": ("official_right", "official_rows", 100),
        "accuracy_verbatim": ("verbatim_right", "official_rows", 100),
        "accuracy_letters_mapped": ("mapped_right", "official_rows", 100),
        "rows": "official_rows",
        "undecided": "undecided",
        **_BOTH,
    },
    "strict": {
        "accuracy": ("strict_right", "strict_rows", 100),
        "rows": "strict_rows",
        "fields/mean": ("field_points", "fields", 1),
        **{f"fields/{name}": (f"field_{name}", f"field_{name}_rows", 1) for name in CAPTION_FIELDS},
        "word_f1": ("word_points", "word_rows", 1),
        **_BOTH,
    },
}
NAMED = 20  # problems that are printed; the score file has all


def score_items(
    benchmark: str,
    items: Sequence[Item],
    predictions: Iterable[Prediction],
    problems: Sequence[str] = (),
    judgements: Iterable[Mapping[str, Any]] | None = None,
    with_rows: bool = True,
    seed: int = 0,
    processes: int = 1,
) -> dict[str, Any]:
    """The score of a benchmark's predictions, as a dictionary that JSON can hold.

    Args:
      benchmark: its name; determines the official rule.
      items: with their references; ids are unique.
      predictions: rows of `read_predictions`.
      problems: the messages of `read_predictions`.
      judgements: rows of `evaluate judge`.
      with_rows: whether the result has a verdict on each item.
      seed: of the bootstrap.
      processes: number of processes; more than one needs a `__main__` that can be imported.

    Returns:
      {"benchmark", "n", "official", "strict", "by": {group: {value: {"n", "official", "strict"}}},
      "confidence", "counts", "problems", "normaliser", "code_version", "rows"}. Accuracies, wer and
      cer are in percent, *_ms in milliseconds, judged from 1 to 5, others from 0 to 1.

    Raises:
      InputError: no prediction for any of the items.
    """
    predictions = list(predictions)
    found, repeated = by_id(predictions)
    known = {item.id for item in items}
    if not known & found.keys():
        other = brief(next(iter(found), ""))
        raise InputError(
            f"no predictions at all for the {len(items)} items of {benchmark}"
            + (f"; {len(found)} are for other ids, such as {other!r}" if found else "")
        )
    missing = [item.id for item in items if item.id not in found]
    unknown = [name for name in found if name not in known]
    judged = {str(row["id"]): row["scores"] for row in judgements or () if row.get("scores")}
    scored = Scorer(benchmark, judged).score(items, found, processes)

    counts = {
        "predicted": len(items) - len(missing),
        "missing": len(missing),
        "unknown_ids": len(unknown),
        "duplicate_ids": len(repeated),
        "broken_lines": len(problems),
        "errors": 0,
        "unparsed": 0,
        "truncated_thinking": 0,
        "empty": 0,
    }
    statuses = collections.Counter(row.status for row in scored)
    counts |= {name: statuses[status] for name, status in _STATUS_COUNTS.items()}
    counts["without_reference"] = sum(row.without_reference for row in scored)
    counts["unjudged"] = sum(row.unjudged for row in scored)

    table = _Table(scored)
    everything = np.arange(len(items))
    parts = {part: table.values(part, everything, benchmark) for part in METRICS}
    labels = [row.labels for row in scored if row.labels is not None]
    if labels:
        parts["official"]["event_f1_macro"] = events.label_average(labels, skip_unfound=True)
        parts["strict"]["event_f1_macro"] = events.label_average(labels, skip_unfound=False)
    metas = [row["meta"] for row in found.values() if isinstance(row.get("meta"), dict)]
    result = {
        "benchmark": benchmark,
        "n": len(items),
        **parts,
        "by": _by(items, table, benchmark),
        "confidence": table.confidence(benchmark, seed),
        "counts": counts,
        "problems": [
            *problems,
            *mixed(metas),
            *repeated,
            *(f"{name}: no prediction" for name in missing),
            *(f"{name}: predicted, but no item of {benchmark}" for name in unknown),
            *(f"{row.id}: failed: {row.error}" for row in scored if row.error),
        ],
        "normaliser": text_norm.identity(),
        "counted": text_norm.COUNTED,
        "code_version": code_version(),
    }
    if metas:
        result["meta"] = {key: value for key, value in metas[0].items() if key != "limit"}
    if with_rows:
        result["rows"] = [row.verdict(item) for item, row in zip(items, scored, strict=True)]
    return result


def asked(items: Sequence[Item], predictions: Iterable[Prediction]) -> Sequence[Item]:
    """The items that `evaluate infer` was told to ask: with --limit N, the first N.

    With several runs the largest N counts; predictions without N are those of all items.
    """
    limits = [(row.get("meta") or {}).get("limit") for row in predictions if "raw_output" in row]
    if not limits or not all(type(limit) is int and limit > 0 for limit in limits):
        return items
    return items[: max(limits)]


_STATUS_COUNTS = {
    "errors": "error",
    "unparsed": "unparsed",
    "truncated_thinking": "truncated_thinking",
    "empty": "empty",
}


class _Table:
    """The sums of all rows as a table, float64 [rows, names]."""

    def __init__(self, scored: Sequence[Scored]) -> None:
        names = dict.fromkeys(name for row in scored for name in row.sums)
        self._column = {name: i for i, name in enumerate(names)}
        self._values = np.zeros((len(scored), len(names)))
        for number, row in enumerate(scored):
            for name, value in row.sums.items():
                self._values[number, self._column[name]] = value

    def values(self, part: str, rows: np.ndarray, benchmark: str) -> dict[str, Any]:
        """The metrics of some rows, without those that no row contributes to; None for 0 / 0."""
        sums = self._values[rows].sum(0)
        result: dict[str, Any] = {}
        for name, metric in METRICS[part].items():
            if isinstance(metric, str):
                if metric in self._column:
                    _put(result, name, round(float(sums[self._column[metric]])), benchmark)
            elif {*metric[:2]} <= self._column.keys():
                over, under = (sums[self._column[name]] for name in metric[:2])
                value = float(metric[2] * over / under) if under else None
                _put(result, name, value, benchmark)
        return result

    def confidence(self, benchmark: str, seed: int) -> dict[str, Any]:
        """95% intervals of all ratios."""
        result: dict[str, Any] = {
            "level": bootstrap.LEVEL,
            "resamples": bootstrap.RESAMPLES,
            "seed": seed,
        }
        ratios = {
            (part, name): metric
            for part, metrics in METRICS.items()
            for name, metric in metrics.items()
            if not isinstance(metric, str) and {*metric[:2]} <= self._column.keys()
        }
        pairs = {
            key: tuple(self._values[:, self._column[name]] for name in metric[:2])
            for key, metric in ratios.items()
        }
        for part in METRICS:
            result[part] = {}
        for key, interval in bootstrap.intervals(pairs, seed).items():
            scale = ratios[key][2]
            bounds = interval and [scale * bound for bound in interval]
            _put(result[key[0]], key[1], bounds, benchmark)
        return result


def _put(result: dict[str, Any], name: str, value: Any, benchmark: str) -> None:
    """Sets result[name], or result[a][b] for "a/b".

    In a benchmark with closed questions, the accuracy of multiple choice is "choice_accuracy".
    """
    if benchmarks.has_closed_questions(benchmark) and name.startswith("accuracy"):
        name = f"choice_{name}"
    *outer, inner = name.split("/")
    for key in outer:
        result = result.setdefault(key, {})
    result[inner] = value


def _by(items: Sequence[Item], table: _Table, benchmark: str) -> dict[str, Any]:
    """Breakdown by each key of the items' groups; an item with a list counts for each entry."""
    rows: dict[str, dict[str, list[int]]] = {}
    for number, item in enumerate(items):
        for key, value in item.group.items():
            for one in dict.fromkeys(map(str, value if isinstance(value, list) else [value])):
                rows.setdefault(key, {}).setdefault(one, []).append(number)
    return {
        key: {
            value: {"n": len(numbers)}
            | {part: table.values(part, np.array(numbers), benchmark) for part in METRICS}
            for value, numbers in sorted(values.items())
        }
        for key, values in rows.items()
    }


# --- command line --------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    options = command.parser("evaluate score", __doc__)
    benchmarks.add_options(options)
    options.add_argument("--predictions", type=as_path, required=True, metavar="FILE")
    options.add_argument("--output", type=as_path, required=True, metavar="FILE.json")
    options.add_argument(
        "--judgements",
        type=as_path,
        metavar="FILE",
        help="from evaluate judge, for captions and open answers",
    )
    options.add_argument(
        "--text-encoder",
        type=Path,
        metavar="DIR",
        help="for DATE and FENSE of MECAT: a folder with the models that the package mecat loads; "
        f"default: {mecat.ENCODER_KEY} in the environment",
    )
    options.add_argument("--no-rows", action="store_true", help="leave out the verdict on each row")
    args = options.parse_args(argv)
    command.distinct(args.output, args.data, args.predictions, args.judgements)
    if args.text_encoder is not None and args.benchmark not in mecat.TASKS:
        raise UsageError(f"--text-encoder is for {' and '.join(mecat.TASKS)}")
    encoder = mecat.encoder_folder(args.text_encoder) if args.benchmark in mecat.TASKS else None
    benchmark = benchmarks.from_args(args)
    rows, problems = read_predictions(args.predictions)
    if not rows:
        raise InputError(
            f"{args.predictions}: no predictions at all"
            + (f"; {len(problems)} line(s) are broken: {problems[0]}" if problems else "")
        )
    judgements = None
    if args.judgements:
        judgements, unread = read_judgements(args.judgements)
        problems += unread
    items = benchmark.items if args.limit else asked(benchmark.items, rows)
    try:
        result = score_items(
            benchmark.name,
            items,
            rows,
            problems,
            judgements,
            with_rows=not args.no_rows,
            processes=min(os.cpu_count() or 1, 8),
        )
    except InputError as error:
        raise InputError(f"{args.predictions}: {error}") from None
    result["inputs"] = {
        "data": str(args.data),
        "items_hash": _hash(
            json.dumps([[item.id, item.reference] for item in items], default=str).encode()
        ),
        "predictions": str(args.predictions),
        "predictions_hash": _hash(read_bytes(args.predictions)),
    }
    if encoder is not None:
        _add_mecat(result, items, by_id(rows)[0], args.data, encoder)
    elif benchmark.name in mecat.TASKS:
        command.say("note: no DATE and FENSE, which need a text encoder: see --text-encoder")
    if len(items) < len(benchmark.items):
        result["inputs"]["limit"] = len(items)
        command.say(
            f"note: only the first {len(items):,} of {len(benchmark.items):,} items were asked "
            f"(evaluate infer --limit), and only they are scored"
        )
    text = json.dumps(result, ensure_ascii=False, indent=1 if args.no_rows else None)
    write_whole(args.output, text + "\n")
    for problem in benchmark.problems[:NAMED]:
        command.say(f"note: {brief(problem, 500)}")
    for problem in result["problems"][:NAMED]:
        command.say(f"error: {brief(problem, 500)}")
    if (more := len(result["problems"]) - NAMED) > 0:
        command.say(f"error: {more} more; {args.output} has all of them under problems")
    print("\n".join(_summary(result)))
    return 1 if result["problems"] else 0


def _add_mecat(
    result: dict[str, Any],
    items: Sequence[Item],
    found: Mapping[str, Prediction],
    data: Path,
    encoder: Path,
) -> None:
    """Adds DATE and FENSE to the official part of a result, as a whole and by subtask."""
    name = result["benchmark"]
    with tempfile.TemporaryDirectory() as folder:
        texts = official_texts(name, items, found)
        files = mecat.write_files(name, items, texts, Path(folder))
        scores, empty = mecat.run(name, files, data, encoder)
    for subtask, values in scores.items():
        part = result["by"]["subtask"][subtask] if subtask else result
        part["official"] |= values
    if empty:
        command.say(
            f"note: no DATE and FENSE over all subtasks, because {', '.join(empty)} have no "
            "predictions"
        )
    result["inputs"] |= mecat.identity(encoder)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _summary(result: Mapping[str, Any]) -> Iterable[str]:
    counts = ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in result["counts"].items() if v)
    yield f"{result['benchmark']}: {result['n']} items; {counts}"
    for part in METRICS:
        for name, value in result[part].items():
            if not isinstance(value, float):
                continue
            bounds = result["confidence"][part].get(name)
            spread = f"  [{bounds[0]:.4g}, {bounds[1]:.4g}]" if bounds else ""
            yield f"{part:8}  {name:24} {value:10.4f}{spread}"


if __name__ == "__main__":
    sys.exit(command.run(main))
