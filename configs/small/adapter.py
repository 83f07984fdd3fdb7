"""Stage 2 of the small model: adapter, mergers and decoder learn to read the frozen encoder.

    moss-audio-jax train --config configs/small/adapter.py --workdir DIR \
        --config.init_from=encoder/export

The paper trains adapter and mergers alone here, under a decoder that knows language. Ours knows
nothing yet, so it learns along. The learning rate does not fall: stage 3 goes on from there.
"""

import small


def get_config():
    c = small.get_config()
    small.answers(c)
    c.data.pick = small.PRETRAIN
    c.train.steps = 400
    c.optimizer.learning_rate = 4e-3
    c.optimizer.schedule = "constant"
    c.optimizer.warmup = 50
    c.optimizer.groups = (("audio_encoder/", 0.0), (".*", 1.0))
    return c
