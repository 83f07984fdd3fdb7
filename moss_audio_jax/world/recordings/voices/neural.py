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
from moss_audio_jax.world import espeak
from moss_audio_jax.world.worker import Worker


def here(*modules: str) -> bool:
    """Whether the modules, ONNX Runtime and espeak-ng are installed."""
    needed = (*modules, "onnxruntime", "espeakng_loader")
    return all(importlib.util.find_spec(module) is not None for module in needed)


def words(text: str) -> list[str]:
    """American phonemes of each word."""
    return espeak.phonemes(text, "en-us")


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


def bounds(frames: np.ndarray, first: Sequence[int], frame: float) -> list[tuple[float, float]]:
    """(start, end) in seconds of words; a word lasts until the next one begins.

    Args:
      frames: how long each token lasts, [tokens].
      first: the first token of each word, then the token after the last word.
      frame: seconds.
    """
    starts = (np.cumsum(frames) - frames) * frame
    edges = [float(starts[token]) for token in first]
    return list(itertools.pairwise(edges))


@functools.cache
def _worker_of(pid: int, model: Path, durations: str) -> Worker:
    script = Path(__file__).with_name("onnx_worker.py")
    return Worker(model.name, [], script, str(model), durations)
