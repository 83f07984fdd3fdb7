"""The content of a report: reads score files and makes sections with tables.

AAS, the accumulated average shift, is the mean error of timestamps (`metrics/timestamps.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moss_audio_jax.errors import InputError
from moss_audio_jax.evaluate import mecat
from moss_audio_jax.evaluate.benchmarks import CAPTION_FIELDS
from moss_audio_jax.evaluate.metrics.verdict import TIMED, verdict
from moss_audio_jax.files import read_json
from moss_audio_jax.files import shown as shown_path

PARTS = ("official", "strict")
NOTHING = "–"
FOUR = {"MMAU": ("mmau", "mmau-mini"), "MMAU-Pro": ("mmau-pro",), "MMAR": ("mmar",)}
FOUR |= {"MMSU": ("mmsu",)}

# Results that the authors of MOSS-Audio report.
PUBLISHED_FOUR = ("MOSS-Audio-8B-Thinking", (77.33, 64.92, 66.53, 75.52), 71.08)
PUBLISHED_ASR = (("MOSS-Audio-8B-Instruct", 11.30), ("MOSS-Audio-4B-Instruct", 11.58))
PUBLISHED_TIMESTAMPS = (("AISHELL-1", 35.77), ("LibriSpeech", 131.61))
PUBLISHED_CAPTION = 3.7252

# Metric -> (title, decimals, the value of a full bar or None), the most important first.
MEASURES = {
    "accuracy": ("accuracy, %", 2, 100),
    "choice_accuracy": ("choices, %", 2, 100),
    "open_accuracy": ("short answers, %", 2, 100),
    "time_accuracy": ("times, %", 2, 100),
    "tempo_accuracy": ("tempo, %", 2, 100),
    "wer": ("WER, %", 2, None),
    "cer": ("CER, %", 2, None),
    "aas_slot_ms": ("AAS per slot, ms", 2, None),
    "aas_token_ms": ("AAS per token, ms", 2, None),
    "coverage": ("coverage", 3, 1),
    "event_f1": ("event F1", 3, 1),
    "date": ("DATE, %", 1, 100),
    "fense": ("FENSE, %", 1, 100),
    "word_f1": ("word F1", 3, 1),
    "judged/mean": ("judge's mean, 1-5", 4, 5),
    "fields/mean": ("offline mean, 0-1", 4, 1),
    "sources_named": ("sources named", 3, 1),
}
HEADLINES = tuple(MEASURES)
_OFFICIAL = ("date", "fense")  # measures without a strict rule
MEASURES |= {
    "bias_ms": ("bias, ms", 2, None),
    "order_violations": ("out of order", 0, None),
    "event_precision": ("precision", 3, None),
    "event_recall": ("recall", 3, None),
    "event_f1_macro": ("F1, mean of labels", 3, None),
    "miou": ("mIoU", 3, 1),
    "r@0.5": ("R@0.5", 3, None),
    "r@0.7": ("R@0.7", 3, None),
    "any_label/event_f1": ("F1, any label", 3, None),
    "unparsed_share": ("unparsed", 3, None),
    "accuracy_verbatim": ("answers as they stand", 2, None),
    "accuracy_letters_mapped": ("letters mapped", 2, None),
    "rows": ("rows the script counts", 0, None),
    "undecided": ("undecided", 0, None),
}
_TIMES = [
    "aas_slot_ms",
    "aas_token_ms",
    "coverage",
    "bias_ms",
    "order_violations",
    "unparsed_share",
]
_EVENTS = [
    "event_f1",
    "event_precision",
    "event_recall",
    "event_f1_macro",
    "miou",
    "r@0.5",
    "r@0.7",
]
_EVENTS += ["any_label/event_f1", "unparsed_share"]
_COUNTS = ["predicted", "missing", "errors", "empty", "unparsed", "truncated_thinking", "unjudged"]
_COUNTS += ["without_reference", "unknown_ids", "duplicate_ids", "broken_lines"]
_LISTED = 100  # problems listed per score file


class Cell(NamedTuple):
    """note: small text below. share: length of its bar, 0 to 1. bad: a count that should be 0."""

    text: str
    note: str = ""
    share: float | None = None
    bad: bool = False


class Table(NamedTuple):
    """published: number of first rows with published results. folded: opened on demand."""

    title: str
    head: Sequence[str]
    rows: list[list[Cell]]
    published: int = 0
    folded: bool = False


class Dot(NamedTuple):
    """rule: official, strict or published."""

    series: str
    value: float
    interval: Sequence[float] | None
    rule: str


class Dots(NamedTuple):
    """Values along an axis from 0 to `full`, in rows by name."""

    unit: str
    full: float
    rows: list[tuple[str, list[Dot]]]


class Section(NamedTuple):
    anchor: str
    title: str
    notes: list[str]
    tables: list[Table]
    figures: Sequence[Dots] = ()


# --- score files ---------------------------------------------------------------------------------

_GROUPS = ("fields?", "judged?", "any_label?")  # metrics that are dicts of metrics
_METRICS = {"*": (float, None), **{group: {"*": (float, None)} for group in _GROUPS}}
_PAIR = ([float, float], None)
_BOUNDS = {"*": _PAIR, **{group: {"*": _PAIR} for group in _GROUPS}}
_SHAPE = {
    "benchmark": str,
    "n": float,
    "official": _METRICS,
    "strict": _METRICS,
    "counts": {"*": (float, None)},
    "by": {"*": {"*": {"n": float, "official": _METRICS, "strict": _METRICS}}},
    "confidence?": (
        {"official?": _BOUNDS, "strict?": _BOUNDS, "level?": (float, None), "*": object},
        None,
    ),
    "inputs?": ({"*": object}, None),
    "meta?": ({"*": object}, None),
    "problems?": [str],
    "rows?": [
        {
            "id": object,
            "kind": str,
            "reference": {"*": object},
            "sums": {"*": float},
            "audio?": [str],
            "group?": {"*": object},
            "cut?": [float, (float, None)],
            **dict.fromkeys(("status?", "prompt?", "answer?", "thinking?", "error?"), str),
            "*": object,
        }
    ],
    "*": object,
}


def _misfit(value: Any, shape: Any) -> str | None:
    """The path at which a value does not fit a shape ("" for the value itself); None if it fits.

    A shape is a type, None, a tuple of alternatives, a list (of one shape for all entries, or of a
    shape for each), or a dict of a shape for each key ("key?" may be missing, "*" is any other).
    """
    if isinstance(shape, tuple):
        found = [_misfit(value, one) for one in shape]
        return None if None in found else max(found, key=len)
    if isinstance(shape, list | dict):
        if not isinstance(value, type(shape)):
            return ""
        if isinstance(shape, list):
            shapes = shape * len(value) if len(shape) == 1 else shape
            if len(shapes) != len(value):
                return ""
            inside = [(str(i), *both) for i, both in enumerate(zip(value, shapes, strict=True))]
        else:
            if missing := [key for key in shape if key[-1] not in "?*" and key not in value]:
                return f"/{missing[0]}"
            inside = [
                (k, v, shape.get(k) or shape.get(f"{k}?") or shape.get("*", object))
                for k, v in value.items()
            ]
        paths = ((key, _misfit(one, each)) for key, one, each in inside)
        return next((f"/{key}{path}" for key, path in paths if path is not None), None)
    if shape is float:  # excludes NaN, infinity, and integers with hundreds of digits
        fits = type(value) in (int, float) and abs(value) < 1e15
    else:
        fits = value is None if shape is None else isinstance(value, shape)
    return None if fits else ""


@dataclasses.dataclass(frozen=True)
class Score:
    """A file that `evaluate score` wrote.

    Attributes:
      model: the model whose answers were scored.
      data: the name of the benchmark's data.
      label: the model, and the data if one model has several scores on a benchmark.
    """

    path: Path
    model: str
    data: str
    content: dict[str, Any]
    label: str = ""

    @property
    def benchmark(self) -> str:
        return self.content["benchmark"]

    @property
    def items(self) -> str:
        return f"{self.content['n']:,}"

    def value(self, part: str, name: str) -> Any:
        """A metric of "official" or "strict", or None; "a/b" is metric b of the group a."""
        return inside(self.content[part], name)

    def interval(self, part: str, name: str) -> Sequence[float] | None:
        """The bounds of a metric's confidence interval, in its unit; None without one."""
        return inside((self.content.get("confidence") or {}).get(part) or {}, name)

    def cell(self, part: str, name: str) -> Cell:
        """A metric with its interval."""
        kind = f"{name.split('/')[0]}/mean" if name not in MEASURES else name
        cell = shown(self.value(part, name), kind)
        if bounds := self.interval(part, name):
            digits = max(MEASURES[kind][1] - 1, 0)
            cell = cell._replace(note="[" + ", ".join(f"{b:.{digits}f}" for b in bounds) + "]")
        return cell


