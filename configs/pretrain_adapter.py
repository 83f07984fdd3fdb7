"""Pretraining, stage 1: adapter and mergers only, between a trained encoder and a Qwen3 decoder.

    moss-audio-jax train --config configs/pretrain_adapter.py:8b --workdir DIR \
        --config.init_from="encoder=ENCODER_DIR,decoder=QWEN3_DIR"

Only audio-text rows: 3 parts of ASR-type rows, 4 parts of captions; within each, data sets are
weighted by sqrt(size).
"""

import common
from ml_collections import ConfigDict


def get_config(size="4b"):
    c = common.get_config(size)
    c.data.mixture = ConfigDict(
        {
            "asr": {
                "weight": 0.3,
                "parts": {
                    "plain": {"paths": ("data/asr-*.array_record",), "weight": "sqrt"},
                    "words": {"paths": ("data/asr_words-*.array_record",), "weight": "sqrt"},
                    "sentences": {
                        "paths": ("data/asr_sentences-*.array_record",),
                        "weight": "sqrt",
                    },
                },
            },
            "captions": {"weight": 0.4, "paths": ("data/captions-*.array_record",)},
        }
    )
    c.train.steps = 20_000
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup = 1000
    c.optimizer.groups = (("^(audio_adapter|mergers)/", 1.0), (".*", 0.0))
    c.checkpoint.every = 1000
    return c
