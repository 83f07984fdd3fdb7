"""The sound events: what they are called, and how one is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moss_audio_jax.world import sounds_living as living
from moss_audio_jax.world import sounds_things as things
from moss_audio_jax.world.draw import Draw
from moss_audio_jax.world.dsp import audible, loudest


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of sound event.

    Attributes:
      label: what a timeline says: "dog barking".
      clause: what a caption says: "a dog barks".
      category: of the nine coarse classes: animal, human voice, natural sound, sounds of things.
      unit: what can be counted of it, singular and plural, or None.
      make: Draw -> (wav float64 [n] at 16 kHz, first samples of its units).
    """

    label: str
    clause: str
    category: str
    unit: tuple[str, str] | None
    make: Callable[[Draw], living.Made]


class Sound(NamedTuple):
    """wav float64 [n] from the first audible sample to the last, its loudest 50 ms at RMS 1."""

    wav: np.ndarray
    onsets: list[int]  # of its units, samples; [] where they cannot be counted


_ANIMAL, _NATURE, _THING, _HUMAN = "animal", "natural sound", "sounds of things", "human sound"
KINDS: dict[str, Kind] = {
    "dog": Kind("dog barking", "a dog barks", _ANIMAL, ("bark", "barks"), living.dog),
    "cat": Kind("cat meowing", "a cat meows", _ANIMAL, ("meow", "meows"), living.cat),
    "bird": Kind("bird chirping", "a bird chirps", _ANIMAL, ("chirp", "chirps"), living.bird),
    "cow": Kind("cow mooing", "a cow moos", _ANIMAL, ("moo", "moos"), living.cow),
    "frog": Kind("frog croaking", "a frog croaks", _ANIMAL, ("croak", "croaks"), living.frog),
    "cricket": Kind("cricket chirring", "a cricket chirrs", _ANIMAL, None, living.cricket),
    "owl": Kind("owl hooting", "an owl hoots", _ANIMAL, ("hoot", "hoots"), living.owl),
    "bee": Kind("bee buzzing", "a bee buzzes", _ANIMAL, None, living.bee),
    "duck": Kind("duck quacking", "a duck quacks", _ANIMAL, ("quack", "quacks"), living.duck),
    "whistle": Kind("person whistling", "a person whistles", _HUMAN, None, living.whistle),
    "heartbeat": Kind(
        "heart beating", "a heart beats", _HUMAN, ("heartbeat", "heartbeats"), living.heartbeat
    ),
    "clap": Kind("hands clapping", "hands clap", _HUMAN, ("clap", "claps"), things.clap),
    "applause": Kind("crowd applauding", "a crowd applauds", _HUMAN, None, things.applause),
    "footsteps": Kind(
        "footsteps", "footsteps are heard", _HUMAN, ("footstep", "footsteps"), things.footsteps
    ),
    "rain": Kind("rain falling", "rain falls", _NATURE, None, living.rain),
    "wind": Kind("wind blowing", "wind blows", _NATURE, None, living.wind),
    "waves": Kind("waves breaking", "waves break", _NATURE, None, living.waves),
    "thunder": Kind("thunder rolling", "thunder rolls", _NATURE, None, living.thunder),
    "fire": Kind("fire crackling", "a fire crackles", _NATURE, None, living.fire),
    "drops": Kind("water dripping", "water drips", _NATURE, ("drop", "drops"), living.drops),
    "stream": Kind("stream bubbling", "a stream bubbles", _NATURE, None, living.stream),
    "bell": Kind("bell ringing", "a bell rings", _THING, ("stroke", "strokes"), things.bell),
    "doorbell": Kind(
        "doorbell chiming", "a doorbell chimes", _THING, ("chime", "chimes"), things.doorbell
    ),
    "siren": Kind("siren wailing", "a siren wails", _THING, None, things.siren),
    "alarm": Kind("alarm beeping", "an alarm beeps", _THING, ("beep", "beeps"), things.alarm),
    "phone": Kind("phone ringing", "a phone rings", _THING, ("ring", "rings"), things.phone),
    "horn": Kind("car honking", "a car honks", _THING, ("honk", "honks"), things.horn),
    "train": Kind("train whistling", "a train whistles", _THING, ("blast", "blasts"), things.train),
    "engine": Kind("engine running", "an engine runs", _THING, None, things.engine),
    "helicopter": Kind("helicopter flying", "a helicopter flies", _THING, None, things.helicopter),
    "knock": Kind("knocking", "someone knocks", _THING, ("knock", "knocks"), things.knock),
    "keyboard": Kind("typing on a keyboard", "someone types", _THING, None, things.keyboard),
    "glass": Kind("glass breaking", "glass breaks", _THING, None, things.glass),
    "clock": Kind("clock ticking", "a clock ticks", _THING, ("tick", "ticks"), things.clock),
    "hammer": Kind("hammering", "a hammer strikes", _THING, ("blow", "blows"), things.hammer),
    "saw": Kind("sawing", "someone saws wood", _THING, None, things.saw),
    "drill": Kind("drilling", "a drill whirrs", _THING, None, things.drill),
    "laser": Kind("laser zapping", "a toy laser zaps", _THING, ("zap", "zaps"), things.laser),
}


def make(kind: str, draw: Draw) -> Sound:
    """One instance of a kind of KINDS."""
    wav, onsets = KINDS[kind].make(draw)
    first, last = audible(wav)
    wav = wav[first:last]
    if KINDS[kind].unit is None:
        onsets = []
    return Sound(wav / loudest(wav), [max(onset - first, 0) for onset in onsets])
