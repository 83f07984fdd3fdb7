"""Stage 7 of the small model: new decoder layers learn to copy and to look up, from text alone.

    moss-audio-jax train --config configs/small/read.py --workdir DIR \
        --config.init_from=deepen/export

It starts from the model of stage 6 with more decoder layers (`tools/small/deepen.py`), and only
those are trained. An official model starts from a language model, which can copy.
"""

import small


def get_config(machine="cpu"):
    c = small.get_config()
    small.answers(c)
    c.data.train = ()
    c.data.mixture = small.written(12.0, 0.4)  # what is to be found must be near at first
    c.data.length = 1664
    c.data.chunks = 1  # there is no sound
    c.data.window = 256
    c.train.steps = 500
    c.optimizer.learning_rate = 4e-3
    c.optimizer.schedule = "wsd"
    c.optimizer.warmup = 20
    small.deepened(c)
    return small.on(machine, "read", c)
