"""Score files as a report reads them; the cells, tables and figures that it makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moss_audio_jax.errors import InputError
from moss_audio_jax.evaluate.metrics.events import COLLAR
from moss_audio_jax.evaluate.reading import json_kind
from moss_audio_jax.files import brief, read_json
from moss_audio_jax.files import shown as shown_path

FOUR = {
    "MMAU": ("mmau", "mmau-mini"),
    "MMAU-Pro": ("mmau-pro",),
    "MMAR": ("mmar",),
    "MMSU": ("mmsu",),
}
PARTS = ("official", "strict")
NOTHING = "–"
TIMED = {"timestamps": "slots", "events": "events"}  # kind -> where its reference has times


@dataclasses.dataclass(frozen=True)
class Score:
    """A file of `evaluate score`.

    Attributes:
      model: whose answers were scored.
      data: the name of the benchmark's data.
      label: the model; with the data where one model has several scores of a benchmark.
    """

    path: Path
    model: str
    data: str
    content: dict[str, Any]
    label: str = ""

    @property
    def benchmark(self) -> str:
        return self.content["benchmark"]

    def value(self, part: str, name: str) -> Any:
        """A metric of "official" or "strict"; "a/b" is one of a group. None where there is none."""
        return inside(self.content[part], name)

    def by(self, key: str) -> dict[str, dict[str, Any]]:
        return self.content["by"].get(key, {})


class Measure(NamedTuple):
    """full: the value of a full bar, None for no bar."""

    title: str
    digits: int = 2
    full: float | None = None


MEASURES = {
    "accuracy": Measure("accuracy, %", full=100),
    "choice_accuracy": Measure("choices, %", full=100),
    "open_accuracy": Measure("short answers, %", full=100),
    "time_accuracy": Measure("times, %", full=100),
    "tempo_accuracy": Measure("tempo, %", full=100),
    "wer": Measure("WER, %"),
    "cer": Measure("CER, %"),
    "aas_slot_ms": Measure("AAS per slot, ms"),
    "aas_token_ms": Measure("AAS per token, ms"),
    "coverage": Measure("coverage", 3, 1),
    "bias_ms": Measure("bias, ms"),
    "order_violations": Measure("out of order", 0),
    "event_f1": Measure("event F1", 3, 1),
    "event_precision": Measure("precision", 3),
    "event_recall": Measure("recall", 3),
    "event_f1_macro": Measure("F1, mean of labels", 3),
    "miou": Measure("mIoU", 3, 1),
    "r@0.5": Measure("R@0.5", 3),
    "r@0.7": Measure("R@0.7", 3),
    "any_label/event_f1": Measure("F1, any label", 3),
    "unparsed_share": Measure("unparsed", 3),
    "judged/mean": Measure("judge's mean, 1-5", 4, 5),
    "fields/mean": Measure("offline mean, 0-1", 4, 1),
    "sources_named": Measure("sources named", 3, 1),
}


# --- reading -------------------------------------------------------------------------------------


def read_score(path: Path, name: str | None = None) -> Score:
    """A score file under a name, or its model's own.

    Raises:
      InputError: it is not what `evaluate score` writes.
    """
    content = read_json(path)
    if problem := _problem(content):
        raise InputError(
            f"{shown_path(path)}: {problem}; expected the file that evaluate score wrote"
        )
    inputs = content.get("inputs") or {}
    data = Path(str(inputs.get("data") or path)).stem
    return Score(path, name or _model(content.get("meta")) or path.stem, data, content)


def _problem(content: Any) -> str | None:
    """What in it is not as `evaluate score` writes it."""
    if not isinstance(content, dict):
        return "is no JSON object"
    if not isinstance(content.get("benchmark"), str) or not _is_number(content.get("n")):
        return "has no benchmark and n"
    for key in ("official", "strict", "by", "counts", "confidence", "inputs", "meta"):
        value = content.get(key, {} if key in ("confidence", "inputs", "meta") else None)
        if not isinstance(value, dict):
            return f"{key!r} is {json_kind(value)}"
    parts = {part: content[part] for part in PARTS}
    for key, groups in content["by"].items():
        for value, one in groups.items() if isinstance(groups, dict) else [("", None)]:
            if not isinstance(one, dict) or not _is_number(one.get("n")):
                return f"by {brief(key)}: {brief(value)} is no breakdown"
            if not all(isinstance(one.get(part), dict) for part in PARTS):
                return f"by {brief(key)}: {brief(value)} is no breakdown"
            parts |= {f"by {key}: {value}: {part}": one[part] for part in PARTS}
    confidence = content.get("confidence") or {}
    if not all(isinstance(confidence.get(part, {}), dict) for part in PARTS):
        return "'confidence' has no intervals"
    checks = [(name, values, _is_number) for name, values in parts.items()]
    checks += [("counts", content["counts"], _is_number)]
    checks += [("confidence", confidence.get(part, {}), _is_interval) for part in PARTS]
    level = confidence.get("level")
    checks += [("confidence", {"level": level}, _is_number)]
    for where, values, fits in checks:
        if odd := next(_odd(values, where, fits), None):
            return f"{brief(odd)} is no number"
    problems = content.get("problems", [])
    if not isinstance(problems, list) or not all(isinstance(one, str) for one in problems):
        return "'problems' is no list of texts"
    rows = content.get("rows", [])
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        try:
            fits = _is_verdict(row)
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError):
            fits = False
        if not fits:
            return f"rows[{number}] is no verdict"
    return None


_GROUPS = ("fields", "judged", "any_label")  # metrics that are several


def _odd(values: Mapping[str, Any], where: str, fits: Callable[[Any], bool]) -> Iterator[str]:
    """Names of what is neither null nor fits."""
    for name, value in values.items():
        if name in _GROUPS and isinstance(value, dict):
            yield from _odd({f"{name}/{n}": v for n, v in value.items()}, where, fits)
        elif value is not None and not fits(value):
            yield f"{where}/{name}"


def _is_number(value: Any) -> bool:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    return fits and abs(value) < 1e15  # not NaN or infinite, nor an integer of hundreds of digits


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


_ROW = {
    "id": (str,),
    "kind": (str,),
    "status": (str,),
    "prompt": (str,),
    "answer": (str,),
    "thinking": (str,),
    "error": (str,),
    "audio": (list,),
    "group": (dict,),
    "cut": (list,),
    "reference": (dict,),
    "sums": (dict,),
}


def _is_verdict(row: Any) -> bool:
    """What a report looks at in a row is there, and of its type."""
    if not {"id", "kind", "reference", "sums"} <= row.keys():
        return False
    if not all(isinstance(row[key], types) for key, types in _ROW.items() if key in row):
        return False
    verdict(row)
    spans = []
    if row["kind"] in TIMED:
        parsed = row.get("parsed")
        spans = row["reference"][TIMED[row["kind"]]] + (parsed if isinstance(parsed, list) else [])
    cut = row.get("cut", [0, None])
    return (
        all(map(_is_number, row["sums"].values()))
        and all(isinstance(path, str) for path in row.get("audio", []))
        and all(isinstance(span["text"], str) for span in spans)
        and all(_is_number(span[edge]) for span in spans for edge in ("start", "end"))
        and len(cut) == 2
        and _is_number(cut[0])
        and (cut[1] is None or _is_number(cut[1]))
    )


def verdict(row: Mapping[str, Any]) -> tuple[str, float | None, str]:
    """(right, partly, wrong or "not scored"; credit from 0 to 1; in figures) by the strict rule."""
    sums = row["sums"]
    detail, credit = "", None

    def share(over: str, under: str) -> float:
        return sums[over] / sums[under] if sums.get(under) else 1.0

    name = next((n for n in ("strict", "open", "time", "tempo") if sums.get(f"{n}_rows")), None)
    if name:
        credit = float(sums[f"{name}_right"])
    elif "word_errors" in sums:
        errors, words = sums["word_errors"], sums["words"]
        credit = max(1 - errors / words, 0.0) if words else float(errors == 0)
        kinds = [int(sums.get(k, 0)) for k in ("substitutions", "deletions", "insertions")]
        rate = f"WER {100 * errors / words:.0f}%" if words else f"{errors:.0f} error(s)"
        detail = "{}: {} sub, {} del, {} ins".format(rate, *kinds)
    elif "reference_slots" in sums:
        shift = 1000 * sums["slot_shift"] / sums["slots"] if sums["slots"] else None
        credit = share("slots", "reference_slots")
        late = shift is not None and shift > 1000 * COLLAR
        if credit == 1 and (late or sums.get("order_violations")):
            credit = 0.99  # all words are there, their times are not
        detail = f"coverage {share('slots', 'reference_slots'):.0%}"
        detail += "" if shift is None else f", off by {shift:.0f} ms"
    elif "event_all" in sums:
        credit = share("event_twice_right", "event_all")
        detail = (
            f"F1 {credit:.2f}, {sums['event_right']:.0f} of {sums['event_reference']:.0f}, "
            f"{sums['event_estimated'] - sums['event_right']:.0f} not there"
        )
    elif "sources" in sums:
        credit = share("sources_named", "sources")
        detail = f"{sums['sources_named']:.0f} of {sums['sources']:.0f} sources"
    elif "fields" in sums:
        credit = share("field_points", "fields")
        detail = f"fields {credit:.2f}"
    if sums.get("judged_fields"):
        detail = f"{detail}, judge {share('judged_points', 'judged_fields'):.2f}".lstrip(", ")
    if credit is None:
        return "not scored", None, detail
    return "right" if credit >= 1 else "partly" if credit > 0 else "wrong", credit, detail


def _model(meta: Any) -> str | None:
    """A short name of what answered, from the predictions' own account."""
    if not isinstance(meta, dict) or not meta.get("model"):
        return None
    name = Path(str(meta["model"])).name
    if meta.get("lora"):
        name += f" + {Path(str(meta['lora'])).name}"
    return f"{name} (random weights)" if meta.get("random_weights") else name


