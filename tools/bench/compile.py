"""Does compile time grow with depth? Prints one JSON line: CPU seconds at 4 and at 36 layers.

python tools/bench/compile.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp

from moss_audio_jax.config import Compute, DecoderConfig, EncoderConfig, ModelConfig
from moss_audio_jax.models import decoder, moss_audio


def lowered(layers: int) -> jax.stages.Lowered:
    """Logits of one prompt with audio, `layers` deep in decoder and encoder, three taps."""
    config = ModelConfig(
        EncoderConfig(
            d_model=64,
            layers=layers,
            heads=4,
            ffn_dim=128,
            conv_channels=16,
            output_dim=64,
            tap_layers=(0, 1, 2),
        ),
        DecoderConfig(
            hidden_size=64,
            ffn_dim=128,
            layers=layers,
            heads=4,
            kv_heads=2,
            head_dim=16,
            vocab_size=512,
        ),
        adapter_dim=128,
    )
    row = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    batch = dict.fromkeys(("tokens", "positions", "segment_ids", "audio_index"), row)
    batch["frames"] = jax.ShapeDtypeStruct((1, 2, 50), jnp.int32)
    batch["mels"] = jax.ShapeDtypeStruct((1, 2, 400, 128), jnp.float32)
    compute = Compute(dtype="float32")

    def logits(params, batch):
        hidden = moss_audio.hidden_states(params, config, compute, batch)
        return decoder.logits(params, hidden)

    return jax.jit(logits).lower(moss_audio.abstract_params(config), batch)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    rounds = options.parse_args().rounds
    seconds: dict[int, list[float]] = {4: [], 36: []}
    for _ in range(rounds):
        for layers, found in seconds.items():
            program = lowered(layers)
            jax.clear_caches()
            start = time.process_time()
            program.compile()
            found.append(time.process_time() - start)
    medians = {layers: statistics.median(found) for layers, found in seconds.items()}
    print(
        json.dumps(
            {
                "cpu_seconds": {str(k): round(v, 2) for k, v in medians.items()},
                "ratio": round(medians[36] / medians[4], 3),
                "hlo_lines": {str(k): lowered(k).as_text().count("\n") for k in seconds},
            }
        )
    )


if __name__ == "__main__":
    main()
