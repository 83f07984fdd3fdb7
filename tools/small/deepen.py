"""Gives the small model more decoder layers, behind its own, which change nothing at first.

    python tools/small/deepen.py --output DIR [--checkpoint DIR] [--layers 4]

The outputs of the new layers start at zero, so the model answers as before, and they can be trained
while all others rest (`optimizer.layers`): what the model hears is kept, whatever the new layers
learn. (arXiv 2401.02415 expands language models so, with new layers between the old ones. Here they
stand behind them, so that nothing has to be computed backwards through the others.)
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np

from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.models.decoder import init_decoder
from moss_audio_jax.tree import flatten, unflatten
from moss_audio_jax.weights.convert import load_params, save_official
from moss_audio_jax.weights.helpers import load_helpers, save_helpers
from moss_audio_jax.weights.opening import read_config

LAYERS = 4
STACK = "language_model/layers/"
OUTPUTS = ("self_attn/o_proj/kernel", "mlp/down_proj/kernel")


def deepen(checkpoint: Path, output: Path, count: int = LAYERS, seed: int = 0) -> None:
    """Writes `checkpoint` with `count` more layers in its decoder, in float32.

    Raises:
      InputError: `output` exists.
    """
    config = read_config(checkpoint)
    more = dataclasses.replace(config.decoder, layers=count)
    fresh = flatten(init_decoder(jax.random.key(seed), more)["layers"])
    leaves = {k: np.asarray(v, np.float32) for k, v in flatten(load_params(checkpoint)).items()}
    for path, leaf in fresh.items():
        leaf = np.asarray(leaf, np.float32) * (path not in OUTPUTS)
        leaves[STACK + path] = np.concatenate([leaves[STACK + path], leaf])
    decoder = dataclasses.replace(config.decoder, layers=config.decoder.layers + count)
    config = dataclasses.replace(config, decoder=decoder)
    save_official(output, unflatten(leaves), config, files_from=checkpoint)
    heads, tags = load_helpers(checkpoint)
    if heads:
        save_helpers(output, {k: v.astype(np.float32) for k, v in heads.items()}, tags)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, metavar="DIR")
    options.add_argument("--output", type=Path, required=True, metavar="DIR")
    options.add_argument("--layers", type=int, default=LAYERS, help="how many more")
    args = options.parse_args()
    deepen(args.checkpoint, args.output, args.layers)


if __name__ == "__main__":
    main()
