"""What the scores are made of: pure functions of references and answers, no files, no JAX."""

from moss_audio_jax.evaluate.metrics.parsing import STATUSES, parse

__all__ = ["STATUSES", "parse"]
