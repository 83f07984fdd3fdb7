"""Fits the small model's adapter and mergers to a new encoder, so that its decoder reads on.

    python tools/small/align.py --workdir small --old extend/export --new hear/export \
        --output align/export [--steps 1500] [--sets joined joined_voices]

`hear` trains the encoder alone, and the decoder behind it no longer understands what it hears. Here
the new model's adapter and mergers learn to give the decoder what the old model's gave it, for
clips that the old model knows: the loss is the squared error over the old outputs' variance. No
decoder runs, so an hour of sound costs little more than hearing it twice. So a decoder can learn
behind one encoder while the next one is trained. Clips are the joined scenes of `train.py --only
data`.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moss_audio_jax.audio.lengths import FRAMES_PER_TOKEN
from moss_audio_jax.config import Compute, ModelConfig
from moss_audio_jax.data.batch import token_frames
from moss_audio_jax.data.sources import Source
from moss_audio_jax.errors import InputError
from moss_audio_jax.models import adapter
from moss_audio_jax.models.encoder import encode
from moss_audio_jax.weights.convert import load_params, save_official
from moss_audio_jax.weights.helpers import load_helpers, save_helpers
from moss_audio_jax.weights.opening import read_config

STEPS, RATE = 1500, 2e-3
STRIPS = 32  # of a step, each of `chunk_frames`
COMPUTE = Compute("float32")
TRAINED = ("audio_adapter", "mergers")


def joined(workdir: Path, sets: Sequence[str]) -> list[str]:
    """The shards of some folders of joined scenes."""
    paths = []
    for name in sets:
        found = sorted(map(str, (workdir / name).glob("all-*.array_record")))
        if not found:
            raise InputError(f"{workdir / name}: no shards; run train.py --only data first")
        paths += found
    return paths


def strips(paths: list[str], size: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches without end: log-mels [STRIPS, size, 128] and the frames of each strip [STRIPS]."""
    sources = [Source(path) for path in paths]
    rows = [(source, i) for source in sources for i in range(len(source))]
    draw = np.random.default_rng(seed)
    mels, frames = np.zeros((STRIPS, size, 128), np.float32), np.zeros(STRIPS, np.int32)
    at = 0
    while True:
        for number in draw.permutation(len(rows)):
            source, index = rows[number]
            clip = np.asarray(source[index].clips[0], np.float32).T
            for start in range(0, len(clip), size):
                piece = clip[start : start + size]
                mels[at], frames[at] = 0, len(piece)
                mels[at, : len(piece)] = piece
                at += 1
                if at == STRIPS:
                    yield mels.copy(), frames.copy()
                    at = 0


def heard(
    params: Any, config: ModelConfig, mels: jax.Array, frames: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The encoder's features [N, S, O] and the taps that are merged [K, N, S, O]."""
    features, taps = encode(params["audio_encoder"], config.encoder, COMPUTE, mels, frames)
    return features, taps[: config.inject_layers]


def given(
    params: Any, config: ModelConfig, features: jax.Array, taps: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What the decoder gets of them: [N, S, D] and [K, N, S, D]."""
    own = adapter.adapt(params["audio_adapter"], config, features)
    return own, adapter.merge(params["mergers"], config, taps)


def unlike(found: jax.Array, wanted: jax.Array, there: jax.Array) -> jax.Array:
    """Mean squared error over variance, of arrays [..., N, S, D] where `there` [N, S] holds."""
    weight = there[..., None] / (jnp.sum(there) * wanted.shape[-1])
    over = (-3, -2, -1)
    mean = jnp.sum(wanted * there[..., None], (-3, -2), keepdims=True) / jnp.sum(there)
    variance = jnp.sum(weight * (wanted - mean) ** 2, over)
    return jnp.mean(jnp.sum(weight * (found - wanted) ** 2, over) / variance)


def align(
    old: Path, new: Path, output: Path, paths: list[str], steps: int = STEPS, rate: float = RATE
) -> None:
    """Writes the model in `new` with an adapter and mergers that follow those in `old`.

    Raises:
      InputError: the two models do not have the same sizes, or `output` exists.
    """
    if output.exists():
        raise InputError(f"{output}: exists already; name a new folder")
    config = read_config(new)
    if read_config(old) != config:
        raise InputError(f"{old}, {new}: expected models of the same sizes")
    models = tuple(jax.tree.map(jnp.asarray, load_params(folder)) for folder in (old, new))
    size = config.encoder.chunk_frames
    optimizer = optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=0.0)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        trained: Any, state: Any, models: tuple[Any, Any], mels: jax.Array, frames: jax.Array
    ) -> tuple:
        before, now = models
        there = (frames > 0).astype(jnp.float32)
        wanted = given(before, config, *heard(before, config, mels, frames))
        found = heard(now, config, mels, frames)

        def loss(trained: Any) -> tuple[jax.Array, tuple]:
            errors = tuple(map(unlike, given(trained, config, *found), wanted, (there, there)))
            return sum(errors), errors

        (_, errors), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        change, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, change), state, jnp.stack(errors)

    # Copies, because a step reuses the memory of what it trains.
    trained = {name: jax.tree.map(jnp.copy, models[1][name]) for name in TRAINED}
    state = optimizer.init(trained)
    begun, losses = time.monotonic(), []
    for number, (mels, frames) in zip(
        range(1, steps + 1), strips(paths, size, seed=0), strict=False
    ):
        there = token_frames(frames, size // FRAMES_PER_TOKEN)
        trained, state, errors = step(trained, state, models, mels, there)
        losses.append(np.asarray(errors))
        if number % 50 == 0 or number == steps:
            own, merged = np.mean(losses, axis=0)
            losses = []
            print(
                f"step {number}/{steps}  adapter {own:.4f}  mergers {merged:.4f}  "
                f"{time.monotonic() - begun:.0f} s",
                flush=True,
            )
    save_official(output, {**models[1], **trained}, config, files_from=new)
    heads, tags = load_helpers(new)
    if heads:
        save_helpers(output, heads, tags)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--workdir", type=Path, required=True, metavar="DIR")
    for name in ("old", "new", "output"):
        options.add_argument(f"--{name}", type=Path, required=True, help="in WORKDIR")
    options.add_argument("--sets", nargs="+", default=["joined"], help="folders in WORKDIR")
    options.add_argument("--steps", type=int, default=STEPS)
    options.add_argument("--learning-rate", type=float, default=RATE)
    args = options.parse_args()
    paths = joined(args.workdir, args.sets)
    folders = (args.workdir / each for each in (args.old, args.new, args.output))
    align(*folders, paths, args.steps, args.learning_rate)


if __name__ == "__main__":
    main()