def read_score(path: Path, name: str | None = None) -> Score:
    """Reads a score file; without a `name` the model's own is used.

    Raises:
      InputError: `evaluate score` did not write the file.
    """
    content = read_json(path)
    wrong = _misfit(content, _SHAPE)
    for number, row in enumerate(content.get("rows", []) if wrong is None else []):
        try:
            verdict(row["sums"])
            spans = [*(row["reference"][TIMED[row["kind"]]] if row["kind"] in TIMED else [])]
            spans += row.get("parsed") or [] if row["kind"] in TIMED else []
            wrong = _misfit(spans, [{"text": str, "start": float, "end": float}])
        except (KeyError, TypeError, ArithmeticError):
            wrong = ""
        if wrong is not None:
            wrong = f"/rows/{number}{wrong}"
            break
    if wrong is not None:
        raise InputError(
            f"{shown_path(path)}: {wrong[1:80] or 'everything'} is missing or has another form; "
            "expected a file that evaluate score wrote"
        )
    meta, inputs = content.get("meta") or {}, content.get("inputs") or {}
    own = Path(str(meta.get("model") or path.stem)).name
    own += f" + {Path(str(meta['lora'])).name}" if meta.get("lora") else ""
    own += " (random weights)" if meta.get("random_weights") else ""
    return Score(path, name or own, Path(str(inputs.get("data") or path)).stem, content)


