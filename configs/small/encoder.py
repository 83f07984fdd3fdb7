"""Stage 1 of the small model: the encoder from scratch, under heads for words, tags and place.

    moss-audio-jax train --config configs/small/encoder.py --workdir DIR \
        --config.tokenizer=TOKENIZER_DIR --config.data.train="('scenes/train-*.array_record',)"

The decoder does not run: word-level CTC and the known times of words and sounds teach the encoder
many times faster than answers read off through an untrained decoder.
"""

import small


def get_config():
    c = small.get_config()
    c.data.length = 640
    c.data.chunks = 8
    c.data.batch = 4
    c.data.branches = 0
    c.train.steps = 2600
    c.train.decoder_loss = 0.0
    c.helpers.ctc = 0.1
    c.helpers.frames = 1.0
    c.helpers.tags = 0.3
    c.helpers.position = 0.1
    c.optimizer.learning_rate = 1.2e-3
    c.optimizer.schedule = "wsd"
    c.optimizer.warmup = 200
    c.optimizer.decay = 0.3
    c.optimizer.groups = (("audio_encoder/", 1.0), (".*", 0.0))
    return c
