"""The 4B model from scratch; the base of recipes that take an argument (`configs/sft.py:4b`).

    moss-audio-jax train --config configs/moss_audio_4b.py --workdir DIR \
        --config.tokenizer=QWEN3_DIR --config.data.train="('rows.jsonl',)"
"""

import common


def get_config():
    return common.get_config("4b")
