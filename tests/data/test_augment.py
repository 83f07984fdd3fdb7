"""Changes to a clip: its speed, and its log-mel."""

import json

import numpy as np
import pytest
import soundfile
from data_rows import ENCODER, audio, text

from moss_audio_jax.audio import log_mel
from moss_audio_jax.data import examples
from moss_audio_jax.data.augment import Augment, warp_mel
from moss_audio_jax.data.examples import ExampleMaker, Job
from moss_audio_jax.data.packing import Room
from moss_audio_jax.data.records import encode_record
from moss_audio_jax.data.sources import Location
from moss_audio_jax.data.targets import NOTHING, Targets
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


_START, _END = 1.0, 2.0  # seconds of the noise in a clip of 3 s


@pytest.fixture
def timed(tmp_path, tokenizer, monkeypatch):
    """timed(speed, *answers, as_mel=False): the example of a row that says when its noise is."""
    noise = np.random.default_rng(0).normal(size=48000).astype(np.float32)
    noise[: int(_START * 16000)] = noise[int(_END * 16000) :] = 0
    soundfile.write(tmp_path / "clip.wav", 0.1 * noise, 16000)

    def make(speed, *answers, as_mel=False):
        span = {"start": _START, "end": _END}
        row = {
            "conversation": [audio("clip.wav")],
            "branches": [
                {"messages": [text("user", "What?"), text("assistant", answer)]}
                for answer in answers
            ],
            "words": [{"text": "a", **span}],
            "tags": [{"name": "noise", **span}],
        }
        data = encode_record(row, [log_mel(0.1 * noise)]) if as_mel else json.dumps(row).encode()
        monkeypatch.setattr(examples, "read_location", lambda _: data)
        maker = ExampleMaker(
            tokenizer,
            ENCODER,
            Room(400, 16, 10),
            augment=Augment(speeds=(speed,)),
            branches=2,
            targets=Targets(8, ("noise",)),
        )
        return maker(Job(0, Location(str(tmp_path / "rows"), 1, 0, 1), "row", "data"))

    return make


@pytest.mark.parametrize(
    ("speed", "as_mel", "frames"),
    [(0.5, False, 600), (0.8, False, 375), (1.25, False, 240), (0.5, True, 300)],
)
def test_words_and_tags_follow_the_speed_of_their_clip(timed, speed, as_mel, frames):
    example = timed(speed, "a noise", "nothing else", as_mel=as_mel)
    (mel,) = example.mels
    assert mel.shape[1] == frames
    # Where the noise is, by the sound itself: tokens of 8 frames.
    loud = mel[:, : frames // 8 * 8].reshape(128, -1, 8).mean((0, 2))
    noisy = np.flatnonzero(loud > (loud.min() + loud.max()) / 2)
    for found in (example.heard.pieces != NOTHING, example.heard.tags[:, 0] == 1):
        assert np.abs(np.flatnonzero(found)[[0, -1]] - noisy[[0, -1]]).max() <= 1


def test_a_branch_with_a_time_keeps_the_speed_of_its_row(timed):
    assert timed(0.8, "a noise", "[1.00]noise[2.00]").mels[0].shape[1] == 300
