"""Stage 7 of the small model: more of the answers after a chain of thought, its encoder frozen.

    moss-audio-jax train --config configs/small/reason.py --workdir DIR \
        --config.init_from=cold_start/export

The learning rate falls to 0 again.
"""

import small


def get_config(machine="cpu"):
    c = small.get_config()
    small.answers(c)
    small.asked(c)
    c.data.pick = small.REASONED
    c.train.steps = 2400
    c.optimizer.learning_rate = 4e-4
    c.optimizer.warmup = 30
    c.optimizer.final = 0.0
    c.optimizer.groups = (("audio_encoder/", 0.0), (".*", 1.0))
    return small.on(machine, "reason", c)
