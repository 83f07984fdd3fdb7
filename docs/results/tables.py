"""Writes the tables of all pages from docs/results/*.json, which store every figure once.

    python docs/results/tables.py            # writes every table of README.md and docs/
    python docs/results/tables.py --check    # says which page is out of date; exit code 1

A page has a table between two marks, which name a file, a table in it and its columns:

    <!-- table: small_model/scores what found interval -->
    <!-- /table -->

In the JSON a table has "columns", {key: heading}, and "rows", a list of {key: value}. A pair of
numbers is an interval; a key that a row lacks is an empty cell.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parents[1]
_TABLE = re.compile(r"(<!-- table: (\S+)/(\S+)((?: \S+)*) -->\n).*?(<!-- /table -->)", re.DOTALL)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def written(text: str) -> str:
    """A page's text with its tables written again.

    Raises:
      KeyError: the results do not have a table or a column.
    """

    def table(match: re.Match) -> str:
        opening, file, name, columns, closing = match.groups()
        # Decimals stay as they are written: 0.680 has three.
        data = json.loads(_read(RESULTS / f"{file}.json"), parse_float=str)["tables"][name]
        return opening + markdown(data, columns.split() or list(data["columns"])) + closing

    return _TABLE.sub(table, text)


def markdown(table: dict[str, Any], columns: list[str]) -> str:
    """The rows of a table as Markdown, without those that have no value in these columns."""
    lines = [[table["columns"][key] for key in columns], ["---"] * len(columns)]
    for row in table["rows"]:
        cells = [_cell(row.get(key)) for key in columns]
        if any(cells[1:]):
            lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " to ".join(_cell(end) for end in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> int:
    old = [page for page in pages() if written(text := _read(page)) != text]
    if "--check" in sys.argv[1:]:
        for page in old:
            print(f"{page.relative_to(ROOT)}: a table is out of date; run docs/results/tables.py")
        return int(bool(old))
    for page in old:
        page.write_text(written(_read(page)), encoding="utf-8")
    return 0


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
