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

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moss_audio_jax.audio.lengths import audio_tokens, chunk_frames
from moss_audio_jax.config import Compute, EncoderConfig, read_json
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import write_whole
from moss_audio_jax.models.encoder import encode
from moss_audio_jax.weights.helpers import FOLDER, load_helpers

NAME = "familiarity"
_BUCKETS = (1, 4, 16, 64)  # chunks encoded at a time
_SHORTEST_FRAMES = 50  # half a second; a shorter clip has too few tokens for a verdict


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
    """Measures clips for one checkpoint. Make one with `Gauge.load`."""

    def __init__(self, pieces: tuple[np.ndarray, np.ndarray], probe: Probe):
        self._pieces = pieces
        self.probe = probe

    @classmethod
    def load(cls, checkpoint: str | Path) -> Gauge | None:
        """The gauge of a checkpoint folder; None if it has none.

        Raises:
          InputError: its files exist but are broken.
        """
        folder = Path(checkpoint) / FOLDER
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

    def measure(
        self,
        mels: Sequence[np.ndarray],
        params: Any,
        config: EncoderConfig,
        compute: Compute,
        mesh: jax.sharding.Mesh,
    ) -> list[Measures | None]:
        """Measures clips from their log-mels [128, F]; None for one shorter than half a second.

        Args:
          params: the encoder's.
        """
        size = config.chunk_frames
        chunks: list[tuple[int, np.ndarray]] = []  # clip, log-mel [F, 128]
        for number, mel in enumerate(mels):
            if mel.shape[1] < _SHORTEST_FRAMES:
                continue
            start = 0
            for frames in chunk_frames(mel.shape[1], size):
                chunks.append((number, mel[:, start : start + frames].T))
                start += frames
        totals: list[Any] = [None] * len(mels)
        for batch in _batches(chunks):
            places = next(b for b in _BUCKETS if b >= len(batch))
            padded = np.zeros((places, size, 128), np.float32)
            frames = np.zeros(places, np.int32)
            for i, (_, mel) in enumerate(batch):
                padded[i, : len(mel)], frames[i] = mel, len(mel)
            with jax.set_mesh(mesh):
                sums = _sums(params, self._pieces, padded, frames, config, compute, self.probe.tap)
            for (number, mel), *row in zip(batch, *map(np.asarray, sums), strict=False):
                row = [*row, audio_tokens(len(mel))]
                so_far = totals[number]
                if so_far is not None:
                    row = [a + b for a, b in zip(so_far, row, strict=True)]
                totals[number] = row
        return [None if each is None else _measures(*each) for each in totals]


def save(checkpoint: Path, probe: Probe, notes: Mapping[str, Any]) -> None:
    """Writes a checkpoint's probe beside its heads; `notes` says how it was fitted and measured."""
    described = probe._asdict() | {"weight": [float(f"{w:.5g}") for w in probe.weight]}
    write_whole(
        Path(checkpoint) / FOLDER / f"{NAME}.json", json.dumps({**notes, **described}) + "\n"
    )


def _measures(entropy: float, total: np.ndarray, squares: np.ndarray, tokens: int) -> Measures:
    mean = total / tokens
    spread = np.sqrt(np.maximum(squares / tokens - np.square(mean), 0))
    return Measures(float(entropy) / tokens, np.concatenate([mean, spread]).astype(np.float32))


def _batches(chunks: Sequence) -> Iterator[Sequence]:
    for start in range(0, len(chunks), _BUCKETS[-1]):
        yield chunks[start : start + _BUCKETS[-1]]


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _sums(params, pieces, mels, frames, config, compute, tap) -> tuple[jax.Array, ...]:
    """Sums over each chunk's tokens: entropy [N], states [N, D], squared states [N, D]."""
    # Each chunk is padded to its own length, as a separate clip would be.
    features, taps = encode(params, config, compute, mels, frames, frames)
    kernel, bias = pieces
    log_probs = jax.nn.log_softmax(features.astype(jnp.float32) @ kernel + bias)
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, -1)
    states = taps[tap].astype(jnp.float32)
    inside = jnp.arange(states.shape[1]) < audio_tokens(frames)[:, None]  # [N, S]
    states = jnp.where(inside[..., None], states, 0)
    return (
        jnp.sum(jnp.where(inside, entropy, 0), -1),
        jnp.sum(states, 1),
        jnp.sum(jnp.square(states), 1),
    )
