"""LoRA fine-tuning: rank 64, alpha 2 as in the official script, all projections of the decoder.

    moss-audio-jax train --config configs/lora.py --workdir DIR \
        --config.init_from=CHECKPOINT --config.data.train="('rows.jsonl',)"

`--config.lora.targets` is a regular expression; `configs/lora.py:encoder` adapts the encoder's
q, k and v as well. `configs/lora.py:8b` (or `8b,encoder`) only changes the sizes that `plan` uses;
a checkpoint has its own.
"""

import common

from moss_audio_jax.models import lora


def get_config(options="4b"):
    options = options.split(",")
    if unknown := set(options) - {"", "4b", "8b", "encoder"}:
        raise ValueError(f"unknown option {min(unknown)!r}; expected 4b, 8b, encoder")
    c = common.get_config("8b" if "8b" in options else "4b")
    c.train.steps = 2000
    c.optimizer.learning_rate = 1e-4
    c.optimizer.weight_decay = 0.0
    c.data.batch = 64
    c.lora.rank = 64
    c.lora.alpha = 2.0
    c.lora.targets = f"{lora.DECODER}|{lora.ENCODER}" if "encoder" in options else lora.DECODER
    return c
