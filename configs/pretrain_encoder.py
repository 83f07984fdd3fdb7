"""The encoder from scratch, on ASR and captions, trained with a small decoder.

    moss-audio-jax train --config configs/pretrain_encoder.py --workdir DIR \
        --config.tokenizer=QWEN3_DIR --config.data.train="('asr.jsonl', 'captions.jsonl')"

The paper does not describe this decoder; here it has 8 layers of width 1024. The next stage uses
only the encoder: `--config.init_from="encoder=DIR/export,decoder=QWEN3_DIR"`.
"""

import common


def get_config():
    c = common.get_config()
    c.model.decoder.hidden_size = 1024
    c.model.decoder.ffn_dim = 3072
    c.model.decoder.layers = 8
    c.model.decoder.heads = 16
    c.model.adapter_dim = 2048
    c.data.length = 4096
    c.train.steps = 200_000
    c.optimizer.learning_rate = 3e-4
    c.optimizer.schedule = "wsd"
    c.optimizer.warmup = 5000
    c.checkpoint.every = 2000
    return c
