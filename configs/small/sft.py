"""Stage 4 of the small model: every task that a scene can be asked about.

Beside scenes, rows of speech and of sounds joined to 16 s that are asked for the times of all their
words or events: times are learned from how many are seen, and a scene has ten.

    moss-audio-jax train --config configs/small/sft.py --workdir DIR \
        --config.init_from=pretrain/export
"""

import small


def get_config():
    c = small.get_config()
    small.answers(c)
    small.listen(c)
    c.data.train = ()
    c.data.mixture.scenes = {"weight": 0.5, "paths": ("scenes/train-*.array_record",)}
    c.data.mixture.timed = {"weight": 0.3, "paths": ("joined/timed-*.array_record",)}
    c.data.mixture.sounds = {"weight": 0.2, "paths": ("joined/sounds-*.array_record",)}
    c.data.pick = small.SFT
    c.data.length = 1664
    c.data.batch = 2
    c.data.branches = 10
    c.data.chunks = 10
    c.data.augment.warp = 0.1
    c.train.steps = 1300
    c.optimizer.learning_rate = 2.5e-3
    c.optimizer.warmup = 50
    c.optimizer.final = 0.02
    c.optimizer.groups = (("audio_encoder/", 0.6), (".*", 1.0))
    return c
