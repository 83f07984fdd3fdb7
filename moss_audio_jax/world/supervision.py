"""A scene as one training row: all its questions share the clip; words and tags have times."""

from __future__ import annotations

import math
from typing import Any

from moss_audio_jax.text.labels import (
    DRUMS,
    INSTRUMENTS,
    KINDS,
    RECORDED_KINDS,
    SAMPLED_INSTRUMENTS,
)
from moss_audio_jax.world import describe
from moss_audio_jax.world.acoustics import BANDS, NOISES
from moss_audio_jax.world.speakers import ACCENTS, INTONATIONS, PITCHES, SPEEDS
from moss_audio_jax.world.tasks import rows

Labels = dict[str, Any]

_STRIKE = 0.04  # seconds that an onset lasts as a tag: half an audio token
# Classes of tempo are each 6% wide, because tempo is heard as a ratio.
_SLOWEST, _RATIO, _TEMPI = 55.0, 1.06, 20
_SPEAKER = {
    "sex": ("female", "male"),
    "pitch": tuple(PITCHES["male"]),
    "speed": tuple(SPEEDS),
    "intonation": tuple(INTONATIONS),
    "accent": (*ACCENTS, "Mandarin"),
}
# espeak's names of the phonemes of its English and Mandarin voices, without stress and variants.
_PHONES = """
    0 3 3: ; @ @L @r A A: A@ Au D E I IR N O O: O@ OI S S; T U U@ V VR X Z a aI aI@ aU aa ai b d dZ
    e@ eI ei f g h i i. i: i@ i@3 iA iE i[ iou j k kh l m n o o@ oU ong ou p ph r s s. t tS tS; tS;h
    th ts ts. ts.h tsh u u: u@ ua uai uei uo v w y y& yE z z."""
PHONES = tuple(_PHONES.split())
TAGS = (
    *(f"sound:{kind}" for kind in KINDS),
    "strike",
    "music",
    "beat",
    *(f"instrument:{name}" for name in (*INSTRUMENTS, *DRUMS)),
    *(f"note:{pitch}" for pitch in range(12)),
    *(f"tempo:{index}" for index in range(_TEMPI)),
    *(f"phone:{name}" for name in PHONES),
    "speech",
    "whispered",
    *(f"{field}:{value}" for field, values in _SPEAKER.items() for value in values),
    *(f"background:{kind}" for kind in NOISES),
    *(f"band:{name}" for name in BANDS),
    "room",
    *(f"loudness:{level}" for level in ("quiet", "normal", "loud")),
)
# With what only recordings have, for models that learn from them too.
RECORDED_TAGS = (
    *TAGS,
    *(f"sound:{kind}" for kind in RECORDED_KINDS),
    *(f"instrument:{name}" for name in SAMPLED_INSTRUMENTS if name not in INSTRUMENTS),
)
_MELODIC = {*INSTRUMENTS, *SAMPLED_INSTRUMENTS} - {"bass"}


def record(labels: Labels, audio: str, draws: int = 1) -> dict[str, Any]:
    """The row (see `data.records`) of a scene: all of `world.rows` as branches.

    Branches are questions that share one clip in a row; none sees the others. Without "words" the
    row says of no word when it is heard; without "tags" it says of no phoneme, so of nothing.
    """
    asked = rows(labels, audio, draws)
    made = {
        "conversation": asked[0]["conversation"][:1],
        "branches": [{"messages": row["conversation"][1:], "task": row["task"]} for row in asked],
        "id": labels["id"],
    }
    if describe.timed(labels):
        made["words"] = [
            {"text": word["text"], "start": word["start"], "end": word["end"]}
            for word in describe.words(labels)
        ]
    if all(sentence["phones"] is not None for sentence in labels["sentences"]):
        made["tags"] = [
            {"name": name, "start": round(start, 3), "end": round(end, 3)}
            for name, start, end in tags(labels)
        ]
    return made


def tags(labels: Labels) -> list[tuple[str, float, float]]:
    """(name, start, end) of everything in a scene's labels, in no particular order.

    Names are in TAGS, except those of a few very rare phonemes; those of a scene of recordings are
    in RECORDED_TAGS.
    """
    found: list[tuple[str, float, float]] = []
    for event in labels["events"]:
        found.append((f"sound:{event['kind']}", event["start"], event["end"]))
        found += [("strike", onset, onset + _STRIKE) for onset in event["onsets"]]
    for sentence in labels["sentences"]:
        span = sentence["start"], sentence["end"]
        speaker = describe.speaker_of(labels, sentence)
        found.append(("speech", *span))
        for field in _SPEAKER:
            heard = not speaker["whispered"] or field not in ("pitch", "intonation")
            if heard and speaker[field]:
                found.append((f"{field}:{speaker[field]}", *span))
        for name, start, end in sentence["phones"] or ():
            found.append((f"phone:{phone(name)}", start, end))
        if speaker["whispered"]:
            found.append(("whispered", *span))
    if music := labels["music"]:
        span = music["start"], music["end"]
        found += [("music", *span), (f"tempo:{tempo_class(music['tempo'])}", *span)]
        found += [("beat", beat, beat + _STRIKE) for beat in music["beats"]]
        for note in music["notes"]:
            when = note["start"], note["end"]
            found.append((f"instrument:{note['instrument']}", *when))
            if note["instrument"] in _MELODIC:
                found.append((f"note:{note['midi'] % 12}", *when))
    whole = 0.0, labels["duration"]
    if labels["background"]:
        found.append((f"background:{labels['background']['kind']}", *whole))
    if labels["band"]:
        found.append((f"band:{labels['band']}", *whole))
    if labels["room"]:
        found.append(("room", *whole))
    return [*found, (f"loudness:{labels['loudness']['level']}", *whole)]


def phone(name: str) -> str:
    """espeak's name of a phoneme without stress marks (', ,) and variant marks (2, #, -)."""
    plain = name.lstrip("',")
    return plain.rstrip("2#-") or plain


def tempo_class(tempo: float) -> int:
    """The class of a tempo; the first and last class include all slower and faster ones."""
    index = math.floor(math.log(tempo / _SLOWEST) / math.log(_RATIO))
    return min(max(index, 0), _TEMPI - 1)
