"""A report's sections as one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from moss_audio_jax import timeline
from moss_audio_jax.evaluate.report_scores import Cell, Dots, Radar, Section, Table

COLOURS = ("#2f6fb3", "#c2571a", "#3f8a4d", "#7a6aa8", "#b03060", "#00838f", "#8a6d00", "#555555")
_PUBLISHED = "#111"
_WIDTH, _LEFT, _LINE = 1000, 190, 15  # of a chart, of its names, between dots: SVG units
ASSETS = Path(__file__).parents[1] / "assets"


def page(
    title: str,
    about: str,
    sections: Sequence[Section],
    models: Sequence[str],
    browser: str,
    origins: Section,
) -> str:
    """The whole page.

    Args:
      title, about: text.
      models: all names of series, for one colour each.
      browser: HTML of the section that shows rows.
    """
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(models)}
    links = [(s.anchor, s.title.split(":")[0]) for s in sections]
    links += [("browser", "Answers"), (origins.anchor, origins.title)]
    parts = [
        f'<p class="note">{escape(about)}</p>',
        "<nav>" + " ".join(f'<a href="#{a}">{escape(t)}</a>' for a, t in links) + "</nav>",
        *(_section(section, colours) for section in sections),
        browser,
        _section(origins, colours),
    ]
    style = (ASSETS / "report.css").read_text(encoding="utf-8")
    return timeline.document(title, parts, style)


def _section(section: Section, colours: Mapping[str, str]) -> str:
    parts = [f'<section id="{section.anchor}"><h2>{escape(section.title)}</h2>']
    parts += [f'<p class="note">{escape(note)}</p>' for note in section.notes]
    for figure in section.figures:
        drawn = _dots if isinstance(figure, Dots) else _radar
        parts.append(drawn(figure, colours))
    parts += map(_table, section.tables)
    return "\n".join([*parts, "</section>"])


# --- tables --------------------------------------------------------------------------------------


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.head)
    rows, before = [], ""
    for number, row in enumerate(table.rows):
        kind = ' class="published"' if number in table.published else ""
        same = len(row) > 1 and row[0].text == before
        rows.append(f"<tr{kind}>{''.join(_cells(row, same))}</tr>")
        before = row[0].text
    body = f'<div class="wide"><table><tr>{head}</tr>\n' + "\n".join(rows) + "</table></div>"
    if table.folded:
        return f"<details><summary>{escape(table.title)}</summary>{body}</details>"
    return (f"<h3>{escape(table.title)}</h3>" if table.title else "") + body


def _cells(row: Sequence[Cell], same: bool) -> Iterable[str]:
    """`same`: the first cell is that of the row above."""
    for number, cell in enumerate(row):
        number_like = not cell.text.strip("0123456789.,-–/ ")
        kinds = [] if number_like else ["text"]
        kinds += ["same"] * (same and number == 0) + ["bad"] * cell.bad
        style = ""
        if cell.share is not None:
            kinds.append("bar")
            style = f' style="--share:{100 * cell.share:.1f}%"'
        note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
        yield f'<td class="{" ".join(kinds)}"{style}>{escape(cell.text)}{note}</td>'


# --- figures -------------------------------------------------------------------------------------


def _dots(figure: Dots, colours: Mapping[str, str]) -> str:
    """One line a dot: filled by the strict rule, hollow by the official, a diamond published."""
    step = _nice(figure.full / 6)
    full = step * math.ceil(figure.full / step) if figure.full else 1.0

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 70) * min(max(value / full, 0.0), 1.0)

    drawn, top = [], 26
    for label, dots in figure.rows:
        height = _LINE * len(dots) + 8
        middle = top + height / 2 + 4
        drawn.append(
            f'<text class="end strong" x="{_LEFT - 14}" y="{middle:.1f}">{escape(label)}</text>'
            f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{top + height}" y2="{top + height}"/>'
        )
        for number, dot in enumerate(dots):
            y = top + 4 + _LINE * (number + 0.5)
            colour = _PUBLISHED if dot.rule == "published" else colours[dot.series]
            if dot.interval:
                low, high = map(x, dot.interval)
                drawn.append(
                    f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{colour}" '
                    'stroke-width="2" stroke-opacity=".45"/>'
                )
            drawn.append(
                f"<g><title>{escape(dot.series)}, {dot.rule}: {dot.value:.2f}</title>"
                f"{_mark(dot.rule, x(dot.value), y, colour)}</g>"
                f'<text class="faint" x="{max(map(x, dot.interval or [dot.value])) + 9:.1f}" '
                f'y="{y + 4}">{dot.value:.2f}</text>'
            )
        top += height
    axis = [
        f'<line class="axis" x1="{x(v):.1f}" x2="{x(v):.1f}" y1="20" y2="{top}"/>'
        f'<text class="faint middle" x="{x(v):.1f}" y="14">{v:g} {escape(figure.unit[-1])}</text>'
        for v in (step * i for i in range(round(full / step) + 1))
    ]
    keys, at, y = [], 0.0, top + 20
    used = dict.fromkeys((d.series, d.rule) for _, dots in figure.rows for d in dots)
    for series, rule in used:
        label = f"{series}, {rule}"
        width = 30 + 6.4 * len(label)
        if at + width > _WIDTH:
            at, y = 0.0, y + 18
        colour = _PUBLISHED if rule == "published" else colours[series]
        mark = _mark(rule, at + 8, y - 4, colour)
        keys.append(f'{mark}<text x="{at + 18:.1f}" y="{y}">{escape(label)}</text>')
        at += width
    body = "".join([*axis, *drawn, *keys])
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {y + 8}">{body}</svg>'


def _mark(rule: str, x: float, y: float, colour: str) -> str:
    if rule == "published":
        return f'<path d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z" fill="{colour}"/>'
    fill = colour if rule == "strict" else "#fff"
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="{colour}" '
        'stroke-width="1.8"/>'
    )


def _nice(step: float) -> float:
    """The next of 1, 2, 5, 10, 20, ..."""
    if step <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= step * 0.999)


def _radar(figure: Radar, colours: Mapping[str, str]) -> str:
    size, radius = 280, 190

    def at(axis: int, value: float) -> tuple[float, float]:
        angle = 2 * math.pi * axis / len(figure.axes) - math.pi / 2
        reach = radius * min(max(value / figure.full, 0.0), 1.0)
        return size + reach * math.cos(angle), size + reach * math.sin(angle)

    def points(values: Sequence[float | None]) -> str:
        known = [at(i, value) for i, value in enumerate(values) if value is not None]
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in known)

    n = len(figure.axes)
    drawn = [f'<text class="middle strong" x="{size}" y="24">{escape(figure.title)}</text>']
    for ring in range(1, 6):
        value = figure.full * ring / 5
        drawn.append(
            f'<polygon class="axis" points="{points([value] * n)}" fill="none"/>'
            f'<text class="faint" x="{size + 4}" y="{at(0, value)[1] + 11:.1f}">{value:g}</text>'
        )
    for number, name in enumerate(figure.axes):
        x, y = at(number, figure.full)
        away_x, away_y = size + (x - size) * 1.09, size + (y - size) * 1.09 + 4
        anchor = "middle" if abs(x - size) < 20 else "start" if x > size else "end"
        drawn.append(
            f'<line class="axis" x1="{size}" y1="{size}" x2="{x:.1f}" y2="{y:.1f}"/>'
            f'<text x="{away_x:.1f}" y="{away_y:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
        )
    keys = []
    if figure.ring is not None:
        drawn.append(
            f'<polygon points="{points([figure.ring] * n)}" fill="none" stroke="{_PUBLISHED}" '
            'stroke-dasharray="5 4"/>'
        )
        keys.append((f"published mean {figure.ring}", _PUBLISHED))
    for number, (name, values) in enumerate(figure.series):
        colour = colours.get(name) or COLOURS[(len(colours) + number) % len(COLOURS)]
        drawn.append(
            f'<polygon points="{points(values)}" fill="{colour}" fill-opacity=".1" '
            f'stroke="{colour}" stroke-width="2"><title>{escape(name)}</title></polygon>'
        )
        keys.append((name, colour))
    y = 2 * size - 26
    for name, colour in keys:
        drawn.append(
            f'<rect x="20" y="{y - 9}" width="14" height="10" fill="{colour}"/>'
            f'<text x="40" y="{y}">{escape(name)}</text>'
        )
        y += 18
    return f'<svg class="radar" viewBox="-40 0 {2 * size + 80} {y}">{"".join(drawn)}</svg>'
