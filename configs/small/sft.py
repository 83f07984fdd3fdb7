"""Stage 4 of the small model: every task that a scene can be asked about.

    moss-audio-jax train --config configs/small/sft.py --workdir DIR \
        --config.init_from=pretrain/export
"""

import small


def get_config():
    c = small.get_config()
    small.answers(c)
    small.listen(c)
    c.data.pick = small.SFT
    c.data.branches = 4
    c.data.chunks = 6
    c.train.steps = 1500
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup = 30
    c.optimizer.final = 0.05
    c.optimizer.groups = (("audio_encoder/", 0.3), (".*", 1.0))
    return c
