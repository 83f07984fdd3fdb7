"""Metrics: pure functions of references and answers, without files and without JAX."""

from moss_audio_jax.evaluate.metrics.parsing import STATUSES, parse

__all__ = ["STATUSES", "parse"]
