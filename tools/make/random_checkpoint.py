"""Writes a full-size checkpoint of random bfloat16 weights in the official layout.

    python tools/make/random_checkpoint.py OUTPUT 4b

It is for measuring speed and memory without the released weights. The answers of such a model are
noise (config.json: "random_weights": true).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from moss_audio_jax.config import RELEASED, ProcessorConfig, processor_to_official, to_official
from moss_audio_jax.weights import safetensors
from moss_audio_jax.weights.folder import new_folder
from moss_audio_jax.weights.native import total_bytes
from moss_audio_jax.weights.official import table

_BLOCK = 32 << 20  # random numbers drawn; every tensor is assembled from pieces of them


def make_random_checkpoint(output: str | Path, size: str, seed: int = 0) -> None:
    """Writes the released `size` ("4b", "8b"); holds about 200 MB at a time."""
    config = RELEASED[size]
    entries = table(config)
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(_BLOCK, np.float32).astype(ml_dtypes.bfloat16)
    noise *= np.array(0.02, noise.dtype)
    tensors = {name: (entry.tensor, noise.dtype) for entry in entries for name in entry.names}
    with new_folder(output, total_bytes(entries, noise.dtype)) as folder:
        raw = to_official(config) | {"random_weights": True}
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        raw = processor_to_official(ProcessorConfig())
        (folder / "processor_config.json").write_text(json.dumps(raw, indent=2) + "\n")
        with safetensors.Writer(folder, tensors) as writer:
            for entry in entries:
                for name in entry.names:
                    if entry.path.endswith("/scale"):
                        writer.write(name, np.ones(entry.tensor, noise.dtype))
                        continue
                    row = math.prod(entry.tensor[1:])
                    step = min(entry.tensor[0], _BLOCK // row // 2)
                    for start in range(0, entry.tensor[0], step):
                        rows = min(step, entry.tensor[0] - start)
                        at = rng.integers(_BLOCK - rows * row)
                        piece = noise[at : at + rows * row].reshape(rows, *entry.tensor[1:])
                        writer.write(name, piece, start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output")
    parser.add_argument("size", choices=sorted(RELEASED))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_random_checkpoint(args.output, args.size, args.seed)


if __name__ == "__main__":
    main()
