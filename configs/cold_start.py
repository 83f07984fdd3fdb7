"""Reasoning cold start: audio and text rows whose answers hold a <think> block.

    moss-audio-jax train --config configs/cold_start.py:8b --workdir DIR \
        --config.init_from=SFT_EXPORT --config.data.train="('reasoning.jsonl',)"
"""

import common


def get_config(size="4b"):
    c = common.get_config(size)
    c.data.length = 16_384  # chains of thought are long
    c.data.batch = 128
    c.train.steps = 1000
    c.optimizer.learning_rate = 5e-6
    c.optimizer.warmup = 50
    return c