def labelled(scores: Sequence[Score]) -> list[Score]:
    """The scores, with labels that differ for scores of one benchmark and model."""
    found = []
    for score in scores:
        column = column_of(score.benchmark) or score.benchmark
        same = [
            s
            for s in scores
            if s.model == score.model and (column_of(s.benchmark) or s.benchmark) == column
        ]
        label = score.model
        # In the table of four benchmarks the first score keeps its label, as the row's name.
        if len(same) > 1 and not (column_of(score.benchmark) and score is same[0]):
            ways = (lambda s: s.data, lambda s: s.path.stem, lambda s: str(s.path))
            apart = (w(score) for w in ways if [w(s) for s in same].count(w(score)) == 1)
            label += f" · {next(apart, score.path)}"
        found.append(dataclasses.replace(score, label=label))
    return found


def column_of(benchmark: str) -> str | None:
    """The column of a benchmark in the table of four; None for others."""
    return next((name for name, ours in FOUR.items() if benchmark in ours), None)


def shown(value: float | None, name: str) -> Cell:
    """A number with the decimals of its metric; a dash for None."""
    if value is None:
        return Cell(NOTHING)
    _, digits, full = MEASURES[name]
    return Cell(f"{value:,.{digits}f}", share=full and min(max(value / full, 0.0), 1.0))


def inside(values: Mapping[str, Any], name: str) -> Any:
    """values[a][b] for the name "a/b"; None if missing."""
    for key in name.split("/"):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def plain(value: Any, depth: int = 3) -> str:
    """Names and values in one line; deeper levels are left out."""
    if isinstance(value, Mapping) and depth:
        return ", ".join(f"{key} {plain(one, depth - 1)}" for key, one in value.items())
    if isinstance(value, Mapping | list):
        return f"({len(value)} values)"
    return "?" if value is None else str(value)


# --- sections ------------------------------------------------------------------------------------


