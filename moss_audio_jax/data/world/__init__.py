"""A world of sound with exact labels: endless scenes, each a pure function of its index.

from moss_audio_jax.data import world
made = world.scene(7, split="train", seed=0)     # made.wav float32 [n], made.labels
world.rows(made.labels, "clips/7.wav")           # training rows
"""

from moss_audio_jax.data.world.scene import CONTENTS, MAX_SECONDS, VERSION, Scene, scene
from moss_audio_jax.data.world.splits import SPLITS, pair_held_out, sentence_part
from moss_audio_jax.data.world.supervision import TAGS, record
from moss_audio_jax.data.world.tasks import rows

__all__ = [
    "CONTENTS",
    "MAX_SECONDS",
    "SPLITS",
    "TAGS",
    "VERSION",
    "Scene",
    "pair_held_out",
    "record",
    "rows",
    "scene",
    "sentence_part",
]
