"""Sampled instruments and scores: what each split hears, and whether the labels are true.

Tests that play need the soundfonts and TinySoundFont, and those of scores need music21.
"""

import importlib.util
import itertools
import struct
from collections import defaultdict

import numpy as np
import pytest

from moss_audio_jax.draw import Draw
from moss_audio_jax.errors import UsageError
from moss_audio_jax.text.labels import SAMPLED_INSTRUMENTS, TONICS
from moss_audio_jax.world import tasks
from moss_audio_jax.world.music import SCALES, Note, compose
from moss_audio_jax.world.recordings import held_out, music, scenes, scores, soundfonts

MELODIC = tuple(name for name in SAMPLED_INSTRUMENTS if name != "bass")
needs_fonts = pytest.mark.skipif(
    not all(font.available() for font in soundfonts.SOURCES),
    reason="needs " + " and ".join(font.install for font in soundfonts.SOURCES),
)
needs_scores = pytest.mark.skipif(
    importlib.util.find_spec("music21") is None, reason="needs pip install music21"
)


def parts_of_programs() -> dict[str, dict[str, set[str]]]:
    """instrument -> split -> font/program, of all fonts, here or not."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for font in soundfonts.SOURCES:
        for instrument, numbers in font.programs.items():
            for bank, number in numbers:
                name = soundfonts.Program(font.name, bank, number).name
                part = held_out.program_part(font.name, name)
                found[instrument][part].add(f"{font.name}/{name}")
    return found


def test_every_instrument_has_programs_for_training_and_others_for_tests():
    parts = parts_of_programs()
    assert set(parts) == {*SAMPLED_INSTRUMENTS, "drums"}
    assert len(SAMPLED_INSTRUMENTS) == 16
    of_split = {split: set() for split in ("train", "test")}
    for instrument, found in parts.items():
        assert set(found) == {"train", "test"}, instrument
        for split in of_split:
            assert not of_split[split] & found[split], "a program of two instruments"
            of_split[split] |= found[split]
    assert not of_split["train"] & of_split["test"]
    held = {p for font, names in held_out.TEST_PROGRAMS.items() for p in names if p != "*"}
    assert held == {p.partition("/")[2] for p in of_split["test"] if p.startswith("fluid/")}


def samples_of(path) -> dict[str, set[tuple[int, int]]]:
    """ "bank:number" -> where its samples lie in a soundfont, by the tables of its chunk "pdta"."""
    data = path.read_bytes()
    tables, at = {}, data.rindex(b"pdta") + 4
    for name in ("phdr", "pbag", "pmod", "pgen", "inst", "ibag", "imod", "igen", "shdr"):
        assert data[at : at + 4].decode() == name
        size = struct.unpack_from("<I", data, at + 4)[0]
        form = {"hdr": "<20s3H3I", "bag": "<2H", "gen": "<2H", "nst": "<20sH"}.get(name[1:])
        form = "<20s5I2B2H" if name == "shdr" else form
        if form:
            tables[name] = list(struct.iter_unpack(form, data[at + 8 : at + 8 + size]))
        at += 8 + size

    def values(head, bags, generators, which):  # of one generator, in all zones
        firsts = [row[0] for row in tables[bags]]
        return [
            [v for name, v in tables[generators][firsts[a] : firsts[b]] if name == which]
            for a, b in itertools.pairwise(head)
        ]

    inside = values([row[1] for row in tables["inst"]], "ibag", "igen", 53)
    used = values([row[3] for row in tables["phdr"]], "pbag", "pgen", 41)
    return {
        f"{row[2]}:{row[1]}": {tables["shdr"][s][1:3] for i in instruments for s in inside[i]}
        for row, instruments in zip(tables["phdr"], used, strict=False)
    }


@pytest.mark.skipif(
    not soundfonts.SOURCES[0].path.is_file(), reason="needs " + soundfonts.SOURCES[0].install
)
def test_programs_of_tests_share_no_sample_with_those_of_training():
    font = soundfonts.SOURCES[0]
    samples = samples_of(font.path)
    parts = {"train": set(), "test": set()}
    for instrument, found in parts_of_programs().items():
        for split, programs in found.items():
            for program in programs:
                if program.startswith(font.name):
                    own = samples[program.partition("/")[2]]
                    assert own, (instrument, program)
                    parts[split] |= own
    assert len(parts["test"]) > 100
    assert not parts["train"] & parts["test"]


def test_notes_are_moved_by_octaves_into_the_range():
    assert soundfonts.playable("bass", 60) == 48
    assert soundfonts.playable("bells", 50) == 62
    assert soundfonts.playable("piano", 60) == 60


def test_music_of_the_world_may_have_other_players():
    piece = compose(Draw("others"), 8.0, ("choir", "harpsichord"))
    assert set(piece.parts) <= {"choir", "harpsichord", "bass", "drums"}
    assert len(piece.wav) == 0


def test_chords_are_the_triads_that_sound():
    tones = [
        *(scores.Tone(0, 2, midi, 0) for midi in (60, 64, 67, 72)),
        *(scores.Tone(2, 1, midi, 0) for midi in (57, 60, 64)),
        *(scores.Tone(3, 1, midi, 0) for midi in (55, 59, 62, 65)),  # a seventh: no triad
    ]
    assert scores._chords(tones, 4, 0.5) == [(0, 16000, "C major"), (16000, 24000, "A minor")]


# --- scores --------------------------------------------------------------------------------------


@needs_scores
def test_each_score_is_in_one_split():
    for corpus in scores.SOURCES:
        names = {split: set(corpus.scores(split)) for split in held_out.SPLITS}
        assert all(names.values())
        assert sum(map(len, names.values())) == len(set.union(*names.values())) > 400


@needs_scores
def test_a_passage_has_the_notes_key_and_beats_of_its_score():
    """The oracle is music21's own reading: the notes, and the signature of the key."""
    from music21 import converter, key

    read = 0
    for i in range(6):
        split = ("train", "test")[i % 2]
        piece = scores.piece(Draw("passage", i), 8.0, split, MELODIC)
        corpus, _, name = piece.files[0].partition("/")
        source = next(one for one in scores.SOURCES if one.name == corpus)
        assert held_out.recording_part(corpus, name) == split
        path = scores._corpus() / source.pattern.rpartition("/")[0] / name
        score = converter.parse(path, forceSource=True)
        own = {
            (round(float(note.getOffsetInHierarchy(score)), 2), pitch.midi)
            for part in score.parts
            for note in part.stripTies(inPlace=False).recurse().notes
            for pitch in note.pitches
        }
        metre = next(iter(score.recurse().getElementsByClass("TimeSignature")))
        quarters = 16000 * 60 / piece.tempo / metre.beatDuration.quarterLength
        heard = [(note.start / quarters, note.midi) for note in piece.notes]
        firsts = {offset for offset, _ in own}
        # Somewhere in the score, all of the passage's notes are found together.
        assert any(
            all(
                any(
                    abs(first + at - offset) < 0.02 and midi == own_midi for offset, own_midi in own
                )
                for at, midi in heard
            )
            for first in firsts
        ), piece.files
        signature = next(iter(score.recurse().getElementsByClass("KeySignature")))
        tonic = piece.tonic.replace(" sharp", "#").replace(" flat", "-")
        named = key.Key(tonic.lower() if piece.mode == "minor" else tonic)
        assert named.sharps % 12 == signature.sharps % 12
        assert np.allclose(np.diff(piece.beats), 16000 * 60 / piece.tempo, atol=1)
        assert max(note.stop for note in piece.notes) <= 8.0 * 16000
        scale = {(TONICS.index(piece.tonic) + step) % 12 for step in SCALES[piece.mode]}
        inside = np.mean([note.midi % 12 in scale for note in piece.notes])
        assert inside > 0.75
        read += len(piece.notes)
    assert read > 150


