"""Voices and what can be heard of them: sex, pitch, speed, intonation, accent, whispering."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from moss_audio_jax.draw import Draw


class Voice(NamedTuple):
    """A voice variant of espeak-ng: its mean pitch in Hz at three settings of espeak's parameter,
    and how a flat and a lively intonation shift it. These are measured and need no precision."""

    at_20: float
    at_50: float
    at_80: float
    flat: float
    lively: float


# Voices that are clearly male or female, and of equal speed.
MALE = {
    "m1": Voice(74, 95, 128, 0.87, 1.13),
    "m2": Voice(74, 101, 142, 0.91, 1.09),
    "m3": Voice(82, 106, 142, 0.86, 1.14),
    "m4": Voice(75, 95, 126, 0.85, 1.15),
    "m5": Voice(80, 103, 139, 0.87, 1.15),
    "m6": Voice(79, 103, 140, 0.87, 1.11),
    "m7": Voice(86, 108, 141, 0.84, 1.14),
    "Andy": Voice(71, 97, 136, 0.91, 1.08),
    "Denis": Voice(76, 100, 136, 0.88, 1.11),
    "max": Voice(79, 103, 138, 0.87, 1.11),
    "michel": Voice(82, 106, 143, 0.87, 1.12),
    "Gene": Voice(72, 96, 132, 0.89, 1.10),
    "travis": Voice(82, 104, 137, 0.85, 1.15),
    "Diogo": Voice(81, 106, 143, 0.87, 1.11),
}
FEMALE = {
    "f1": Voice(138, 183, 247, 0.88, 1.10),
    "f2": Voice(153, 199, 264, 0.86, 1.13),
    "f3": Voice(171, 215, 275, 0.84, 1.15),
    "f4": Voice(136, 181, 248, 0.89, 1.11),
    "f5": Voice(156, 206, 283, 0.89, 1.11),
    "belinda": Voice(170, 235, 330, 0.91, 1.08),
    "Andrea": Voice(180, 244, 344, 0.91, 1.08),
    "steph": Voice(130, 181, 261, 0.96, 1.07),
    "linda": Voice(169, 230, 325, 0.93, 1.10),
}
HELD_OUT_VOICES = ("m6", "travis", "Diogo", "f4", "steph", "linda")

# Targets. There are gaps between the classes, so that listeners agree with the labels.
PITCHES = {  # Hz
    "male": {"low": (72, 84), "medium": (98, 110), "high": (134, 152)},
    "female": {"low": (140, 158), "medium": (190, 212), "high": (262, 300)},
}
SPEEDS = {"slow": (105, 130), "normal": (160, 185), "fast": (225, 260)}  # espeak's words per minute
INTONATIONS = {"flat": (0, 4), "normal": (45, 55), "lively": (88, 99)}  # espeak's pitch range
ACCENTS = {"British": "en", "American": "en-us", "Scottish": "en-gb-scotland"}


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A way to speak: espeak's `voice` variant, and its parameters `rate`, `tone`, `range`."""

    voice: str
    sex: str
    pitch: str
    speed: str
    intonation: str
    accent: str
    whispered: bool
    language: str
    rate: int
    tone: int
    range: int

    @property
    def espeak_voice(self) -> str:
        base = "cmn" if self.language == "zh" else ACCENTS[self.accent]
        variant = self.voice
        if self.whispered:
            variant = "whisper" if self.sex == "male" else "whisperf"
        return f"{base}+{variant}"


def draw_speaker(draw: Draw, language: str, held_out: bool, sex: str | None = None) -> Speaker:
    """A speaker with one of the held-out voices, or with none of them.

    A held-out voice never whispers, because espeak whispers with separate voices, which are all
    used in training.
    """
    sex = sex or draw.choice(("male", "female"))
    known = MALE if sex == "male" else FEMALE
    voice = draw.choice([name for name in known if (name in HELD_OUT_VOICES) == held_out])
    pitch = draw.weighted({"low": 1.0, "medium": 2.0, "high": 1.0})
    speed = draw.weighted({"slow": 1.0, "normal": 2.0, "fast": 1.0})
    intonation = draw.weighted({"flat": 1.0, "normal": 3.0, "lively": 1.0})
    accent = draw.weighted({"British": 2.0, "American": 2.0, "Scottish": 1.0})
    return Speaker(
        voice=voice,
        sex=sex,
        pitch=pitch,
        speed=speed,
        intonation=intonation,
        accent="Mandarin" if language == "zh" else accent,
        whispered=draw.chance(0.03) and not held_out,
        language=language,
        rate=draw.integer(*SPEEDS[speed]),
        tone=_tone(
            known[voice],
            # The same setting sounds lower in Mandarin.
            draw.uniform(*PITCHES[sex][pitch]) / (0.85 if language == "zh" else 1.0),
            intonation,
        ),
        range=draw.integer(*INTONATIONS[intonation]),
    )


def _tone(voice: Voice, hertz: float, intonation: str) -> int:
    """espeak's pitch parameter (0 to 99) for a mean pitch; linear in log Hz below and above 50."""
    hertz /= {"flat": voice.flat, "normal": 1.0, "lively": voice.lively}[intonation]
    side = voice.at_20 if hertz < voice.at_50 else voice.at_80
    step = math.log(hertz / voice.at_50) / abs(math.log(side / voice.at_50))
    return min(max(round(50 + 30 * step), 0), 99)
