"""A scene is a pure function of its index, also in another process and on another machine."""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from world_helpers import digest, needs_espeak

from moss_audio_jax import world
from moss_audio_jax.audio import load_audio
from moss_audio_jax.draw import Draw
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.world import espeak

# Of wav and labels, which change with world.VERSION and with nothing else; and of rows, which also
# change with their wording.
GOLDEN = {
    ("sound", 0): "0180b107-27f07e58",
    ("sound", 1): "dbe33c43-98edda7b",
    ("music", 0): "31b57890-9ea40859",
    ("music", 1): "852a306b-30ff4960",
    ("sound+music", 0): "0c130a6c-c1a6990e",
    ("silence", 0): "3fc4b43f-49422f09",
}
# The same with speech, as this version of the wheel speaks on Linux.
GOLDEN_SPEECH = (
    "0.2.4",
    {
        ("speech", 0): "a1fc730e-6a5fad8c",
        ("speech", 1): "540b20da-e4c06bdf",
        ("speech+sound+music", 2): "29861248-623c9d00",
    },
)


def test_golden():
    found = {key: digest(world.scene(key[1], content=key[0])) for key in GOLDEN}
    assert found == GOLDEN


@needs_espeak
def test_golden_speech():
    version, golden = GOLDEN_SPEECH
    if importlib.metadata.version("espeakng-loader") != version or sys.platform != "linux":
        pytest.skip(f"the digests are those of espeakng-loader {version} on Linux")
    assert {key: digest(world.scene(key[1], content=key[0])) for key in golden} == golden


@pytest.mark.parametrize(
    "content", ["sound", "music", pytest.param(None, marks=needs_espeak)], ids=str
)
def test_same_in_another_process(content):
    """In reverse order, with other hash seeds, and with the instructions of an older processor."""
    indices = list(range(12))
    here = [digest(world.scene(i, "test", 3, content)) for i in indices]
    code = (
        "from world_helpers import digest, world\n"
        f"print(*(digest(world.scene(i, 'test', 3, {content!r})) for i in {indices[::-1]}))"
    )
    older = {
        "PYTHONPATH": str(Path(__file__).parents[1] / "support"),
        "PYTHONHASHSEED": "123",
        "OMP_NUM_THREADS": "2",
        "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX2 FMA3",
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F",
    }
    there = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | older,
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.split()[::-1] == here


def test_streams():
    """The bits behind all draws never change."""
    draw = Draw("stream", 1)
    assert [draw.integer(0, 999) for _ in range(4)] == [911, 44, 280, 413]
    noise = Draw("noise").noise(40_000)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.var() - 1) < 0.02
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.02
    assert draw.child("a").uniform() == Draw("stream", 1).child("a").uniform()


def test_seed_split_index_content_all_count():
    made = [
        world.scene(*key)
        for key in (
            (0, "train", 0, "sound"),
            (1, "train", 0, "sound"),
            (0, "train", 1, "sound"),
            (0, "validation", 0, "sound"),
            (0, "train", 0, "music"),
        )
    ]
    assert len({hashlib.sha256(m.wav.tobytes()).digest() for m in made}) == len(made)
    assert len({m.labels["id"] for m in made}) == len(made)


@pytest.mark.parametrize("content", ["sound", "music", pytest.param(None, marks=needs_espeak)])
@pytest.mark.parametrize("longest", [5.0, 12.0])
def test_form(content, longest, tmp_path):
    import soundfile

    for index in range(15):
        made = world.scene(index, content=content, max_seconds=longest)
        wav, labels = made.wav, made.labels
        assert wav.dtype == np.float32
        assert wav.ndim == 1
        assert len(wav) / 16000 == pytest.approx(labels["duration"], abs=6e-4)
        assert labels["duration"] <= longest
        assert np.abs(wav).max() < 1
        assert json.loads(json.dumps(labels)) == labels
        items = labels["sentences"] + labels["events"] + [labels["music"]] * bool(labels["music"])
        words = [word for s in labels["sentences"] for word in s["words"]]
        for item in items + words + labels["overlap"] + labels["silence"]:
            assert 0 <= item["start"] < item["end"] <= labels["duration"]
    path = tmp_path / "a.wav"
    soundfile.write(path, (wav * 32768).astype(np.int16), 16000)
    np.testing.assert_array_equal(load_audio(path), wav)  # 16 bits lose nothing


def test_level_and_noise_labels():
    """Level, peak and signal-to-noise ratio, measured."""
    seen = set()
    for index in range(40):
        made = world.scene(index, content="sound")
        loudness = made.labels["loudness"]
        wav = made.wav.astype(np.float64)
        assert 20 * np.log10(np.abs(wav).max()) == pytest.approx(loudness["peak_dbfs"], abs=0.06)
        assert 10 * np.log10(np.mean(wav**2)) == pytest.approx(loudness["rms_dbfs"], abs=0.06)
        low, high = {"quiet": (-34, -26), "normal": (-14, -6), "loud": (-2.5, -0.5)}[
            loudness["level"]
        ]
        assert low - 0.1 <= loudness["peak_dbfs"] <= high + 0.1
        background, silence = made.labels["background"], made.labels["silence"]
        if not silence or made.labels["room"]:
            continue
        quiet = np.concatenate(
            [wav[int(16000 * s["start"]) + 80 : int(16000 * s["end"]) - 80] for s in silence]
        )
        rest = np.sqrt(np.mean(quiet**2))
        if background is None:
            assert rest < 1e-3 * np.abs(wav).max()
        else:
            seen.add(background["kind"])
            events = np.concatenate(
                [
                    wav[int(16000 * e["start"]) : int(16000 * e["end"])]
                    for e in made.labels["events"]
                ]
            )
            snr = 20 * np.log10(np.sqrt(np.mean(events**2)) / rest)
            assert snr == pytest.approx(background["snr_db"], abs=3)
    assert len(seen) >= 2


def test_bad_requests():
    with pytest.raises(UsageError, match="no split 'tset' of the world; expected one of train"):
        world.scene(0, "tset")
    with pytest.raises(UsageError, match="content 'music' in split 'test_voices'; expected one of"):
        world.scene(0, "test_voices", content="music")
    with pytest.raises(UsageError, match="4 s or more"):
        world.scene(0, max_seconds=2)


def test_speech_without_its_wheel(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    espeak._worker_of.cache_clear()
    with pytest.raises(InputError, match=r"pip install -e '\.\[world\]'"):
        world.scene(0, content="speech")
    world.scene(0, content="sound")


@needs_espeak
def test_speech_does_not_remember():
    """Earlier speech changes nothing; words that espeak does not know are an error."""
    line = espeak.Utterance(("in", "the", "garden", "of", "the", "house"), "en+f2", 170, 50, 50)
    first = espeak.speak([line])[0]
    espeak.speak([line._replace(voice="en+m1", rate=240)])
    again = espeak.speak([line])[0]
    np.testing.assert_array_equal(first.wav, again.wav)
    assert [word.text for word in again.words] == list(line.units)  # "of the" is two words
    starts = [word.start for word in again.words]
    assert starts == sorted(set(starts))
    with pytest.raises(InputError, match="espeak-ng could not say"):
        espeak.speak([line._replace(voice="nobody")])
