"""Live audio: what is answered while sound comes is what would be answered about the whole clip."""

import re
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

import moss_audio_jax as mj
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.errors import InputError, UsageError

CLIP = Path(DEFAULT_CHECKPOINT).parent / "demo" / "two_people.flac"
ASKED = "Transcribe the speech."


@pytest.fixture(scope="module")
def model():
    return mj.MossAudio.load(dtype="float32")


def pushed(ear, wav, seed):
    """Pushes a waveform in pieces of random lengths."""
    rng = np.random.default_rng(seed)
    while len(wav):
        n = int(rng.integers(1, 40_000))
        ear.push(wav[:n])
        wav = wav[n:]


def test_answers_are_those_about_the_whole_clip(model):
    wav = np.tile(mj.load_audio(CLIP), 2)
    assert len(wav) > 160_000
    half = wav[: len(wav) // 2]
    with model.listen(seconds=60, max_new_tokens=48) as ear:
        pushed(ear, half, 0)
        early = ear.ask(ASKED, max_new_tokens=32)
        pushed(ear, wav[len(half) :], 1)
        late = ear.ask(ASKED, max_new_tokens=48)
        again = ear.ask("How many people speak?", max_new_tokens=8)
        heard = ear._answerer.hearing.frames
        kept = ear._answerer.counts["cached_tokens"] / ear._answerer.counts["prompt_tokens"]
    assert early.ids == model.generate(ASKED, [half], max_new_tokens=32).ids
    assert late.ids == model.generate(ASKED, [wav], max_new_tokens=48).ids
    assert again.ids == model.generate("How many people speak?", [wav], max_new_tokens=8).ids
    # Each chunk was encoded once; the last one of each question again when it was whole.
    assert heard <= 100 * len(wav) / 16_000 + 2 * 400
    assert kept > 0.5


def test_a_microphone_pushes_while_somebody_asks(model):
    wav = np.tile(mj.load_audio(CLIP), 3)
    failed: list[BaseException] = []
    with model.listen(seconds=60, max_new_tokens=16) as ear:
        ear.push(wav[:16_000])

        def microphone():
            try:
                for start in range(16_000, len(wav), 1_600):
                    ear.push(wav[start : start + 1_600])
            except BaseException as error:
                failed.append(error)

        pushes = threading.Thread(target=microphone)
        pushes.start()
        while pushes.is_alive():
            assert ear.ask(ASKED, max_new_tokens=4).ids
        pushes.join()
        last = ear.ask(ASKED, max_new_tokens=16)
    assert not failed
    assert last.ids == model.generate(ASKED, [wav], max_new_tokens=16).ids


def test_sound_is_turned_into_frames_about_once(model):
    """Not all of it again at each chunk: else the work would grow with the square of the length."""
    rng = np.random.default_rng(3)
    wav = (0.1 * rng.standard_normal(96 * 16_000)).astype(np.float32)
    ear = model.listen(seconds=96, max_new_tokens=8)
    found = []
    for half in np.split(wav, 2):
        for start in range(0, len(half), 16_000):
            ear.take(half[start : start + 16_000])
            ear.begun()
        found.append(ear._mel.frames)
    assert found[1] < 2.2 * found[0] < 2.2 * 1.7 * 4800
    begun = model.prepare(ear.request("", mj.Sampling()))
    np.testing.assert_array_equal(begun.mels[0], model.prepare(mj.Request("", [wav])).mels[0])


def test_a_maximum_that_comes_last_changes_what_was_heard_before(model):
    """The floor of the log-mel rises, so earlier chunks are heard again."""
    wav = mj.load_audio(CLIP)
    wav = np.concatenate([0.02 * wav, 0.02 * wav, np.clip(40 * wav[:30_000], -1, 1)])
    with model.listen(seconds=60, max_new_tokens=32) as ear:
        pushed(ear, wav, 2)
        reply = ear.ask(ASKED, max_new_tokens=32)
    assert reply.ids == model.generate(ASKED, [wav], max_new_tokens=32).ids


def test_what_an_ear_cannot_take_is_said(model):
    with pytest.raises(UsageError, match="ask for less"):
        model.listen(seconds=1e5)
    with pytest.raises(UsageError, match="ask for less"):
        model.listen(max_new_tokens=10_000)
    for seconds in (float("nan"), float("inf"), "5", 0, -1, 1e308, 10**400):
        with pytest.raises(UsageError, match=r"seconds is .*; expected a number"):
            model.listen(seconds=seconds)
    for tokens in (-5, 0, "5", 1.5):
        with pytest.raises(
            UsageError, match=r"max_new_tokens is .*; expected a whole number from 1 on"
        ):
            model.listen(max_new_tokens=tokens)
    ear = model.listen(seconds=1)
    with pytest.raises(InputError, match="clip 1"):
        ear.ask(ASKED)
    with pytest.raises(UsageError, match="expected float"):
        ear.push(np.zeros((2, 8)))
    with pytest.raises(InputError, match="NaN"):
        ear.push(np.array([np.nan]))
    with pytest.raises(InputError, match="more than the 1 s"):
        ear.push(np.zeros(16_001, np.float32))
    with pytest.raises(UsageError, match="warmth"):
        ear.ask(ASKED, warmth=1)
    with ear:
        pass
    with pytest.raises(UsageError, match="closed"):
        ear.push(np.zeros(8))


def test_nothing_of_a_refused_push_is_kept(model):
    """A value that only float64 holds, or that the log-mel refuses, would spoil what follows."""
    wav = mj.load_audio(CLIP)[:32_000]
    wrong = [
        np.full(1600, 1e300),
        np.full(1600, np.longdouble("1e4000")),
        1e30 * wav,
        np.append(wav, np.float32(-np.inf)),
        np.ma.masked_less(wav, 0),
        np.zeros(16_000 * 61, np.float32),
    ]
    with model.listen(seconds=60, max_new_tokens=8) as ear, warnings.catch_warnings():
        warnings.simplefilter("error")
        ear.push(wav[:16_000])
        for samples in wrong:
            with pytest.raises(InputError) as refused:
                ear.push(samples)
            assert "\n" not in str(refused.value)
        ear.push(np.zeros(0))
        ear.push(wav[16_000:].astype(np.float64))
        np.testing.assert_array_equal(ear.wav, wav)
        assert ear.ask(ASKED, max_new_tokens=8).ids == (
            model.generate(ASKED, [wav], max_new_tokens=8).ids
        )


def test_an_ear_is_as_large_as_the_model_allows(model):
    """`model.listen()` works for any model; the bundled one has positions for some minutes."""
    with model.listen() as ear:
        ear.push(np.zeros(16_000 * 120, np.float32))
        with pytest.raises(InputError, match=r"more than the \d+ s") as refused:
            ear.push(np.zeros(16_000 * 480, np.float32))
    fits = int(re.search(r"the (\d+) s", str(refused.value))[1])
    model.listen(seconds=fits)
    with pytest.raises(UsageError, match="ask for less"):
        model.listen(seconds=fits + 1)


def test_ears_share_a_service(model):
    """Two clips grow at once, on one engine."""
    wavs = [mj.load_audio(CLIP), mj.load_audio(CLIP)[::-1].copy()]
    with model.service(slots=2, cache_tokens=4096, max_new_tokens=48) as service:
        ears = [model.listen(seconds=60, max_new_tokens=48, service=service) for _ in wavs]
        for start in range(0, max(map(len, wavs)), 30_000):
            for ear, wav in zip(ears, wavs, strict=True):
                ear.push(wav[start : start + 30_000])
        found = [ear.ask(ASKED, max_new_tokens=16) for ear in ears]
    for reply, wav in zip(found, wavs, strict=True):
        assert reply.ids == model.generate(ASKED, [wav], max_new_tokens=16).ids
    with pytest.raises(InputError, match="stopping"):
        ears[0].ask(ASKED)
