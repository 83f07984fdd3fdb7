"""What a report says, before it is a page: sections of tables and figures from score files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moss_audio_jax.evaluate.benchmarks import CAPTION_FIELDS
from moss_audio_jax.evaluate.report_scores import (
    FOUR,
    MEASURES,
    NOTHING,
    PARTS,
    Cell,
    Dot,
    Dots,
    Measure,
    Radar,
    Score,
    Section,
    Table,
    column_of,
    inside,
    interval,
    measured,
    plain,
    shown,
)

# What the authors of MOSS-Audio report.
PUBLISHED_FOUR = ("MOSS-Audio-8B-Thinking", (77.33, 64.92, 66.53, 75.52), 71.08)
PUBLISHED_ASR = (("MOSS-Audio-8B-Instruct", 11.30), ("MOSS-Audio-4B-Instruct", 11.58))
PUBLISHED_TIMESTAMPS = (("AISHELL-1", 35.77), ("LibriSpeech", 131.61))
PUBLISHED_CAPTION = 3.7252
_HEADLINES = (
    "accuracy",
    "choice_accuracy",
    "open_accuracy",
    "time_accuracy",
    "tempo_accuracy",
    "wer",
    "cer",
    "aas_slot_ms",
    "aas_token_ms",
    "coverage",
    "event_f1",
    "judged/mean",
    "fields/mean",
    "sources_named",
)
_TIMESTAMPS = (
    "aas_slot_ms",
    "aas_token_ms",
    "coverage",
    "bias_ms",
    "order_violations",
    "unparsed_share",
)
_EVENTS = (
    "event_f1",
    "event_precision",
    "event_recall",
    "event_f1_macro",
    "miou",
    "r@0.5",
    "r@0.7",
    "any_label/event_f1",
    "unparsed_share",
)


# --- sections ------------------------------------------------------------------------------------


def sections(scores: Sequence[Score]) -> list[Section]:
    """All that a report says beside its error browser."""
    of = {
        name: [s for s in scores if s.benchmark == name]
        for name in ("asr", "timestamps", "events", "world")
    }
    four = [s for s in scores if column_of(s.benchmark)]
    captions = [s for s in scores if any(_fields(s, kind) for kind in _CAPTIONS)]
    made = [
        _overview(scores),
        _four(four) if four else None,
        _asr(of["asr"]) if of["asr"] else None,
        _timed(of["timestamps"]) if of["timestamps"] else None,
        _events(of["events"]) if of["events"] else None,
        _captions(captions) if captions else None,
        _world(of["world"]) if of["world"] else None,
        _counts(scores),
    ]
    return [section for section in made if section]


def _overview(scores: Sequence[Score]) -> Section:
    rows = []
    for score in scores:
        name = _headlines([score])[0]
        count = f"{score.content['n']:,}"
        if (score.content.get("inputs") or {}).get("limit"):
            count = f"the first {count}"
        rows.append(
            [
                Cell(score.benchmark),
                Cell(score.label),
                Cell(count),
                Cell(MEASURES[name].title),
                *(measured(score, part, name) for part in PARTS),
            ]
        )
    head = ("benchmark", "model", "items", "measure", "official", "strict")
    level = next(
        (
            s.content["confidence"].get("level")
            for s in scores
            if isinstance(s.content.get("confidence"), dict)
        ),
        None,
    )
    notes = [
        "Official: the rule of the benchmark's own script, its quirks included. Strict: every row "
        "counts, what cannot be read is wrong, nothing is guessed."
    ]
    if level:
        notes.append(f"In brackets: {100 * level:g}% bootstrap intervals over the items.")
    return Section("overview", "Overview", notes, [Table("", head, rows)])


def _headlines(scores: Sequence[Score]) -> list[str]:
    """What any of the scores has, the most telling first."""
    found = [
        name
        for name in _HEADLINES
        if any(score.value(part, name) is not None for score in scores for part in PARTS)
    ]
    return found or ["accuracy"]


def _four(scores: Sequence[Score]) -> Section:
    labels = dict.fromkeys(s.label for s in scores)
    cells = {(s.label, column_of(s.benchmark)): s for s in scores}
    name, values, mean = PUBLISHED_FOUR
    rows = [
        [
            Cell(name, "published"),
            Cell("official"),
            *(Cell(f"{value:.2f}", share=value / 100) for value in (*values, mean)),
        ]
    ]
    for label in labels:
        for part in PARTS:
            found = [cells.get((label, column)) for column in FOUR]
            row = [_accuracy(score, part) if score else Cell(NOTHING) for score in found]
            accuracies = [score and score.value(part, "accuracy") for score in found]
            whole = None if None in accuracies else sum(accuracies) / len(FOUR)
            rows.append([Cell(label), Cell(part), *row, shown(whole, MEASURES["accuracy"])])
    dots = [
        (
            column,
            [Dot(name, value, None, "published")]
            + [
                Dot(
                    label,
                    cells[label, column].value(part, "accuracy"),
                    interval(cells[label, column], part, "accuracy"),
                    part,
                )
                for label in labels
                if (label, column) in cells
                for part in PARTS
                if cells[label, column].value(part, "accuracy") is not None
            ],
        )
        for column, value in zip(FOUR, values, strict=True)
    ]
    names = ("accuracy", "accuracy_verbatim", "accuracy_letters_mapped", "rows", "undecided")
    detail = [
        [
            Cell(s.benchmark),
            Cell(s.label),
            Cell(f"{s.content['n']:,}"),
            *(shown(s.value("official", n), MEASURES["accuracy"]) for n in names[:3]),
            *(shown(s.value("official", n), Measure("", 0)) for n in names[3:]),
            shown(s.value("strict", "accuracy"), MEASURES["accuracy"]),
        ]
        for s in scores
    ]
    rules = Table(
        "The official rules in detail",
        (
            "benchmark",
            "model",
            "items",
            "official",
            "answers as they stand",
            "letters mapped",
            "rows the script counts",
            "undecided",
            "strict",
        ),
        detail,
        folded=True,
    )
    notes = [
        "Accuracy in percent and the unweighted mean of the four. A mean needs all four.",
        *_same_items(scores),
    ]
    table = Table("", ("model", "rule", *FOUR, "mean"), rows, frozenset([0]))
    return Section(
        "four",
        "Audio questions: MMAU, MMAU-Pro, MMAR, MMSU",
        notes,
        [table, rules, *_breakdowns(scores)],
        [Dots("%", 100, dots)],
    )


def _accuracy(score: Score, part: str) -> Cell:
    cell = measured(score, part, "accuracy")
    notes = [cell.note, "mini" if score.benchmark == "mmau-mini" else ""]
    if part == "official":
        counted, undecided = (score.value(part, name) for name in ("rows", "undecided"))
        if counted is not None and counted != score.value("strict", "rows"):
            notes.append(f"of {counted:,.0f} rows")
        if undecided:
            notes.append(f"{undecided:,.0f} undecided")
    return cell._replace(note="\n".join(filter(None, notes)))


def _asr(scores: Sequence[Score]) -> Section:
    rows = [
        [
            Cell(name, "published"),
            Cell("overall"),
            Cell(NOTHING),
            Cell(f"{value:.2f}"),
            *[Cell(NOTHING)] * 3,
        ]
        for name, value in PUBLISHED_ASR
    ]
    dots: dict[str, list[Dot]] = {}
    for model in dict.fromkeys(s.model for s in scores):
        ours = [s for s in scores if s.model == model]
        by = [
            (s, name, group["n"], group["strict"]) for s in ours for name, group in _dimensions(s)
        ]
        names = [name for _, name, _, _ in by]
        for score, name, n, strict in by:
            if names.count(name) > 1:
                name = f"{name} ({score.data})"
            rows.append([Cell(model), Cell(name), *_error_cells(n, strict)])
            if strict.get("wer") is not None:
                dots.setdefault(name, []).append(Dot(model, strict["wer"], None, "strict"))
        for score in ours:
            name = "overall" if len(ours) == 1 else f"overall, {score.data}"
            cells = _error_cells(score.content["n"], score.content["strict"])
            cells[1], cells[3] = (measured(score, "strict", rate) for rate in ("wer", "cer"))
            rows.append([Cell(model), Cell(name), *cells])
            if (value := score.value("strict", "wer")) is not None:
                bounds = interval(score, "strict", "wer")
                dots.setdefault(name, []).append(Dot(model, value, bounds, "strict"))
        if len(by) > 1:
            means = [_mean(strict.get(rate) for *_, strict in by) for rate in ("wer", "cer")]
            wer, cer = (shown(mean, MEASURES["wer"]) for mean in means)
            rows.append(
                [
                    Cell(model),
                    Cell("mean of the dimensions"),
                    Cell(NOTHING),
                    wer,
                    Cell(NOTHING),
                    cer,
                    Cell(NOTHING),
                ]
            )
    lines = sorted(dots.items(), key=lambda one: one[0].startswith("overall"))
    lines.append(
        (
            "overall, published",
            [Dot(name, value, None, "published") for name, value in PUBLISHED_ASR],
        )
    )
    most = max((dot.interval or [dot.value])[-1] for _, some in lines for dot in some)
    notes = [
        "Rates over the whole corpus, no row left out: errors of all rows over units of all "
        "references. The WER counts words, and characters of scripts that put no space between "
        "words (Chinese, Japanese, Thai and the like).",
        *_same_items(scores),
    ]
    head = ("model", "dimension", "items", "WER, %", "sub / del / ins", "CER, %", "sub / del / ins")
    table = Table("", head, rows, frozenset(range(len(PUBLISHED_ASR))))
    tables = [table, *_breakdowns(scores, skip="dimension")]
    return Section(
        "asr", "Speech recognition by dimension", notes, tables, [Dots("WER, %", most, lines)]
    )


def _dimensions(score: Score) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Data without dimensions are one."""
    return score.by("dimension").items() or [(score.data, score.content)]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _error_cells(n: int, strict: Mapping[str, Any]) -> list[Cell]:
    cells = [Cell(f"{n:,}")]
    for rate, prefix in (("wer", ""), ("cer", "character_")):
        cells.append(shown(strict.get(rate), MEASURES[rate]))
        kinds = [strict.get(f"{prefix}{k}") for k in ("substitutions", "deletions", "insertions")]
        cells.append(Cell(NOTHING if None in kinds else " / ".join(f"{k:,.0f}" for k in kinds)))
    return cells


