"""The decoder's layers one by one: the same answers as with stacked layers, without copies."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import paged
import pytest

import moss_audio_jax as mj
from moss_audio_jax.data.batch import Example, Shape, make_batch
from moss_audio_jax.generate import decode_state
from moss_audio_jax.generate.engine import Engine
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.models import cache as kv_cache
from moss_audio_jax.models import decoder, moss_audio
from moss_audio_jax.plan.hlo import Module
from moss_audio_jax.weights.convert import load_params

OWN = Path(__file__).parents[1] / "golden" / "tiny" / "a"


@pytest.fixture(scope="module", params=["none", "weights+cache"])
def model(request):
    return mj.MossAudio.load(OWN, "float32", quantize=request.param)


def static(model):
    return {"config": model.config, "compute": model.compute, "vocab": model._vocab}


def test_params_are_the_checkpoints(model):
    expected = load_params(OWN, model.config, "float32")
    names = jax.tree_util.tree_leaves_with_path(expected)
    if model.compute.quantize == "none":
        found = dict(jax.tree_util.tree_leaves_with_path(model.stacked_params()))
        assert len(found) == len(names)
        assert all(np.array_equal(found[path], leaf) for path, leaf in names)
    kernel = model.stacked_params()["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.shape == expected["language_model"]["layers"]["mlp"]["up_proj"]["kernel"].shape


def test_answers_and_logits_are_those_of_the_stack():
    model = mj.MossAudio.load(OWN, "float32")
    golden = np.load(OWN / "golden.npz")
    mels = np.split(golden["s1_mel"], np.cumsum(golden["s1_clips"])[:-1], axis=1)
    example = model._example(golden["s1_ids"], mels)
    requests = [(example, Sampling(12, loop_guard=False)), (Example(np.arange(9)), Sampling(5))]
    stack = model.stacked_params()
    from_stack = Engine(stack, model.config, model.compute, model._vocab, model.mesh)
    with model._engine(2) as engine:
        found = engine.run(requests)
    assert [output.ids for output in found] == [output.ids for output in from_stack.run(requests)]

    batch = model._batch([example])
    ours, stacks = (hidden(params, model, batch) for params in (model.params, stack))
    np.testing.assert_allclose(ours, stacks, atol=2e-5)


def hidden(params, model, batch):
    run = jax.jit(moss_audio.hidden_states, static_argnums=(1, 2))
    return run(params, model.config, model.compute, batch)


def test_prefill_extend_and_step_give_the_logits_of_one_pass():
    """The cache's content equals that of a pass through stacked layers without a cache."""
    model = mj.MossAudio.load(OWN, "float32")
    config, tokens = model.config, np.arange(26, dtype=np.int32)

    def batch_of(ids, room):
        return make_batch([[Example(ids)]], Shape(1, room, 0, 400), config.encoder, -1)

    @jax.jit
    def run(params):
        whole = batch_of(tokens[:20], 24)
        first, kv = paged.prefilled(params, config, model.compute, whole, 32)
        piece, tables = batch_of(tokens[20:25], 8), jnp.arange(2)[None]
        more, kv = moss_audio.extend(
            params, config, model.compute, piece, kv, tables, jnp.array([20])
        )
        newest, at = jnp.array([tokens[25:]]), jnp.array([25])
        last, kv = moss_audio.decode_step(params, config, model.compute, newest, at, kv, tables)
        return (first[0], more[0], last[0, 0]), kv

    found, kv = run(model.params)
    assert len(kv) == config.decoder.layers
    assert kv_cache.pages_of(kv) == 2
    assert kv_cache.groups_of(kv) == 1
    stack = model.stacked_params()
    whole = decoder.logits(stack, hidden(stack, model, batch_of(tokens, 26)))[0]
    for logits, at in zip(found, (19, 24, 25), strict=True):
        np.testing.assert_allclose(logits, whole[at], atol=2e-5)
    with pytest.raises(ValueError, match="unrolled"):
        run(stack)


def test_a_step_copies_neither_weights_nor_cache():
    model = mj.MossAudio.load(OWN, "float32")  # int8 a CPU converts beside the product
    count = 5  # of which no other array has the size of a weight or a cache
    slots = decode_state.empty_state(**static(model), count=count, room=64, pages=count * 11)
    number, tables = jnp.int32(1), jnp.arange(count * 8).reshape(count, 8)
    with jax.set_mesh(model.mesh):
        text = (
            decode_state.decode_until.lower(
                model.params, slots, tables, number, number, **static(model)
            )
            .compile()
            .as_text()
        )
    layer = jax.tree.leaves(model.params["language_model"]["layers"][0])
    sizes = {x.size for x in layer if x.ndim == 2 and x.shape[0] > 1}
    heads = model.config.decoder
    sizes.add(kv_cache.pages_of(slots.cache) * kv_cache.PAGE * heads.kv_heads * heads.head_dim)
    assert not Module(text, 1).turn().made(sizes)
