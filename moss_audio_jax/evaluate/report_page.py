"""A report as one HTML file that needs no other files: tables, charts and answers."""

from __future__ import annotations

import itertools
import math
import os
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from rapidfuzz.distance import Levenshtein

from moss_audio_jax import timeline
from moss_audio_jax.audio import load_audio
from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.errors import InputError
from moss_audio_jax.evaluate import text_norm
from moss_audio_jax.evaluate.clips import part
from moss_audio_jax.evaluate.metrics.verdict import TIMED, off, verdict
from moss_audio_jax.evaluate.report_tables import Cell, Dots, Score, Section, Table
from moss_audio_jax.text.timestamps import Segment

LONGEST = 30.0  # seconds of the longest clip that is embedded in the page
_HEAD, _TAIL = 4000, 1000  # characters kept at the start and end of a longer text
_COLOURS = ("#2f6fb3", "#c2571a", "#3f8a4d", "#7a6aa8", "#b03060", "#00838f", "#8a6d00", "#555555")
_WIDTH, _LEFT, _LINE = 1000, 190, 15  # SVG units: width of a chart, of its names, dot distance
_ASSETS = Path(__file__).parents[1] / "assets"


def page(
    title: str, about: str, sections: Sequence[Section], answers: str, origins: Section
) -> str:
    """The whole page. `title` and `about` are text, `answers` the HTML of `AnswersSection`."""
    links = [(s.anchor, s.title.split(":")[0]) for s in sections]
    links += [("answers", "Answers"), (origins.anchor, origins.title)]
    parts = [
        f'<p class="note">{escape(about)}</p>',
        "<nav>" + " ".join(f'<a href="#{a}">{escape(t)}</a>' for a, t in links) + "</nav>",
        *map(_section, sections),
        answers,
        _section(origins),
        f"<script>{(_ASSETS / 'report.js').read_text(encoding='utf-8')}</script>",
    ]
    return timeline.document(title, parts, (_ASSETS / "report.css").read_text(encoding="utf-8"))


def _section(section: Section) -> str:
    parts = [f'<section id="{section.anchor}"><h2>{escape(section.title)}</h2>']
    parts += [f'<p class="note">{escape(note)}</p>' for note in section.notes]
    parts += [*map(_chart, section.figures), *map(_table, section.tables), "</section>"]
    return "\n".join(parts)


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.head)
    rows = [
        f'<tr class="{"published" if number < table.published else ""}">'
        f"{''.join(map(_cell, row))}</tr>"
        for number, row in enumerate(table.rows)
    ]
    body = f'<div class="wide"><table><tr>{head}</tr>\n' + "\n".join(rows) + "</table></div>"
    if table.folded:
        return f"<details><summary>{escape(table.title)}</summary>{body}</details>"
    return (f"<h3>{escape(table.title)}</h3>" if table.title else "") + body


def _cell(cell: Cell) -> str:
    kinds = ["text"] if cell.text.strip("0123456789.,-–/ ") else []
    kinds += ["bad"] * cell.bad + ["bar"] * (cell.share is not None)
    style = f' style="--share:{100 * (cell.share or 0):.1f}%"'
    note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
    return f'<td class="{" ".join(kinds)}"{style}>{escape(cell.text)}{note}</td>'


# --- charts --------------------------------------------------------------------------------------


