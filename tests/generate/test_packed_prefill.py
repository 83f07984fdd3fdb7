"""Prompts are packed into rows for prefill: each must come out as it does in a row of its own."""

import numpy as np
import paged
import pytest
from golden_prompts import OWN, golden_prompts

import moss_audio_jax as mj
from moss_audio_jax.data.batch import Example, Shape, bucket_shape, make_batch

ROOM = 160


@pytest.fixture(scope="module")
def model():
    return mj.MossAudio.load(OWN, "float32")


@pytest.fixture(scope="module")
def prompts():
    return [*golden_prompts((1, 5, 0, 2)), Example(np.array([7])), Example(np.arange(90))]


def prefill(model, rows, shape, prompts):
    batch = make_batch(rows, shape, model.config.encoder, model.processor.audio_token_id)
    logits, kv = paged.run(model.params, model.config, model.compute, batch, ROOM, prompts)
    where = paged.tables(len(rows), prompts, ROOM).reshape(len(rows) * prompts, -1)
    return logits, paged.held(kv, where, ROOM)


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_prompts_have_the_logits_and_the_cache_of_their_own(model, prompts, rows):
    each = 8 // rows  # with room for empty slots
    packed = [prompts[each * row : each * (row + 1)] for row in range(rows)]
    shape = Shape(rows, 384, 4, 400)
    logits, cache = prefill(model, packed, shape, each)
    for slot, prompt in enumerate(prompts):
        alone = bucket_shape([prompt], model.config.encoder, 1)
        expected, own = prefill(model, [[prompt]], alone, 1)
        np.testing.assert_allclose(logits[slot], expected[0], atol=2e-5)
        held = len(prompt.ids)
        for ours, theirs in zip(sum(cache, ()), sum(own, ()), strict=True):
            np.testing.assert_allclose(ours[slot, :held], theirs[0, :held], atol=2e-5)
