import sys

import numpy as np
import pytest

from moss_audio_jax.annotate.music import describe_music
from moss_audio_jax.errors import InputError


def piece(bars=8, tempo=120.0, tonic=60):
    """Chords I-IV-V-I in a major key, struck on every beat."""
    beat = 60 / tempo
    wav = np.zeros(int(bars * 4 * beat * 16000) + 16000)
    for i in range(bars * 4):
        root = tonic + (0, 5, 7, 0)[i // 4 % 4]
        t = np.arange(int(0.9 * beat * 16000)) / 16000
        for step in (0, 4, 7):
            hertz = 440 * 2 ** ((root + step - 69) / 12)
            note = np.sin(2 * np.pi * hertz * t) + 0.3 * np.sin(4 * np.pi * hertz * t)
            at = int(i * beat * 16000)
            wav[at : at + len(t)] += 0.1 * note * np.exp(-4 * t)
    return wav.astype(np.float32)


@pytest.mark.parametrize(("tonic", "key"), [(60, "C major"), (67, "G major")])
def test_tempo_beats_and_key(tonic, key):
    pytest.importorskip("librosa")
    told = describe_music(piece(tonic=tonic))
    assert told["key"] == key
    # A beat tracker may count half or double time; the grid must be right.
    ratio = told["tempo"] / 120
    assert min(abs(ratio - r) for r in (0.5, 1, 2)) < 0.05
    step = np.median(np.diff(told["beats"]))
    assert min(abs(step * r - 0.5) for r in (0.5, 1, 2)) < 0.04
    assert sum(told["chroma"]) == pytest.approx(1, abs=0.01)
    assert told["sections"][0]["start"] == 0
    assert told["sections"][-1]["end"] == pytest.approx(17.0, abs=0.001)


def test_silence_has_no_tempo_and_no_key():
    pytest.importorskip("librosa")
    told = describe_music(np.zeros(32_000, np.float32))
    assert told["tempo"] is None
    assert told["key"] is None


def test_missing_librosa_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[annotate\]'"):
        describe_music(np.zeros(16_000, np.float32))
