"""Stage 3 of the small model: everything, on transcripts, timestamps, timelines and captions.

Beside single scenes, whose rows ask two questions each, rows of speech joined end to end: long
transcripts, with more words to a prompt.

    moss-audio-jax train --config configs/small/pretrain.py --workdir DIR \
        --config.init_from=adapter/export
"""

import small


def get_config():
    c = small.get_config()
    small.answers(c)
    c.data.train = ()
    c.data.mixture.scenes = {"weight": 0.6, "paths": ("scenes/train-*.array_record",)}
    c.data.mixture.speech = {"weight": 0.4, "paths": ("joined/speech-*.array_record",)}
    c.data.branches = 2
    c.data.chunks = 12
    c.data.pick = small.PRETRAIN
    c.train.steps = 1150
    small.listen(c)
    c.optimizer.learning_rate = 3e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = 50
    c.optimizer.final = 0.1
    c.optimizer.groups = (("audio_encoder/", 0.3), (".*", 1.0))
    return c
