"""Stage 3 of the small model: everything, on transcripts, timestamps, timelines and captions.

    moss-audio-jax train --config configs/small/pretrain.py --workdir DIR \
        --config.init_from=adapter/export
"""

import small


def get_config():
    c = small.get_config()
    small.answers(c)
    c.data.pick = small.PRETRAIN
    c.train.steps = 800
    small.listen(c)
    c.optimizer.learning_rate = 4e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = 50
    c.optimizer.final = 0.1
    c.optimizer.groups = (("audio_encoder/", 0.3), (".*", 1.0))
    return c
