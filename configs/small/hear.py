"""Stage 8 of the small model: its encoder learns the world of recordings beside the procedural one.

    moss-audio-jax train --config configs/small/hear.py --workdir DIR \
        --config.init_from=extend/export

It starts from the model of stage 7 with more word pieces (`tools/small/extend.py`). Run it in the
folder where `tools/small/train.py --recordings N --voices N` made joined/, joined_recordings/ and
joined_voices/. As in stage 1, only helper losses train, and the decoder does not run.
"""

import encoder
import small


def get_config(machine="cpu"):
    c = encoder.get_config(machine)
    c.tokenizer = ""
    c.model.decoder.vocab_size = small.EXTENDED
    c.data.mixture = small.joined({"all": 0.3, "speech": 0.3, "sounds": 0.2}, "joined")
    c.data.mixture.update(small.joined({"all": 1.0, "sounds": 0.3}, "joined_recordings"))
    c.data.mixture.update(small.joined({"speech": 2.0}, "joined_voices"))
    c.data.augment.warp = 0.2
    c.data.augment.freq_masks = 2
    c.data.augment.freq_width = 16
    c.data.augment.time_masks = 6
    c.data.augment.time_width = 16
    c.train.steps = 2400
    c.optimizer.learning_rate = 3e-3
    return small.on(machine, "hear", c)
