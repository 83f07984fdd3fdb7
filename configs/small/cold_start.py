"""Stage 5 of the small model: answers that come after a chain of thought, beside the rest.

    moss-audio-jax train --config configs/small/cold_start.py --workdir DIR \
        --config.init_from=sft/export

The encoder is frozen: what is heard does not change, only what is made of it.
"""

import small


def get_config():
    c = small.get_config()
    small.answers(c)
    c.data.pick = small.REASONING
    c.train.steps = 600
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup = 100
    c.optimizer.final = 0.0
    c.optimizer.groups = (("audio_encoder/", 0.0), (".*", 1.0))
    return c
