"""Every key of a run and its default: `moss_audio_jax/train/defaults.py`. Recipes start here.

    moss-audio-jax train --config configs/common.py --workdir DIR \
        --config.init_from=CHECKPOINT --config.data.train="('rows.jsonl',)"
"""

from moss_audio_jax.train.defaults import get_config, sizes

__all__ = ["get_config", "sizes"]
