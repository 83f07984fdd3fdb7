"""Tests whether a sound is like a model's training data. A small model answers fluently about any.

Two measures of one clip, both computed from the encoder's output, decide:

  doubt     mean entropy, in nats a token, of the word pieces that the encoder's CTC head hears
            (`helpers/pieces`). It is low for voices that the model knows. The head never saw an
            unknown voice, and this measure is not fitted to any.
  strangeness  log-odds that a linear probe gives to "not of the training world", from the mean and
            the standard deviation over time of one tapped layer.
            `tools/small/fit_familiarity.py` fits it on scenes of the world against recordings and
            other synthesisers.

A clip is unfamiliar if either one is above its limit. The limits are set so that 1 in 100 of the
world's own held-out scenes is above. A checkpoint has these measures if its folder `helpers` has
familiarity.json; other checkpoints give no verdict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moss_audio_jax.buckets import as_path
from moss_audio_jax.config import read_json
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import write_whole
from moss_audio_jax.weights.helpers import FOLDER, load_helpers

NAME = "familiarity"
_LEAST_TOKENS = 7  # half a second; a shorter clip has too few for a verdict


class Familiarity(NamedTuple):
    """A verdict on one clip.

    Attributes:
      score: how far the worse of both measures is above its limit, in units of that limit's scale;
        above 0 means unfamiliar.
      unfamiliar: whether the clip is.
      reason: one sentence for people; "" if the clip is familiar.
    """

    score: float
    unfamiliar: bool
    reason: str


class Measures(NamedTuple):
    """The measures of a clip: doubt in nats a token, pooled states float32 [2 D]."""

    doubt: float
    pooled: np.ndarray


class Sums(NamedTuple):
    """Over the tokens of a piece of sound: entropy in nats, states [D], squared states [D]."""

    entropy: float
    states: np.ndarray
    squares: np.ndarray
    tokens: int


class Probe(NamedTuple):
    """The fitted parameters.

    weight: float32 [2 D], bias: float; strangeness is their affine map of `Measures.pooled`.
    tap: which tapped layer is pooled.
    doubt_limit, strange_limit: verdicts above them are "unfamiliar".
    world: what the model knows, for messages.
    """

    weight: np.ndarray
    bias: float
    tap: int
    doubt_limit: float
    strange_limit: float
    world: str


class Gauge:
    """Measures and judges sound for one checkpoint. Make one with `Gauge.load`; `Hearing.measure`
    gives it what the encoder makes of clips."""

    def __init__(self, pieces: tuple[np.ndarray, np.ndarray], probe: Probe):
        self._pieces = pieces
        self.probe = probe

    @classmethod
    def load(cls, checkpoint: str | Path) -> Gauge | None:
        """The gauge of a checkpoint folder; None if it has none.

        Raises:
          InputError: its files exist but are broken.
        """
        folder = as_path(checkpoint) / FOLDER
        described = folder / f"{NAME}.json"
        if not described.is_file():
            return None
        heads, _ = load_helpers(checkpoint)
        try:
            pieces = heads["helpers/pieces/kernel"], heads["helpers/pieces/bias"]
        except KeyError:
            raise InputError(f"{folder}: {NAME}.json needs the head `pieces`") from None
        raw = read_json(described)
        try:
            probe = Probe(**{name: raw[name] for name in Probe._fields})
            probe = probe._replace(weight=np.asarray(probe.weight, np.float32))
            ok = np.isfinite([*probe.weight, *probe[1:5]]).all() and probe.weight.ndim == 1
        except (KeyError, TypeError, ValueError):
            ok = False
        if not ok:
            raise InputError(
                f"{described}: expected the numbers of tools/small/fit_familiarity.py; run it again"
            )
        return cls(pieces, probe)

    def judge(self, measures: Measures) -> Familiarity:
        """The verdict for given measures."""
        probe = self.probe
        strange = float(measures.pooled @ probe.weight + probe.bias)
        # No figures: the windows of a long file share one sentence.
        scores = {
            "its encoder cannot tell what is said": measures.doubt / probe.doubt_limit - 1,
            "its encoder tells it from the sound of its own world": strange - probe.strange_limit,
        }
        why, score = max(scores.items(), key=lambda item: item[1])
        return Familiarity(score, score > 0, why if score > 0 else "")

    def sums(self, features: np.ndarray, taps: np.ndarray) -> Sums:
        """The sums over a piece of sound, from the encoder's output [n, D] and taps [K, n, D]."""
        kernel, bias = self._pieces
        logits = features.astype(np.float32) @ kernel + bias
        logits -= logits.max(-1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        entropy = -float((np.exp(log_probs) * log_probs).sum())
        states = taps[self.probe.tap].astype(np.float32)
        return Sums(entropy, states.sum(0), np.square(states).sum(0), len(states))


def measures_of(pieces: Sequence[Sums]) -> Measures | None:
    """The measures of a clip in pieces; None for one shorter than half a second."""
    tokens = sum(piece.tokens for piece in pieces)
    if tokens < _LEAST_TOKENS:
        return None
    mean = sum(piece.states for piece in pieces) / tokens
    squares = sum(piece.squares for piece in pieces) / tokens
    spread = np.sqrt(np.maximum(squares - np.square(mean), 0))
    doubt = sum(piece.entropy for piece in pieces) / tokens
    return Measures(doubt, np.concatenate([mean, spread]).astype(np.float32))


def save(checkpoint: Path, probe: Probe, notes: Mapping[str, Any]) -> None:
    """Writes a checkpoint's probe beside its heads; `notes` says how it was fitted and measured."""
    described = probe._asdict() | {"weight": [float(f"{w:.5g}") for w in probe.weight]}
    write_whole(
        Path(checkpoint) / FOLDER / f"{NAME}.json", json.dumps({**notes, **described}) + "\n"
    )
