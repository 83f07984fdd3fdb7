"""Stage 3 of the small model: adapter, mergers and decoder train on the frozen encoder's output.

    moss-audio-jax train --config configs/small/adapter.py --workdir DIR \
        --config.init_from=read/export

In this stage the paper trains only adapter and mergers, with a trained language model as decoder.
Here the decoder can only copy and look up, so it trains too, above all to read words from the
audio, from many clips with two questions each. Helper losses also teach the adapter which piece is
said at each audio token, and the token's time.
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