@needs_scores
def test_no_passage_is_said():
    with pytest.raises(UsageError, match=r"no passage of a score fits in 0.5 s"):
        scores.piece(Draw("short"), 0.5, "train", MELODIC)


# --- sound ---------------------------------------------------------------------------------------


def energy_at(wav: np.ndarray, midi: float) -> float:
    """How strongly harmonics of a note sound."""
    n = 1 << 16
    spectrum = np.abs(np.fft.rfft(wav * np.hanning(len(wav)), n))
    hertz = 440 * 2 ** ((midi - 69) / 12) * np.arange(1, 9)
    bins = np.rint(hertz[hertz < 7000] * n / 16000).astype(int)
    return float(sum(spectrum[b - 1 : b + 2].max() for b in bins))


@needs_fonts
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_program_plays_the_note_when_it_says(split):
    """Nearer to its note than to the semitones beside it, and heard within 60 ms."""
    for instrument, found in soundfonts.programs(split).items():
        if instrument == "drums":
            continue
        for program in found:
            midi = soundfonts.playable(instrument, 62)
            start = 8000
            notes = [Note(start, start + 12000, instrument, midi)]
            wav = soundfonts._played(Draw("tune"), program, notes, 24000)
            assert np.abs(wav[: start - 100]).max() < 0.02 * np.abs(wav).max(), program
            level = np.sqrt(np.convolve(wav**2, np.ones(160) / 160, "same"))
            heard = int(np.flatnonzero(level > 10 ** (-15 / 20) * level.max())[0])
            assert -160 <= heard - start <= 0.06 * 16000, (program, heard - start)
            tone = wav[start + 1600 : start + 11000]
            shifts = (-1, -0.5, 0, 0.5, 1)
            off = max(shifts, key=lambda shift: energy_at(tone, midi + shift))
            if instrument != "bells":  # their partials are no harmonics
                assert abs(off) <= 0.5, (program, off)


@needs_fonts
def test_a_piece_sounds_the_same_whatever_was_played_before():
    first = music.make(Draw("same", 0), 5.0, "train")
    music.make(Draw("same", 1), 5.0, "train")
    again = music.make(Draw("same", 0), 5.0, "train")
    np.testing.assert_array_equal(first.wav, again.wav)
    assert first[1:] == again[1:]


@needs_fonts
@needs_scores
def test_scenes_of_each_split_are_played_by_its_programs_from_its_scores():
    programs = parts_of_programs()
    allowed = {s: set.union(*(found[s] for found in programs.values())) for s in ("train", "test")}
    heard = {"train": set(), "test": set()}
    for split in heard:
        for i in range(10):
            labels = scenes.scene(i, split, content="music").labels
            (origin,) = labels["sources"]
            assert "files" not in labels["music"]
            for file in (origin["file"] or "").split(", ") if origin["file"] else ():
                font = file.partition("/")[0]
                if font in ("bach", "ryans-mammoth"):
                    assert held_out.recording_part(font, file.partition("/")[2]) == split
                else:
                    assert file in allowed[split]
                heard[split].add(file)
            lead = labels["music"]["parts"][0]
            answers = {r["task"]: r["conversation"][-1]["content"] for r in tasks.rows(labels, "x")}
            assert answers["instrument"] == lead
            assert answers["key"] == f"{labels['music']['tonic']} {labels['music']['mode']}"
    assert len(heard["train"]) > 10
    assert not heard["train"] & heard["test"]
