"""Reinforcement learning after the cold start: rewards that can be checked, DAPO.

    moss-audio-jax train --config configs/dapo.py:8b --workdir DIR \
        --config.init_from=COLD_START_EXPORT --config.data.train="('questions.jsonl',)"

The rows are questions with an "answer", or conversations whose last message is the expected answer.
`:small` is for the small model, on two CPU cores.
"""

import common

from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.post_train import run


def get_config(size="4b"):
    small = size == "small"
    c = common.get_config("" if small else size)
    c.train.source = "moss_audio_jax.post_train.run"
    c.policy = run.get_config()
    c.optimizer.schedule = "constant"  # after the warmup
    c.optimizer.weight_decay = 0.0
    if small:
        c.init_from = str(DEFAULT_CHECKPOINT)
        c.policy.prompts = 8
        c.policy.prompt_tokens = 320
        c.policy.new_tokens = 160
        c.policy.slots = 16
        c.data.length = 1536
        c.data.batch = 24
        c.data.chunks = 16
        c.train.steps = 400
        c.train.dtype = "float32"
        c.train.remat = "none"
        c.train.log_every = 1
        c.optimizer.learning_rate = 2e-5
        c.optimizer.warmup = 10
        c.checkpoint.every = 20
    else:
        c.policy.prompts = 128
        c.policy.prompt_tokens = 2048
        c.policy.new_tokens = 2048
        c.policy.slots = 512
        # The cache has 8 heads of keys, which fsdp's devices share in rollouts; with more devices
        # than heads each would hold all of it (78 GiB for 8B and 256 slots).
        c.mesh.data = -1
        c.mesh.fsdp = 8
        c.data.length = 16_384
        c.data.batch = 384
        c.train.steps = 500
        c.optimizer.learning_rate = 1e-6
        c.optimizer.warmup = 20
        c.checkpoint.every = 20
    return c
