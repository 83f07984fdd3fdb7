"""Music of sampled instruments: passages of real scores, and music of the procedural world."""

from __future__ import annotations

from moss_audio_jax.draw import Draw
from moss_audio_jax.text.labels import SAMPLED_INSTRUMENTS
from moss_audio_jax.world import music
from moss_audio_jax.world.recordings import scores, soundfonts
from moss_audio_jax.world.recordings.source import of_kind

_FROM_SCORES = 0.5


def available(split: str) -> bool:
    """Whether a split has a program for every instrument."""
    return {*SAMPLED_INSTRUMENTS, "drums"} <= set(soundfonts.programs(split))


def make(draw: Draw, seconds: float, split: str) -> music.Piece:
    """A piece of about `seconds` at most, played by programs of the split.

    Half of the pieces come from scores of the split, where a source of scores is here.
    """
    melodic = tuple(name for name in SAMPLED_INSTRUMENTS if name != "bass")
    if of_kind("score") and draw.chance(_FROM_SCORES):
        piece = scores.piece(draw, seconds, split, melodic)
    else:
        piece = music.compose(draw, seconds, melodic)
    return soundfonts.play(draw, piece, split)
