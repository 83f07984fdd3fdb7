"""A small source of voices, made here, that the tests of recordings plug in."""

import dataclasses

import numpy as np

from moss_audio_jax.world import espeak
from moss_audio_jax.world.recordings import held_out, source

RATE = 16_000


@dataclasses.dataclass(frozen=True)
class Buzz(source.Voice):
    """Sixty people who buzz each word, a tenth of a second and a rest of 50 ms.

    Attributes:
      timed: whether it tells the times of words.
      own: its texts, if it is a voice of recordings.
    """

    timed: bool = True
    own: tuple[str, ...] | None = None

    def available(self):
        return True

    def speakers(self, split):
        known = [source.Speaker(f"s{i}", "en", ("male", "female")[i % 2]) for i in range(60)]
        return held_out.speakers(self.name, known, split)

    def texts(self, speaker, split):
        return self.own and held_out.recordings(self.name, self.own, split)

    def say(self, text, speaker, draw):
        base = 108 if speaker.sex == "male" else 210
        t = np.arange(RATE // 10) / RATE
        cycles = base * (t - t**2 / 2)  # it falls by a tenth: no pitch but this one fits
        word = sum(np.sin(2 * np.pi * k * cycles) / k for k in range(1, 12))
        pieces, words = [], []
        for number, name in enumerate(text.split()):
            pieces += [word, np.zeros(RATE // 20)]
            start = number * (RATE // 10 + RATE // 20)
            words.append(espeak.SpokenWord(name, start, start + RATE // 10))
        wav = np.concatenate(pieces[:-1])
        wav = wav / np.abs(wav).max() + 1e-6 * draw.noise(len(wav))
        file = f"{speaker.name}/{text}.wav" if self.own else None
        return source.Line(wav / np.abs(wav).max(), text, words if self.timed else None, None, file)


def buzz(name="buzz", **more):
    return Buzz(name, "voice", "Apache-2.0", "tests", "no command", **more)


def only(monkeypatch, *voices):
    """Makes these the only voices; the texts are those of the grammar."""
    texts = tuple(s for s in source.sources() if s.name == "grammar")
    monkeypatch.setattr(source, "sources", lambda: (*texts, *voices))