def labelled(scores: Sequence[Score]) -> list[Score]:
    """The scores with labels that tell those of one benchmark and model apart."""
    found = []
    for score in scores:
        column = column_of(score.benchmark)
        same = [
            s
            for s in scores
            if s.model == score.model
            and (s.benchmark == score.benchmark or (column and column_of(s.benchmark) == column))
        ]
        label = score.model
        # Of the four benchmarks the first keeps its label: it stands beside the other three.
        if not (column and score is same[0]):
            for way in (lambda s: s.data, lambda s: s.path.stem, lambda s: str(s.path)):
                if len(same) == 1 or [way(s) for s in same].count(way(score)) == 1:
                    label += f" · {way(score)}" if len(same) > 1 else ""
                    break
        found.append(dataclasses.replace(score, label=label))
    return found


def column_of(benchmark: str) -> str | None:
    """Which of the four it is."""
    return next((name for name, ours in FOUR.items() if benchmark in ours), None)


# --- what a report is made of --------------------------------------------------------------------


class Cell(NamedTuple):
    """note: small print below the text. share: of a full bar. bad: a count that should be 0."""

    text: str
    note: str = ""
    share: float | None = None
    bad: bool = False


class Table(NamedTuple):
    """published: numbers of the rows that are not ours. folded: opened on demand."""

    title: str
    head: Sequence[str]
    rows: list[list[Cell]]
    published: frozenset[int] = frozenset()
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


