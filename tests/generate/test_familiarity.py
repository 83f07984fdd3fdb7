"""Whether a sound is like the small model's training data. Not covered: real recordings;
helpers/familiarity.json has the shares that are recognised (tools/small/fit_familiarity.py)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

import moss_audio_jax as mj
from moss_audio_jax import command
from moss_audio_jax.api import MossAudio, Request, Sampling
from moss_audio_jax.audio import load_audio, log_mel
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.errors import InputError
from moss_audio_jax.generate import __main__ as generate
from moss_audio_jax.generate.familiarity import Gauge
from moss_audio_jax.generate.hearing import Hearing

DEMO = Path(DEFAULT_CHECKPOINT).parent / "demo"


@pytest.fixture(scope="module")
def model():
    return MossAudio.load(DEFAULT_CHECKPOINT, "float32")


@pytest.fixture(scope="module")
def gauge():
    return Gauge.load(DEFAULT_CHECKPOINT)


def measure(model, gauge, wavs):
    hearing = Hearing(model.encoder_params, model.config.encoder, model.compute, gauge)
    with jax.set_mesh(model.mesh):
        return hearing.measure([log_mel(wav) for wav in wavs])


def buzz(seconds=3.0):
    """A voice-like sound unlike the world's voices: a low pulse train through moving formants."""
    n = int(16_000 * seconds)
    t = np.arange(n) / 16_000
    phase = 2 * np.pi * np.cumsum(95 + 12 * np.sin(2 * np.pi * 0.7 * t)) / 16_000
    wav = np.zeros(n)
    for harmonic in range(1, 60):
        hertz = 95 * harmonic
        first, second = 500 + 250 * np.sin(2 * np.pi * 3.1 * t), 1600 + 600 * np.sin(9 * t)
        gain = np.exp(-(((hertz - first) / 120) ** 2)) + np.exp(-(((hertz - second) / 200) ** 2))
        wav += gain * np.sin(harmonic * phase)
    return (0.2 * wav / np.abs(wav).max()).astype(np.float32)


def test_the_bundled_clips_are_familiar_and_a_strange_voice_is_not(model, gauge):
    clips = [load_audio(file) for file in sorted(DEMO.glob("*.flac"))]
    for verdict in map(gauge.judge, measure(model, gauge, clips)):
        assert not verdict.unfamiliar
        assert verdict.score <= 0
        assert verdict.reason == ""
    (strange,) = measure(model, gauge, [buzz()])
    verdict = gauge.judge(strange)
    assert verdict.unfamiliar
    assert verdict.score > 0
    assert verdict.reason


def test_a_reply_and_a_transcript_say_that_the_sound_is_strange(model):
    strange, known = buzz(), load_audio(DEMO / "two_people.flac")
    (reply, other, both) = model.generate_batch(
        [
            Request("What is heard?", [strange], Sampling(2)),
            Request("What is heard?", [known], Sampling(2)),
            Request("What is heard?", [known, strange], Sampling(2)),
        ]
    )
    (warning,) = reply.warnings
    assert "unlike what this model was trained on" in warning
    assert other.warnings == ()
    assert both.warnings == (f"clip 2: {warning}",)
    streamed = model.stream("What is heard?", [strange], max_new_tokens=2)
    list(streamed)
    assert streamed.reply.warnings == (warning,)
    assert model.familiarity((strange, 16_000)).unfamiliar
    assert not model.familiarity(known).unfamiliar
    heard = mj.transcribe(model, strange, sampling=Sampling(2))
    assert any(warning in problem for problem in heard.problems)


def test_a_clip_measures_the_same_alone_and_among_others(model, gauge):
    wavs = [buzz(9.3), load_audio(DEMO / "two_people.flac"), buzz(0.2), buzz(0.7)]
    together = measure(model, gauge, wavs)
    assert together[2] is None  # too short for a verdict
    for wav, measured in zip(wavs, together, strict=True):
        if measured is None:
            continue
        (alone,) = measure(model, gauge, [wav])
        assert alone.doubt == pytest.approx(measured.doubt, rel=1e-4, abs=1e-6)
        np.testing.assert_allclose(alone.pooled, measured.pooled, rtol=1e-3, atol=1e-4)


def test_pooled_states_are_those_of_the_encoder(model, gauge):
    """Compared with `encode_audio` on one whole chunk, because it pads the last chunk."""
    wav = buzz(4.0)
    ((_, taps),) = model.encode_audio([log_mel(wav)])
    states = taps[gauge.probe.tap]
    (measured,) = measure(model, gauge, [wav])
    expected = np.concatenate([states.mean(0), states.std(0)])
    np.testing.assert_allclose(measured.pooled, expected, rtol=1e-3, atol=1e-4)


def test_a_folder_without_it_has_no_gauge_and_a_broken_one_is_named(tmp_path):
    assert Gauge.load(tmp_path) is None
    shutil.copytree(Path(DEFAULT_CHECKPOINT) / "helpers", tmp_path / "helpers")
    file = tmp_path / "helpers" / "familiarity.json"
    whole = json.loads(file.read_text())
    for broken in (
        {**whole, "bias": None},
        {**whole, "weight": [[1.0]]},
        {"bias": 1.0},
        {**whole, "weight": [float("nan")]},
    ):
        file.write_text(json.dumps(broken))
        with pytest.raises(InputError, match=r"familiarity\.json"):
            Gauge.load(tmp_path)


def test_generate_says_so_whatever_it_prints(tmp_path, capsys):
    file = tmp_path / "strange.wav"
    soundfile.write(file, buzz(), 16_000)
    words = ["--audio", str(file), "--prompt", "What is heard?", "--max-new-tokens", "2"]
    for form in ([], ["--stream"], ["--json"]):
        assert command.run(generate.main, words + form) == 0
        said = capsys.readouterr().err
        assert said.count(f"warning: {file}: the sound is unlike what this model was") == 1
