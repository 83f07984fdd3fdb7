"""Stage 9 of the small model: all tasks again, on both worlds, with the encoder of stage 8 frozen.

    moss-audio-jax train --config configs/small/tell.py --workdir DIR \
        --config.init_from=align/export

In this last stage the learning rate falls to 0.
"""

import small


def get_config(machine="cpu"):
    c = small.get_config()
    c.model.decoder.vocab_size = small.EXTENDED
    small.answers(c)
    small.asked(c)
    c.data.mixture.recordings = {"weight": 0.6, "paths": ("recordings/train-*.array_record",)}
    c.data.mixture.update(small.joined({"sounds": 0.1}, "joined_recordings"))
    c.data.mixture.update(small.joined({"timed": 0.2, "speech": 0.3}, "joined_voices"))
    c.data.pick = small.TELLING
    c.helpers.adapter = 0.2
    c.train.steps = 1200
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup = 50
    c.optimizer.final = 0.0
    c.optimizer.groups = (("audio_encoder/", 0.0), (".*", 1.0))
    return small.on(machine, "tell", c)