def _timed(scores: Sequence[Score]) -> Section:
    blank = [Cell(NOTHING)] * (len(_TIMESTAMPS) - 1)
    rows = [
        [
            Cell("MOSS-Audio-8B-Instruct", "published"),
            Cell(data),
            Cell(NOTHING),
            Cell(f"{value:.2f}"),
            *blank,
        ]
        for data, value in PUBLISHED_TIMESTAMPS
    ]
    rows += [
        [
            Cell(s.model),
            Cell(s.data),
            Cell(f"{s.content['n']:,}"),
            *(measured(s, "strict", name) for name in _TIMESTAMPS),
        ]
        for s in scores
    ]
    notes = [
        "AAS is how far the times of matched words are off. Per slot each start and each end is "
        "one; per token both are summed, which is about twice as much. It alone rewards words left "
        "out: coverage is the share of the reference's slots that were matched. Bias above 0: the "
        "answer is late.",
        *_same_items(scores),
    ]
    head = ("model", "data", "items", *(MEASURES[name].title for name in _TIMESTAMPS))
    published = frozenset(range(len(PUBLISHED_TIMESTAMPS)))
    tables = [Table("", head, rows, published), *_breakdowns(scores)]
    return Section("timestamps", "Timestamps", notes, tables)


def _events(scores: Sequence[Score]) -> Section:
    rows = [
        [
            Cell(s.label),
            Cell(f"{s.content['n']:,}"),
            *(measured(s, "strict", name) for name in _EVENTS),
        ]
        for s in scores
    ]
    notes = [
        "F1 of events as sed_eval counts them: onset within 0.2 s, offset within 0.2 s or half of "
        "the length. IoU and recall (R) are those of the reference's events.",
        *_same_items(scores),
    ]
    head = ("model", "items", *(MEASURES[name].title for name in _EVENTS))
    return Section("events", "Events", notes, [Table("", head, rows), *_breakdowns(scores)])


