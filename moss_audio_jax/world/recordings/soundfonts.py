"""Sampled instruments: the programs of General MIDI soundfonts, played by TinySoundFont."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import soxr

from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.draw import Draw
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.text.labels import DRUMS
from moss_audio_jax.world.dsp import loudest, samples, swell
from moss_audio_jax.world.music import Note, Piece
from moss_audio_jax.world.recordings import held_out
from moss_audio_jax.world.recordings.source import Source, of_kind

if TYPE_CHECKING:
    import tinysoundfont

_RATE = 44100  # the fonts' own: at 16 kHz the player would fold high partials down
_DRUM_BANK = 128
_DRUM_KEYS = dict(zip(DRUMS, (36, 38, 42), strict=True))
_TAIL = 0.3  # seconds that the last notes may ring on
# Keys that an instrument plays well; notes beyond are moved by octaves.
_RANGES = {
    "bass": (28, 52),
    "bells": (60, 96),
    "flute": (60, 93),
    "trumpet": (54, 84),
    "violin": (55, 98),
    "saxophone": (48, 84),
    "marimba": (45, 96),
}
_LEVELS = {"lead": 1.0, "bass": 0.7, "drums": 0.6, "other": 0.45}


class Program(NamedTuple):
    """An instrument of a font.

    Attributes:
      font: the name of the source.
      bank, number: as the font counts them, from 0.
    """

    font: str
    bank: int
    number: int

    @property
    def name(self) -> str:
        return f"{self.bank}:{self.number}"


@dataclasses.dataclass(frozen=True)
class Font(Source):
    """A soundfont.

    Attributes:
      path: of its file.
      programs: by instrument (`labels.SAMPLED_INSTRUMENTS` and "drums"): banks and numbers.
    """

    path: Path
    programs: dict[str, tuple[tuple[int, int], ...]] = dataclasses.field(hash=False)

    def available(self) -> bool:
        return self.path.is_file() and importlib.util.find_spec("tinysoundfont") is not None


def programs(split: str) -> dict[str, tuple[Program, ...]]:
    """The programs that are here and that a split may use, by instrument.

    Validation uses those of training.
    """
    wanted = "test" if held_out.checked(split) == "test" else "train"
    found: dict[str, list[Program]] = {}
    for font in of_kind("instrument"):
        for instrument, numbers in font.programs.items():
            for bank, number in numbers:
                program = Program(font.name, bank, number)
                if held_out.program_part(font.name, program.name) == wanted:
                    found.setdefault(instrument, []).append(program)
    return {instrument: tuple(of_it) for instrument, of_it in found.items()}


def playable(instrument: str, midi: int) -> int:
    """The note, moved by octaves into the instrument's range."""
    low, high = _RANGES.get(instrument, (36, 96))
    while midi < low:
        midi += 12
    while midi > high:
        midi -= 12
    return midi


def play(draw: Draw, piece: Piece, split: str) -> Piece:
    """The piece, played by programs that the split may use.

    Notes begin when they say and ring on for at most 0.3 s. Those outside of their instruments'
    ranges are moved by octaves.

    Raises:
      UsageError: an instrument has no program here.
    """
    notes = [
        note if note.midi is None else note._replace(midi=playable(note.instrument, note.midi))
        for note in piece.notes
    ]
    wav, used = _rendered(draw, notes, piece.parts[0], split)
    files = (*piece.files, *(f"{program.font}/{program.name}" for program in used))
    return piece._replace(wav=wav / loudest(wav), notes=notes, files=files)


def _rendered(
    draw: Draw, notes: Sequence[Note], lead: str, split: str
) -> tuple[np.ndarray, list[Program]]:
    """(float64 [n] at 16 kHz, the programs that play)."""
    known = programs(split)
    parts: dict[str, list[Note]] = {}
    for note in notes:
        name = "drums" if note.instrument in DRUMS else note.instrument
        parts.setdefault(name, []).append(note)
    if missing := sorted(set(parts) - set(known)):
        raise UsageError(
            f"no program for {', '.join(missing)} in split {split!r}; install the soundfonts of "
            "`source.table`"
        )
    n = max(note.stop for note in notes) + samples(_TAIL)
    wav, used = np.zeros(n), []
    for name in sorted(parts):
        stream = draw.child("program", name)
        used.append(stream.choice(known[name]))
        part = _played(stream, used[-1], parts[name], n)
        role = "lead" if name == lead else name if name in _LEVELS else "other"
        wav += _LEVELS[role] * part / loudest(part)
    return wav * swell(n, 0.001, _TAIL), used


