"""The sentences of the procedural world."""

from __future__ import annotations

from moss_audio_jax.draw import Draw
from moss_audio_jax.world import grammar
from moss_audio_jax.world.recordings.source import Text


class Grammar(Text):
    def available(self) -> bool:
        return True

    def sentence(self, draw: Draw) -> str:
        return grammar.sentence(draw, draw.weighted(grammar.ORDERS))


SOURCES = (
    Grammar(
        name="grammar",
        kind="text",
        licence="Apache-2.0",
        origin="this package",
        install="",
    ),
)