def sections(scores: Sequence[Score]) -> list[Section]:
    """All sections of a report except the answers and the origins of the numbers."""

    def of(benchmark: str) -> list[Score]:
        return [s for s in scores if s.benchmark == benchmark]

    wanted = [
        (_overview, scores),
        (_four, [s for s in scores if column_of(s.benchmark)]),
        (_asr, of("asr")),
        (_timestamps, of("timestamps")),
        (_events, of("events")),
        (_captions, [s for s in scores if any(_fields(s, kind) for kind in _CAPTIONS)]),
        (_mecat, [s for s in scores if s.benchmark in mecat.TASKS]),
        (_world, of("world")),
        (_counts, scores),
    ]
    return [make(some) for make, some in wanted if some]


def _overview(scores: Sequence[Score]) -> Section:
    rows = []
    for score in scores:
        name = _headlines([score])[0]
        limited = (score.content.get("inputs") or {}).get("limit")
        count = f"the first {score.items}" if limited else score.items
        start = _cells(score.benchmark, score.label, count, MEASURES[name][0])
        rows.append([*start, *(score.cell(part, name) for part in PARTS)])
    notes = [
        "Official: the rule of the benchmark's own script, including its quirks. Strict: every row "
        "counts, an answer that cannot be read is wrong, nothing is guessed."
    ]
    levels = [(s.content.get("confidence") or {}).get("level") for s in scores]
    if level := next(filter(None, levels), None):
        notes.append(f"In brackets: {100 * level:g}% bootstrap intervals over the items.")
    head = ("benchmark", "model", "items", "measure", *PARTS)
    return Section("overview", "Overview", notes, [Table("", head, rows)])


def _four(scores: Sequence[Score]) -> Section:
    cells = {(s.label, column_of(s.benchmark)): s for s in scores}
    name, values, mean = PUBLISHED_FOUR
    rows = [[*_cells(name, "official"), *(shown(v, "accuracy") for v in (*values, mean))]]
    dots = {c: [Dot(name, v, None, "published")] for c, v in zip(FOUR, values, strict=True)}
    for label in dict.fromkeys(s.label for s in scores):
        for part in PARTS:
            found = {column: cells.get((label, column)) for column in FOUR}
            known = {c: s.value(part, "accuracy") for c, s in found.items() if s}
            for column, value in known.items():
                if value is not None:
                    bounds = found[column].interval(part, "accuracy")
                    dots[column].append(Dot(label, value, bounds, part))
            whole = (
                _mean(known.values()) if len(known) == 4 and None not in known.values() else None
            )
            row = [_accuracy(score, part) if score else Cell(NOTHING) for score in found.values()]
            rows.append([*_cells(label, part), *row, shown(whole, "accuracy")])
    names = ["accuracy", "accuracy_verbatim", "accuracy_letters_mapped", "rows", "undecided"]
    detail = [
        [
            *_cells(s.benchmark, s.label, s.items),
            *(shown(s.value("official", n), n) for n in names),
            shown(s.value("strict", "accuracy"), "accuracy"),
        ]
        for s in scores
    ]
    titles = ["official", *(MEASURES[n][0] for n in names[1:]), "strict"]
    head = ("benchmark", "model", "items", *titles)
    rules = Table("The official rules in detail", head, detail, folded=True)
    notes = ["Accuracy in percent, and the unweighted mean if all four are there."]
    table = Table("", ("model", "rule", *FOUR, "mean"), rows, published=1)
    title = "Audio questions: MMAU, MMAU-Pro, MMAR, MMSU"
    figures = [Dots("accuracy, %", 100, list(dots.items()))]
    return _section("four", title, notes, scores, [table, rules], figures)


def _accuracy(score: Score, part: str) -> Cell:
    cell = score.cell(part, "accuracy")
    notes = [cell.note, "mini" if score.benchmark == "mmau-mini" else ""]
    if part == "official":
        counted, undecided = (score.value(part, name) for name in ("rows", "undecided"))
        if counted is not None and counted != score.value("strict", "rows"):
            notes.append(f"of {counted:,.0f} rows")
        if undecided:
            notes.append(f"{undecided:,.0f} undecided")
    return cell._replace(note="\n".join(filter(None, notes)))


