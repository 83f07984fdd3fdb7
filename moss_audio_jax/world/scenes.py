"""Scenes: a clip and labels of all that it contains, a pure function of (index, split, seed).

`labels` is a JSON object; times are seconds, rounded to milliseconds:

    {"version", "id", "seed", "split", "index", "content", "duration", "language": en | zh | null,
     "speakers": [{"voice", "sex", "pitch", "speed", "intonation", "accent", "whispered",
                   "f0_hz", "words_per_minute"}],
     "sentences": [{"text", "start", "end", "speaker", "order",
                    "words": [{"text", "start", "end"}], "phones": [[espeak's name, start, end]]}],
     "events": [{"kind", "start", "end", "onsets", "level_db"}],
     "music": null | {"start", "end", "tempo", "pace", "tonic", "mode", "parts", "beats",
                      "notes": [{"start", "end", "instrument", "midi"}],
                      "chords": [{"start", "end", "name"}], "level_db"},
     "background": null | {"kind", "snr_db"}, "room": null | {"rt60"}, "band": null | name,
     "loudness": {"level", "rms_dbfs", "peak_dbfs"},
     "overlap": [{"start", "end", "sources"}], "silence": [{"start", "end"}]}

A Mandarin word is a character. Ends are those of the sound before reverberation is added. `snr_db`
is measured where any source sounds. `silence` is where no source sounds for 0.2 s or more; there
may be background noise.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.draw import Draw
from moss_audio_jax.errors import UsageError
from moss_audio_jax.world import acoustics, espeak, grammar, mandarin, music, sounds
from moss_audio_jax.world.dsp import loudest, median_f0, samples
from moss_audio_jax.world.speakers import Speaker, draw_speaker
from moss_audio_jax.world.splits import (
    Split,
    held_out_pairs,
    pair_held_out,
    sentence_part,
    split_named,
)

VERSION = 1  # goes up whenever a scene changes
MAX_SECONDS = 12.0
CONTENTS = {
    "speech": 0.40,
    "sound": 0.17,
    "music": 0.12,
    "speech+sound": 0.11,
    "speech+music": 0.07,
    "sound+music": 0.04,
    "speech+sound+music": 0.05,
    "silence": 0.04,
}
LEVELS = {"quiet": (-34.0, -26.0), "normal": (-14.0, -6.0), "loud": (-2.5, -0.5)}  # peak, dBFS
_TRIES = 200


@dataclasses.dataclass(frozen=True)
class Scene:
    """wav float32 [n] at 16 kHz, exactly what a 16-bit file holds; labels as above."""

    wav: np.ndarray
    labels: dict[str, Any]


class Track(NamedTuple):
    start: int  # samples
    wav: np.ndarray
    db: float


def check_place(index: int, max_seconds: float) -> None:
    """Raises UsageError unless there can be such a scene."""
    if index < 0:
        raise UsageError(f"scene {index}; expected a number from 0")
    if not max_seconds >= 4:
        raise UsageError(f"max_seconds is {max_seconds}; a scene needs 4 s or more")


def scene(
    index: int,
    split: str = "train",
    seed: int = 0,
    content: str | None = None,
    max_seconds: float = MAX_SECONDS,
) -> Scene:
    """Scene `index` of a split.

    Args:
      content: a key of CONTENTS; None: drawn with the weights in CONTENTS.
      max_seconds: no scene is longer; at least 4.

    Raises:
      UsageError: an unknown split or content, content that the split excludes, a bad number.
      InputError: speech without the extra `world`; see `espeak.speak`.
    """
    rules = split_named(split)
    check_place(index, max_seconds)
    allowed = {
        name: weight
        for name, weight in CONTENTS.items()
        if (content is None or name == content) and (not rules.needs or rules.needs in name)
    }
    if not allowed:
        raise UsageError(
            f"no scene of content {content!r} in split {split!r}; expected one of "
            f"{', '.join(name for name in CONTENTS if not rules.needs or rules.needs in name)}"
        )
    draw = Draw("world", VERSION, seed, split, index, content, float(max_seconds))
    chosen = draw.weighted(allowed)
    parts = chosen.split("+")
    limit = samples(max_seconds) - samples(0.1)
    labels = blank(name_of(index, split, seed, content, max_seconds), seed, split, index, chosen)
    tracks: list[Track] = []
    if "speech" in parts:
        tracks += _speech(draw.child("speech"), labels, rules, limit)
    if "sound" in parts:
        end = max((t.start + len(t.wav) for t in tracks), default=0)
        tracks += add_events(draw.child("events"), labels, rules, limit, end, alone=len(parts) == 1)
    if "music" in parts:
        end = max((t.start + len(t.wav) for t in tracks), default=0)
        tracks.append(add_music(draw.child("music"), labels, limit, end))
    wav = mixed(draw.child("mix"), labels, tracks, limit)
    return Scene(wav, labels)


def blank(name: str, seed: int, split: str, index: int, content: str) -> dict[str, Any]:
    """The labels of a scene in which there is nothing yet."""
    return {
        "version": VERSION,
        "id": name,
        "seed": seed,
        "split": split,
        "index": index,
        "content": content,
        "duration": 0.0,
        "language": None,
        "speakers": [],
        "sentences": [],
        "events": [],
        "music": None,
    }


def name_of(index: int, split: str, seed: int, content: str | None, max_seconds: float) -> str:
    name = f"{split}-{seed}-{index:08d}"
    if content:
        name += f"-{content}"
    return name if max_seconds == MAX_SECONDS else f"{name}-{max_seconds:g}s"


# --- sources -------------------------------------------------------------------------------------


def _speech(draw: Draw, labels: dict[str, Any], rules: Split, limit: int) -> list[Track]:
    language = "zh" if draw.chance(0.15) else "en"
    for attempt in range(_TRIES):  # a long sentence said slowly may not fit
        tracks, sentences, speakers = _talk(draw.child(attempt), language, rules, limit)
        if tracks:
            labels |= {"language": language, "sentences": sentences, "speakers": speakers}
            return tracks
    raise UsageError(f"no sentence fits in {limit / SAMPLE_RATE:.1f} s; allow longer scenes")


def _talk(draw: Draw, language: str, rules: Split, limit: int) -> tuple[list, list, list]:
    """One to four sentences by one or two speakers; empty if not even one fits."""
    count = draw.weighted({1: 0.45, 2: 0.3, 3: 0.15, 4: 0.1})
    speakers = [draw_speaker(draw, language, rules.held_out_voices)]
    if count > 1 and draw.chance(0.5):
        sex = {"male": "female", "female": "male"}[speakers[0].sex] if draw.chance(0.7) else None
        other = draw_speaker(draw, language, rules.held_out_voices, sex)
        if other.voice != speakers[0].voice:
            speakers.append(other)
    lines = []
    for i in range(count):
        order = rules.order or draw.weighted(grammar.ORDERS)
        text = _sentence(draw, language, order, rules.sentences)
        lines.append((text, order, i % len(speakers)))
    units = [tuple(text) if language == "zh" else tuple(text.split()) for text, _, _ in lines]
    spoken = espeak.speak(
        [_utterance(speakers[who], u) for u, (_, _, who) in zip(units, lines, strict=True)]
    )

    tracks, sentences = [], []
    gains = [draw.uniform(-3, 0) for _ in speakers]
    at = samples(draw.uniform(0.1, 0.6))
    for (text, order, who), line in zip(lines, spoken, strict=True):
        if at + len(line.wav) > limit:
            break
        sentences.append(sentence_labels(text, who, order, at, line))
        tracks.append(Track(at, line.wav / loudest(line.wav), gains[who]))
        at += len(line.wav) + samples(draw.uniform(0.3, 0.9))
    heard = sorted({sentence["speaker"] for sentence in sentences})
    return tracks, sentences, [_described(speakers[who], who, sentences, tracks) for who in heard]


def sentence_labels(
    text: str, speaker: int, order: str | None, at: int, line: espeak.Spoken
) -> dict[str, Any]:
    """The labels of a line that begins at sample `at`; words and phones may be None."""

    def placed(items: list[espeak.SpokenWord] | None) -> list[tuple[str, float, float]] | None:
        return items and [(i.text, _s(at + i.start), _s(at + i.stop)) for i in items]

    words, phones = placed(line.words), placed(line.phones)
    return {
        "text": text,
        "start": _s(at),
        "end": _s(at + len(line.wav)),
        "speaker": speaker,
        "order": order,
        "words": words and [{"text": t, "start": start, "end": end} for t, start, end in words],
        "phones": phones and [list(phone) for phone in phones],
    }


def _utterance(speaker: Speaker, units: tuple[str, ...]) -> espeak.Utterance:
    return espeak.Utterance(
        units,
        speaker.espeak_voice,
        speaker.rate,
        speaker.tone,
        speaker.range,
        speaker.language == "zh",
    )


def _sentence(draw: Draw, language: str, order: str, part: str) -> str:
    make = mandarin.sentence if language == "zh" else grammar.sentence
    while True:
        text = make(draw, order)
        if sentence_part(text) == part:
            return text


def _described(
    speaker: Speaker, who: int, sentences: list[dict], tracks: list[Track]
) -> dict[str, Any]:
    said = [i for i, sentence in enumerate(sentences) if sentence["speaker"] == who]
    words = sum(len(sentences[i]["words"]) for i in said)
    minutes = sum(sentences[i]["end"] - sentences[i]["start"] for i in said) / 60
    f0 = 0.0 if speaker.whispered else median_f0(tracks[said[0]].wav)
    names = ("voice", "sex", "pitch", "speed", "intonation", "accent", "whispered")
    return {name: getattr(speaker, name) for name in names} | {
        "f0_hz": round(f0, 1),
        "words_per_minute": round(words / minutes, 1),
    }


def add_events(
    draw: Draw,
    labels: dict[str, Any],
    rules: Split,
    limit: int,
    end: int,
    alone: bool,
    kinds: Sequence[str] = tuple(sounds.KINDS),
    make: Callable[[str, Draw], sounds.Sound] = sounds.make,
) -> list[Track]:
    """One to five sounds, alone or among the tracks that end at sample `end`.

    Args:
      labels: get the events.
      kinds: the kinds of sound that may be heard.
      make: makes a sound of a kind.
    """
    for attempt in range(_TRIES):
        stream = draw.child(attempt)
        chosen = _kinds(stream, rules, alone, kinds)
        placed = _placed(stream, chosen, limit, end, make)
        if len(placed) >= (2 if rules.held_out_pairs else 1):
            break
    else:
        raise UsageError(f"no sound fits in {limit / SAMPLE_RATE:.1f} s; allow longer scenes")
    tracks = []
    for kind, at, sound in placed:
        db = stream.uniform(-6, 0) if alone else stream.uniform(-9, 0)
        tracks.append(Track(at, sound.wav, db))
        labels["events"].append(
            {
                "kind": kind,
                "start": _s(at),
                "end": _s(at + len(sound.wav)),
                "onsets": [_s(at + onset) for onset in sound.onsets],
                "level_db": round(db, 1),
            }
            | ({"files": (sound.file,)} if sound.file else {})
        )
    labels["events"].sort(key=lambda event: (event["start"], event["kind"]))
    return tracks


def _kinds(draw: Draw, rules: Split, alone: bool, known: Sequence[str]) -> list[str]:
    count = draw.weighted({1: 0.3, 2: 0.3, 3: 0.2, 4: 0.12, 5: 0.08} if alone else {1: 0.7, 2: 0.3})
    if rules.held_out_pairs:
        kinds = draw.shuffled(draw.choice(held_out_pairs()))
    else:
        kinds = [draw.choice(known)]
    while len(kinds) < count:
        if draw.chance(0.15):
            kinds.append(draw.choice(kinds))
            continue
        fresh = [kind for kind in known if kind not in kinds]
        if not rules.held_out_pairs:
            fresh = [kind for kind in fresh if not any(pair_held_out(kind, k) for k in kinds)]
        if not fresh:  # few kinds are known
            break
        kinds.append(draw.choice(fresh))
    return kinds


def _placed(
    draw: Draw,
    kinds: list[str],
    limit: int,
    end: int,
    make: Callable[[str, Draw], sounds.Sound],
) -> list[tuple[str, int, sounds.Sound]]:
    """(kind, first sample, sound): one after the other, sometimes two at once."""
    placed: list[tuple[str, int, sounds.Sound]] = []
    latest = 0
    for number, kind in enumerate(kinds):
        sound = make(kind, draw.child(number))
        if end:  # anywhere among the tracks that are already there
            last = min(max(end - len(sound.wav) // 2, samples(0.5)), limit - len(sound.wav))
            at = draw.integer(0, max(last, 0))
            if any(
                at < b + len(s.wav) + samples(0.2) and b < at + len(sound.wav) + samples(0.2)
                for k, b, s in placed
                if k == kind
            ):
                continue  # two of a kind at once could not be told apart
        elif placed and placed[-1][0] != kind and draw.chance(0.2):
            at = placed[-1][1] + round(draw.uniform(0.3, 0.8) * len(placed[-1][2].wav))
        else:
            at = latest + samples(draw.uniform(0.25, 1.0))
        if at + len(sound.wav) > limit:
            continue
        placed.append((kind, at, sound))
        latest = max(latest, at + len(sound.wav))
    return placed


def add_music(
    draw: Draw,
    labels: dict[str, Any],
    limit: int,
    end: int,
    make: Callable[[Draw, float], music.Piece] = music.make,
) -> Track:
    """Music, alone or under all other tracks.

    Args:
      labels: get the music.
      make: makes a piece of so many seconds at most.
    """
    at = samples(draw.uniform(0.05, 0.4))
    seconds = (max(end, samples(4.0)) - at) / SAMPLE_RATE if end else draw.uniform(4.0, 12.0)
    piece = make(draw, min(seconds + 0.3, (limit - at) / SAMPLE_RATE))
    wav = piece.wav[: limit - at]
    db = 0.0
    if labels["sentences"]:
        db = draw.uniform(-16, -8)
    elif labels["events"]:
        db = draw.uniform(-10, -3)
    labels["music"] = {
        "start": _s(at + piece.notes[0].start),
        "end": _s(at + min(max(note.stop for note in piece.notes), len(wav))),
        "tempo": piece.tempo,
        "pace": piece.pace,
        "tonic": piece.tonic,
        "mode": piece.mode,
        "parts": piece.parts,
        "beats": [_s(at + beat) for beat in piece.beats],
        "notes": [
            {
                "start": _s(at + note.start),
                "end": _s(at + note.stop),
                "instrument": note.instrument,
                "midi": note.midi,
            }
            for note in piece.notes
        ],
        "chords": [
            {"start": _s(at + start), "end": _s(at + stop), "name": name}
            for start, stop, name in piece.chords
        ],
        "level_db": round(db, 1),
    } | ({"files": piece.files} if piece.files else {})
    return Track(at, wav, db)


# --- mixing --------------------------------------------------------------------------------------


def mixed(
    draw: Draw,
    labels: dict[str, Any],
    tracks: list[Track],
    limit: int,
    channel: Callable[[Draw, np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """The sum of the tracks, with a room, noise, a band limit and a level; float32 [n].

    Args:
      labels: get all that does not depend on single tracks.
      channel: changes the sum before its level is set, and neither its length nor its times.
    """
    end = max((t.start + len(t.wav) for t in tracks), default=0)
    if not tracks:
        end = samples(draw.uniform(1.5, 6.0))
    n = min(end + samples(draw.uniform(0.1, 0.6)), limit + samples(0.1))
    wav = np.zeros(n)
    active = np.zeros(n, bool)
    for track in tracks:
        along = slice(track.start, track.start + len(track.wav))
        wav[along] += 10 ** (track.db / 20) * track.wav
        active[along] = True
    power = np.mean(wav[active] ** 2) if tracks else 1.0

    room = band = background = None
    if tracks and draw.chance(0.35):
        rt60 = draw.uniform(0.15, 0.6)
        wav = acoustics.reverberate(draw, wav, rt60, draw.uniform(-14, -5))
        room = {"rt60": round(rt60, 3)}
    # Sound events keep the whole band: some lie outside that of a telephone.
    if tracks and not labels["events"] and draw.chance(0.12):
        band = draw.choice(tuple(acoustics.BANDS))
        wav = acoustics.band_limit(wav, band)
    if draw.chance(0.4 if tracks else 0.7):
        kind = draw.choice(acoustics.NOISES)
        snr = draw.uniform(8, 35) if not labels["events"] else draw.uniform(16, 35)
        wav += acoustics.noise(draw, kind, n) * np.sqrt(power * 10 ** (-snr / 10))
        background = {"kind": kind, "snr_db": round(snr, 1) if tracks else None}
    if channel:
        wav = channel(draw.child("channel"), wav)
    level = draw.weighted({"quiet": 1.0, "normal": 3.0, "loud": 1.0})
    peak = np.abs(wav).max()
    if peak > 0:
        wav *= 10 ** (draw.uniform(*LEVELS[level]) / 20) / peak
    pcm = np.rint(wav * 32767) + 0.0  # + 0.0 removes negative zeros, which depend on the machine

    labels |= {
        "duration": _s(n),
        "background": background,
        "room": room,
        "band": band,
        "loudness": {
            "level": level,
            "rms_dbfs": _dbfs(np.sqrt(np.mean(pcm**2))),
            "peak_dbfs": _dbfs(np.abs(pcm).max()),
        },
    }
    labels |= _coverage(labels)
    return (pcm / 32768).astype(np.float32)


def _coverage(labels: dict[str, Any]) -> dict[str, Any]:
    """The spans in which two or more sources sound, and those in which none does."""
    spans = [(s["start"], s["end"], "speech") for s in labels["sentences"]]
    spans += [(e["start"], e["end"], e["kind"]) for e in labels["events"]]
    if labels["music"]:
        spans.append((labels["music"]["start"], labels["music"]["end"], "music"))
    edges = sorted({0.0, labels["duration"], *(t for start, end, _ in spans for t in (start, end))})
    overlap: list[dict[str, Any]] = []
    silence: list[dict[str, Any]] = []
    for start, end in itertools.pairwise(edges):
        sources = sorted({name for a, b, name in spans if a < end and b > start})
        if len(sources) > 1:
            if overlap and overlap[-1]["end"] == start and overlap[-1]["sources"] == sources:
                overlap[-1]["end"] = end
            else:
                overlap.append({"start": start, "end": end, "sources": sources})
        elif not sources:
            silence.append({"start": start, "end": end})
    return {
        "overlap": overlap,
        "silence": [s for s in silence if s["end"] - s["start"] >= 0.2],
    }


def _s(at: int) -> float:
    return round(at / SAMPLE_RATE, 3)


def _dbfs(level: float) -> float | None:
    return round(float(20 * np.log10(level / 32768)), 1) if level > 0 else None
