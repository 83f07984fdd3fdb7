"""Errors of timestamps: accumulated average shift (AAS), coverage, bias, order.

Reference and answer are aligned by edit distance over their words (Chinese: characters). A start in
the reference is matched if its first word is aligned with an equal word that begins a segment of
the answer; ends are matched in the same way. For word timestamps, with one word per segment, this
is the usual matching of equal tokens. AAS is the mean of |answer - reference| over matched times.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rapidfuzz.distance import Levenshtein

from moss_audio_jax.evaluate import text_norm
from moss_audio_jax.text.timestamps import Parsed, Segment, parse

Slot = Mapping[str, Any]


class Shifts(NamedTuple):
    """The errors of one answer, in seconds. A slot is one timestamp: a start or an end.

    AAS per slot is slot_shift / slots; AAS per token is token_shift / tokens, about twice as much.
    Coverage is slots / reference_slots.
    """

    slot_shift: float  # sum of |answer - reference| over matched slots
    bias: float  # sum of answer - reference over matched slots
    slots: int
    reference_slots: int
    token_shift: float  # sum of both shifts over segments whose start and end are matched
    tokens: int


class _Unit(NamedTuple):
    text: str
    start: float | None  # the segment's start, if this is its first unit
    end: float | None
    segment: int


def shifts(
    reference: Sequence[Slot],
    answer: Sequence[Segment],
    level: str = "word",
    language: str | None = None,
) -> Shifts:
    """Compares an answer's segments with a reference's slots.

    Args:
      reference: {"text", "start", "end"} of each word or sentence, seconds, in order.
      answer: segments in the order in which the model gave them.
      level: "word" compares words without case and punctuation; "sentence" normalises as for error
        rates.
      language: of the reference; determines the normalisation of sentences.
    """
    rules = None
    if level == "sentence":
        rules = text_norm.rules_for(" ".join(str(slot["text"]) for slot in reference), language)
    true = _units([(s["text"], s["start"], s["end"]) for s in reference], rules)
    said = _units([(s.text, s.start, s.end) for s in answer], rules)
    pairs = _equal_pairs([u.text for u in true], [u.text for u in said])
    starts: dict[int, float] = {}
    ends: dict[int, float] = {}
    for i, j in pairs:
        if true[i].start is not None and said[j].start is not None:
            starts[true[i].segment] = said[j].start - true[i].start
        if true[i].end is not None and said[j].end is not None:
            ends[true[i].segment] = said[j].end - true[i].end
    differences = [*starts.values(), *ends.values()]
    both = starts.keys() & ends.keys()
    return Shifts(
        slot_shift=sum(map(abs, differences)),
        bias=sum(differences),
        slots=len(differences),
        reference_slots=2 * len(reference),
        token_shift=sum(abs(starts[k]) + abs(ends[k]) for k in both),
        tokens=len(both),
    )


def order_violations(answer: str, segments: Sequence[Segment]) -> int:
    """The number of segments that start before the previous one or end before they start.

    Args:
      segments: of the parsed answer; the parser moves an end before its start to the start.
    """
    back = sum(b.start < a.start for a, b in itertools.pairwise(segments))
    if all(s.start < s.end for s in segments):
        return back
    parsed = parse(answer)
    return back + sum(_ends_early(piece, parsed) for piece in parsed.unread)


def _ends_early(piece: str, parsed: Parsed) -> bool:
    """Whether the parser reports a piece because it moved its end; see `parse`."""
    if parsed.format == "stamps" and piece[-1:] not in ("]", "］", "】"):
        return False  # the end's timestamp is missing
    alone = parse(piece).segments
    return len(alone) == 1 and alone[0].start == alone[0].end


def _units(slots: Sequence[tuple[str, float, float]], rules: text_norm.Rules | None) -> list[_Unit]:
    found = []
    for number, (text, start, end) in enumerate(slots):
        if rules is None:
            units = text_norm.plain_units(text)
        else:
            units = text_norm.units(text_norm.normalise(text, rules), rules)
        last = len(units) - 1
        found += [
            _Unit(unit, start if i == 0 else None, end if i == last else None, number)
            for i, unit in enumerate(units)
        ]
    return found


def _equal_pairs(reference: Sequence[str], answer: Sequence[str]) -> list[tuple[int, int]]:
    """Index pairs of equal tokens in an alignment of least edit distance."""
    pairs, i, j = [], 0, 0
    for operation in Levenshtein.editops(reference, answer):
        kept = operation.src_pos - i
        pairs += [(i + k, j + k) for k in range(kept)]
        i, j = operation.src_pos, operation.dest_pos
        i += operation.tag != "insert"
        j += operation.tag != "delete"
    return pairs + list(zip(range(i, len(reference)), range(j, len(answer)), strict=True))
