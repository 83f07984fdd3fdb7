"""MOSS-Audio on JAX/Flax: sound and text in, text out.

Names are imported when they are first used, so that reading audio or text does not start JAX.
"""

from __future__ import annotations

import importlib
import sys
import types

TYPE_CHECKING = False  # not imported from typing, which is slow to import
if TYPE_CHECKING:
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
    "Clip": "moss_audio_jax.api",
    "Request": "moss_audio_jax.api",
    "Reply": "moss_audio_jax.api",
    "Sampling": "moss_audio_jax.generate.options",
    "transcribe": "moss_audio_jax.transcribe",
    "Transcript": "moss_audio_jax.transcribe",
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


class _Package(types.ModuleType):
    """Keeps `transcribe` a function of the package.

    It is also the name of a module, and Python would replace the function when that is imported.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
