"""Scores one prediction: what it adds to the sums from which a benchmark's metrics are made."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moss_audio_jax.evaluate import text_norm
from moss_audio_jax.evaluate.benchmarks import Item, has_closed_questions
from moss_audio_jax.evaluate.metrics import caption, choice, closed, events, timestamps
from moss_audio_jax.evaluate.metrics.error_rate import transcript_errors
from moss_audio_jax.evaluate.metrics.instructions import follows
from moss_audio_jax.evaluate.metrics.parsing import parse
from moss_audio_jax.evaluate.official_files import official_text
from moss_audio_jax.evaluate.predictions import Prediction
from moss_audio_jax.runtime import deaf_workers, end_with_parent
from moss_audio_jax.text.prompt import split_thinking
from moss_audio_jax.text.timestamps import Segment

Sums = dict[str, float]
_CHUNK = 2000  # rows that a process takes at a time
JUDGE_HIGHEST = 5  # MMAU-Pro's official score of an open answer is the judge's, divided by this


@dataclasses.dataclass
class Scored:
    """The verdict on one item.

    Attributes:
      status: of `parse`; "missing" without a prediction, "error" without an output.
      thinking: the thinking block before the answer; None without one.
      sums: what the row adds to each column; columns to which it adds nothing are missing.
      labels: `events.count` of the row, if it has events.
      without_reference: the right answer is not published, so the row is not scored.
      unjudged: the row needs a judgement, and there is none.
    """

    id: str
    status: str
    parsed: Any
    answer: str
    thinking: str | None = None
    sums: Sums = dataclasses.field(default_factory=dict)
    labels: dict[str, tuple[int, int, int]] | None = None
    error: str | None = None
    without_reference: bool = False
    unjudged: bool = False

    def verdict(self, item: Item) -> dict[str, Any]:
        """The row of the score file: question, output, parsed answer and sums."""
        row = {
            "id": self.id,
            "kind": item.kind,
            "status": self.status,
            "audio": list(item.audio),
            "group": item.group,
            "prompt": item.prompt,
            "reference": item.reference,
            "answer": self.answer,
            "sums": {name: round(float(value), 6) for name, value in self.sums.items()},
        }
        if item.cut is not None:
            row["cut"] = list(item.cut)
        if self.thinking:
            row["thinking"] = self.thinking
        if self.parsed is not None and self.parsed != self.answer:
            row["parsed"] = self.parsed
        return row if self.error is None else row | {"error": self.error}


class Scorer:
    """Scores the items of one benchmark in order, because MMSU's official rule depends on it."""

    def __init__(
        self, benchmark: str, judgements: Mapping[str, Mapping[str, float]] | None = None
    ) -> None:
        self._benchmark, self._judged = benchmark, judgements or {}

    def score(
        self, items: Sequence[Item], predictions: Mapping[str, Prediction], processes: int = 1
    ) -> list[Scored]:
        """A verdict on each item, in order; processes share large sets."""
        letters = self._letters(items, predictions) if self._benchmark == "mmsu" else {}
        rows = [(item, predictions.get(item.id), letters.get(item.id)) for item in items]
        if processes == 1 or len(rows) < 2 * _CHUNK:
            return self._some(rows)
        chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(processes, context, end_with_parent)
        with pool:
            with deaf_workers():
                scored = pool.map(self._some, chunks)
            return [row for chunk in scored for row in chunk]

    def _some(self, rows: Iterable[tuple[Item, Prediction | None, str | None]]) -> list[Scored]:
        return [self._one(*row) for row in rows]

    def _letters(
        self, items: Sequence[Item], predictions: Mapping[str, Prediction]
    ) -> dict[str, str | None]:
        """The letters that MMSU's script reads, in the order of rows in its file.

        Our own predictions are taken in the order of the data, as `evaluate export` writes them.
        """
        known = {item.id: item for item in items}
        theirs = any("official_key" in row for row in predictions.values())
        order = [name for name in predictions if name in known] if theirs else list(known)
        rule = choice.LastLetter()
        return {
            name: rule.read(official_text("mmsu", known[name], predictions[name]))
            for name in order
            if name in predictions
        }

    def _one(self, item: Item, prediction: Prediction | None, letter: str | None) -> Scored:
        """`letter` is what MMSU's rule reads in the output."""
        raw = None if prediction is None else prediction.get("raw_output")
        if raw is None:
            parsed, status = None, "missing" if prediction is None else "error"
            thinking, answer = None, ""
        else:
            parsed, status = parse(item.kind, item.reference, raw)
            thinking, answer = split_thinking(raw)
            # Official files have the thinking under a separate key.
            thinking = thinking or prediction.get("thinking")
        row = Scored(item.id, status, parsed, answer.strip(), thinking)
        if prediction is not None and raw is None:
            row.error = str(prediction.get("error") or "no output")
        if item.kind == "choice":
            self._choice(row, item, prediction, letter)
        elif item.kind == "asr":
            _asr(row, item)
        elif item.kind == "timestamps":
            _timestamps(row, item)
        elif item.kind == "events":
            _events(row, item)
        elif item.kind == "caption":
            self._caption(row, item)
        else:
            self._open(row, item, prediction)
        return row

    def _choice(
        self, row: Scored, item: Item, prediction: Prediction | None, letter: str | None
    ) -> None:
        choices, answer = item.reference["choices"], item.reference["answer"]
        if answer is None:
            row.without_reference = True
            return
        row.sums |= {"strict_right": choice.same_choice(row.parsed, answer), "strict_rows": 1}
        if prediction is None:
            return  # the official scripts skip rows without one
        if self._benchmark == "mmsu":
            if letter is not None:
                right = choice.letter_is_right(letter, answer, choices)
                row.sums |= {"official_right": right, "official_rows": 1}
            return
        said = official_text(self._benchmark, item, prediction) or ""
        if self._benchmark == "mmau-pro":
            # The script takes the choice whose embedding is nearest. For a choice's exact text
            # that is the choice; other texts would need its embedding model.
            row.sums |= {"official_right": said == answer, "official_rows": 1}
            row.sums["undecided"] = said not in choices
            return
        mapped = choice.choice_by_letter(row.answer, choices) or row.answer
        verbatim = said if "official_key" in prediction else row.answer
        row.sums |= {
            "official_right": choice.words_match(answer, said, choices),
            "official_rows": 1,
            "verbatim_right": choice.words_match(answer, verbatim, choices),
            "mapped_right": choice.words_match(answer, mapped, choices),
        }

    def _open(self, row: Scored, item: Item, prediction: Prediction | None) -> None:
        reference = item.reference
        if task := reference.get("task_identifier"):
            row.sums |= {"strict_rows": 1, "strict_right": 0}
            if prediction is not None:
                said = official_text(self._benchmark, item, prediction) or ""
                right = follows(task, reference.get("kwargs"), said, item.prompt)
                row.sums |= {"official_rows": 1, "official_right": right}
                right = bool(row.answer) and follows(
                    task, reference.get("kwargs"), row.answer, item.prompt
                )
                row.sums["strict_right"] = right
        elif has_closed_questions(self._benchmark):
            asked = str(item.group.get("task"))
            form = closed.form(reference["answer"], asked)
            name = "open" if form == "text" else form
            right = closed.is_right(reference["answer"], row.answer, asked)
            row.sums |= {f"{name}_right": right, f"{name}_rows": 1}
        else:
            several = isinstance(reference["answer"], list)
            if several:
                best = max(caption.field_score(one, row.answer) for one in reference["answer"])
                row.sums |= {"word_points": best, "word_rows": 1}
            if (scores := self._judged.get(item.id)) is not None:
                points = sum(scores.values()) / len(scores)
                row.sums |= {"judged_points": points, "judged_fields": 1}
                if not several:
                    row.sums |= {"official_right": points / JUDGE_HIGHEST, "official_rows": 1}
                    row.sums |= {"strict_right": points / JUDGE_HIGHEST, "strict_rows": 1}
            row.unjudged = scores is None and not several

    def _caption(self, row: Scored, item: Item) -> None:
        if "sources" in item.reference:
            sources = item.reference["sources"]
            named = caption.named(sources, row.answer)
            row.sums |= {"sources_named": named, "sources": len(sources)}
            return
        said = row.parsed or {}
        for name, value in item.reference.items():
            points = caption.field_score(value, said.get(name)) if name in said else 0.0
            row.sums |= {f"field_{name}": points, f"field_{name}_rows": 1}
        row.sums["fields"] = len(item.reference)
        row.sums["field_points"] = sum(row.sums[f"field_{name}"] for name in item.reference)
        scores = self._judged.get(item.id)
        row.unjudged = scores is None
        for name, points in (scores or {}).items():
            row.sums |= {f"judged_{name}": points, f"judged_{name}_rows": 1}
        if scores:
            row.sums |= {"judged_points": sum(scores.values()), "judged_fields": len(scores)}


