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

    # "as": checkers then take a name for a public one.
    from moss_audio_jax.api import Clip as Clip
    from moss_audio_jax.api import MossAudio as MossAudio
    from moss_audio_jax.api import Reply as Reply
    from moss_audio_jax.api import Request as Request
    from moss_audio_jax.audio import load_audio as load_audio
    from moss_audio_jax.audio import log_mel as log_mel
    from moss_audio_jax.errors import InputError as InputError
    from moss_audio_jax.errors import UsageError as UsageError
    from moss_audio_jax.generate.options import Sampling as Sampling
    from moss_audio_jax.text import Segment as Segment
    from moss_audio_jax.text import build_conversation as build_conversation
    from moss_audio_jax.text import build_prompt as build_prompt
    from moss_audio_jax.text import load_tokenizer as load_tokenizer
    from moss_audio_jax.text import parse_timestamps as parse_timestamps
    from moss_audio_jax.text import to_json as to_json
    from moss_audio_jax.text import to_srt as to_srt
    from moss_audio_jax.text import to_textgrid as to_textgrid
    from moss_audio_jax.text import to_vtt as to_vtt
    from moss_audio_jax.transcribe import Transcript as Transcript
    from moss_audio_jax.transcribe import transcribe as transcribe

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


if not TYPE_CHECKING:  # a checker would take every name for one that there is

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