_CAPTIONS = {  # who scores the fields -> title, part, full scale, what it is held against
    "judged": ("by a judge, 1-5", "official", 5, PUBLISHED_CAPTION),
    "fields": ("offline, 0-1", "strict", 1, None),
}


def _fields(score: Score, kind: str) -> dict[str, float]:
    """What each field got, where three or more did."""
    values = score.value(_CAPTIONS[kind][1], kind)
    values = values if isinstance(values, Mapping) else {}
    found = {field: values[field] for field in CAPTION_FIELDS if values.get(field) is not None}
    return found if len(found) >= 3 else {}


def _captions(scores: Sequence[Score]) -> Section:
    figures, columns = [], []
    for kind, (title, part, full, ring) in _CAPTIONS.items():
        drawn = []
        for score in scores:
            if values := _fields(score, kind):
                label = score.label + ("" if score.benchmark == "caption" else " (the world)")
                drawn.append((label, values))
                measure = MEASURES[f"{kind}/mean"]
                cells = [
                    measured(score, part, f"{kind}/{name}", measure)
                    for name in ("mean", *CAPTION_FIELDS)
                ]
                columns.append((f"{label}, {title}", cells))
        if drawn:
            axes = [field for field in CAPTION_FIELDS if any(field in v for _, v in drawn)]
            series = [(label, [values.get(axis) for axis in axes]) for label, values in drawn]
            figures.append(Radar(title, full, axes, series, ring))
    rows = [
        [Cell(name), *(cells[number] for _, cells in columns)]
        for number, name in enumerate(("mean", *CAPTION_FIELDS))
    ]
    notes = [
        f"Published mean of MOSS-Audio-8B-Instruct by its authors' judge: {PUBLISHED_CAPTION}. "
        "Another judge has another scale. Offline: the share of words that a field has in common "
        "with the reference's (F1); a field that is missing is 0.",
        *_same_items(scores),
    ]
    table = Table("", ("field", *(title for title, _ in columns)), rows)
    return Section("captions", "Speech captions", notes, [table], figures)