def _asr(row: Scored, item: Item) -> None:
    language = item.group.get("language")
    words, characters = transcript_errors(item.reference["text"], row.parsed or "", language)
    unit = text_norm.unit(text_norm.rules_for(item.reference["text"], language))
    row.sums |= {
        f"rows_in_{unit}": 1,
        "word_errors": words.total,
        "words": words.reference,
        "substitutions": words.substitutions,
        "deletions": words.deletions,
        "insertions": words.insertions,
        "character_errors": characters.total,
        "characters": characters.reference,
        "character_substitutions": characters.substitutions,
        "character_deletions": characters.deletions,
        "character_insertions": characters.insertions,
    }


def _timestamps(row: Scored, item: Item) -> None:
    slots, level = item.reference["slots"], item.reference["level"]
    segments = [Segment(**segment) for segment in row.parsed or ()]
    found = timestamps.shifts(slots, segments, level, item.group.get("language"))
    row.sums |= found._asdict()
    row.sums["order_violations"] = timestamps.order_violations(row.answer, segments)
    row.sums |= {"timed_rows": 1, "timed_unparsed": row.parsed is None and bool(slots)}


def _events(row: Scored, item: Item) -> None:
    true = [events.event(e["start"], e["end"], e["text"]) for e in item.reference["events"]]
    said = [events.event(e["start"], e["end"], e["text"]) for e in row.parsed or ()]
    row.labels = events.count(true, said)
    right = sum(counts[0] for counts in row.labels.values())
    ious = events.ious(true, said)
    nameless = [[e._replace(label="") for e in found] for found in (true, said)]
    row.sums |= {
        "event_right": right,
        "event_twice_right": 2 * right,
        "event_reference": len(true),
        "event_estimated": len(said),
        "event_all": len(true) + len(said),
        "iou": sum(ious),
        "iou_0.5": sum(iou >= 0.5 for iou in ious),
        "iou_0.7": sum(iou >= 0.7 for iou in ious),
        "any_twice_right": 2 * sum(c[0] for c in events.count(*nameless).values()),
        "any_iou": sum(events.ious(*nameless)),
        "timed_rows": 1,
        "timed_unparsed": row.parsed is None and bool(true),
    }
