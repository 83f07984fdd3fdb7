"""Stage 4 of the small model: all weights, on transcripts, timestamps, timelines and captions.

Besides single scenes there are rows joined end to end: speech with long transcripts, speech with
the times of all words, and sounds with the times of all events.

    moss-audio-jax train --config configs/small/pretrain.py --workdir DIR \
        --config.init_from=adapter/export
"""

import small


def get_config(machine="cpu"):
    c = small.get_config()
    small.answers(c)
    c.data.train = ()
    c.data.mixture.scenes = {"weight": 0.4, "paths": ("scenes/train-*.array_record",)}
    c.data.mixture.speech = {"weight": 0.3, "paths": ("joined/speech-*.array_record",)}
    c.data.mixture.timed = {"weight": 0.2, "paths": ("joined/timed-*.array_record",)}
    c.data.mixture.sounds = {"weight": 0.1, "paths": ("joined/sounds-*.array_record",)}
    c.data.length = 1664
    c.data.batch = 2
    c.data.branches = 4
    c.data.chunks = 12
    c.data.pick = small.PRETRAIN
    c.train.steps = 1150
    small.listen(c)
    c.optimizer.learning_rate = 3e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = 50
    c.optimizer.final = 0.1
    c.optimizer.groups = (("audio_encoder/", 0.3), (".*", 1.0))
    return small.on(machine, "pretrain", c)