def _chart(figure: Dots) -> str:
    """One line for each dot: filled for the strict rule, hollow for the official rule, a diamond
    for a published value."""
    used = list(dict.fromkeys((d.series, d.rule) for _, dots in figure.rows for d in dots))
    ours = dict.fromkeys(series for series, rule in used if rule != "published")
    colours = dict(zip(ours, itertools.cycle(_COLOURS)))
    step = 10 ** math.floor(math.log10(figure.full / 4)) if figure.full else 0.25
    step *= next(digit for digit in (1, 2, 5, 10) if figure.full <= 6.5 * step * digit)
    full = step * math.ceil(figure.full / step) or 1.0

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 70) * min(max(value / full, 0.0), 1.0)

    def mark(series: str, rule: str, x: float, y: float) -> str:
        if rule == "published":
            return f'<path d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z" fill="#111"/>'
        fill, colour = colours[series] if rule == "strict" else "#fff", colours[series]
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="{colour}"/>'

    drawn, top = [f'<text y="14">{escape(figure.unit)}</text>'], 26
    for label, dots in figure.rows:
        height = _LINE * len(dots) + 8
        drawn.append(
            f'<text class="name" x="{_LEFT - 14}" y="{top + height / 2 + 4:.1f}">{escape(label)}'
            f'</text><line class="axis" x2="{_WIDTH}" y1="{top + height}" y2="{top + height}"/>'
        )
        for number, dot in enumerate(dots):
            y = top + 4 + _LINE * (number + 0.5)
            low, high = map(x, dot.interval or (dot.value, dot.value))
            drawn.append(
                f'<line class="{dot.rule}" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" '
                f'stroke="{colours.get(dot.series)}"/><g><title>{escape(dot.series)}, {dot.rule}: '
                f"{dot.value:.2f}</title>{mark(dot.series, dot.rule, x(dot.value), y)}</g>"
                f'<text class="faint" x="{high + 9:.1f}" y="{y + 4}">{dot.value:.2f}</text>'
            )
        top += height
    for tick in (step * i for i in range(round(full / step) + 1)):
        drawn.insert(
            0,
            f'<line class="axis" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="20" y2="{top}"/>'
            f'<text class="faint" x="{x(tick):.1f}" y="14">{tick:g}</text>',
        )
    for series, rule in used:
        top += 18
        drawn.append(mark(series, rule, 8, top - 4))
        drawn.append(f'<text x="18" y="{top}">{escape(f"{series}, {rule}")}</text>')
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {top + 8}">{"".join(drawn)}</svg>'


# --- answers -------------------------------------------------------------------------------------


class _Answer(NamedTuple):
    """A row of a score file, under the name of its model."""

    label: str
    row: Mapping[str, Any]
    word: str
    credit: float | None
    detail: str


