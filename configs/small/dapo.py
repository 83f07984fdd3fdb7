"""Last stage of the small model: learns from the rewards of its own answers (docs/post_train.md).

    moss-audio-jax train --config configs/small/dapo.py --workdir DIR \
        --config.init_from=reason/export
"""

import small

from moss_audio_jax.post_train import run


def get_config(machine="cpu"):
    c = small.get_config()
    c.train.source = "moss_audio_jax.post_train.run"
    c.policy = run.get_config()
    c.policy.prompts = 8
    c.policy.prompt_tokens = 320
    c.policy.new_tokens = 320
    c.policy.slots = 16  # on CPUs a step takes as long for a slot at rest
    c.policy.refills = 4
    c.policy.held_out = 200
    c.data.pick = small.REWARDED
    c.data.length = 1536
    c.data.batch = 32
    c.data.chunks = 16
    c.data.tasks = ()
    c.train.steps = 300
    c.train.log_every = 1
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 5e-5
    c.optimizer.schedule = "constant"
    c.optimizer.warmup = 10
    c.optimizer.weight_decay = 0.0
    c.optimizer.groups = (("audio_encoder/", 0.3), (".*", 1.0))
    c.checkpoint.every = 20
    return small.on(machine, "dapo", c)
