"""Audio in: files to waveforms, waveforms to log-mel features. Needs no JAX."""

from moss_audio_jax.audio.features import log_mel
from moss_audio_jax.audio.io import load_audio

__all__ = ["load_audio", "log_mel"]
