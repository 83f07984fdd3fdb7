"""Log-mel, NumPy and JAX, against the numbers of transformers' extractor."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_audio_jax.audio import log_mel
from moss_audio_jax.audio.features import GrowingMel, mel_filters, rounded
from moss_audio_jax.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden" / "mel.npz"
SHARED = Path(__file__).parents[3] / "shared"
CASES = dict(np.load(GOLDEN))
NAMES = sorted(key.removesuffix("_wav") for key in CASES if key.endswith("_wav"))


def noise(n: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_numpy_version_meets_the_extractor(name):
    mel = log_mel(CASES[f"{name}_wav"])
    assert mel.dtype == np.float32
    # Far below the tolerance, so that float32 in the transform would fail ("high_tone").
    np.testing.assert_allclose(mel, CASES[f"{name}_mel"], rtol=0, atol=2e-6)


def test_floor_is_global_to_the_clip_across_blocks():
    # 10 s: several blocks of frames. Only the first second is loud.
    wav = noise(160_000)
    wav[16_000:] *= 1e-6
    mel = log_mel(wav)
    floor = mel.max() - 2.0
    assert mel.min() == floor
    assert (mel[:, 110:] == floor).all()


def test_blocks_leave_no_seam():
    # Without the floor (noise stays far above it) a piece on frame borders has the clip's frames.
    wav = noise(16 * 16_000)
    whole, piece = log_mel(wav), log_mel(wav[160 * 200 : 160 * 1000])
    np.testing.assert_allclose(piece[:, 2:-2], whole[:, 202:998], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(3))
def test_a_clip_that_grows_has_the_log_mel_of_the_whole(dtype, seed):
    """At any length, also where the maximum comes last and the floor rises above earlier sound."""
    rng = np.random.default_rng(seed)
    wav = noise(30 * 16_000, seed) * np.repeat(10.0 ** rng.uniform(-9, 0, 60), 8000).astype("f4")
    wav[-8000:] *= 1e3
    edges = [160 * 256 * k + d for k in (1, 3) for d in (39, 40)]
    ends = [160, 161, *sorted([*rng.integers(160, len(wav), 20), *edges]), len(wav)]
    growing = GrowingMel(dtype)
    for end in [*ends, 160 * 300]:  # the last: less than before
        expected = rounded(log_mel(wav[:end]), dtype)
        np.testing.assert_array_equal(growing.of(wav[:end]), expected)
    with pytest.raises(InputError, match="at least 160"):
        growing.of(wav[:159])


@pytest.mark.parametrize("seconds", [60, 240])
def test_the_frames_of_a_clip_that_grows_are_computed_about_once(seconds):
    growing, wav = GrowingMel("float32"), noise(seconds * 16_000)
    for end in range(64_000, len(wav) + 1, 64_000):
        growing.of(wav[:end])
    # At each of the chunks of 4 s the block at the end is not whole.
    assert 100 * seconds <= growing.frames <= (100 + 256 / 4) * seconds


def test_working_memory_does_not_grow_with_the_clip():
    wav = noise(160 * 20_000)
    log_mel(wav[:16_000])
    tracemalloc.start()
    mel = log_mel(wav)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - mel.nbytes < 12e6


@given(st.integers(160, 2000), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_one_frame_every_160_samples(n, seed):
    assert log_mel(noise(n, seed)).shape == (128, n // 160)


@given(st.floats(0.1, 8.0), st.sampled_from([np.float16, np.float32, np.float64]))
@settings(max_examples=20, deadline=None)
def test_gain_is_an_offset(gain, dtype):
    # log10(gain^2) / 4 everywhere, as long as no bin meets the absolute floor of 1e-10.
    wav = noise(4000).astype(dtype)
    louder = wav.astype(np.float64) * gain
    shift = np.log10(gain) / 2
    np.testing.assert_allclose(log_mel(louder), log_mel(wav) + shift, rtol=0, atol=2e-6)


def test_filters_have_unit_area_and_cover_the_band():
    bank = mel_filters()
    assert bank.shape == (128, 201)
    assert (bank >= 0).all()
    assert bank[:, 1:200].any(axis=0).all()  # no bin between 0 and 8 kHz is lost
    # 40 Hz a bin: sampled triangles of unit area, exact where many bins fall on a filter.
    np.testing.assert_allclose(40 * bank[100:].sum(axis=1), 1, atol=0.02)


@pytest.mark.parametrize(
    ("wav", "words"),
    [
        (np.zeros(159, np.float32), "159 samples"),
        (np.zeros((2, 1600), np.float32), r"shape \[2, 1600\]"),
        (np.zeros(1600, np.int16), "int16"),
        (np.full(1600, np.nan, np.float32), "finite"),
        (np.append(np.zeros(1600), -np.inf), "finite"),
        (np.full(1600, 1e30), "1e\\+30"),
        (np.ma.masked_greater(np.linspace(0, 1, 1600), 0.5), "masked samples"),
    ],
)
def test_bad_waveforms_are_named(wav, words):
    with pytest.raises(InputError, match=words) as caught:
        log_mel(wav)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_official_processor():
    golden = np.load(SHARED / "golden" / "processor.npz")
    for j in (0, 2, 4, 6):
        mel = log_mel(golden[f"w{j}_wav"])
        head, tail = golden[f"w{j}_mel_head"], golden[f"w{j}_mel_tail"]
        np.testing.assert_allclose(mel[:, : head.shape[1]], head, rtol=0, atol=2e-6)
        np.testing.assert_allclose(mel[:, -tail.shape[1] :], tail, rtol=0, atol=2e-6)
        np.testing.assert_allclose(mel.mean(1), golden[f"w{j}_mel_mean"], rtol=0, atol=2e-6)


@pytest.mark.oracle
def test_live_against_transformers():
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    t = np.arange(48_000) / 16_000
    sounds = [noise(n, seed=n) for n in (160, 319, 320, 16_001, 48_000)]
    sounds += [np.sin(2 * np.pi * f * t) for f in (30, 440, 7990)]
    sounds += [np.sign(sounds[-2]), 0.5 + sounds[4] * 1e-2]
    for sound in sounds:
        wav = np.asarray(sound, np.float32)
        expected = extractor._np_extract_fbank_features(wav[None], "cpu")[0]
        np.testing.assert_allclose(log_mel(wav), expected, rtol=0, atol=2e-6)