def _asr(scores: Sequence[Score]) -> Section:
    published = [Dot(name, value, None, "published") for name, value in PUBLISHED_ASR]
    rows = [_cells(d.series, "overall", "", f"{d.value:.2f}", "", "", "") for d in published]
    dots: dict[str, list[Dot]] = {}
    for model in dict.fromkeys(s.model for s in scores):
        ours = [s for s in scores if s.model == model]
        # Data without dimensions counts as one dimension.
        by = [
            (s, name, group)
            for s in ours
            for name, group in (s.content["by"].get("dimension") or {s.data: s.content}).items()
        ]
        names = [name for _, name, _ in by]
        for score, name, group in by:
            if names.count(name) > 1:
                name = f"{name} ({score.data})"
            rows.append([*_cells(model, name), *_errors(group)])
            if (value := group["strict"].get("wer")) is not None:
                dots.setdefault(name, []).append(Dot(model, value, None, "strict"))
        for score in ours:
            name = "overall" if len(ours) == 1 else f"overall, {score.data}"
            cells = _errors(score.content)
            cells[1], cells[3] = score.cell("strict", "wer"), score.cell("strict", "cer")
            rows.append([*_cells(model, name), *cells])
            if (value := score.value("strict", "wer")) is not None:
                bounds = score.interval("strict", "wer")
                dots.setdefault(name, []).append(Dot(model, value, bounds, "strict"))
        if len(by) > 1:
            rates = [_mean(g["strict"].get(rate) for *_, g in by) for rate in ("wer", "cer")]
            wer, cer = (shown(rate, "wer") for rate in rates)
            rows.append([*_cells(model, "mean of the dimensions", ""), wer, Cell(NOTHING), cer])
            rows[-1].append(Cell(NOTHING))
    lines = sorted(dots.items(), key=lambda one: one[0].startswith("overall"))
    lines.append(("overall, published", published))
    most = max((dot.interval or [dot.value])[-1] for _, some in lines for dot in some)
    notes = [
        "Rates over the whole corpus: the errors of all rows divided by the units of all "
        "references. The WER counts words; in scripts without spaces between words (such as "
        "Chinese, Japanese and Thai) it counts characters."
    ]
    head = ("model", "dimension", "items", "WER, %", "sub / del / ins", "CER, %", "sub / del / ins")
    tables = [Table("", head, rows, published=len(published))]
    figures = [Dots("WER, %", most, lines)]
    title = "Speech recognition by dimension"
    return _section("asr", title, notes, scores, tables, figures, skip="dimension")


def _errors(group: Mapping[str, Any]) -> list[Cell]:
    """The number of items; then error rate and kinds of errors for words and for characters."""
    cells, strict = _cells(f"{group['n']:,}"), group["strict"]
    for rate, prefix in (("wer", ""), ("cer", "character_")):
        kinds = [strict.get(f"{prefix}{k}") for k in ("substitutions", "deletions", "insertions")]
        cells.append(shown(strict.get(rate), rate))
        cells += _cells("" if None in kinds else " / ".join(f"{k:,.0f}" for k in kinds))
    return cells


def _timestamps(scores: Sequence[Score]) -> Section:
    blank = [""] * (len(_TIMES) - 1)
    rows = [
        _cells("MOSS-Audio-8B-Instruct", data, "", f"{value:.2f}", *blank)
        for data, value in PUBLISHED_TIMESTAMPS
    ]
    notes = [
        "AAS (accumulated average shift) is the mean error of the times of matched words. Per "
        "slot, each start and each end counts once; per token, the errors of both are added, which "
        "gives about twice as much. Read it with coverage, the share of the reference's slots that "
        "were matched, because leaving words out can lower AAS. Bias above 0: the answer is late."
    ]
    table = _measures(scores, _TIMES, rows)
    return _section("timestamps", "Timestamps", notes, scores, [table])


def _events(scores: Sequence[Score]) -> Section:
    notes = [
        "F1 of events as in sed_eval: the onset is right within 0.2 s, the offset within 0.2 s or "
        "half of the length. IoU and recall (R) are means over the reference's events."
    ]
    return _section("events", "Events", notes, scores, [_measures(scores, _EVENTS, [])])


