"""Pretraining, stage 2: everything trains; ASR-type 30, captions 40, text 30.

    moss-audio-jax train --config configs/pretrain_full.py:8b --workdir DIR \
        --config.init_from=STAGE_1_EXPORT
"""

import pretrain_adapter


def get_config(size="4b"):
    c = pretrain_adapter.get_config(size)
    c.data.mixture.text = {"weight": 0.3, "paths": ("data/text-*.array_record",)}
    c.train.steps = 200_000
    c.train.z_loss = 1e-5
    c.optimizer.schedule = "wsd"
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup = 2000
    c.optimizer.final = 0.05
    # Encoder and language model are already trained, so they get half the learning rate.
    c.optimizer.groups = (("^(audio_adapter|mergers)/", 1.0), ("^audio_encoder/", 0.5), (".*", 0.5))
    c.checkpoint.keep_every = 20_000
    return c
