"""Stage 8 of the small model: its new decoder layers learn all tasks.

    moss-audio-jax train --config configs/small/recall.py --workdir DIR \
        --config.init_from=read/export

What stands before these layers is not trained. Texts to copy stay in the mixture.
"""

import small


def get_config(machine="cpu"):
    c = small.get_config()
    small.answers(c)
    small.asked(c)
    c.data.mixture.update(small.written(3.0, 0.4))
    c.data.pick = small.REASONED
    c.data.batch = 4
    c.train.steps = 3000
    c.optimizer.learning_rate = 3e-3
    c.optimizer.schedule = "wsd"
    c.optimizer.warmup = 20
    c.optimizer.decay = 0.4
    c.optimizer.final = 0.0
    small.deepened(c)
    return small.on(machine, "recall", c)
