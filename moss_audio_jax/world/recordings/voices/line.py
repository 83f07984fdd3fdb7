"""A line from the samples and word times that a package gave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import soxr

from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.errors import InputError
from moss_audio_jax.world.dsp import audible, moving_rms
from moss_audio_jax.world.espeak import SpokenWord, cut_out, tightened
from moss_audio_jax.world.recordings.source import Line

QUIET = 10 ** (-40 / 20)  # relative to the loudest 5 ms: recorded and neural pauses hiss


class Span(NamedTuple):
    """A word or phoneme (by espeak's name), and when it is said, in seconds."""

    text: str
    start: float
    end: float


def line(
    wav: np.ndarray,
    rate: int,
    text: str,
    words: Sequence[Span] | None = None,
    phones: Sequence[Span] | None = None,
    file: str | None = None,
) -> Line:
    """The line; bounds of words move inwards to where there is sound.

    Args:
      wav: float [n] at `rate`.
      words: each word of the text; None: nothing tells their times. The times are dropped, with
        those of phones, if there is no sound within one of them, for then they cannot be right.

    Raises:
      InputError: silence, or other words than those of the text.
    """
    wav = np.asarray(wav, np.float64)
    if rate != SAMPLE_RATE:
        wav = soxr.resample(wav, rate, SAMPLE_RATE)
    if not len(wav) or np.abs(wav).max() < 1e-4:
        raise InputError(f"{file or repr(text)}: silence where speech was expected")
    if words is not None and (said := " ".join(word.text for word in words)) != text:
        raise InputError(f"the voice says {said!r}; expected {text!r}")
    placed = words and [_samples(word, len(wav)) for word in words]
    if placed and all(_sounds(wav, word) for word in placed):
        placed = tightened(wav, placed, QUIET)
        begin, end = placed[0].start, placed[-1].stop
        return Line(
            cut_out(wav, begin, end),
            text,
            _within(placed, begin, end),
            phones and _within([_samples(phone, len(wav)) for phone in phones], begin, end),
            file,
        )
    begin, end = audible(wav, QUIET)
    return Line(cut_out(wav, begin, end), text, None, None, file)


def _samples(span: Span, n: int) -> SpokenWord:
    start, stop = (min(max(round(at * SAMPLE_RATE), 0), n) for at in (span.start, span.end))
    return SpokenWord(span.text, start, stop)


def _within(spans: Sequence[SpokenWord], begin: int, end: int) -> list[SpokenWord]:
    """The parts of spans between two samples, counted from the first."""
    moved = [
        SpokenWord(text, max(start, begin) - begin, min(stop, end) - begin)
        for text, start, stop in spans
    ]
    return [span for span in moved if span.start < span.stop]


def _sounds(wav: np.ndarray, word: SpokenWord) -> bool:
    piece = wav[word.start : word.stop]
    return len(piece) > 80 and moving_rms(piece, 0.005, 16).max() > QUIET * np.abs(wav).max()