def _played(draw: Draw, program: Program, notes: Sequence[Note], n: int) -> np.ndarray:
    """One instrument's notes; [n]."""
    font = next(font for font in of_kind("instrument") if font.name == program.font)
    synth, number = _synth(font.path)
    synth.sounds_off()
    while _generated(synth, 2048).any():  # what was played before fades
        pass
    drums = program.bank == _DRUM_BANK
    synth.program_select(0, number, program.bank, program.number, drums)
    loud = draw.integer(75, 110)
    actions = []
    for note in notes:
        key = _DRUM_KEYS[note.instrument] if note.midi is None else note.midi
        velocity = loud + draw.integer(-8, 8)
        actions.append((_at(note.start), 1, key, velocity))
        actions.append((_at(note.stop), 0, key, 0))
    blocks, at = [], 0
    for when, on, key, velocity in sorted(actions):  # a key's note ends before its next begins
        if when > at:
            blocks.append(_generated(synth, when - at))
            at = when
        if on:
            synth.noteon(0, key, velocity)
        else:
            synth.noteoff(0, key)
    blocks.append(_generated(synth, _at(n) - at))
    wav = soxr.resample(np.concatenate(blocks), _RATE, SAMPLE_RATE)[:n]
    return np.pad(wav, (0, n - len(wav)))


def _at(sample: int) -> int:
    return round(sample * _RATE / SAMPLE_RATE)


def _generated(synth: tinysoundfont.Synth, n: int) -> np.ndarray:
    stereo = np.frombuffer(synth.generate(n), np.float32).reshape(-1, 2)
    return stereo.mean(axis=1, dtype=np.float64)


@functools.lru_cache(4)
def _synth(path: Path) -> tuple[tinysoundfont.Synth, int]:
    import tinysoundfont

    synth = tinysoundfont.Synth(samplerate=_RATE)
    try:
        return synth, synth.sfload(str(path))
    except (tinysoundfont.SoundFontException, RuntimeError) as error:
        raise InputError(f"{path}: expected a soundfont: {error}") from None


_PLAYER = "pip install --no-deps tinysoundfont"  # its dependency plays to loudspeakers
SOURCES = (
    Font(
        name="fluid",
        kind="instrument",
        licence="MIT",
        origin="fluid-soundfont-gm",
        install=f"apt-get install fluid-soundfont-gm; {_PLAYER}",
        path=Path("/usr/share/sounds/sf2/FluidR3_GM.sf2"),
        programs={
            "piano": ((0, 0), (0, 1), (0, 3)),
            "harpsichord": ((0, 6), (8, 6)),
            "bells": ((0, 9), (0, 14)),
            "marimba": ((0, 12),),
            "organ": ((0, 16), (0, 17), (0, 18), (0, 19), (0, 20)),
            "accordion": ((0, 21), (8, 21)),
            "guitar": ((0, 24), (0, 25), (8, 25)),
            "electric guitar": ((0, 26), (0, 27), (0, 29), (0, 30)),
            "bass": ((0, 32), (0, 33), (0, 34), (0, 35), (0, 36), (0, 37), (0, 38)),
            "violin": ((0, 40), (0, 110)),
            "strings": ((0, 48), (0, 50)),
            "choir": ((0, 52), (0, 53), (0, 54)),
            "trumpet": ((0, 56), (0, 59)),
            "saxophone": ((0, 64), (0, 65), (0, 66), (0, 67)),
            "flute": ((0, 73), (0, 74), (0, 75), (0, 79)),
            "synthesizer": ((0, 80), (0, 81), (0, 82), (0, 87)),
            "drums": tuple((_DRUM_BANK, kit) for kit in (0, 8, 16, 24, 25, 32, 40)),
        },
    ),
    Font(
        name="timgm6mb",
        kind="instrument",
        licence="GPL-2",
        origin="timgm6mb-soundfont",
        install=f"apt-get install timgm6mb-soundfont; {_PLAYER}",
        path=Path("/usr/share/sounds/sf2/TimGM6mb.sf2"),
        programs={
            "piano": ((0, 0), (0, 1)),
            "harpsichord": ((0, 6),),
            "bells": ((0, 9), (0, 14)),
            "marimba": ((0, 12),),
            "organ": ((0, 16), (0, 19)),
            "accordion": ((0, 21), (0, 23)),
            "guitar": ((0, 24), (0, 25)),
            "electric guitar": ((0, 27), (0, 29)),
            "bass": ((0, 32), (0, 33)),
            "violin": ((0, 40),),
            "strings": ((0, 48), (0, 50)),
            "choir": ((0, 52), (0, 53)),
            "trumpet": ((0, 56),),
            "saxophone": ((0, 65), (0, 66)),
            "flute": ((0, 73), (0, 75)),
            "synthesizer": ((0, 80), (0, 81)),
            "drums": ((_DRUM_BANK, 0), (_DRUM_BANK, 8)),
        },
    ),
)