class AnswersSection:
    """All questions, answers and references, with filters, search, audio and timelines.

    Each item appears once, with the answers of all models.

    Args:
      output: the path of the page; links to audio are relative to it.
      audio_root: the folder in which audio is searched first, by the ends of the rows' paths.
      embed: the number of clips of up to LONGEST seconds that are embedded in the page: first
        those of events and timestamps, the worst first.
      most: the most items of each score file; the worst are kept.

    Attributes:
      html: the section.
      notes: a note for each thing that the section leaves out.
    """

    def __init__(
        self, scores: Sequence[Score], output: Path, audio_root: Path | None, embed: int, most: int
    ) -> None:
        self.notes: list[str] = []
        self._output, self._root = output, audio_root
        self._lost: dict[str, None] = {}
        items: dict[tuple, list[_Answer]] = {}
        for score in scores:
            if "rows" not in score.content:
                self.notes.append(f"{score.path} has no rows: it was scored with --no-rows.")
                continue
            said = [_Answer(score.label, r, *verdict(r["sums"])) for r in score.content["rows"]]
            if len(said) > most:
                kept = sorted(range(len(said)), key=lambda i: (_rank(said[i].credit), i))[:most]
                self.notes.append(
                    f"{score.path}: only the worst {most:,} of {len(said):,} rows; see --rows."
                )
                said = [said[i] for i in sorted(kept)]
            data = str((score.content.get("inputs") or {}).get("items_hash", score.path))
            for one in said:
                items.setdefault((score.benchmark, data, str(one.row["id"])), []).append(one)
        self._first: dict[str, int] = {}  # the address of an embedded file -> its number
        self._clips = self._embedded(list(items.values()), embed)
        shown = [self._item(benchmark, name, said) for (benchmark, _, name), said in items.items()]
        if self._lost:
            self.notes.append(
                f"{len(self._lost):,} audio file(s) are not where the scores say, such as "
                f"{next(iter(self._lost))}; see --audio-root."
            )
        self.html = (
            '<section id="answers"><h2>Answers</h2><p class="note">Click on a row to open it. Red '
            'marks what the reference lacks or has at another time.</p><div id="controls"></div>'
            f'<div id="list">\n{chr(10).join(shown)}\n</div></section>'
        )

    def _item(self, benchmark: str, name: str, said: Sequence[_Answer]) -> str:
        row = said[0].row
        groups = [f"{k}: {one}" for k, v in (row.get("group") or {}).items() for one in _listed(v)]
        tags = [f"benchmark: {benchmark}", *groups]
        for one in said:
            tags += [f"{one.label}: {one.word}", f"status: {one.row.get('status', 'ok')}"]
            official = one.row["sums"].get("official_right")
            if official is not None and official != one.credit:
                tags.append(f"{one.label}: official and strict differ")
        lines = [("", " ".join(f'<span class="tag">{escape(one)}</span>' for one in groups))]
        lines += [("prompt", escape(row.get("prompt") or "(not in the score file)"))]
        lines += [("reference", _reference(row, row.get("answer") or ""))]
        lines += [(one.label, _said(one)) for one in said]
        listed = "".join(f"<dt>{escape(key)}</dt><dd>{text}</dd>" for key, text in lines)
        badges = "".join(f'<em class="badge {one.word}">{one.word}</em>' for one in said)
        worst = min(_rank(one.credit) for one in said)
        attributes = (
            f'data-tags="{escape(chr(10).join(dict.fromkeys(tags)))}" data-credit="{worst}"'
        )
        detail = escape("; ".join(one.detail for one in said if one.detail))
        start = escape((row.get("answer") or "")[:200])
        return (
            f"<details {attributes}><summary>{badges}<i>{escape(benchmark)}</i> {escape(name)} "
            f"<small>{detail}</small> {start}</summary>"
            f"{self._sound(said)}<dl>{listed}</dl></details>"
        )

    def _sound(self, said: Sequence[_Answer]) -> str:
        """Players of an item's clips; timelines of reference and answers below the first."""
        row = said[0].row
        lanes = []
        if row["kind"] in TIMED:
            true = row["reference"][TIMED[row["kind"]]]
            colour = {"timestamps": timeline.WORDS, "events": timeline.EVENTS}[row["kind"]]
            lanes.append(timeline.Lane("truth", _segments(true), colour))
            for one in said:
                heard = one.row.get("parsed") or []
                lanes.append(timeline.Lane(one.label, _segments(heard), colour, off(heard, true)))
        players = []
        for number, sound in enumerate(_sounds(row) or ([("", None)] if lanes else [])):
            drawn = lanes if number == 0 else []
            if sound in self._clips:
                players.append(timeline.clip(self._clips[sound], drawn))
            else:
                players.append(timeline.player(self._link(*sound), drawn))
            if sound[0] in self._lost:
                players.append(f"<small>no audio: {escape(sound[0])}</small>")
        return re.sub(r'\bsrc="(data:[^"]+)"', self._once, "".join(players))

    def _once(self, source: re.Match[str]) -> str:
        """An embedded file at its first use; at later uses a number, which report.js replaces."""
        address = source[1]
        if address in self._first:
            return f'data-same="{self._first[address]}"'
        self._first[address] = len(self._first)
        return f'data-embedded="{self._first[address]}" {source[0]}'

    # --- audio files -----------------------------------------------------------------------------

    def _find(self, path: str) -> Path | None:
        """The file under the root whose path has the longest matching end, or the path itself."""
        if self._root is not None:
            parts = Path(path).relative_to(Path(path).anchor).parts
            for start in range(len(parts)) if ".." not in parts else ():
                if (found := self._root.joinpath(*parts[start:])).is_file():
                    return found
        return Path(path) if Path(path).is_file() else None

    def _link(self, path: str, cut: tuple | None) -> str | None:
        """The address of a file relative to the page. A media fragment selects the part."""
        if not path:
            return None
        if (found := self._find(path)) is None:
            self._lost[path] = None
            return None
        there = os.path.relpath(found.resolve(), self._output.resolve().parent)
        meant = (
            "" if cut is None else "#t=" + ",".join(f"{end:g}" for end in cut if end is not None)
        )
        return urllib.parse.quote(os.fsencode(Path(there).as_posix())) + meant

    def _embedded(self, items: Sequence[Sequence[_Answer]], count: int) -> dict[tuple, Any]:
        """{clip: float32 [n]} of the clips that are embedded in the page."""
        ranked: dict[str, list] = {}
        for said in items:
            row, sounds = said[0].row, _sounds(said[0].row)
            if len(sounds) == 1 and self._find(sounds[0][0]):
                worst = min(_rank(one.credit) for one in said)
                ranked.setdefault(row["kind"], []).append((worst, sounds[0]))
        queues = [
            dict.fromkeys(sound for _, sound in sorted(ranked[kind], key=lambda one: one[0]))
            for kind in sorted(ranked, key=lambda kind: kind not in TIMED)
        ]
        found: dict[tuple, Any] = {}
        for sound in filter(None, itertools.chain(*itertools.zip_longest(*queues))):
            if len(found) >= count:
                break
            try:
                wav = load_audio(self._find(sound[0]))
                if sound[1] is not None:
                    wav = part(wav, sound[1], sound[0])
                if SAMPLE_RATE // 100 <= len(wav) <= LONGEST * SAMPLE_RATE:
                    found[sound] = wav
            except InputError as error:
                self.notes.append(f"not embedded: {error}")
        return found