def _measures(scores: Sequence[Score], names: Sequence[str], published: list) -> Table:
    """The published rows, then a row for each score by the strict rule."""
    rows = [
        [*_cells(s.model, s.data, s.items), *(s.cell("strict", name) for name in names)]
        for s in scores
    ]
    head = ("model", "data", "items", *(MEASURES[name][0] for name in names))
    return Table("", head, published + rows, published=len(published))


_CAPTIONS = {  # who scores the fields -> title, part, full scale
    "judged": ("by a judge, 1-5", "official", 5),
    "fields": ("offline, 0-1", "strict", 1),
}


def _fields(score: Score, kind: str) -> dict[str, float]:
    """The score of each field; {} for fewer than three fields."""
    values = score.value(_CAPTIONS[kind][1], kind)
    found = {f: v for f, v in (values or {}).items() if f in CAPTION_FIELDS and v is not None}
    return found if len(found) >= 3 else {}


def _captions(scores: Sequence[Score]) -> Section:
    figures, columns = [], []
    names = ("mean", *CAPTION_FIELDS)
    for kind, (title, part, full) in _CAPTIONS.items():
        lines: dict[str, list[Dot]] = {}
        if kind == "judged":
            lines["mean"] = [Dot("MOSS-Audio-8B-Instruct", PUBLISHED_CAPTION, None, "published")]
        drawn = [s for s in scores if _fields(s, kind)]
        for score in drawn:
            columns.append(
                (f"{score.label}, {title}", [score.cell(part, f"{kind}/{n}") for n in names])
            )
            for name in names:
                if (value := score.value(part, f"{kind}/{name}")) is not None:
                    bounds = score.interval(part, f"{kind}/{name}")
                    lines.setdefault(name, []).append(Dot(score.label, value, bounds, part))
        if drawn:
            figures.append(Dots(title, full, list(lines.items())))
    rows = [
        [Cell(name), *(cells[number] for _, cells in columns)] for number, name in enumerate(names)
    ]
    notes = [
        f"Published mean of MOSS-Audio-8B-Instruct by its authors' judge: {PUBLISHED_CAPTION}. "
        "Scales of different judges differ. Offline: F1 of the words that a field shares with the "
        "reference's field; 0 for a missing field.",
        *_same_items(scores),
    ]
    table = Table("", ("field", *(title for title, _ in columns)), rows)
    return Section("captions", "Speech captions", notes, [table], figures)


def _mecat(scores: Sequence[Score]) -> Section:
    names = (*_OFFICIAL, "word_f1", "judged/mean")
    rows = [
        [
            *_cells(s.benchmark, s.label, s.items),
            *(s.cell("strict" if n == "word_f1" else "official", n) for n in names),
        ]
        for s in scores
    ]
    notes = [
        "DATE and FENSE by the authors' package, which skips missing answers. Word F1: the words "
        "that an answer shares with the nearest of its references."
    ]
    head = ("benchmark", "model", "items", *(MEASURES[name][0] for name in names))
    table = Table("", head, rows)
    return _section("mecat", "MECAT: captions and questions", notes, scores, [table])


def _world(scores: Sequence[Score]) -> Section:
    whole = [
        [Cell(MEASURES[name][0]), *(s.cell("strict", name) for s in scores)]
        for name in _headlines(scores)
    ]
    notes = [
        "Synthetic sound with exact labels. Choices are scored by the strict rule; times may be "
        "wrong by 0.2 s, a tempo by 5%."
    ]
    tables = [
        Table("", ("all tasks", *(s.label for s in scores)), whole),
        _by_group(scores, "task")._replace(title="By task"),
    ]
    return _section("world", "The world", notes, scores, tables, skip="task")


def _counts(scores: Sequence[Score]) -> Section:
    rows, tables = [], []
    for score in scores:
        counts = [(name, score.content["counts"].get(name)) for name in _COUNTS]
        rows.append(_cells(score.benchmark, score.label, score.items))
        rows[-1] += [
            Cell(NOTHING) if n is None else Cell(f"{n:,}", bad=name != "predicted" and n > 0)
            for name, n in counts
        ]
        if problems := score.content.get("problems"):
            listed = problems[:_LISTED]
            if more := len(problems) - len(listed):
                listed = [*listed, f"and {more:,} more in {score.path}"]
            title = f"{score.benchmark}, {score.label}: {len(problems):,} problem(s)"
            tables.append(Table(title, ("what",), [_cells(one) for one in listed], folded=True))
    head = ("benchmark", "model", "items", *(name.replace("_", " ") for name in _COUNTS))
    notes = ["By the strict rule, an item without a readable answer is wrong."]
    return Section("counts", "Missing answers", notes, [Table("", head, rows), *tables])


