"""Prediction files: our JSON lines, and the files that the benchmarks' official scripts read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moss_audio_jax.buckets import as_path, delete_one, is_remote
from moss_audio_jax.errors import InputError
from moss_audio_jax.evaluate.items import Item
from moss_audio_jax.evaluate.reading import json_kind, read_rows
from moss_audio_jax.files import brief, parse_json, read_bytes, shown
from moss_audio_jax.journal import write_lines
from moss_audio_jax.text.prompt import split_thinking

# The keys of the answer in official scripts: MMAU and MMAU-Pro, MMAR, MMSU.
OFFICIAL_KEYS = ("model_output", "answer_prediction", "response")

Prediction = dict[str, Any]

_TEXT = (str, type(None))
_NUMBER = (int, float, type(None))
# The keys that the code reads, and their types.
_TYPES: dict[str, tuple[type, ...]] = {
    "raw_output": _TEXT,
    "answer": _TEXT,
    "thinking": _TEXT,
    "prompt": _TEXT,
    "error": _TEXT,
    "audio_seconds": _NUMBER,
    "warnings": (list,),
    "meta": (dict,),
}


def read_predictions(path: str | Path) -> tuple[list[Prediction], list[str]]:
    """The rows of a prediction file, and a message for each row that could not be read.

    The file may be JSON lines, a JSON list or a parquet table. It may be the file of an official
    script, whose rows have `model_output`, `answer_prediction` or `response` and no `raw_output`.
    Such a row gets `raw_output` (None for null), `thinking` if it has `thinking_prediction`, and
    `official_key`, the key of its answer. Official files have the right answer under "answer";
    here "answer" is always the model's, or missing. Rows of MMAU-Pro's table, which has no ids,
    are named by their number, from 1.

    Returns:
      (rows, problems): rows in the order of the file, each with a string "id"; a message for each
      row that is not a JSON object, has no id, or has a value of a wrong type. A line that a killed
      process left half-written is such a row.

    Raises:
      InputError: no such file, or a JSON list or table that cannot be read.
    """
    path = as_path(path)
    problems: list[str] = []
    rows = []
    for number, (where, row) in enumerate(_rows(path, problems), 1):
        if not isinstance(row, dict):
            problems.append(f"{where}: is {json_kind(row)}; expected a JSON object")
            continue
        official = next((key for key in OFFICIAL_KEYS if key in row), None)
        if "raw_output" not in row and official:
            row = {**row, "id": row.get("id", number), "official_key": official}
            given = row[official]
            if not isinstance(given, str | int | float | None):
                problems.append(f"{where}: {official} is {json_kind(given)}; expected text")
                continue
            raw = None if given is None else str(given)
            row |= {"raw_output": raw, "answer": None if raw is None else split_thinking(raw)[1]}
            if "thinking_prediction" in row:
                row["thinking"] = row["thinking_prediction"]
        if "raw_output" not in row:
            row = {name: value for name, value in row.items() if name != "answer"}
        if row.get("id") in (None, ""):
            problems.append(f"{where}: no id")
        elif not isinstance(row["id"], str | int | float):
            problems.append(f"{where}: the id is {json_kind(row['id'])}; expected text")
        elif odd := next(
            (key for key, types in _TYPES.items() if key in row and not _is(row[key], types)), None
        ):
            problems.append(f"{where}: {brief(row['id'])}: {odd} is {json_kind(row[odd])}")
        else:
            rows.append({**row, "id": str(row["id"])})
    return rows, problems


def _is(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def read_judgements(path: str | Path) -> tuple[list[Prediction], list[str]]:
    """The rows of a file that `evaluate judge` wrote, and a message for each unreadable row.

    Rows with scores have {field: 1 to 5} under "scores".
    """
    rows, problems = read_predictions(path)
    fit = []
    for row in rows:
        scores = row.get("scores")
        if scores is None or (
            isinstance(scores, dict)
            and scores
            and all(_is(score, (int,)) and 1 <= score <= 5 for score in scores.values())
        ):
            fit.append(row)
        else:
            problems.append(
                f"{shown(path)}: {brief(row['id'])}: scores: expected a number from 1 to 5 for "
                "each field"
            )
    return fit, problems


def by_id(rows: Iterable[Prediction]) -> tuple[dict[str, Prediction], list[str]]:
    """({id: prediction}, a message for each repeated id).

    Of several predictions the first one counts, but an output takes precedence over a failure. A
    row without the key of an answer is not a prediction; official files have such rows for items
    that were not asked.
    """
    found: dict[str, Prediction] = {}
    problems = []
    for row in rows:
        if "raw_output" not in row:
            continue
        before = found.setdefault(row["id"], row)
        if before is not row:
            problems.append(f"{row['id']}: predicted more than once")
            if before["raw_output"] is None:
                found[row["id"]] = row
    return found, problems


def _rows(path: Path, problems: list[str]) -> Iterable[tuple[str, Any]]:
    if path.suffix == ".parquet":
        yield from read_rows(path)
        return
    # Bytes, because a killed process may have cut a character in two.
    raw = read_bytes(path, "a file of predictions")
    if raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from read_rows(path)
        return
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{shown(path)}:{number}"
        try:
            row = parse_json(line, where)
        except InputError as error:
            half = number == len(lines)
            problems.append(f"{where}: the last line is half-written" if half else str(error))
        else:
            yield where, row


# --- files of predictions that grow ---------------------------------------------------------------


def partial_file(output: Path, index: int, count: int) -> Path:
    """The file of process `index` of `count` for predictions that will be merged into `output`."""
    number = f"-{index}" if count > 1 else ""
    return output.with_name(f"{output.name}.partial{number}.jsonl")


def _partials(output: Path) -> list[Path]:
    """The partial files of this and earlier runs, also of runs with more processes."""
    whole, numbered = f"{output.name}.partial.jsonl", f"{output.name}.partial-"
    files = output.parent.glob("*.jsonl")
    return sorted(f for f in files if f.name == whole or f.name.startswith(numbered))


def read_all(output: Path, problems: list[str] | None = None) -> dict[str, Prediction]:
    """Every prediction on disk, by id. An answer takes precedence over a failure.

    `problems`, if given, gets a message for each unreadable prediction; its item is asked again.
    """
    found: dict[str, Prediction] = {}
    for path in [output, *_partials(output)]:
        if not path.exists():
            continue
        rows, unread = read_predictions(path)
        for row in rows:
            if failed(found.get(row["id"])):
                found[row["id"]] = row
        if problems is not None:
            problems += unread
    return found


def failed(prediction: Prediction | None) -> bool:
    """Whether the prediction is missing or has an error instead of an answer."""
    return prediction is None or prediction.get("raw_output") is None


_FREE = ("code_version", "limit")  # of `meta`, what may differ within a file


def check_same(
    done: Mapping[str, Prediction], items: Sequence[Item], meta: Mapping[str, Any], output: Path
) -> None:
    """Checks that one file does not mix predictions of two models or of two ways to ask.

    Raises:
      InputError: a prediction in `done` has other settings (except the code's version and --limit)
        or another prompt.
    """
    prompts = {item.id: item.prompt for item in items}
    for name, row in done.items():
        old = row.get("meta", {})
        for key in meta:
            if key not in _FREE and old.get(key) != meta[key]:
                raise InputError(
                    f"{output}: {brief(name)} was predicted with {key} "
                    f"{brief(repr(old.get(key)))}, now it is {brief(repr(meta[key]))}; {_ADVICE}"
                )
        if row.get("prompt") != prompts.get(name, row.get("prompt")):
            raise InputError(
                f"{output}: {brief(name)} was asked {brief(repr(row.get('prompt')))}, now it is "
                f"{brief(repr(prompts[name]))}; {_ADVICE}"
            )


def mixed(metas: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each setting in which the `meta` of a file's predictions differ."""
    lines = []
    for key in dict.fromkeys(key for meta in metas for key in meta if key not in _FREE):
        values = Counter(json.dumps(meta.get(key), sort_keys=True) for meta in metas)
        if len(values) > 1:
            told = ", ".join(f"{brief(value, 80)} ({n})" for value, n in values.most_common(3))
            lines.append(f"the predictions were made with several settings: {key} {told}")
    return lines


_ADVICE = "give another --output, or remove the old predictions"


def merge(output: Path, items: Sequence[Item]) -> None:
    """Writes all predictions on disk to `output`, in the order of the items; others at the end."""
    found, partials = read_all(output), _partials(output)
    if not partials:
        return  # nothing new
    ids = [item.id for item in items]
    ids += sorted(found.keys() - set(ids))
    write_lines(output, (found[name] for name in ids))
    for partial in partials:
        if is_remote(partial):
            delete_one(partial)
        else:
            partial.unlink()