def _world(scores: Sequence[Score]) -> Section:
    whole = [
        [Cell(MEASURES[name].title), *(measured(s, "strict", name) for s in scores)]
        for name in _headlines(scores)
    ]
    labels = [s.label for s in scores]
    notes = [
        "Procedural sound with exact labels. Choices by the strict rule; times may be 0.2 s off, a "
        "tempo 5%.",
        *_same_items(scores),
    ]
    tables = [
        Table("", ("all tasks", *labels), whole),
        _by_group(scores, "task", _HEADLINES)._replace(title="By task"),
        *_breakdowns(scores, skip="task"),
    ]
    return Section("world", "The world", notes, tables)


_COUNTS = (
    "predicted",
    "missing",
    "errors",
    "empty",
    "unparsed",
    "truncated_thinking",
    "unjudged",
    "without_reference",
    "unknown_ids",
    "duplicate_ids",
    "broken_lines",
)
_LISTED = 100  # problems of one score file


def _counts(scores: Sequence[Score]) -> Section:
    rows, tables = [], []
    for score in scores:
        counts = score.content["counts"]
        rows.append(
            [Cell(score.benchmark), Cell(score.label), Cell(f"{score.content['n']:,}")]
            + [
                Cell(NOTHING)
                if counts.get(name) is None
                else Cell(f"{counts[name]:,}", bad=name != "predicted" and counts[name] > 0)
                for name in _COUNTS
            ]
        )
        if problems := score.content.get("problems"):
            listed = [[Cell(str(problem))] for problem in problems[:_LISTED]]
            if more := len(problems) - _LISTED:
                listed += [[Cell(f"and {more:,} more in {score.path}")]] if more > 0 else []
            title = f"{score.benchmark}, {score.label}: {len(problems):,} problem(s)"
            tables.append(Table(title, ("what",), listed, folded=True))
    head = ("benchmark", "model", "items", *(name.replace("_", " ") for name in _COUNTS))
    notes = ["Whatever has no answer that could be read is wrong by the strict rule."]
    return Section("counts", "What was not answered", notes, [Table("", head, rows), *tables])


