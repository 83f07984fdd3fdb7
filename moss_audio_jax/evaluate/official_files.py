"""Writes predictions in the form that a benchmark's official script reads.

example:
  moss-audio-jax evaluate export --benchmark mmar --data MMAR-meta.jsonl \\
      --predictions predictions.jsonl --output for_mmar.jsonl

mmau, mmau-mini   a JSON list with `model_output`            (its evaluation.py --input FILE)
mmar              JSON lines with `answer_prediction` and `thinking_prediction`
mmsu              JSON lines with `response`
mmau-pro          a parquet table with `model_output`
mecat-caption     a folder with JSON lines {KEY: text} for each subtask (python -m mecat.evaluate)
mecat-qa          a folder with JSON lines {KEY: text}

Answers are written without their thinking. If the script compares texts (all but mmsu), an answer
that is only the letter of a choice becomes the text of that choice. The `official` part of a score
equals the script's result for this file.
"""

from __future__ import annotations

import io
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moss_audio_jax import command
from moss_audio_jax.buckets import as_path
from moss_audio_jax.errors import InputError, UsageError, extra
from moss_audio_jax.evaluate import benchmarks, mecat
from moss_audio_jax.evaluate.benchmarks import Item
from moss_audio_jax.evaluate.metrics.choice import choice_by_letter
from moss_audio_jax.evaluate.predictions import Prediction, by_id, read_predictions
from moss_audio_jax.evaluate.reading import name_of, read_rows
from moss_audio_jax.files import brief, write_whole
from moss_audio_jax.journal import write_lines
from moss_audio_jax.text.prompt import split_thinking

KEYS = {
    "mmau": "model_output",
    "mmau-mini": "model_output",
    "mmau-pro": "model_output",
    "mmar": "answer_prediction",
    "mmsu": "response",
}


def official_text(benchmark: str, item: Item, prediction: Prediction) -> str | None:
    """The text of a prediction that the official script sees; None if there was no output.

    A row that came from an official script's file is used unchanged.
    """
    raw = prediction["raw_output"]
    if raw is None or "official_key" in prediction:
        return raw
    answer = split_thinking(raw)[1].strip()
    if benchmark == "mmsu" or item.kind != "choice":
        return answer
    return choice_by_letter(answer, item.reference["choices"]) or answer


def official_texts(
    benchmark: str, items: Sequence[Item], predictions: Mapping[str, Prediction]
) -> dict[str, str]:
    """`official_text` by id of the items that have a prediction; "" for a failed one."""
    return {
        item.id: official_text(benchmark, item, predictions[item.id]) or ""
        for item in items
        if item.id in predictions
    }


def official_rows(
    benchmark: str,
    data: str | Path,
    items: Sequence[Item],
    predictions: Mapping[str, Prediction],
) -> list[dict[str, Any]]:
    """The rows of the data, each with its prediction. A row without one lacks the key.

    A failed item has "" (null for MMSU, because its script would give an empty answer the letter of
    the row before).

    Raises:
      UsageError: a benchmark without an official script.
    """
    if benchmark not in KEYS:
        raise UsageError(f"{benchmark} has no official script; expected one of {', '.join(KEYS)}")
    known = {item.id: item for item in items}
    rows = []
    for number, (where, row) in enumerate(read_rows(as_path(data)), 1):
        name = name_of(row, number, where)
        if name not in known:
            continue
        prediction = predictions.get(name)
        if prediction is not None:
            text = official_text(benchmark, known[name], prediction)
            if text is None and benchmark != "mmsu":
                text = ""
            row = {**row, KEYS[benchmark]: text}
            if benchmark == "mmar":
                row["thinking_prediction"] = prediction.get("thinking") or ""
        elif benchmark == "mmau-pro":
            row = {**row, KEYS[benchmark]: None}  # a table has every column
        rows.append(row)
    return rows


def write(benchmark: str, rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Writes the result of `official_rows` in the form that the script opens."""
    if benchmark == "mmau-pro":
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise InputError(f"{output}: parquet needs pyarrow: {extra('evaluate')}") from None
        table = io.BytesIO()
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), table)
        except (ValueError, OverflowError, pyarrow.ArrowException) as error:
            raise InputError(
                f"{output}: the rows cannot be written as a table: {brief(error)}"
            ) from None
        write_whole(output, table.getvalue())
    elif benchmark in ("mmau", "mmau-mini"):
        write_whole(output, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    else:
        write_lines(output, rows)


def main(argv: Sequence[str]) -> int:
    options = command.parser("evaluate export", __doc__)
    benchmarks.add_options(options)
    options.add_argument("--predictions", type=as_path, required=True, metavar="FILE")
    options.add_argument("--output", type=as_path, required=True, metavar="FILE|DIR")
    args = options.parse_args(argv)
    command.distinct(args.output, args.data, args.predictions)
    benchmark = benchmarks.from_args(args)
    rows, problems = read_predictions(args.predictions)
    found, more = by_id(rows)
    if args.benchmark in mecat.TASKS:
        texts = official_texts(args.benchmark, benchmark.items, found)
        files = mecat.write_files(args.benchmark, benchmark.items, texts, args.output)
        count = len(texts)
        command.say(f"to score them: python {shlex.join(mecat.words(args.benchmark, files))}")
    else:
        rows = official_rows(args.benchmark, args.data, benchmark.items, found)
        write(args.benchmark, rows, args.output)
        count = len(rows)
    missing = [item.id for item in benchmark.items if item.id not in found]
    problems += more + [f"{args.predictions}: no prediction for {name}" for name in missing]
    for problem in problems:
        command.say(f"error: {problem}")
    command.say(f"wrote {args.output}: {count} rows")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(command.run(main))
