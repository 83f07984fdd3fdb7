"""Stage 2 of the small model: its decoder learns to copy and to look up, from text alone.

    moss-audio-jax train --config configs/small/read.py --workdir DIR \
        --config.init_from=encoder/export

An official model starts from a language model, which can do that.
"""

import small


def get_config(machine="cpu"):
    c = small.get_config()
    small.answers(c)
    c.data.train = ()
    # A drill has a tenth of the tokens; most of what is learned must be short at first.
    c.data.mixture.drills = {"weight": 12.0, "paths": ("written/drills-*.array_record",)}
    c.data.mixture.written = {"weight": 0.4, "paths": ("written/scenes-*.array_record",)}
    c.data.length = 1664
    c.data.chunks = 1  # there is no sound
    c.data.window = 256
    c.train.steps = 600
    c.optimizer.learning_rate = 4e-3
    c.optimizer.schedule = "wsd"
    c.optimizer.warmup = 20
    c.optimizer.groups = (("audio_encoder/", 0.0), (".*", 1.0))
    return small.on(machine, "read", c)
