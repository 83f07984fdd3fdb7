"""Models that speak from phonemes and tell how long each phoneme lasts."""

from __future__ import annotations

import functools
import importlib.util
import io
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moss_audio_jax.errors import InputError
from moss_audio_jax.world.recordings.voices.line import Span
from moss_audio_jax.world.worker import Worker


def here(*modules: str) -> bool:
    """Whether the modules, ONNX Runtime and espeak-ng are installed."""
    needed = (*modules, "onnxruntime", "espeakng_loader")
    return all(importlib.util.find_spec(module) is not None for module in needed)


class Tokens:
    """A text as a model's tokens, and which of them are of which word and phoneme."""

    def __init__(self, text: str, before: Sequence[int], space: Sequence[int]):
        """Tokens come one word after the other by `add`; `space` stands between words."""
        self._text = text.split()
        self._space = space
        self.ids = list(before)
        self._words: list[int] = []  # the first token of each
        self._phones: list[tuple[str, int, int]] = []

    def add(self, word: Sequence[tuple[str, Sequence[int]]]) -> None:
        """A word: for each phoneme espeak's name and its tokens, of which there may be none."""
        if self._words:
            self.ids += self._space
        self._words.append(len(self.ids))
        for name, ids in word:
            self._phones.append((name, len(self.ids), len(self.ids) + len(ids)))
            self.ids += ids

    def close(self, stop: Sequence[int], after: Sequence[int]) -> None:
        """A full stop, up to whose end the last word may last, and what the model needs then."""
        self.ids += stop
        self._words.append(len(self.ids))
        self.ids += after

    def spans(
        self, frames: np.ndarray, frame: float, early: float = 0.0
    ) -> tuple[list[Span], list[Span]]:
        """(words, phones); a word lasts until the next one begins.

        Args:
          frames: how long each token lasts, [tokens], in frames of `frame` seconds.
          early: seconds by which the sound comes before what these durations say.
        """
        at = np.concatenate([[0.0], np.cumsum(frames.ravel()) * frame]) - early
        edges = [float(at[token]) for token in self._words]
        words = [
            Span(w, *edge) for w, edge in zip(self._text, itertools.pairwise(edges), strict=True)
        ]
        return words, [Span(name, float(at[a]), float(at[b])) for name, a, b in self._phones]


def run(model: Path, durations: str, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The model's outputs and the tensor `durations`; the same inputs give the same sound.

    The last bits may differ between machines, as in every product of matrices.
    """
    out = io.BytesIO()
    np.savez(out, **given)
    answer = _worker_of(os.getpid(), model, durations).ask(out.getvalue())
    if not answer:
        raise InputError(f"{model}: the model did not run; does its package fit onnxruntime?")
    found = np.load(io.BytesIO(answer))
    return [found[name] for name in found.files]


@functools.cache
def _worker_of(pid: int, model: Path, durations: str) -> Worker:
    script = Path(__file__).with_name("onnx_worker.py")
    return Worker(model.name, [], script, str(model), durations)
