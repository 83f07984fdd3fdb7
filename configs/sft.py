"""Supervised fine-tuning of a whole model on audio questions, captions, ASR, timestamps.

    moss-audio-jax train --config configs/sft.py --workdir DIR \
        --config.init_from=CHECKPOINT --config.data.train="('rows.jsonl',)"

`configs/sft.py:8b` only changes the sizes that are planned for; a checkpoint brings its own.
"""

import common


def get_config(size="4b"):
    c = common.get_config(size)
    c.train.steps = 2000
    c.optimizer.learning_rate = 1e-5
    c.optimizer.warmup = 60
    return c
