"""Scenes of recordings: as those of `world.scenes`, and the labels have the same form.

They have one key more, and some values may be None, of which no row asks:

    "sources": [{"part": speech | sound | music, "source", "speaker", "file", "text", "manner"}]

in the order of the sentences, then of the events, then the music; for speech, "text" names the
source of the sentence, and "manner" how much its pitch, formants and speed were changed; for music,
"file" names the score and the programs of the soundfonts. "codec"
is a key of `channels.CODECS` or None. A sentence's "words" and "phones" are None where nothing
tells their times; its "order" is where its text comes from. A speaker's "pitch", "speed",
"intonation" and "accent" are None where they are not clear.

A scene depends on (index, split, seed, content, max_seconds), on the sources that are here, and, by
neural voices and codecs, on the machine's last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.draw import Draw
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.text.labels import KINDS
from moss_audio_jax.world import music as procedural_music
from moss_audio_jax.world import sounds as procedural_sounds
from moss_audio_jax.world.dsp import loudest, median_f0, samples
from moss_audio_jax.world.music import Piece
from moss_audio_jax.world.recordings import (
    channels,
    held_out,
    listener,
    music,
    sentences,
    sounds,
)
from moss_audio_jax.world.recordings.source import Line, Speaker, Voice, of_kind, sources
from moss_audio_jax.world.scenes import (
    CONTENTS,
    MAX_SECONDS,
    Scene,
    Track,
    add_events,
    add_music,
    blank,
    check_place,
    mixed,
    name_of,
    sentence_labels,
)
from moss_audio_jax.world.sounds import Sound
from moss_audio_jax.world.speakers import PITCHES
from moss_audio_jax.world.splits import split_named

VERSION = 3  # goes up whenever a scene changes
# How often each source of voices speaks, if it is here. kokoro has the most speakers and takes the
# most time. A small model that often hears foreign prompts takes English ones for them.
_WEIGHTS = {
    "kokoro": 0.1,
    "espeak": 0.25,
    "flite": 0.25,
    "piper": 0.25,
    "asterisk-en": 0.15,
    "asterisk-es": 0.05,
    "asterisk-fr": 0.01,
    "asterisk-it": 0.01,
    "asterisk-ru": 0.01,
}
_OTHER = 0.2  # of a source of another package
_FROM_PROCEDURAL = 0.2  # of sounds and music in training and validation
_SPEEDS = {"slow": (60, 125), "normal": (150, 190), "fast": (225, 400)}  # words per minute
_TRIES = 50


class _Part(NamedTuple):
    """What one part of a scene is made from.

    Attributes:
      limit: the sample before which all must end.
      end: where the parts before end, in samples; 0 if there are none.
      alone: there is no other part.
    """

    split: str
    limit: int
    end: int
    alone: bool
    judged: bool


class _Who(NamedTuple):
    """A speaker of a scene, and how he or she speaks in it."""

    voice: Voice
    speaker: Speaker
    manner: channels.Manner
    gain: float  # dB


def scene(
    index: int,
    split: str = "train",
    seed: int = 0,
    content: str | None = None,
    max_seconds: float = MAX_SECONDS,
    judged: bool = False,
) -> Scene:
    """Scene `index` of a split, one of `held_out.SPLITS`.

    A line that its voice cannot say, or that does not fit, is drawn again.

    Args:
      content: a key of `world.CONTENTS`; None: drawn with the weights there.
      max_seconds: no scene is longer; at least 4.
      judged: English lines that `listener` cannot read are drawn again, except those of voices
        that are `certain`.

    Raises:
      UsageError: an unknown split or content, a bad number.
      InputError: no source here has a speaker of this split; see `source.sources`.
    """
    held_out.checked(split)
    check_place(index, max_seconds)
    if content is not None and content not in CONTENTS:
        raise UsageError(f"no scene of content {content!r}; expected one of {', '.join(CONTENTS)}")
    key = ("recordings", VERSION, seed, split, index, content, float(max_seconds), judged)
    draw = Draw(*key)
    chosen = content or draw.weighted(CONTENTS)
    name = f"recordings-{name_of(index, split, seed, content, max_seconds)}"
    labels = blank(name + "-judged" * judged, seed, split, index, chosen)
    labels |= {"version": VERSION, "sources": []}
    parts = chosen.split("+")
    limit = samples(max_seconds) - samples(0.1)
    tracks: list[Track] = []
    for part in (name for name in _PARTS if name in parts):
        end = max((t.start + len(t.wav) for t in tracks), default=0)
        rules = _Part(split, limit, end, len(parts) == 1, judged)
        tracks += _PARTS[part](draw.child(part), labels, rules)

    def channel(stream: Draw, wav: np.ndarray) -> np.ndarray:
        # Sounds and music keep the whole band: some of them lie outside that of a telephone.
        whole = bool(labels["events"]) or labels["music"] is not None
        wav, labels["codec"] = channels.channel(stream, wav, whole)
        return wav

    wav = mixed(draw.child("mix"), labels, tracks, limit, channel)
    return Scene(wav, labels)


# --- speech --------------------------------------------------------------------------------------


def _speech(draw: Draw, labels: dict[str, Any], part: _Part) -> list[Track]:
    """One to four lines by one or two speakers of one language."""
    voices = _voices(part.split)
    reason: InputError | None = None
    for attempt in range(_TRIES):
        stream = draw.child(attempt)
        try:
            tracks = _talk(stream, labels, _speakers(stream, voices, part.split), part)
        except InputError as error:  # a word that a voice does not know
            reason = error
            continue
        if tracks:
            return tracks
    if reason:
        raise reason
    raise UsageError(f"no line fits in {part.limit / SAMPLE_RATE:.1f} s; allow longer scenes")


def _voices(split: str) -> dict[Voice, float]:
    """The sources that have a speaker of the split, and their weights."""
    found = {
        voice: _WEIGHTS.get(voice.name, _OTHER)
        for voice in of_kind("voice")
        if isinstance(voice, Voice) and voice.speakers(split)
    }
    if not found:
        able = {s.install for s in sources() if isinstance(s, Voice) and s.speakers(split)}
        ways = "; ".join(sorted(able)) or "none has"
        raise InputError(f"no source of voices here has a speaker for the split {split}: {ways}")
    return found


def _speakers(draw: Draw, voices: dict[Voice, float], split: str) -> list[_Who]:
    voice = draw.weighted(voices)
    found = [(voice, draw.choice(voice.speakers(split)))]
    if draw.chance(0.35):
        other = draw.weighted(voices)
        speaker = draw.choice(other.speakers(split))
        if speaker.language == found[0][1].language and (other, speaker) not in found:
            found.append((other, speaker))
    return [
        _Who(
            voice,
            speaker,
            # Tests hear the voices as they are.
            channels.draw_manner(draw)
            if split == "train" and draw.chance(0.6)
            else channels.Manner(),
            draw.uniform(-3, 0),
        )
        for voice, speaker in found
    ]


def _talk(draw: Draw, labels: dict[str, Any], who: list[_Who], part: _Part) -> list[Track]:
    """The tracks, and what the labels get by them; none, and nothing, if no line fits."""
    count = max(draw.weighted({1: 0.4, 2: 0.3, 3: 0.2, 4: 0.1}), len(who))
    said: list[dict[str, Any]] = []
    tracks: list[Track] = []
    origins: list[dict[str, Any]] = []
    at = samples(draw.uniform(0.1, 0.6))
    for number in range(count):
        speaker = who[number % len(who)]
        line, text = _line(draw, speaker, part)
        if at + len(line.wav) > part.limit:
            break
        said.append(sentence_labels(line.text, number % len(who), text, at, line))
        tracks.append(Track(at, line.wav / loudest(line.wav), speaker.gain))
        origins.append(
            {
                "part": "speech",
                "source": speaker.voice.name,
                "speaker": speaker.speaker.name,
                "file": line.file,
                "text": text,
                "manner": [round(ratio, 3) for ratio in speaker.manner],
            }
        )
        at += len(line.wav) + samples(draw.uniform(0.3, 0.9))
    if said:
        heard = sorted({sentence["speaker"] for sentence in said})
        labels["language"] = who[0].speaker.language
        labels["sentences"] = said
        labels["speakers"] = [_described(who[number], number, said, tracks) for number in heard]
        labels["sources"] += origins
    return tracks


def _line(draw: Draw, who: _Who, part: _Part) -> tuple[Line, str]:
    """(what is said, the source of its text)."""
    own = who.voice.texts(who.speaker, part.split)
    text, origin = (
        sentences.sentence(draw, part.split) if own is None else (draw.choice(own), who.voice.name)
    )
    line = who.voice.say(text, who.speaker, draw)
    judged = part.judged and who.speaker.language == "en" and not who.voice.certain
    if judged and not listener.reads(line):
        raise InputError(f"{who.voice.name}: {text!r} cannot be read")
    return channels.spoken_so(line, who.manner), origin


def _described(
    who: _Who, number: int, said: list[dict[str, Any]], tracks: list[Track]
) -> dict[str, Any]:
    """What can be heard of a speaker; None where it lies between two classes."""
    own = [i for i, sentence in enumerate(said) if sentence["speaker"] == number]
    f0 = median_f0(tracks[own[0]].wav)
    words = sum(len(said[i]["text"].split()) for i in own)
    rate = words / sum(said[i]["end"] - said[i]["start"] for i in own) * 60
    low, middle, high = PITCHES[who.speaker.sex].values()
    pitches = {"low": (60, low[1]), "medium": middle, "high": (high[0], 450)}
    return {
        "voice": f"{who.voice.name}/{who.speaker.name}",
        "sex": who.speaker.sex,
        "pitch": _class_of(f0, pitches),
        "speed": _class_of(rate, _SPEEDS) if words >= 6 else None,
        "intonation": None,
        "accent": who.speaker.accent,
        "whispered": False,
        "f0_hz": round(f0, 1),
        "words_per_minute": round(rate, 1),
    }


def _class_of(value: float, classes: dict[str, tuple[float, float]]) -> str | None:
    return next((name for name, (low, high) in classes.items() if low <= value <= high), None)


# --- sounds and music ----------------------------------------------------------------------------


def _sound(draw: Draw, labels: dict[str, Any], part: _Part) -> list[Track]:
    """Recorded sounds; in training, a part of them is procedural, if the kind can be."""
    recorded = sounds.recordings(part.split)
    kinds = tuple(recorded) if recorded else tuple(KINDS)
    if part.split != "test":
        kinds = tuple(sorted({*recorded, *KINDS}))

    def make(kind: str, stream: Draw) -> Sound:
        if kind not in recorded or (kind in KINDS and _procedural(stream, part)):
            return procedural_sounds.make(kind, stream)
        return sounds.make(kind, part.split, stream)

    rules = split_named(part.split)
    tracks = add_events(draw, labels, rules, part.limit, part.end, part.alone, kinds, make)
    labels["sources"] += [_origin("sound", event.pop("files", ())) for event in labels["events"]]
    return tracks


def _music(draw: Draw, labels: dict[str, Any], part: _Part) -> list[Track]:
    """Music of sampled instruments; in training, a part of it is procedural."""

    def make(stream: Draw, seconds: float) -> Piece:
        if not music.available(part.split) or _procedural(stream, part):
            return procedural_music.make(stream, seconds)
        return music.make(stream, seconds, part.split)

    tracks = [add_music(draw, labels, part.limit, part.end, make)]
    labels["sources"].append(_origin("music", labels["music"].pop("files", ())))
    return tracks


def _procedural(draw: Draw, part: _Part) -> bool:
    return part.split != "test" and draw.chance(_FROM_PROCEDURAL)


def _origin(part: str, files: Sequence[str]) -> dict[str, Any]:
    source = "recordings" if files else "procedural"
    return {"part": part, "source": source, "speaker": None, "file": ", ".join(files) or None}


_PARTS: dict[str, Callable[[Draw, dict[str, Any], _Part], list[Track]]] = {
    "speech": _speech,
    "sound": _sound,
    "music": _music,
}
