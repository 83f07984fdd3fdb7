"""Rows that are written as they come and survive whatever ends the process; predictions of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moss_audio_jax.errors import InputError
from moss_audio_jax.evaluate.benchmarks import Item
from moss_audio_jax.evaluate.predictions import Prediction, read_predictions
from moss_audio_jax.files import brief, not_written, writing


class Journal:
    """Appends rows to a file, each as a whole line; use it as a context.

    The file is there once something is written. A line that a killed process left half-written is
    cut off first. Without a path nothing is written: in a process whose peer does it.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._file = path, None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self.sync()
            self._file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row; if the process is killed after this, it is in the file."""
        if self._path is None:
            return
        if self._file is None:
            self._open()
        try:
            self._file.write(line(row))
            self._file.flush()
        except OSError as error:
            raise not_written(self._path, error) from error

    def sync(self) -> None:
        """What was written survives the machine too."""
        if self._file:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise not_written(self._path, error) from error

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                with open(self._path, "rb+") as file:
                    file.truncate(file.read().rfind(b"\n") + 1)
            self._file = open(self._path, "ab")  # noqa: SIM115
        except OSError as error:
            raise not_written(self._path, error) from None


def line(row: Mapping[str, Any]) -> bytes:
    """A row as JSON in UTF-8; a lone surrogate, of a file name, is written as JSON's escape."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    except RecursionError:
        raise InputError(f"{brief(row.get('id'))}: the row nests too deeply") from None


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """The file, all of it or as it was."""
    with writing(path, "wb") as file:
        file.writelines(map(line, rows))


# --- predictions ---------------------------------------------------------------------------------


def partial_file(output: Path, index: int, count: int) -> Path:
    """Where process `index` of `count` writes predictions that will be `output`."""
    number = f"-{index}" if count > 1 else ""
    return output.with_name(f"{output.name}.partial{number}.jsonl")


def _partials(output: Path) -> list[Path]:
    """Those of this run and of earlier ones, which may have had more processes or fewer."""
    whole, numbered = f"{output.name}.partial.jsonl", f"{output.name}.partial-"
    files = output.parent.glob("*.jsonl")
    return sorted(f for f in files if f.name == whole or f.name.startswith(numbered))


def read_all(output: Path, problems: list[str] | None = None) -> dict[str, Prediction]:
    """Every prediction that is on disk, by id; an answer counts for more than a failure.

    `problems`, where given, gets a line for each that cannot be read: its item is asked again.
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
    """Whether there is nothing, or an error instead of an answer."""
    return prediction is None or prediction.get("raw_output") is None


def check_same(
    done: Mapping[str, Prediction], items: Sequence[Item], meta: Mapping[str, Any], output: Path
) -> None:
    """Predictions of two models, or two ways to ask, must not mix in one file.

    Raises:
      InputError: what is `done` has another meta (but for the code's version and what --limit
        was) or another prompt.
    """
    prompts = {item.id: item.prompt for item in items}
    for name, row in done.items():
        old = row.get("meta", {})
        for key in meta:
            if key not in ("code_version", "limit") and old.get(key) != meta[key]:
                raise InputError(
                    f"{output}: {brief(name)} was predicted with {key} "
                    f"{brief(repr(old.get(key)))}, now it is {brief(repr(meta[key]))}; {_ADVICE}"
                )
        if row.get("prompt") != prompts.get(name, row.get("prompt")):
            raise InputError(
                f"{output}: {brief(name)} was asked {brief(repr(row.get('prompt')))}, now it is "
                f"{brief(repr(prompts[name]))}; {_ADVICE}"
            )


_ADVICE = "name another --output, or remove the old predictions"


def merge(output: Path, items: Sequence[Item]) -> None:
    """Makes `output` of all that is on disk: in the items' order, then those of no item."""
    found, partials = read_all(output), _partials(output)
    if not partials:
        return  # nothing new
    ids = [item.id for item in items]
    ids += sorted(found.keys() - set(ids))
    write_lines(output, (found[name] for name in ids))
    for partial in partials:
        partial.unlink()
