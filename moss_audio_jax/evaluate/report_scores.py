"""Score files as a report reads them; the cells, tables and figures that it makes of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moss_audio_jax.errors import InputError

FOUR = {"MMAU": ("mmau", "mmau-mini"), "MMAU-Pro": ("mmau-pro",), "MMAR": ("mmar",),
        "MMSU": ("mmsu",)}  # fmt: skip
PARTS = ("official", "strict")
NOTHING = "–"


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
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError:
        content = None
    if problem := _problem(content):
        raise InputError(f"{path}: {problem}; expected the file that evaluate score wrote")
    inputs = content.get("inputs") or {}
    data = Path(str(inputs.get("data") or path)).stem
    return Score(path, name or _model(content.get("meta")) or path.stem, data, content)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _problem(content: Any) -> str | None:
    if not isinstance(content, dict):
        return "is no JSON object"
    if not isinstance(content.get("benchmark"), str) or type(content.get("n")) is not int:
        return "has no benchmark and n"
    for key in ("official", "strict", "by", "counts", "confidence", "inputs"):
        value = content.get(key, {} if key in ("confidence", "inputs") else None)
        if not isinstance(value, dict):
            return f"{key!r} is {str(value)[:40]!r}"
        if key != "inputs" and (odd := next(_odd(value, key), None)):
            return f"{odd} is no number"
    if odd := next((f"by {k}: {v}" for k, some in content["by"].items() for v, one in some.items()
                    if not {"n", *PARTS} <= one.keys()), None):  # fmt: skip
        return f"{odd} is no breakdown"
    rows = content.get("rows", [])
    needed = {"id": object, "kind": str, "reference": dict, "sums": dict}
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), kind) for key, kind in needed.items()
        ):
            return f"rows[{number}] is no verdict"
    return None


def _odd(values: Mapping[str, Any], where: str) -> Iterator[str]:
    """Names of leaves that are neither numbers, intervals nor null."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _odd(value, f"{where}/{name}")
        elif value is not None and not all(
            isinstance(one, int | float) for one in (value if isinstance(value, list) else [value])
        ):
            yield f"{where}/{name}"


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
            s for s in scores
            if s.model == score.model
            and (s.benchmark == score.benchmark or (column and column_of(s.benchmark) == column))
        ]  # fmt: skip
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


def plain(value: Any) -> str:
    """Names and values in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(one)}" for key, one in value.items())
    return "?" if value is None else str(value)
