"""Music in a key and a tempo: melody, chords, bass and drums, with the time of every note."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moss_audio_jax.draw import Draw
from moss_audio_jax.text.labels import MODES, TONICS
from moss_audio_jax.world.dsp import loudest, place, samples
from moss_audio_jax.world.instruments import MELODIC, PERCUSSION, bass, frequency

SCALES = dict(zip(MODES, ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)), strict=True))
# Degrees of the chords of four bars. A piece starts on the tonic, and its last beat is the tonic.
_PROGRESSIONS = ((0, 3, 4, 0), (0, 5, 3, 4), (0, 4, 5, 3), (0, 3, 0, 4), (0, 5, 4, 0))
_RHYTHMS = ((1.0,), (0.5, 0.5), (1.0,), (0.5, 0.5), (2.0,), (1.5, 0.5))  # beats of melody notes
TEMPI = {"slow": (58, 84), "moderate": (92, 122), "fast": (132, 176)}  # beats per minute
BEATS_A_BAR = 4


class Note(NamedTuple):
    """start and stop in samples; midi is None for drums."""

    start: int
    stop: int
    instrument: str
    midi: int | None


class Piece(NamedTuple):
    """wav float64 [n], the RMS of its loudest 50 ms being 1, and what is played in it."""

    wav: np.ndarray  # [0] until it is played
    tempo: float  # beats per minute
    pace: str  # a key of TEMPI
    tonic: str
    mode: str
    parts: list[str]  # instruments, the leading one first
    notes: list[Note]  # in order of start
    chords: list[tuple[int, int, str]]  # start and stop in samples, name
    beats: list[int]  # samples
    files: tuple[str, ...] = ()  # the score and the programs, if it is made of such


def make(draw: Draw, seconds: float) -> Piece:
    """A piece of about `seconds` at most; it has at least two beats, however few seconds."""
    piece = compose(draw, seconds)
    wav = _render(draw, piece.notes, piece.parts[0])
    return piece._replace(wav=wav / loudest(wav))


def compose(draw: Draw, seconds: float, melodic: tuple[str, ...] = tuple(MELODIC)) -> Piece:
    """As `make`, but not played yet.

    Args:
      melodic: the instruments that may play the melody and the chords.
    """
    pace = draw.choice(tuple(TEMPI))
    tempo = float(draw.integer(*TEMPI[pace]))
    beat = 60 / tempo
    n_beats = max(int((seconds - 0.15) / beat), 2)
    tonic, mode = draw.integer(0, 11), draw.choice(MODES)
    lead = draw.choice(melodic)
    backing = draw.weighted({"none": 1.0, "chords": 1.5})
    parts = [lead]
    if backing == "chords":
        parts.append(draw.choice([name for name in melodic if name != lead]))
    with_bass, with_drums = draw.chance(0.4), draw.chance(0.45)
    parts += ["bass"] * with_bass + ["drums"] * with_drums

    degrees = _degrees(draw, n_beats)
    notes = _melody(draw, lead, n_beats, beat, tonic, mode, degrees)
    chords = []
    for first, last, degree in _spans(degrees):
        start, stop = samples(first * beat), samples(last * beat)
        triad = [_pitch(48 + tonic, mode, degree + step) for step in (0, 2, 4)]
        chords.append((start, stop, _chord_name(triad)))
        if backing == "chords":
            notes += [Note(start, stop, parts[1], midi) for midi in triad]
    if with_bass:
        for i, degree in enumerate(degrees):
            midi = _pitch(36 + tonic, mode, degree) - (12 if tonic > 7 else 0)
            notes.append(Note(samples(i * beat), samples((i + 0.9) * beat), "bass", midi))
    if with_drums:
        for half in range(2 * n_beats):
            at, stop = samples(half * beat / 2), samples((half + 1) * beat / 2)
            if half % 2 == 0:
                strong = (half // 2) % 2 == 0
                notes.append(Note(at, stop, "kick" if strong else "snare", None))
            notes.append(Note(at, stop, "hihat", None))
    notes.sort(key=lambda note: (note.start, note.instrument, note.midi or 0))
    return Piece(
        np.zeros(0),
        tempo,
        pace,
        TONICS[tonic],
        mode,
        parts,
        notes,
        chords,
        [samples(i * beat) for i in range(n_beats)],
    )


def _degrees(draw: Draw, n_beats: int) -> list[int]:
    """The chord's degree for each beat."""
    progression = draw.choice(_PROGRESSIONS)
    degrees = [progression[(i // BEATS_A_BAR) % 4] for i in range(n_beats)]
    degrees[-1] = 0  # ends on the tonic, so that the key can be heard
    return degrees


def _melody(
    draw: Draw, lead: str, n_beats: int, beat: float, tonic: int, mode: str, degrees: list[int]
) -> list[Note]:
    """Notes that start on a beat belong to its chord; others are a step from the note before.

    The first note is the chord's root, and the last the tonic, for the last beat.
    """
    notes, at, step = [], 0.0, 7 * draw.integer(0, 1) if tonic < 6 else 0
    while at < n_beats - 1:
        for length in draw.choice(_RHYTHMS):
            length = min(length, n_beats - 1 - at)
            if length <= 0:
                break
            if at % 1 == 0:
                chord = [
                    degrees[int(at)] + tone + octave for tone in (0, 2, 4) for octave in (0, 7)
                ]
                near = sorted(chord, key=lambda s: (abs(s - step), s))
                step = draw.choice(near[:2]) if at else 0
            else:
                step += draw.choice((-1, 1))
            midi = _pitch(60 + tonic, mode, step)
            notes.append(Note(samples(at * beat), samples((at + length) * beat), lead, midi))
            at += length
    start = samples(at * beat)
    notes.append(Note(start, start + samples(beat), lead, _pitch(60 + tonic, mode, 0)))
    return notes


def _pitch(root: int, mode: str, step: int) -> int:
    octave, degree = divmod(step, 7)
    return root + 12 * octave + SCALES[mode][degree]


def _chord_name(triad: list[int]) -> str:
    third, fifth = triad[1] - triad[0], triad[2] - triad[0]
    quality = {(4, 7): "major", (3, 7): "minor", (3, 6): "diminished"}[third, fifth]
    return f"{TONICS[triad[0] % 12]} {quality}"


def _spans(degrees: list[int]) -> list[tuple[int, int, int]]:
    """(first beat, last beat exclusive, degree) of runs of one degree within a bar."""
    spans = []
    for i, degree in enumerate(degrees):
        if spans and spans[-1][2] == degree and i % BEATS_A_BAR:
            spans[-1] = (spans[-1][0], i + 1, degree)
        else:
            spans.append((i, i + 1, degree))
    return spans


def _render(draw: Draw, notes: list[Note], lead: str) -> np.ndarray:
    made: dict[tuple[str, int | None, int], np.ndarray] = {}  # a note played again sounds the same
    pieces = []
    for note in notes:
        key = (note.instrument, note.midi, note.stop - note.start)
        if key not in made:
            stream = draw.child(*key)
            if note.midi is None:
                made[key] = PERCUSSION[note.instrument](stream)
            else:
                play = bass if note.instrument == "bass" else MELODIC[note.instrument]
                level = 1.0 if note.instrument == lead else 0.8 if play is bass else 0.3
                seconds = (note.stop - note.start) / 16000
                made[key] = level * play(stream, frequency(note.midi), seconds)
        pieces.append((note.start, made[key]))
    return place(pieces)
