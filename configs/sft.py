"""Supervised fine-tuning of a whole model on audio questions, captions, ASR, timestamps.

    moss-audio-jax train --config configs/sft.py --workdir DIR \
        --config.init_from=CHECKPOINT --config.data.train="('rows.jsonl',)"

`configs/sft.py:8b` only changes the sizes that `plan` uses; a checkpoint has its own.
`configs/sft.py:small` fine-tunes the package's small model on a laptop, without init_from.
"""

import common

from moss_audio_jax.config import DEFAULT_CHECKPOINT


def get_config(size="4b"):
    c = common.get_config("" if size == "small" else size)
    c.train.steps = 2000
    c.optimizer.learning_rate = 1e-5
    c.optimizer.warmup = 60
    if size == "small":
        c.init_from = str(DEFAULT_CHECKPOINT)
        c.data.length = 1024
        c.data.batch = 4
        c.train.steps = 200
        c.train.dtype = "float32"
        c.train.remat = "none"
        c.optimizer.learning_rate = 1e-4
        c.optimizer.warmup = 20
        c.checkpoint.every = 100
    return c
