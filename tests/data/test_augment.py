"""Changes to a clip's log-mel."""

import numpy as np
import pytest

from moss_audio_jax.audio import log_mel
from moss_audio_jax.data.augment import Augment, warp_mel
from moss_audio_jax.errors import InputError


def test_a_warp_moves_a_tone_by_its_factor_at_most_and_loses_no_frame():
    seconds = np.arange(16000) / 16000
    mel = log_mel(np.sin(2 * np.pi * 1000 * seconds).astype(np.float32))
    peak = mel.mean(1).argmax()
    moved = set()
    for seed in range(40):
        warped = warp_mel(mel, Augment(warp=0.2), np.random.default_rng(seed))
        assert warped.shape == mel.shape
        assert warped.dtype == np.float32
        moved.add(int(warped.mean(1).argmax()))
    assert peak / 1.2 - 1 <= min(moved) < peak < max(moved) <= peak / 0.8 + 1


def test_a_warp_of_one_is_the_mel_itself():
    mel = np.random.default_rng(0).normal(size=(128, 7)).astype(np.float32)

    class One:
        def uniform(self, low, high):
            return 0.0

    np.testing.assert_array_equal(warp_mel(mel, Augment(warp=0.1), One()), mel)


@pytest.mark.parametrize("key", ["warp", "time_share"])
def test_shares_out_of_range_are_named(key):
    with pytest.raises(InputError, match=rf"augment\.{key} is 1\.5"):
        Augment(**{key: 1.5})
