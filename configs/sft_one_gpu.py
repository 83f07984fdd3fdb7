"""Fine-tuning on one GPU of 24 or 80 GB: adapters, or the whole 4B model.

    moss-audio-jax train --config configs/sft_one_gpu.py:80g,8b --workdir DIR \
        --config.init_from=CHECKPOINT --config.data.train="('rows.jsonl',)"

Export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 first: by default JAX takes three quarters of a GPU.

                trained, optimizer                 rows per step    tokens per row    peak, GiB
    24g,4b      adapters of rank 64, AdamW         16, 1 at a time  2048              14.4
    24g,8b      adapters of rank 16, AdamW         16, 1 at a time  1024              20.2
    80g,4b      everything, Adafactor              8, all at once   4096              57.9
    80g,8b      adapters of rank 64, AdamW         16, 8 at a time  4096              36.8

Peaks are those that the TPU compiler reports for the same step on one v5p, as in `plan`; a GPU may
need more or less. None was run on a GPU. A second of sound takes 12.5 tokens. If memory runs out,
lower data.batch (or raise train.accumulate), data.length or lora.rank.
"""

import common

from moss_audio_jax.models import lora


def get_config(options="24g,4b"):
    options = options.split(",")
    if unknown := set(options) - {"", "24g", "80g", "4b", "8b"}:
        raise ValueError(f"unknown option {min(unknown)!r}; expected 24g, 80g, 4b, 8b")
    size = "8b" if "8b" in options else "4b"
    large = "80g" in options
    c = common.get_config(size)
    c.train.steps = 2000
    c.optimizer.warmup = 60
    c.data.length = 4096 if large else 2048
    if not large and size == "8b":
        c.data.length = 1024
        c.train.loss_chunk = 256
    if large and size == "4b":  # the whole model, with an optimizer that has a small state
        c.data.batch = 8
        c.optimizer.name = "adafactor"
        c.optimizer.learning_rate = 1e-5
    else:
        c.data.batch = 16
        c.train.accumulate = 2 if large else 16
        c.optimizer.learning_rate = 1e-4
        c.optimizer.weight_decay = 0.0
        c.lora.rank = 64 if large or size == "4b" else 16
        c.lora.alpha = 2.0
        c.lora.targets = lora.DECODER
    return c
