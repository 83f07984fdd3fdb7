"""Synthetic scenes of sound with exact labels; each scene is a pure function of its index.

from moss_audio_jax import world
made = world.scene(7, split="train", seed=0)     # made.wav float32 [n], made.labels
world.rows(made.labels, "clips/7.wav")           # training rows
"""

import importlib

# Not imported from typing: `python -m moss_audio_jax.world` runs this before it handles Ctrl-C.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HOME = {
    "CONTENTS": "scenes",
    "MAX_SECONDS": "scenes",
    "VERSION": "scenes",
    "Scene": "scenes",
    "scene": "scenes",
    "drill": "drills",
    "SPLITS": "splits",
    "pair_held_out": "splits",
    "sentence_part": "splits",
    "TAGS": "supervision",
    "record": "supervision",
    "rows": "tasks",
    "word_questions": "questions",
    "write": "folder",
    "written": "tasks",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> "Any":
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
