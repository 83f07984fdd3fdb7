"""Passages of real scores from music21's corpus, as pieces of music with all their labels.

Two parts of it whose music is in the public domain: the chorales of Bach, and Ryan's Mammoth
Collection of 1883, dances for the fiddle. Their players and tempi are drawn.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moss_audio_jax.draw import Draw
from moss_audio_jax.errors import UsageError, extra
from moss_audio_jax.text.labels import TONICS
from moss_audio_jax.world.dsp import samples
from moss_audio_jax.world.music import TEMPI, Note, Piece
from moss_audio_jax.world.recordings import held_out
from moss_audio_jax.world.recordings.source import Source, of_kind

# Instruments that can play any voice of a score.
WIDE = (
    "piano",
    "harpsichord",
    "organ",
    "accordion",
    "guitar",
    "electric guitar",
    "strings",
    "choir",
    "synthesizer",
)
_METRES = {"4/4": 1.0, "3/4": 1.0, "2/4": 1.0, "2/2": 2.0, "6/8": 1.5}  # quarters of a beat
_SHORTEST = 0.08  # seconds: faster notes are none that people play
_FEWEST_BEATS = 4
_MOST_VOICES = 4  # more are instruments that double the choir
_TRIES = 60
_TRIADS = {(0, 4, 7): "major", (0, 3, 7): "minor", (0, 3, 6): "diminished"}


class Tone(NamedTuple):
    """A note of a score; start and length in beats."""

    start: float
    length: float
    midi: int
    voice: int  # 0 has the melody


class Score(NamedTuple):
    """A score in one metre and one key; tones in order of start."""

    tonic: int  # 0 is C
    mode: str
    tones: tuple[Tone, ...]


@dataclasses.dataclass(frozen=True)
class Corpus(Source):
    """A folder of music21's corpus.

    Attributes:
      pattern: of its files, in the corpus.
    """

    pattern: str

    def available(self) -> bool:
        return importlib.util.find_spec("music21") is not None

    def scores(self, split: str) -> tuple[str, ...]:
        """The names of the scores that a split may use."""
        self.require()
        return _names(self.name, self.pattern, split)

    def read(self, name: str) -> Score | None:
        """A score; None if it is none that labels can tell of.

        Such a one has more than four parts, changes its metre, is in a rare one, or its key differs
        from its key signature.
        """
        return _read(_corpus() / Path(self.pattern).parent / name)


@functools.cache
def _names(source: str, pattern: str, split: str) -> tuple[str, ...]:
    found = sorted(path.name for path in _corpus().glob(pattern))
    return held_out.recordings(source, found, split)


def _corpus() -> Path:
    return Path(importlib.util.find_spec("music21").origin).parent / "corpus"


@functools.cache
def _read(path: Path) -> Score | None:
    from music21 import converter
    from music21.exceptions21 import Music21Exception

    try:
        score = converter.parse(path, forceSource=True)
    except (Music21Exception, ValueError, IndexError, KeyError, AttributeError):
        return None  # some of the corpus's files are beyond its own reader
    parts = list(getattr(score, "parts", ()))
    if not 1 <= len(parts) <= _MOST_VOICES:
        return None
    metres = {sign.ratioString for sign in parts[0].recurse().getElementsByClass("TimeSignature")}
    if len(metres) != 1 or not metres <= set(_METRES):
        return None
    beat = _METRES[metres.pop()]
    key = score.analyze("key")
    signs = {sign.sharps for sign in parts[0].recurse().getElementsByClass("KeySignature")}
    if signs != {key.sharps}:
        return None
    tones = []
    for voice, part in enumerate(parts):
        for note in part.stripTies().flatten().notes:
            length = float(note.quarterLength) / beat
            if length > 0:
                midi = max(pitch.midi for pitch in note.pitches)
                tones.append(Tone(float(note.offset) / beat, length, midi, voice))
    return Score(key.tonic.pitchClass, key.mode, tuple(sorted(tones)))


def piece(draw: Draw, seconds: float, split: str, melodic: Sequence[str]) -> Piece:
    """A passage of about `seconds` at most, not played yet; its key is heard in it.

    It begins where the melody has a note on a beat, and has at least four beats. One instrument
    plays all parts, or one the melody and another the rest.

    Args:
      melodic: the instruments that may play the melody.

    Raises:
      UsageError: no source of scores is here, or no passage fits.
    """
    corpora = of_kind("score")
    if not corpora:
        raise UsageError("no source of scores is here; `source.table` says how to get one")
    for attempt in range(_TRIES):
        stream = draw.child(attempt)
        pace = stream.choice(tuple(TEMPI))
        tempo = stream.integer(*TEMPI[pace])
        count = int((seconds - 0.15) * tempo / 60)
        if count < _FEWEST_BEATS:
            continue
        corpus = stream.choice(corpora)
        name = stream.choice(corpus.scores(split))
        score = corpus.read(name)
        found = score and _passage(stream, score, pace, float(tempo), count, tuple(melodic))
        if found:
            return found._replace(files=(f"{corpus.name}/{name}",))
    raise UsageError(f"no passage of a score fits in {seconds:.1f} s; allow longer music")


def _passage(
    draw: Draw, score: Score, pace: str, tempo: float, count: int, melodic: tuple[str, ...]
) -> Piece | None:
    """`count` beats from somewhere in the score; None if these do not do."""
    beat = 60 / tempo
    starts = [t.start for t in score.tones if t.voice == 0 and t.start % 1 == 0]
    end = max(tone.start + tone.length for tone in score.tones)
    starts = [start for start in starts if start + count <= end]
    if not starts:
        return None
    first = draw.choice(starts)
    tones = [
        tone._replace(
            start=tone.start - first,
            length=min(tone.length, count - tone.start + first),
        )
        for tone in score.tones
        if first <= tone.start < first + count - 0.1
    ]
    shortest = min(tone.length for tone in tones) * beat
    if shortest < _SHORTEST or _key(tones) != (score.tonic, score.mode):
        return None
    if (count - 1) - max(tone.start for tone in tones) > 1:
        return None  # ends in a rest: its beats could not be heard
    lead = draw.choice(melodic)
    rest = lead
    if len({tone.voice for tone in tones}) > 1 and (lead not in WIDE or draw.chance(0.5)):
        rest = draw.choice([name for name in WIDE if name != lead])
    notes = {
        Note(
            samples(tone.start * beat),
            samples((tone.start + tone.length) * beat),
            lead if tone.voice == 0 else rest,
            tone.midi,
        )
        for tone in tones
    }
    return Piece(
        np.zeros(0),
        tempo,
        pace,
        TONICS[score.tonic],
        score.mode,
        [lead] if all(note.instrument == lead for note in notes) else [lead, rest],
        sorted(notes, key=lambda note: (note.start, note.instrument, note.midi)),
        _chords(tones, count, beat),
        [samples(i * beat) for i in range(count)],
    )


def _key(tones: Sequence[Tone]) -> tuple[int, str]:
    from music21 import note, stream

    passage = stream.Stream()
    for tone in tones:
        passage.insert(tone.start, note.Note(tone.midi, quarterLength=tone.length))
    key = passage.analyze("key")
    return key.tonic.pitchClass, key.mode


def _chords(tones: Sequence[Tone], count: int, beat: float) -> list[tuple[int, int, str]]:
    """The triads that sound on beats, each to where another begins or none sounds."""
    found: list[tuple[int, int, str]] = []
    for at in range(count):
        sounding = {t.midi % 12 for t in tones if t.start <= at < t.start + t.length}
        names = [
            f"{TONICS[root]} {quality}"
            for root in range(12)
            for shape, quality in _TRIADS.items()
            if {(root + step) % 12 for step in shape} == sounding
        ]
        start, stop = samples(at * beat), samples((at + 1) * beat)
        if names and found and found[-1][1:] == (start, names[0]):
            found[-1] = (found[-1][0], stop, names[0])
        elif names:
            found.append((start, stop, names[0]))
    return found


SOURCES = (
    Corpus(
        name="bach",
        kind="score",
        licence="public domain (music), BSD-3-Clause (music21)",
        origin="music21",
        install=extra("ears"),
        pattern="bach/*.mxl",
    ),
    Corpus(
        name="ryans-mammoth",
        kind="score",
        licence="public domain (music), BSD-3-Clause (music21)",
        origin="music21",
        install=extra("ears"),
        pattern="ryansMammoth/*.abc",
    ),
)
