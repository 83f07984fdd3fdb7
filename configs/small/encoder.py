"""Stage 1 of the small model: the encoder from scratch, with heads for words, tags and position.

    moss-audio-jax train --config configs/small/encoder.py --workdir DIR

Run it in the folder where `tools/small/train.py` made tokenizer/ and joined/ (scenes joined end to
end). Of five clips, two are of all scenes, two only have speech, which takes longest to learn, and
one only has sounds. The decoder does not run. Helper losses train the encoder directly on the
words, their times, and the tags of what sounds when.
"""

import small


def get_config(machine="cpu"):
    c = small.get_config()
    c.tokenizer = "tokenizer"
    c.data.train = ()
    c.data.mixture = small.joined({"all": 1.0, "speech": 1.0, "sounds": 0.5}, "joined")
    c.data.length = 768
    c.data.chunks = 8
    c.data.batch = 4
    c.data.branches = 0
    c.data.augment.warp = 0.1
    c.train.steps = 3600
    c.train.decoder_loss = 0.0
    c.helpers.ctc = 0.1
    c.helpers.frames = 1.0
    c.helpers.tags = 0.3
    c.helpers.position = 0.1
    c.optimizer.learning_rate = 5e-3
    c.optimizer.schedule = "wsd"
    c.optimizer.warmup = 100
    c.optimizer.decay = 0.3
    c.optimizer.groups = (("audio_encoder/", 1.0), (".*", 0.0))
    return small.on(machine, "encoder", c)
