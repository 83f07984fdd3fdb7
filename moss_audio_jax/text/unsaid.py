"""Whether speech goes on after the end of its transcript.

A model may stop after a few words although more are said, and its answer does not show it. A
listener that hears word by word and cannot stop, such as a CTC head on the encoder, does. It hears
no words in silence, music and other sounds. Where it does not know a voice it is unsure, and then
nothing is concluded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_SURE = 0.9  # a word that is as probable counts
_LEAST = 4  # such words are speech that goes on; a few may be an error of either
_NEAR = 0.1  # seconds by which the times of both differ


class Word(NamedTuple):
    """A word that was heard: start and end in seconds, and its probability."""

    start: float
    end: float
    text: str
    sure: float


def goes_on_at(transcript: str, heard: Sequence[Word], told: float = 0.0) -> float | None:
    """The second at which speech goes on that the transcript lacks at its end; None if it does not.

    Args:
      transcript: without times.
      heard: the words of the whole sound.
      told: the last time that the transcript tells, if it has times. What is heard before it is in
        the transcript, however it was understood.
    """
    rest = [word for word in heard[_said(transcript, heard) :] if word.start > told - _NEAR]
    return rest[0].start if sum(word.sure >= _SURE for word in rest) >= _LEAST else None


def _said(transcript: str, heard: Sequence[Word]) -> int:
    """How many of the words, from the first on, the transcript says.

    It is the beginning of `heard` that is most like the transcript: that with the least edit
    distance, of letters and digits alone, so that spelling and the division into words matter
    little. Of beginnings that are equally alike it is the longest.
    """
    words = [_letters(word.text) for word in heard]
    letters = np.concatenate([np.zeros(0, int), *words])
    place = np.arange(len(letters) + 1)
    distance = place  # of each beginning to the transcript so far
    for letter in _letters(transcript):
        replaced = distance[:-1] + (letters != letter)
        distance = np.minimum(distance + 1, np.append(distance[0] + 1, replaced))
        distance = np.minimum.accumulate(distance - place) + place
    end = len(letters) - int(np.argmin(distance[::-1]))
    starts = np.cumsum([0, *map(len, words)])[:-1]
    return int(np.searchsorted(starts, end))


def _letters(text: str) -> np.ndarray:
    return np.array([ord(letter) for letter in text.casefold() if letter.isalnum()], int)
