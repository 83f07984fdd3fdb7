"""Continued training of the decoder alone, on rows of text, without audio and encoder.

It also lets `plan` be compared with trainers of language models.

    moss-audio-jax train --config configs/decoder.py --workdir DIR \
        --config.init_from=CHECKPOINT --config.data.train="('text.jsonl',)"
"""

import common


def get_config(size="4b"):
    c = common.get_config(size)
    c.data.length = 4096
    c.data.chunks = 0
    c.train.steps = 2000
    c.optimizer.learning_rate = 1e-5
    c.optimizer.warmup = 60
    c.optimizer.groups = (("^(language_model|lm_head)/", 1.0), (".*", 0.0))
    return c
