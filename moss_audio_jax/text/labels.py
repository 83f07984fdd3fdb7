"""Names of what can be heard: kinds of sound, instruments, keys."""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of sound event.

    Attributes:
      label: as in a timeline: "dog barking".
      clause: as in a caption: "a dog barks".
      category: its coarse class: animal, human sound, natural sound or sounds of things.
      unit: a countable part of it, such as a bark: singular and plural, or None.
    """

    label: str
    clause: str
    category: str
    unit: tuple[str, str] | None


_ANIMAL, _NATURE, _THING, _HUMAN = "animal", "natural sound", "sounds of things", "human sound"
KINDS: dict[str, Kind] = {
    "dog": Kind("dog barking", "a dog barks", _ANIMAL, ("bark", "barks")),
    "cat": Kind("cat meowing", "a cat meows", _ANIMAL, ("meow", "meows")),
    "bird": Kind("bird chirping", "a bird chirps", _ANIMAL, ("chirp", "chirps")),
    "cow": Kind("cow mooing", "a cow moos", _ANIMAL, ("moo", "moos")),
    "frog": Kind("frog croaking", "a frog croaks", _ANIMAL, ("croak", "croaks")),
    "cricket": Kind("cricket chirring", "a cricket chirrs", _ANIMAL, None),
    "owl": Kind("owl hooting", "an owl hoots", _ANIMAL, ("hoot", "hoots")),
    "bee": Kind("bee buzzing", "a bee buzzes", _ANIMAL, None),
    "duck": Kind("duck quacking", "a duck quacks", _ANIMAL, ("quack", "quacks")),
    "whistle": Kind("person whistling", "a person whistles", _HUMAN, None),
    "heartbeat": Kind("heart beating", "a heart beats", _HUMAN, ("heartbeat", "heartbeats")),
    "clap": Kind("hands clapping", "hands clap", _HUMAN, ("clap", "claps")),
    "applause": Kind("crowd applauding", "a crowd applauds", _HUMAN, None),
    "footsteps": Kind("footsteps", "footsteps are heard", _HUMAN, ("footstep", "footsteps")),
    "rain": Kind("rain falling", "rain falls", _NATURE, None),
    "wind": Kind("wind blowing", "wind blows", _NATURE, None),
    "waves": Kind("waves breaking", "waves break", _NATURE, None),
    "thunder": Kind("thunder rolling", "thunder rolls", _NATURE, None),
    "fire": Kind("fire crackling", "a fire crackles", _NATURE, None),
    "drops": Kind("water dripping", "water drips", _NATURE, ("drop", "drops")),
    "stream": Kind("stream bubbling", "a stream bubbles", _NATURE, None),
    "bell": Kind("bell ringing", "a bell rings", _THING, ("stroke", "strokes")),
    "doorbell": Kind("doorbell chiming", "a doorbell chimes", _THING, ("chime", "chimes")),
    "siren": Kind("siren wailing", "a siren wails", _THING, None),
    "alarm": Kind("alarm beeping", "an alarm beeps", _THING, ("beep", "beeps")),
    "phone": Kind("phone ringing", "a phone rings", _THING, ("ring", "rings")),
    "horn": Kind("car honking", "a car honks", _THING, ("honk", "honks")),
    "train": Kind("train whistling", "a train whistles", _THING, ("blast", "blasts")),
    "engine": Kind("engine running", "an engine runs", _THING, None),
    "helicopter": Kind("helicopter flying", "a helicopter flies", _THING, None),
    "knock": Kind("knocking", "someone knocks", _THING, ("knock", "knocks")),
    "keyboard": Kind("typing on a keyboard", "someone types", _THING, None),
    "glass": Kind("glass breaking", "glass breaks", _THING, None),
    "clock": Kind("clock ticking", "a clock ticks", _THING, ("tick", "ticks")),
    "hammer": Kind("hammering", "a hammer strikes", _THING, ("blow", "blows")),
    "saw": Kind("sawing", "someone saws wood", _THING, None),
    "drill": Kind("drilling", "a drill whirrs", _THING, None),
    "laser": Kind("laser zapping", "a toy laser zaps", _THING, ("zap", "zaps")),
}

INSTRUMENTS = ("guitar", "piano", "organ", "flute", "strings", "trumpet", "marimba")  # melodic
DRUMS = ("kick", "snare", "hihat")
TONICS = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
MODES = ("major", "minor")
