"""MOSS-Audio on JAX/Flax: sound and text in, text out.

Names are imported when they are first used, so that reading audio or text does not start JAX.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load_audio": "moss_audio_jax.audio",
    "log_mel": "moss_audio_jax.audio",
    "load_tokenizer": "moss_audio_jax.text",
    "build_prompt": "moss_audio_jax.text",
    "build_conversation": "moss_audio_jax.text",
    "parse_timestamps": "moss_audio_jax.text",
    "Segment": "moss_audio_jax.text",
    "to_srt": "moss_audio_jax.text",
    "to_vtt": "moss_audio_jax.text",
    "to_textgrid": "moss_audio_jax.text",
    "to_json": "moss_audio_jax.text",
    "MossAudio": "moss_audio_jax.api",
    "Request": "moss_audio_jax.api",
    "Reply": "moss_audio_jax.api",
    "Sampling": "moss_audio_jax.generate.sampling",
    "InputError": "moss_audio_jax.errors",
    "UsageError": "moss_audio_jax.errors",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
