"""`tools/small/deepen.py`: a model with more decoder layers answers as before."""

import numpy as np
import pytest

from moss_audio_jax import MossAudio
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.errors import InputError
from moss_audio_jax.tree import flatten
from moss_audio_jax.weights.convert import load_params
from moss_audio_jax.weights.helpers import load_helpers
from moss_audio_jax.weights.opening import read_config
from tools.small.deepen import OUTPUTS, STACK, deepen

MORE = 2


@pytest.fixture(scope="module")
def deeper(tmp_path_factory):
    output = tmp_path_factory.mktemp("deeper") / "model"
    deepen(DEFAULT_CHECKPOINT, output, MORE)
    return output


def test_weights_stay_and_the_new_layers_put_out_nothing(deeper):
    old, new = read_config(DEFAULT_CHECKPOINT).decoder.layers, read_config(deeper).decoder.layers
    assert new == old + MORE
    before, after = (
        {path: np.asarray(leaf, np.float32) for path, leaf in flatten(load_params(folder)).items()}
        for folder in (DEFAULT_CHECKPOINT, deeper)
    )
    assert before.keys() == after.keys()
    for path, leaf in after.items():
        if path.startswith(STACK):
            np.testing.assert_array_equal(leaf[:old], before[path])
            fresh = leaf[old:]
            assert not fresh.any() if path.removeprefix(STACK) in OUTPUTS else fresh.any(), path
        else:
            np.testing.assert_array_equal(leaf, before[path])
    was, now = (load_helpers(folder)[0] for folder in (DEFAULT_CHECKPOINT, deeper))
    assert {path: (now[path] == was[path]).all() for path in was} == dict.fromkeys(now, True)
    with pytest.raises(InputError, match="exists"):
        deepen(DEFAULT_CHECKPOINT, deeper, MORE)


def test_answers_stay(deeper):
    sound = np.random.default_rng(0).normal(0, 0.02, 24_000).astype(np.float32)
    models = (MossAudio.load(folder, dtype="float32") for folder in (DEFAULT_CHECKPOINT, deeper))
    question = "List every sound with its start and end time."
    old, new = (model.generate(question, [sound], max_new_tokens=24) for model in models)
    assert old.ids
    assert new.ids == old.ids
