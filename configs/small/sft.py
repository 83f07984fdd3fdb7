"""Stage 5 of the small model: all tasks.

Besides scenes there are rows of speech and of sounds, joined to 16 s, with the times of all their
words or events. A model learns times from many examples, and a scene only has about ten.

    moss-audio-jax train --config configs/small/sft.py --workdir DIR \
        --config.init_from=pretrain/export
"""

import small


def get_config(machine="cpu"):
    c = small.get_config()
    small.answers(c)
    small.listen(c)
    small.asked(c)
    c.data.pick = small.SFT
    c.train.steps = 1300
    c.optimizer.learning_rate = 2.5e-3
    c.optimizer.warmup = 50
    c.optimizer.final = 0.1
    c.optimizer.groups = (("audio_encoder/", 0.6), (".*", 1.0))
    return small.on(machine, "sft", c)
