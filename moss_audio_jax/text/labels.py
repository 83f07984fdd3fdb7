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
# Kinds that only recordings have (`world.recordings`); the procedural world cannot make them.
RECORDED_KINDS: dict[str, Kind] = {
    "goose": Kind("goose honking", "a goose honks", _ANIMAL, ("honk", "honks")),
    "horse": Kind("horse neighing", "a horse neighs", _ANIMAL, None),
    "hooves": Kind("horse galloping", "a horse gallops", _ANIMAL, None),
    "rooster": Kind("rooster crowing", "a rooster crows", _ANIMAL, None),
    "hen": Kind("hen clucking", "a hen clucks", _ANIMAL, None),
    "crow": Kind("crow cawing", "a crow caws", _ANIMAL, ("caw", "caws")),
    "gull": Kind("seagull calling", "a seagull calls", _ANIMAL, None),
    "sheep": Kind("sheep bleating", "a sheep bleats", _ANIMAL, None),
    "pig": Kind("pig grunting", "a pig grunts", _ANIMAL, None),
    "donkey": Kind("donkey braying", "a donkey brays", _ANIMAL, None),
    "wolf": Kind("wolf howling", "a wolf howls", _ANIMAL, None),
    "lion": Kind("lion roaring", "a lion roars", _ANIMAL, None),
    "monkey": Kind("monkey screeching", "a monkey screeches", _ANIMAL, None),
    "sea_lion": Kind("sea lion barking", "a sea lion barks", _ANIMAL, None),
    "cough": Kind("person coughing", "a person coughs", _HUMAN, None),
    "sneeze": Kind("person sneezing", "a person sneezes", _HUMAN, None),
    "laughter": Kind("person laughing", "a person laughs", _HUMAN, None),
    "scream": Kind("person screaming", "a person screams", _HUMAN, None),
    "snap": Kind("fingers snapping", "fingers snap", _HUMAN, ("snap", "snaps")),
    "crowd": Kind("crowd talking", "a crowd talks", _HUMAN, None),
    "slurp": Kind("person slurping", "a person slurps", _HUMAN, None),
    "splash": Kind("water splashing", "water splashes", _NATURE, None),
    "bubbles": Kind("liquid bubbling", "a liquid bubbles", _NATURE, None),
    "falling_tree": Kind("tree falling", "a tree falls", _NATURE, None),
    "jet": Kind("jet flying", "a jet flies", _THING, None),
    "propeller": Kind("propeller plane flying", "a propeller plane flies", _THING, None),
    "ship_horn": Kind("ship horn blowing", "a ship horn blows", _THING, None),
    "steam": Kind("steam hissing", "steam hisses", _THING, None),
    "railway": Kind("train passing", "a train passes", _THING, None),
    "crossing": Kind("railway crossing ringing", "a railway crossing rings", _THING, None),
    "door": Kind("door opening or closing", "a door opens or closes", _THING, None),
    "camera": Kind("camera clicking", "a camera clicks", _THING, None),
    "till": Kind("cash register ringing", "a cash register rings", _THING, None),
    "coins": Kind("coins jingling", "coins jingle", _THING, None),
    "gong": Kind("gong sounding", "a gong sounds", _THING, None),
    "cymbal": Kind("cymbal crashing", "a cymbal crashes", _THING, None),
    "jackhammer": Kind("jackhammer rattling", "a jackhammer rattles", _THING, None),
    "power_saw": Kind("power saw running", "a power saw runs", _THING, None),
    "axe": Kind("chopping wood", "someone chops wood", _THING, None),
    "chisel": Kind("chiselling stone", "someone chisels stone", _THING, None),
    "explosion": Kind("explosion", "something explodes", _THING, None),
    "gunshot": Kind("gun firing", "a gun fires", _THING, ("shot", "shots")),
    "fireworks": Kind("fireworks bursting", "fireworks burst", _THING, None),
}
ALL_KINDS = KINDS | RECORDED_KINDS

INSTRUMENTS = ("guitar", "piano", "organ", "flute", "strings", "trumpet", "marimba")  # melodic
# Melodic, as sampled instruments play them; "bass" plays the lowest part of other music too.
SAMPLED_INSTRUMENTS = (
    "piano",
    "harpsichord",
    "bells",
    "marimba",
    "organ",
    "accordion",
    "guitar",
    "electric guitar",
    "bass",
    "violin",
    "strings",
    "choir",
    "trumpet",
    "saxophone",
    "flute",
    "synthesizer",
)
DRUMS = ("kick", "snare", "hihat")
TONICS = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
MODES = ("major", "minor")
