"""Stage 2 of the small model: adapter, mergers and decoder learn to read the frozen encoder.

    moss-audio-jax train --config configs/small/adapter.py --workdir DIR \
        --config.init_from=encoder/export

The paper trains adapter and mergers alone here, under a decoder that knows language. Ours knows
nothing yet, so it learns along: above all to read words off the audio, from many clips with two
questions each. The adapter is also told which piece each audio token should look like, and when.
"""

import small


def get_config(machine="cpu"):
    c = small.get_config()
    small.answers(c)
    c.data.branches = 2
    c.data.chunks = 12
    c.data.pick = small.READING
    c.helpers.adapter = 0.5
    c.helpers.clock = 0.1
    c.train.steps = 1200
    c.optimizer.learning_rate = 4e-3
    c.optimizer.schedule = "constant"
    c.optimizer.warmup = 50
    c.optimizer.groups = (("audio_encoder/", 0.0), (".*", 1.0))
    return small.on(machine, "adapter", c)
