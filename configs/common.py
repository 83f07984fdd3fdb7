"""Every key of a run and its default: `moss_audio_jax/train/defaults.py`. Recipes start here."""

from moss_audio_jax.train.defaults import get_config, sizes

__all__ = ["get_config", "sizes"]
