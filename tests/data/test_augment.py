"""Changes to a clip and to what is read of an answer."""

import numpy as np
import pytest
from data_rows import asr, write_clip, write_rows

from moss_audio_jax.audio import log_mel
from moss_audio_jax.data.augment import Augment, misread, warp_mel
from moss_audio_jax.data.targets import IGNORE
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


def test_misread_exchanges_up_to_its_share_inside_answers_alone():
    ids = np.arange(1000, dtype=np.int32)
    answers = np.zeros(1000, bool)
    answers[100:500] = answers[600:900] = True
    shares = []
    for seed in range(60):
        read = misread(ids, answers, Augment(misread=0.4), np.random.default_rng(seed))
        changed = np.flatnonzero(read != ids)
        assert answers[changed].all()
        assert answers[read[changed]].all()  # ids are their own places here
        ends = [499, 899]
        assert not np.isin(changed, ends).any()
        assert not np.isin(read[changed], ends).any()
        shares.append(len(changed) / 698)
    assert max(shares) < 0.45
    assert 0.15 < np.mean(shares) < 0.25
    np.testing.assert_array_equal(ids, np.arange(1000))


def test_an_answer_misread_is_still_learned_as_it_is(tmp_path, make_loader):
    write_clip(tmp_path / "clip.wav", 1.0)
    path = write_rows(tmp_path / "rows.jsonl", [asr("clip.wav", "some plain words to read")])
    keys = {"packing": False, "batch": 1}
    plain = next(make_loader((path,), **keys)).arrays
    noisy = next(make_loader((path,), **keys, augment=Augment(misread=1.0))).arrays
    again = next(make_loader((path,), **keys, augment=Augment(misread=1.0))).arrays
    np.testing.assert_array_equal(noisy["labels"], plain["labels"])
    changed = noisy["tokens"] != plain["tokens"]
    assert changed.any()
    assert (plain["labels"][changed] != IGNORE).all()
    np.testing.assert_array_equal(noisy["tokens"], again["tokens"])


@pytest.mark.parametrize("key", ["warp", "misread", "time_share"])
def test_shares_out_of_range_are_named(key):
    with pytest.raises(InputError, match=rf"augment\.{key} is 1\.5"):
        Augment(**{key: 1.5})
