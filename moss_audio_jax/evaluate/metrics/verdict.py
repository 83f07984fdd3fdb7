"""Summarises a row's sums as right, partly right or wrong, for the report and the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moss_audio_jax.evaluate import text_norm
from moss_audio_jax.evaluate.metrics.events import COLLAR

TIMED = {"timestamps": "slots", "events": "events"}  # kind -> the reference's key with times


class Verdict(NamedTuple):
    """The verdict by the strict rule.

    Attributes:
      word: right, partly, wrong or not scored.
      credit: from 0 to 1; None if the row is not scored.
      detail: the figures that led to it.
    """

    word: str
    credit: float | None
    detail: str


def verdict(sums: Mapping[str, float]) -> Verdict:
    """The verdict on a row, from its sums (`rows.Scored.sums`)."""
    credit, detail = _credit(sums)
    if sums.get("judged_fields"):
        judged = sums["judged_points"] / sums["judged_fields"]
        detail = f"{detail}, judge {judged:.2f}".lstrip(", ")
    if credit is None:
        return Verdict("not scored", None, detail)
    return Verdict("right" if credit >= 1 else "partly" if credit > 0 else "wrong", credit, detail)


def _credit(sums: Mapping[str, float]) -> tuple[float | None, str]:
    def share(over: str, under: str) -> float:
        return sums[over] / sums[under] if sums.get(under) else 1.0

    for name in ("strict", "open", "time", "tempo"):
        if sums.get(f"{name}_rows"):
            return float(sums[f"{name}_right"]), ""
    if "word_errors" in sums:
        errors, words = sums["word_errors"], sums["words"]
        kinds = [int(sums.get(k, 0)) for k in ("substitutions", "deletions", "insertions")]
        rate = f"WER {100 * errors / words:.0f}%" if words else f"{errors:.0f} error(s)"
        credit = max(1 - errors / words, 0.0) if words else float(errors == 0)
        return credit, "{}: {} sub, {} del, {} ins".format(rate, *kinds)
    if "reference_slots" in sums:
        credit = share("slots", "reference_slots")
        shift = 1000 * sums["slot_shift"] / sums["slots"] if sums["slots"] else None
        late = shift is not None and shift > 1000 * COLLAR
        detail = f"coverage {credit:.0%}" + ("" if shift is None else f", off by {shift:.0f} ms")
        if credit == 1 and (late or sums.get("order_violations")):
            credit = 0.99  # all words are there, but their times are wrong
        return credit, detail
    if "event_all" in sums:
        credit = share("event_twice_right", "event_all")
        extra = sums["event_estimated"] - sums["event_right"]
        found = f"{sums['event_right']:.0f} of {sums['event_reference']:.0f}"
        return credit, f"F1 {credit:.2f}, {found}, {extra:.0f} extra"
    if "sources" in sums:
        found = f"{sums['sources_named']:.0f} of {sums['sources']:.0f} sources"
        return share("sources_named", "sources"), found
    if "word_rows" in sums:
        return float(sums["word_points"]), f"words {sums['word_points']:.2f}"
    if "fields" in sums:
        credit = share("field_points", "fields")
        return credit, f"fields {credit:.2f}"
    return None, ""


def off(said: Sequence[Mapping[str, Any]], true: Sequence[Mapping[str, Any]]) -> list[int]:
    """Indices of answered segments that the reference does not have at that time.

    Times may differ by the collar, the tolerance of `events`.

    Args:
      said, true: {"text", "start", "end"} of each segment, seconds.
    """
    known: dict[str, list[tuple[float, float]]] = {}
    for one in true:
        known.setdefault(text_norm.key(one["text"]), []).append((one["start"], one["end"]))
    return [
        number
        for number, one in enumerate(said)
        if not any(
            max(abs(one["start"] - start), abs(one["end"] - end)) <= COLLAR + 1e-9
            for start, end in known.get(text_norm.key(one["text"]), ())
        )
    ]
