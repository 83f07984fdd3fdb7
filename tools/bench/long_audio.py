"""Hours of sound through the chunked encoder: seconds, and memory beside input and output.

    python tools/bench/long_audio.py [--checkpoint DIR] [--minutes 5,10,20,40,60] [--plot FILE.png]

Encodes noise of each length in one prompt, as `encode_audio` does, in float32. Memory is the
compiler's own account of temporaries. Prints one JSON line; --plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moss_audio_jax import MossAudio
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.models import encoder


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    options.add_argument("--minutes", default="5,10,20,40,60")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--plot", type=Path, metavar="FILE.png")
    args = options.parse_args()
    model = MossAudio.load(args.checkpoint, "float32")
    config, params = model.config.encoder, model.encoder_params

    @jax.jit
    def encode(params, mels, frames):
        return encoder.encode_rows(params, config, model.compute, mels, frames)

    rows = []
    for minutes in map(float, args.minutes.split(",")):
        chunks = int(np.ceil(minutes * 6000 / config.chunk_frames))
        shape = (1, chunks, config.chunk_frames, config.mel_bins)
        mels = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        batch = mels, jnp.full((1, chunks, config.chunk_frames // 8), 8)
        compiled = encode.lower(params, *batch).compile()
        took = []
        for _ in range(args.repeats):
            begun = time.perf_counter()
            jax.block_until_ready(compiled(params, *batch))
            took.append(time.perf_counter() - begun)
        held = compiled.memory_analysis().temp_size_in_bytes
        rows.append({"minutes": minutes, "seconds": min(took), "temporary_bytes": held})
    each = [row["seconds"] / row["minutes"] for row in rows]
    print(
        json.dumps(
            {"bench": "long_audio", "runs": rows, "seconds_a_minute": [min(each), max(each)]}
        )
    )
    if args.plot:
        plot(rows, args.plot)


def plot(rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    minutes = [row["minutes"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot(minutes, [row["seconds"] for row in rows], "o-")
    left.set(ylabel="seconds", title="time")
    right.plot(minutes, [row["temporary_bytes"] / 2**20 for row in rows], "o-", color="tab:red")
    right.set(ylabel="MiB", title="memory beside input and output")
    for axes in (left, right):
        axes.set(xlabel="minutes of sound")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
