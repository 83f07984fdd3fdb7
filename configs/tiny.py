"""A model of 0.9M parameters that learns a few rows by heart on a CPU, in a few minutes.

    moss-audio-jax train --config configs/tiny.py --workdir DIR \
        --config.data.train="('rows.jsonl',)"

Its tokenizer is that of the package's small model. To make rows for it, which needs no extra:
`moss-audio-jax world --count 8 --content sound --output scenes` writes scenes/rows.jsonl.
"""

import common

from moss_audio_jax.config import DEFAULT_CHECKPOINT, DecoderConfig, EncoderConfig, ModelConfig


def get_config():
    c = common.get_config()
    c.model = common.sizes(
        ModelConfig(
            EncoderConfig(
                d_model=64,
                layers=3,
                heads=4,
                ffn_dim=128,
                conv_channels=16,
                output_dim=64,
                tap_layers=(0, 1),
            ),
            DecoderConfig(
                hidden_size=96,
                ffn_dim=192,
                layers=3,
                heads=4,
                kv_heads=2,
                head_dim=24,
                vocab_size=2560,
                max_positions=2048,
            ),
            adapter_dim=128,
            inject_layers=2,
        )
    )
    c.tokenizer = str(DEFAULT_CHECKPOINT)
    c.data.length = 512
    c.data.batch = 8
    c.data.window = 16
    c.train.steps = 300
    c.train.dtype = "float32"
    c.train.remat = "none"
    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup = 20
    c.optimizer.weight_decay = 0.0
    c.checkpoint.every = 100
    return c