def origins(scores: Sequence[Score]) -> Section:
    """What the numbers were made from, and what of it differs between the files."""
    rows, notes = [], []
    for score in scores:
        inputs, meta = (score.content.get(key) or {} for key in ("inputs", "meta"))
        settings = ", ".join(
            f"{key} {plain(value)}" for key, value in meta.items() if value not in (None, False, "")
        )
        rows.append(
            [
                Cell(text)
                for text in (
                    str(score.path),
                    score.benchmark,
                    score.label,
                    f"{inputs.get('data', '?')} #{inputs.get('items_hash', '?')}",
                    f"{inputs.get('predictions', '?')} #{inputs.get('predictions_hash', '?')}",
                    plain(score.content.get("normaliser")),
                    str(score.content.get("code_version", "?")),
                    settings or NOTHING,
                )
            ]
        )
    for key, name in (("normaliser", "normalisers"), ("code_version", "versions of the code")):
        if len({plain(score.content.get(key)) for score in scores}) > 1:
            notes.append(f"These scores were made by different {name}.")
    head = (
        "score file",
        "benchmark",
        "model",
        "data #hash of items",
        "predictions #hash",
        "normaliser",
        "scored by",
        "answered by",
    )
    return Section("origins", "What this was made from", notes, [Table("", head, rows)])


# --- of several sections -------------------------------------------------------------------------


def _same_items(scores: Sequence[Score]) -> Iterable[str]:
    """A note where scores that stand side by side are of other items."""
    found: dict[str, dict[Any, str]] = {}
    for score in scores:
        key = (score.content.get("inputs") or {}).get("items_hash")
        found.setdefault(score.benchmark, {}).setdefault(plain(key), score.label)
    for benchmark, labels in found.items():
        if len(labels) > 1:
            yield f"Not the same items of {benchmark}: {', '.join(labels.values())} differ."


def _breakdowns(scores: Sequence[Score], skip: str = "") -> Iterable[Table]:
    for benchmark in dict.fromkeys(s.benchmark for s in scores):
        same = [s for s in scores if s.benchmark == benchmark]
        for key in dict.fromkeys(key for s in same for key in s.content["by"] if key != skip):
            table = _by_group(same, key, _HEADLINES)
            yield table._replace(title=f"{benchmark} by {key}", folded=True)


def _by_group(scores: Sequence[Score], key: str, names: Sequence[str]) -> Table:
    """Values of a group against models, strict; of multiple choice both rules."""
    rows = []
    for value in dict.fromkeys(value for s in scores for value in s.by(key)):
        groups = [s.by(key).get(value) for s in scores]
        n = dict.fromkeys(str(group["n"]) for group in groups if group)
        for name in names:
            for part in PARTS if name == "accuracy" else ("strict",):
                found = [inside((group or {}).get(part) or {}, name) for group in groups]
                if all(one is None for one in found):
                    continue
                title = MEASURES[name].title + (f", {part}" if name == "accuracy" else "")
                rows.append(
                    [
                        Cell(value),
                        Cell(" / ".join(n)),
                        Cell(title),
                        *(shown(one, MEASURES[name]) for one in found),
                    ]
                )
    return Table("", (key, "items", "measure", *(s.label for s in scores)), rows)
