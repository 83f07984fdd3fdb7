"""Prompts are packed into rows for prefill: each must come out as it does in a row of its own."""

import jax
import numpy as np
import pytest
from golden_prompts import OWN, golden_prompts

import moss_audio_jax as mj
from moss_audio_jax.data.batch import Example, Shape, bucket_shape, make_batch, packed_shape
from moss_audio_jax.models import moss_audio

ROOM = 160


@pytest.fixture(scope="module")
def model():
    return mj.MossAudio.load(OWN, "float32")


@pytest.fixture(scope="module")
def prompts():
    return [*golden_prompts((1, 5, 0, 2)), Example(np.array([7])), Example(np.arange(90))]


def prefill(model, rows, shape, count):
    run = jax.jit(moss_audio.prefill, static_argnums=(1, 2, 4, 5))
    batch = make_batch(rows, shape, model.config.encoder, model.processor.audio_token_id)
    return run(model.params, model.config, model.compute, batch, ROOM, count)


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_prompts_have_the_logits_and_the_cache_of_their_own(model, prompts, rows):
    each = 8 // rows  # with room for empty slots
    packed = [prompts[each * row : each * (row + 1)] for row in range(rows)]
    shape = packed_shape(packed, model.config.encoder, each)
    assert shape.tokens < each * bucket_shape(prompts, model.config.encoder, 1).tokens
    logits, cache = prefill(model, packed, shape, each)
    for slot, prompt in enumerate(prompts):
        alone = bucket_shape([prompt], model.config.encoder, 1)
        expected, own = prefill(model, [[prompt]], alone, 1)
        np.testing.assert_allclose(logits[slot], expected[0], atol=2e-5)
        held = len(prompt.ids)
        for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(own), strict=True):
            np.testing.assert_allclose(ours[slot, :, :held], theirs[0, :, :held], atol=2e-5)


def test_packed_rows_are_little_longer_than_what_they_hold(model):
    encoder = model.config.encoder
    examples = [Example(np.zeros(n), (np.zeros((128, 8 * n)),)) for n in (120, 90, 80, 70)]
    # 360 tokens in eighths of 4 * 128, 9 chunks of up to 4 s share 8 strips.
    assert packed_shape([examples], encoder, 4) == Shape(1, 384, 8, 400)
    assert packed_shape([[each] for each in examples], encoder, 1) == Shape(4, 128, 3, 400)
    text = [Example(np.zeros(10))] * 3
    assert packed_shape([text, text[:1]], encoder, 3) == Shape(2, 48, 0, 400)