def origins(scores: Sequence[Score]) -> Section:
    """The files and settings behind the numbers, and which of them differ between score files."""
    rows, notes = [], []
    for score in scores:
        inputs, meta = (score.content.get(key) or {} for key in ("inputs", "meta"))
        settings = (f"{k} {plain(v)}" for k, v in meta.items() if v not in (None, False, ""))
        rows.append(
            _cells(
                str(score.path),
                score.benchmark,
                score.label,
                f"{inputs.get('data', '?')} #{inputs.get('items_hash', '?')}",
                f"{inputs.get('predictions', '?')} #{inputs.get('predictions_hash', '?')}",
                plain(score.content.get("normaliser")),
                str(score.content.get("code_version", "?")),
                ", ".join(settings),
            )
        )
    for key, name in (("normaliser", "normalisers"), ("code_version", "versions of the code")):
        if len({plain(score.content.get(key)) for score in scores}) > 1:
            notes.append(f"These scores were made by different {name}.")
    head = ("score file", "benchmark", "model", "data #hash of items", "predictions #hash")
    head += ("normaliser", "scored by", "answered by")
    return Section("origins", "Sources", notes, [Table("", head, rows)])


# --- shared by sections --------------------------------------------------------------------------


def _cells(*texts: str) -> list[Cell]:
    return [Cell(text or NOTHING) for text in texts]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _headlines(scores: Sequence[Score]) -> list[str]:
    """The metrics that any of the scores has, the most important first."""

    def has(name: str) -> bool:
        return any(s.value(part, name) is not None for s in scores for part in PARTS)

    return [name for name in HEADLINES if has(name)] or ["accuracy"]


def _section(
    anchor: str,
    title: str,
    notes: list[str],
    scores: Sequence[Score],
    tables: list[Table],
    figures: Sequence[Dots] = (),
    skip: str = "",
) -> Section:
    """A section with a folded breakdown by each group of the items except `skip`."""
    for benchmark in dict.fromkeys(s.benchmark for s in scores):
        same = [s for s in scores if s.benchmark == benchmark]
        for key in dict.fromkeys(key for s in same for key in s.content["by"] if key != skip):
            table = _by_group(same, key)._replace(title=f"{benchmark} by {key}", folded=True)
            tables.append(table)
    return Section(anchor, title, [*notes, *_same_items(scores)], tables, figures)


def _same_items(scores: Sequence[Score]) -> Iterable[str]:
    """A note for each benchmark whose scores are of different items."""
    found: dict[str, dict[Any, str]] = {}
    for score in scores:
        key = (score.content.get("inputs") or {}).get("items_hash")
        found.setdefault(score.benchmark, {}).setdefault(plain(key), score.label)
    for benchmark, labels in found.items():
        if len(labels) > 1:
            yield f"{benchmark}: {', '.join(labels.values())} were scored on different items."


def _by_group(scores: Sequence[Score], key: str) -> Table:
    """Strict results by the values of a group and by model; both rules for multiple choice."""
    rows = []
    by = [s.content["by"].get(key, {}) for s in scores]
    for value in dict.fromkeys(value for groups in by for value in groups):
        found = [groups.get(value) or {} for groups in by]
        n = " / ".join(dict.fromkeys(str(group["n"]) for group in found if group))
        for name in HEADLINES:
            parts = ("official",) if name in _OFFICIAL else ("strict",)
            for part in PARTS if name == "accuracy" else parts:
                values = [inside(group.get(part) or {}, name) for group in found]
                if values.count(None) < len(values):
                    title = MEASURES[name][0] + (f", {part}" if name == "accuracy" else "")
                    rows.append([*_cells(value, n, title), *(shown(v, name) for v in values)])
    return Table("", (key, "items", "measure", *(s.label for s in scores)), rows)
