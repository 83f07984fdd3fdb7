"""Word and character error rates, summed over a corpus; equal to jiwer's on the same text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rapidfuzz.distance import Levenshtein

from moss_audio_jax.evaluate import text_norm


class Errors(NamedTuple):
    """The edits from a reference, which has `reference` units, to a hypothesis."""

    substitutions: int
    deletions: int
    insertions: int
    reference: int

    @property
    def total(self) -> int:
        return self.substitutions + self.deletions + self.insertions


def errors(reference: Sequence[str], hypothesis: Sequence[str]) -> Errors:
    """The fewest edits between two sequences of units; a string is a sequence of characters."""
    kinds = [operation.tag for operation in Levenshtein.editops(reference, hypothesis)]
    return Errors(
        kinds.count("replace"), kinds.count("delete"), kinds.count("insert"), len(reference)
    )


def transcript_errors(
    reference: str, hypothesis: str, language: str | None = None
) -> tuple[Errors, Errors]:
    """(word errors, character errors) of a transcript, both texts normalised.

    Words are those of `text_norm.units`; in scripts without spaces they are characters. Characters
    are the code points of the normalised text, including one space between words.
    """
    rules = text_norm.rules_for(reference, language)
    true = text_norm.normalise(reference, rules)
    said = true if hypothesis == reference else text_norm.normalise(hypothesis, rules)
    words = errors(text_norm.units(true, rules), text_norm.units(said, rules))
    return words, errors(true, said)
