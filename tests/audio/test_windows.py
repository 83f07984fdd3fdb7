"""Long audio is cut where it is quiet, and nothing is lost."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moss_audio_jax.audio import log_mel
from moss_audio_jax.audio.windows import quiet_windows
from moss_audio_jax.errors import InputError, UsageError

RATE = 16_000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return 0.3 * np.random.default_rng(seed).standard_normal(int(seconds * RATE)).astype("f4")


@given(
    n=st.integers(0, 20 * RATE),
    seconds=st.floats(1, 25),
    scale=st.sampled_from([0.0, 1e-6, 1.0]),
)
def test_windows_cover_everything_once(n, seconds, scale):
    wav = scale * np.random.default_rng(n).standard_normal(n).astype("f4")
    windows = quiet_windows(wav, seconds)
    assert windows[0][0] == 0
    assert windows[-1][1] == n
    for (_, end), (start, _) in itertools.pairwise(windows):
        assert start == end
    assert all(end - start <= seconds * RATE for start, end in windows)
    # Each except the last has at least two thirds of the limit, so there are not too many.
    assert all(end - start >= int(seconds * RATE) * 2 // 3 for start, end in windows[:-1])


def test_cuts_lie_in_the_pauses():
    pauses = [8.1, 16.9, 25.3]  # where each begins, 0.5 s long
    wav = noise(30)
    for pause in pauses:
        wav[int(pause * RATE) : int((pause + 0.5) * RATE)] *= 0.01
    cuts = [end / RATE for _, end in quiet_windows(wav, 10)][:-1]
    assert len(cuts) == len(pauses)
    for cut, pause in zip(cuts, pauses, strict=True):
        assert pause + 0.1 < cut < pause + 0.4  # its middle, not its edge


def test_a_pause_is_preferred_to_a_dip():
    """A cut falls in a soft pause of 0.5 s, not in 50 ms of digital silence inside a word."""
    wav = noise(15)
    wav[int(7.5 * RATE) : int(7.55 * RATE)] = 0
    wav[int(9 * RATE) : int(9.5 * RATE)] *= 0.1
    (_, cut), _ = quiet_windows(wav, 10)
    assert 9.1 < cut / RATE < 9.4


def test_what_fits_stays_whole():
    wav = noise(10)
    assert quiet_windows(wav, 10) == [(0, len(wav))]
    assert len(quiet_windows(noise(10.01), 10)) == 2


def test_windows_of_any_size():
    wav = noise(2)
    for seconds in (1e308, 10**400, np.float32(3e38), 2):
        assert quiet_windows(wav, seconds) == [(0, len(wav))]
    assert quiet_windows(wav[:0], 1) == [(0, 0)]


def test_waveforms_with_channels_are_refused_as_everywhere():
    for wav in (np.zeros((2, 32_000), "f4"), np.ma.masked_less(noise(2), 0)):
        with pytest.raises(InputError) as of_mel:
            log_mel(wav)
        with pytest.raises(InputError) as of_windows:
            quiet_windows(wav, 30)
        assert str(of_windows.value) == str(of_mel.value)


@pytest.mark.parametrize("seconds", [0.0, 0.99, -1.0, float("nan"), float("inf"), "30", None])
def test_impossible_lengths(seconds):
    with pytest.raises(UsageError, match="at least 1 s"):
        quiet_windows(noise(2), seconds)