class Radar(NamedTuple):
    """Values from 0 to `full` on an axis each; `ring` is a value to hold them against."""

    title: str
    full: float
    axes: Sequence[str]
    series: list[tuple[str, list[float | None]]]
    ring: float | None = None


class Section(NamedTuple):
    anchor: str
    title: str
    notes: list[str]
    tables: list[Table]
    figures: Sequence[Dots | Radar] = ()


def measured(score: Score, part: str, name: str, measure: Measure | None = None) -> Cell:
    """A metric of a score with its interval."""
    measure = measure or MEASURES[name]
    cell = shown(score.value(part, name), measure)
    bounds = interval(score, part, name)
    if not bounds:
        return cell
    digits = max(measure.digits - 1, 0)
    return cell._replace(note="[" + ", ".join(f"{bound:.{digits}f}" for bound in bounds) + "]")


def interval(score: Score, part: str, name: str) -> Sequence[float] | None:
    """Its bounds, in the unit of the metric."""
    return inside((score.content.get("confidence") or {}).get(part) or {}, name)


def shown(value: Any, measure: Measure) -> Cell:
    """A number, or a dash where there is none."""
    if value is None:
        return Cell(NOTHING)
    share = None if measure.full is None else min(max(value / measure.full, 0.0), 1.0)
    return Cell(f"{value:,.{measure.digits}f}", share=share)


def inside(values: Mapping[str, Any], name: str) -> Any:
    """values[a][b] of "a/b"; None where there is none."""
    for key in name.split("/"):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def plain(value: Any, depth: int = 3) -> str:
    """Names and values in one line; what lies deeper is left out."""
    if isinstance(value, Mapping) and depth:
        return ", ".join(f"{key} {plain(one, depth - 1)}" for key, one in value.items())
    if isinstance(value, Mapping | list):
        return f"({len(value)} values)"
    return "?" if value is None else str(value)
