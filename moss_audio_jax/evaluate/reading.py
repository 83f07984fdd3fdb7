"""Reads tables and lines of foreign files, and checks values in them."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moss_audio_jax.errors import InputError, extra
from moss_audio_jax.files import brief, open_regular, parse_json, read_bytes, read_text, shown


def read_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line" or "file: row n", row) of a .parquet table, a JSON list, or JSON lines.

    Text is UTF-8, or UTF-16 with a byte order mark; a .gz file is UTF-8.

    Raises:
      InputError: the file cannot be read, or a line is not a JSON object.
    """
    if file.suffix == ".parquet":
        rows = _parquet(file)
    else:
        text = _unpacked(file) if file.suffix == ".gz" else read_text(file, "a manifest")
        if text.lstrip().startswith("["):
            rows = parse_json(text, shown(file))
        else:
            rows = None
    if rows is not None:
        numbered = ((f"{shown(file)}: row {number}", row) for number, row in enumerate(rows, 1))
    else:
        numbered = (
            (where, parse_json(line, where)) for where, line in _numbered(file, text.split("\n"))
        )
    for where, row in numbered:
        if not isinstance(row, dict):
            raise InputError(f"{where}: is {json_kind(row)}; expected a JSON object")
        yield where, row


def _parquet(file: Path) -> list[Any]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{shown(file)}: parquet needs pyarrow: {extra('evaluate')}") from None
    with open_regular(file, "a parquet table") as opened:
        try:
            return pyarrow.parquet.read_table(opened).to_pylist()
        except (OSError, ValueError, OverflowError, MemoryError, pyarrow.ArrowException) as error:
            raise InputError(f"{shown(file)}: {brief(error)}") from None


def _unpacked(file: Path) -> str:
    try:
        return gzip.decompress(read_bytes(file, "a manifest")).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{shown(file)}: not UTF-8 text packed by gzip ({brief(error)})") from None


def read_lines(file: Path, errors: str = "strict") -> Iterator[tuple[str, str]]:
    """("file:line", text) of each line that is not blank.

    Args:
      errors: see `files.read_text`.
    """
    # Not splitlines(), which also splits at characters that a transcript may contain.
    return _numbered(file, read_text(file, errors=errors).split("\n"))


def read_keyed(file: Path, errors: str = "strict") -> Iterator[tuple[str, str, str]]:
    """("file:line", first word, the rest) of each line that is not blank."""
    for where, line in read_lines(file, errors):
        name, *rest = line.split(maxsplit=1)
        yield where, name, rest[0].rstrip() if rest else ""


def _numbered(file: Path, lines: list[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{shown(file)}:{number}", line


# --- values --------------------------------------------------------------------------------------


def json_kind(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def first_of(row: dict[str, Any], keys: tuple[str, ...], where: str) -> Any:
    """The value of the first of `keys` that the row has, or InputError."""
    for key in keys:
        if row.get(key) is not None:
            return row[key]
    raise InputError(f"{where}: no {' or '.join(map(repr, keys))}")


def text_of(value: Any, where: str, what: str) -> str:
    """A text. Numbers become text; anything else raises InputError."""
    if isinstance(value, str | int | float):
        return str(value)
    raise InputError(f"{where}: {what} is {json_kind(value)}; expected text")


def name_of(row: dict[str, Any], otherwise: object, where: str) -> str:
    """The row's "id" as text, or `otherwise` if it has none."""
    return text_of(row["id"], where, "the id") if "id" in row else str(otherwise)


def group_of(row: dict[str, Any], keys: tuple[str, ...], where: str) -> dict[str, Any]:
    """The entries of a row under `keys`, for breakdowns: text or numbers, or lists of them."""
    found = {key: row[key] for key in keys if row.get(key) not in (None, "")}
    for key, value in found.items():
        some = value if isinstance(value, list) else [value]
        if not all(isinstance(one, str | int | float) for one in some):
            raise InputError(f"{where}: {key!r} is {json_kind(value)}; expected text")
        if key == "language" and not isinstance(value, str):
            raise InputError(
                f"{where}: the language is {json_kind(value)}; expected text such as 'en'"
            )
    return found
