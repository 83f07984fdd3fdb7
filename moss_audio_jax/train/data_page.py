"""Sections of tables and bars as text and as an HTML page that needs no other files."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moss_audio_jax import timeline

_STYLE = """
h3 { font-size: .95em; font-weight: normal; color: #666; margin: 1em 0 .2em; }
.note { font-weight: 600; }
th.number, td.number { text-align: right; white-space: nowrap; }
svg.bars { display: block; width: 100%; max-width: 800px; }
"""
_WIDTH, _HEIGHT, _LINE, _NAMES = 800, 140, 20, 220  # SVG units
_COLOUR = timeline.WORDS


class Bars(NamedTuple):
    """A bar for each name: upright, with the first and last name below, or `level`, each named."""

    title: str
    values: Mapping[str, float]
    level: bool = False


class Section(NamedTuple):
    """A table with its notes and plots; the first cell of a row names it."""

    title: str
    notes: Sequence[str]
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    plots: Sequence[Bars] = ()


def as_text(sections: Sequence[Section]) -> str:
    return "\n\n".join(map(_text, sections))


def _text(section: Section) -> str:
    lines = [section.title, *(f"  {note}" for note in section.notes)]
    table = [section.head, *section.rows] if any(section.head) else section.rows
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [
            cell.rjust(width) if number and _is_number(section, number) else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return "\n".join(lines)


def _is_number(section: Section, column: int) -> bool:
    return all(not row[column].strip("0123456789.,%-+e ") for row in section.rows)


def page(title: str, sections: Sequence[Section]) -> str:
    """The HTML; `title` is text."""
    return timeline.document(title, map(_section, sections), _STYLE)


def _section(section: Section) -> str:
    parts = [f"<section><h2>{html.escape(section.title)}</h2>"]
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in section.notes]
    if section.rows:
        rows = [_cells(section, "th", section.head)] if any(section.head) else []
        rows += [_cells(section, "td", row) for row in section.rows]
        parts.append(f"<table>{''.join(rows)}</table>")
    for plot in section.plots:
        drawn = _level(plot) if plot.level else _upright(plot)
        parts.append(f"<h3>{html.escape(plot.title)}</h3>{drawn}")
    return "\n".join([*parts, "</section>"])


def _cells(section: Section, tag: str, row: Sequence[str]) -> str:
    cells = []
    for number, cell in enumerate(row):
        kind = ' class="number"' if number and _is_number(section, number) else ""
        cells.append(f"<{tag}{kind}>{html.escape(cell)}</{tag}>")
    return f"<tr>{''.join(cells)}</tr>"


def _upright(bars: Bars) -> str:
    most = max(bars.values.values()) or 1.0
    width = _WIDTH / len(bars.values)
    drawn = []
    for n, (name, value) in enumerate(bars.values.items()):
        height = _HEIGHT * value / most
        drawn.append(_bar(name, value, n * width, _HEIGHT - height, width - 1, height))
    first, *_, last = bars.values
    drawn.append(
        f'<text y="{_HEIGHT + 14}">{html.escape(first)}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT + 14}" text-anchor="end">{html.escape(last)}</text>'
    )
    return _svg(drawn, _HEIGHT + 20)


def _level(bars: Bars) -> str:
    most = max(bars.values.values()) or 1.0
    drawn = []
    for n, (name, value) in enumerate(bars.values.items()):
        width = (_WIDTH - _NAMES) * value / most
        drawn.append(
            f'<text class="name" x="{_NAMES - 8}" y="{n * _LINE + 14}">{html.escape(name)}</text>'
            + _bar(name, value, _NAMES, n * _LINE + 3, width, _LINE - 6)
        )
    return _svg(drawn, len(bars.values) * _LINE)


def _bar(name: str, value: float, x: float, y: float, width: float, height: float) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'fill="{_COLOUR}"><title>{html.escape(name)}: {value:,.4g}</title></rect>'
    )


def _svg(drawn: Sequence[str], height: float) -> str:
    return f'<svg class="bars" viewBox="0 0 {_WIDTH} {height}">{"".join(drawn)}</svg>'
