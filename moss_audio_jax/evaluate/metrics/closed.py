"""Short answers with one right value (times, numbers, words), as in the benchmark world."""

from __future__ import annotations

import re
from typing import Literal

from moss_audio_jax.evaluate import text_norm

Form = Literal["time", "tempo", "text"]

TIME_TOLERANCE = 0.2  # seconds
TEMPO_TOLERANCE = 0.05  # share of the tempo

_NUMBER = r"\d+(?:\.\d+)?"
_UNIT = r"(?:\s*(?:seconds?|secs?|s|bpm|beats per minute)\b)?"
_VALUE = rf"({_NUMBER}){_UNIT}"
_SPAN = re.compile(rf"{_VALUE}\s*(?:-|–|—|to)\s*{_VALUE}")
_BETWEEN = re.compile(r"\s*(?:,|;|\band\b|\n)\s*")


def form(reference: str, task: str | None = None) -> Form:
    """How a reference is compared: spans and decimals are times; the task tells a tempo."""
    if task == "tempo":
        return "tempo"
    found = spans(reference)
    return "time" if found and (len(found[0]) == 2 or "." in reference) else "text"


def is_right(reference: str, answer: str, task: str | None = None) -> bool:
    """Whether an answer has the reference's value.

    Each time may be wrong by 0.2 s, a tempo by 5%. Anything else must be the same text, except for
    case, spacing and surrounding punctuation.
    """
    compared = form(reference, task)
    if compared == "text":
        return text_norm.key(reference) == text_norm.key(answer)
    if compared == "tempo":
        return within(reference, answer, share=TEMPO_TOLERANCE)
    return within(reference, answer, TIME_TOLERANCE + 1e-9)


def within(reference: str, answer: str, tolerance: float = 0.0, share: float = 0.0) -> bool:
    """Whether an answer has as many numbers as the reference, none of them further off.

    Args:
      tolerance: how far off each may be; `share` of the number in the reference is added.
    """
    true, said = spans(reference), spans(answer)
    if not said or [len(span) for span in true] != [len(span) for span in said]:
        return False
    pairs = [(t, s) for a, b in zip(true, said, strict=True) for t, s in zip(a, b, strict=True)]
    return all(abs(t - s) <= tolerance + share * t for t, s in pairs)


def spans(text: str) -> list[tuple[float, ...]]:
    """[(start, end), ...] or [(value,)] if the text has nothing else; [] otherwise."""
    found: list[tuple[float, ...]] = []
    lines = (" ".join(line.split()) for line in text.strip().lower().rstrip(".").split("\n"))
    text = re.sub(r", ?and\b", ",", "\n".join(lines))
    pieces = _BETWEEN.split(text)
    for piece in pieces:
        if match := _SPAN.fullmatch(piece):
            found.append((float(match[1]), float(match[2])))
        elif len(pieces) == 1 and (match := re.fullmatch(_VALUE, piece)):
            found.append((float(match[1]),))
        else:
            return []
    return found
