"""espeak-ng's voices, as in the procedural world."""

from __future__ import annotations

from moss_audio_jax.draw import Draw
from moss_audio_jax.errors import extra
from moss_audio_jax.world import espeak
from moss_audio_jax.world.recordings import held_out
from moss_audio_jax.world.recordings.source import Line, Speaker, Voice
from moss_audio_jax.world.speakers import FEMALE, HELD_OUT_VOICES, MALE, draw_speaker


class Espeak(Voice):
    certain = True

    def available(self) -> bool:
        return espeak.available()

    def speakers(self, split: str) -> tuple[Speaker, ...]:
        known = [Speaker(name, "en", "male") for name in MALE]
        known += [Speaker(name, "en", "female") for name in FEMALE]
        return held_out.speakers(self.name, known, split)

    def say(self, text: str, speaker: Speaker, draw: Draw) -> Line:
        held = speaker.name in HELD_OUT_VOICES
        while True:
            drawn = draw_speaker(draw, "en", held, speaker.sex)
            if drawn.voice == speaker.name and not drawn.whispered:
                break
        units = tuple(text.split())
        utterance = espeak.Utterance(units, drawn.espeak_voice, drawn.rate, drawn.tone, drawn.range)
        (spoken,) = espeak.speak([utterance])
        return Line(spoken.wav, text, spoken.words, spoken.phones)


SOURCES = (
    Espeak(
        name="espeak",
        kind="voice",
        licence="GPL-3 (program)",
        origin="espeakng-loader",
        install=extra("world"),
    ),
)
