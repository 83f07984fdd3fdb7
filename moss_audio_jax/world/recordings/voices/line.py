"""A line from the samples and word times that a package gave."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import soxr

from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.errors import InputError
from moss_audio_jax.world.dsp import audible, moving_rms
from moss_audio_jax.world.espeak import SpokenWord, cut_out, tightened
from moss_audio_jax.world.recordings.source import Line

QUIET = 10 ** (-40 / 20)  # relative to the loudest 5 ms: recorded and neural pauses hiss


def line(
    wav: np.ndarray,
    rate: int,
    text: str,
    bounds: Sequence[tuple[float, float]] | None,
    file: str | None = None,
) -> Line:
    """The line; bounds of words move inwards to where there is sound.

    Args:
      wav: float [n] at `rate`.
      bounds: (start, end) of each word of the text, in seconds; None: nothing tells them. They
        are dropped if there is no sound between two of them, for then they cannot be right.

    Raises:
      InputError: silence.
    """
    wav = np.asarray(wav, np.float64)
    if rate != SAMPLE_RATE:
        wav = soxr.resample(wav, rate, SAMPLE_RATE)
    if not len(wav) or np.abs(wav).max() < 1e-4:
        raise InputError(f"{file or repr(text)}: silence where speech was expected")
    if bounds is not None:
        words = [
            SpokenWord(word, round(start * SAMPLE_RATE), min(round(end * SAMPLE_RATE), len(wav)))
            for word, (start, end) in zip(text.split(), bounds, strict=True)
        ]
        if all(_sounds(wav, word) for word in words):
            words = tightened(wav, words, QUIET)
            begin, end = words[0].start, words[-1].stop
            words = [SpokenWord(w.text, w.start - begin, w.stop - begin) for w in words]
            return Line(cut_out(wav, begin, end), text, words, None, file)
    begin, end = audible(wav, QUIET)
    return Line(cut_out(wav, begin, end), text, None, None, file)


def _sounds(wav: np.ndarray, word: SpokenWord) -> bool:
    piece = wav[max(word.start, 0) : word.stop]
    return len(piece) > 80 and moving_rms(piece, 0.005, 16).max() > QUIET * np.abs(wav).max()
