"""Stage 6 of the small model: answers after a chain of thought, beside all other answers.

    moss-audio-jax train --config configs/small/cold_start.py --workdir DIR \
        --config.init_from=sft/export

The learning rate falls to 0.
"""

import small


def get_config(machine="cpu"):
    c = small.get_config()
    small.answers(c)
    small.listen(c)
    small.asked(c)
    c.data.pick = small.REASONING
    c.train.steps = 600
    c.optimizer.learning_rate = 4e-4
    c.optimizer.warmup = 30
    c.optimizer.final = 0.0
    c.optimizer.groups = (("audio_encoder/", 0.3), (".*", 1.0))
    return small.on(machine, "cold_start", c)
