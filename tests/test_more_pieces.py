"""`tools/small/extend.py`: a model with more word pieces is the same model on old texts."""

import itertools

import numpy as np
import pytest

from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.errors import InputError
from moss_audio_jax.text.loading import load_tokenizer
from moss_audio_jax.tree import flatten
from moss_audio_jax.weights.convert import load_params
from moss_audio_jax.weights.helpers import load_helpers
from moss_audio_jax.weights.opening import read_config
from tools.small import extend

SAID = (
    "that agent is already logged on",
    "please enter your agent number followed by the pound key",
    "the password that you have entered is not correct",
    "every extension of this department is busy at present",
)
NEW = 12


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
    output = tmp_path_factory.mktemp("wider") / "model"
    said = itertools.cycle(SAID)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extend, "sentence", lambda draw, split: (next(said), "here"))
        patch.setattr(extend, "SENTENCES", 400)
        extend.extend(DEFAULT_CHECKPOINT, output, NEW)
    return output


def test_old_pieces_stay_and_new_words_get_shorter(wider):
    old, new = load_tokenizer(DEFAULT_CHECKPOINT), load_tokenizer(wider)
    assert new.vocab_size == old.vocab_size + NEW == read_config(wider).decoder.vocab_size
    new.check(new.vocab_size)
    for index in range(old.vocab_size):
        assert new.token_bytes(index, False) == old.token_bytes(index, False)
    known = "a dog barks twice, [12.34]hammer[12.80] 请转写音频。"
    assert new.encode(known) == old.encode(known)
    for text in SAID:
        assert len(new.encode(text)) < len(old.encode(text))
        assert new.decode(new.encode(text)) == text


def test_weights_of_old_pieces_stay_and_new_ones_are_means(wider):
    old, new = load_tokenizer(DEFAULT_CHECKPOINT), load_tokenizer(wider)
    first = old.vocab_size
    before, after = (
        {path: np.asarray(leaf, np.float32) for path, leaf in flatten(load_params(folder)).items()}
        for folder in (DEFAULT_CHECKPOINT, wider)
    )
    for path in before.keys() - {extend.EMBEDDING}:
        np.testing.assert_array_equal(after[path], before[path])
    rows = after[extend.EMBEDDING]
    np.testing.assert_array_equal(rows[:first], before[extend.EMBEDDING])
    for index in range(first, new.vocab_size):
        spelled = old.encode(new.token_bytes(index).decode())
        assert len(spelled) > 1
        np.testing.assert_allclose(rows[index], rows[spelled].mean(axis=0), rtol=1e-6, atol=1e-7)
    heads = load_helpers(DEFAULT_CHECKPOINT)[0], load_helpers(wider)[0]
    for name in ("kernel", "bias"):
        was, now = (np.asarray(h[f"helpers/pieces/{name}"], np.float32) for h in heads)
        assert now.shape[-1] == was.shape[-1] + NEW
        np.testing.assert_array_equal(now[..., :first], was[..., :first])
        np.testing.assert_array_equal(now[..., -1], was[..., -1])  # "no piece" stays the last


def test_too_few_new_pieces_are_an_error():
    with pytest.raises(InputError, match="new pieces were found; expected at least 50"):
        extend.new_pieces(["aha", "oho"] * 20, frozenset(), 50)