def _rank(credit: float | None) -> float:
    return 2.0 if credit is None else credit


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _sounds(row: Mapping[str, Any]) -> list[tuple[str, tuple | None]]:
    """(path, part in seconds or None) of a row's clips."""
    cut = tuple(row["cut"]) if row.get("cut") else None
    return [(path, cut) for path in row.get("audio") or ()]


def _segments(spans: Iterable[Mapping[str, Any]]) -> list[Segment]:
    return [Segment(span["start"], span["end"], span["text"]) for span in spans]


def _reference(row: Mapping[str, Any], answer: str) -> str:
    reference = row["reference"]
    if row["kind"] == "choice" and reference.get("answer") in reference.get("choices", ()):
        letter = chr(65 + reference["choices"].index(reference["answer"]))
        return escape(f"{letter}. {reference['answer']}")
    if row["kind"] == "asr":
        return _differing(str(reference.get("text", "")), answer)
    if row["kind"] in TIMED:
        spans = reference[TIMED[row["kind"]]]
        lines = [f"{s['start']:.2f} – {s['end']:.2f}  {s['text']}" for s in spans]
        return escape("\n".join(lines) or "(none)")
    lines = [f"{key}: {value}" for key, value in reference.items()]
    return escape("\n".join(lines))


def _said(one: _Answer) -> str:
    row = one.row
    answer = row.get("answer") or ""
    text = escape(_cut(answer)) or "(nothing)"
    if row["kind"] == "asr" and answer:
        text = _differing(_cut(answer), str(row["reference"].get("text", "")))
    thought = (
        f'<div class="think">{escape(_cut(row["thinking"]))}</div>' if row.get("thinking") else ""
    )
    failed = f"<mark>failed: {escape(row['error'])}</mark>" if row.get("error") else ""
    official = row["sums"].get("official_right")
    notes = [one.detail, "" if official is None else f"official rule: {official:g}"]
    if row["kind"] == "choice":
        notes += [f"read as: {row['parsed']}"] if row.get("parsed") else []
        notes += ["official rule: not counted"] if official is None else []
    status = row.get("status", "ok")
    notes.append("" if status == "ok" else status.replace("_", " "))
    return (
        f'{thought}{failed}{text}\n<em class="badge {one.word}">{one.word}</em> '
        f"<small>{escape('; '.join(filter(None, notes)))}</small>"
    )


def _cut(text: str) -> str:
    """Shortens a long text, such as an answer that repeats itself."""
    left = len(text) - _HEAD - _TAIL
    if left <= 0:
        return text
    return f"{text[:_HEAD]}\n[... {left:,} characters ...]\n{text[-_TAIL:]}"


_UNIT = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+|\s+")


def _differing(text: str, other: str) -> str:
    """HTML of a text; words (Chinese: characters) that the other text lacks are marked."""
    pieces = _UNIT.findall(text)
    mine = [(i, "".join(text_norm.plain_units(piece))) for i, piece in enumerate(pieces)]
    mine = [(i, unit) for i, unit in mine if unit]
    theirs = ["".join(text_norm.plain_units(piece)) for piece in _UNIT.findall(other)]
    edits = Levenshtein.editops([unit for _, unit in mine], [unit for unit in theirs if unit])
    lacking = {mine[edit.src_pos][0] for edit in edits if edit.tag != "insert"}
    return "".join(
        f"<mark>{escape(piece)}</mark>" if i in lacking else escape(piece)
        for i, piece in enumerate(pieces)
    )
