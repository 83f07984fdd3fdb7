"""The step as a pure function: what must not change it, what is trained, what is skipped."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moss_audio_jax.config import Compute
from moss_audio_jax.data.batch import Shape, TrainExample, make_train_batch
from moss_audio_jax.errors import UsageError
from moss_audio_jax.models import lora
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.train.defaults import get_config
from moss_audio_jax.train.optimizer import (
    factors,
    make_optimizer,
    schedule,
    untouched_layers,
)
from moss_audio_jax.train.step import (
    Recipe,
    batch_shardings,
    gradients,
    init_state,
    make_train_step,
    state_shardings,
)
from moss_audio_jax.tree import flatten, unflatten
from moss_audio_jax.weights.convert import load_params
from moss_audio_jax.weights.opening import read_config

OWN = Path(__file__).parents[1] / "golden" / "tiny" / "a"
MODEL = read_config(OWN)
RECIPE = Recipe(MODEL, Compute(dtype="float32"), tasks=3)


@pytest.fixture(scope="module")
def params():
    return flatten(load_params(OWN, MODEL, "float32"))


@pytest.fixture(scope="module")
def examples():
    """The golden prompts as rows to learn from: the text behind the audio is the answer."""
    golden = np.load(OWN / "golden.npz")
    made = []
    for i in range(7):
        ids = golden[f"s{i}_ids"]
        last = np.flatnonzero(ids == 445)[-1]
        labels = np.where(np.arange(len(ids)) > last + 1, ids, -100)
        mels = np.split(golden[f"s{i}_mel"], np.cumsum(golden[f"s{i}_clips"])[:-1], axis=1)
        made.append(
            TrainExample(
                ids,
                tuple(mels),
                labels=labels,
                weights=1.0 + i / 4,
                tasks=i % 3,
                row_id=str(i),
                index=i,
                seconds=1.0,
            )
        )
    return made


def batch_of(rows):
    """Always of one shape, filled with empty rows, so that programs are compiled only once."""
    shape = Shape(8, 192, 4, MODEL.encoder.chunk_frames)
    return make_train_batch(rows, shape, MODEL.encoder, 445)


@functools.cache
def grad_fn(recipe=RECIPE):
    return jax.jit(functools.partial(gradients, recipe=recipe))


def assert_same(found, expected, tolerance=1e-5):
    """Gradients and sums agree within a share of each array's largest value."""
    for key in expected:
        a, b = np.asarray(found[key]), np.asarray(expected[key])
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-3), key


def test_packing_changes_neither_loss_nor_gradient(params, examples):
    alone = grad_fn()(params, {}, batch=batch_of([[e] for e in examples]))
    packed = grad_fn()(
        params,
        {},
        batch=batch_of([[examples[i] for i in row] for row in ((6, 0, 1), (4, 2), (5, 3))]),
    )
    assert_same(packed[1], alone[1])
    assert_same(packed[0], alone[0])


def test_micro_batches_change_nothing(params, examples):
    batch = batch_of([[e] for e in examples])
    whole = grad_fn()(params, {}, batch=batch)
    parts = grad_fn(dataclasses.replace(RECIPE, accumulate=4))(params, {}, batch=batch)
    assert_same(parts[1], whole[1])
    assert_same(parts[0], whole[0])


@pytest.mark.parametrize("remat", ["full", "attention", "projections", "offload"])
def test_rematerialisation_changes_nothing(params, examples, remat):
    batch = batch_of([[e] for e in examples[:2]])
    plain = grad_fn()(params, {}, batch=batch)
    compute = dataclasses.replace(RECIPE.compute, remat=remat)
    again = grad_fn(dataclasses.replace(RECIPE, compute=compute))(params, {}, batch=batch)
    assert_same(again[0], plain[0])


@pytest.mark.parametrize("mesh", [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2)], ids=str)
def test_meshes_change_nothing(params, examples, mesh):
    batch = batch_of([[e] for e in examples])
    expected, sums = jax.device_get(grad_fn()(params, {}, batch=batch))
    mesh = make_mesh(*mesh)
    optimizer = optax.sgd(0.1)
    params = jax.device_get(params)
    init = functools.partial(init_state, trained=set(params), optimizer=optimizer, recipe=RECIPE)
    shardings = state_shardings(jax.eval_shape(init, params), MODEL, mesh)
    step = make_train_step(dataclasses.replace(RECIPE, clip_norm=0.0), optimizer, lambda _: 0.1)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    with jax.set_mesh(mesh):
        state = jax.jit(init, out_shardings=shardings)(params)
        placed = jax.device_put(batch, batch_shardings(batch, mesh))
        state, metrics = jax.device_get(step(state, placed))
    assert abs(metrics["mean_loss"] - sums["loss"] / sums["weight"]) < 1e-5
    moved = {path: (params[path] - state["trained"][path]) / 0.1 for path in params}
    assert_same(moved, expected, 1e-3)  # a difference of two nearly equal numbers


@functools.cache
def small_step(paths, trained, recipe=RECIPE, name="adamw"):
    """An optimizer and its jitted step."""
    config = get_config().optimizer
    config.name, config.learning_rate, config.warmup = name, 1e-2, 1
    optimizer = make_optimizer(config, 10, {path: float(path in trained) for path in paths})
    return optimizer, jax.jit(make_train_step(recipe, optimizer, lambda _: 0.0))


def run_steps(params, trained, batch, recipe=RECIPE, steps=2, name="adamw"):
    optimizer, step = small_step(frozenset(params), frozenset(trained), recipe, name)
    state = init_state(params, trained, optimizer, recipe)
    for _ in range(steps):
        state, metrics = step(state, batch)
    return state, metrics


def test_frozen_parameters_have_no_copy_and_no_optimizer_state(params, examples):
    groups = (("^(audio_adapter|mergers)/", 1.0), (".*", 0.0))
    factor = factors(list(params), groups)
    trained = {path for path, value in factor.items() if value}
    assert {path.split("/")[0] for path in trained} == {"audio_adapter", "mergers"}
    recipe = dataclasses.replace(RECIPE, compute=Compute(dtype="bfloat16"))
    state, _ = run_steps(params, trained, batch_of([[e] for e in examples[:2]]), recipe)
    assert set(state["trained"]) == trained
    assert {x.dtype for x in state["trained"].values()} == {jnp.dtype("float32")}
    assert {x.dtype for x in state["frozen"].values()} == {jnp.dtype("bfloat16")}
    trained_size = sum(params[path].size for path in trained)
    assert sum(x.size for x in jax.tree.leaves(state["opt"])) < 2 * trained_size + 10
    for path in params:
        if path in trained:
            assert np.abs(state["trained"][path] - params[path]).max() > 0, path
        else:
            assert (state["frozen"][path] == params[path].astype(jnp.bfloat16)).all()


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_layers_have_factors_and_the_first_may_rest(params, examples, name):
    count = MODEL.decoder.layers
    layers = (0.0,) * (count - 1) + (1.0,)
    factor = factors(list(params), (("^language_model/layers/", 1.0), (".*", 0.0)))
    assert untouched_layers(factor, layers) == count - 1
    assert untouched_layers(factor, (0.5, *layers[1:])) == untouched_layers(factor, ()) == 0
    # What stands before the layers, as a tied embedding does, needs their gradients.
    for path in ("audio_adapter/gate_proj/kernel", "language_model/embed_tokens/embedding"):
        assert untouched_layers(factor | {path: 1.0}, layers) == 0
    for path in ("language_model/norm/scale", "lm_head/kernel", "helpers/clock/kernel"):
        assert untouched_layers(factor | {path: 1.0}, layers) == count - 1

    config = get_config().optimizer
    config.name, config.learning_rate, config.warmup, config.layers = name, 1e-2, 1, layers
    optimizer = make_optimizer(config, 10, factor)
    trained = {path for path, value in factor.items() if value}
    batch = batch_of([[e] for e in examples[:3]])
    found = []
    for untouched in (0, count - 1):  # all gradients, or those that are needed
        compute = Compute(dtype="float32", untouched_layers=untouched)
        # Clipping is by the norm of the gradients that were computed.
        recipe = dataclasses.replace(RECIPE, compute=compute, clip_norm=0.0)
        step = jax.jit(make_train_step(recipe, optimizer, lambda _: 0.0))
        state = init_state(params, trained, optimizer, recipe)
        for _ in range(2):
            state, metrics = step(state, batch)
        assert metrics["finite"]
        found.append(state["trained"])
    for path, leaf in found[1].items():
        assert (leaf[:-1] == params[path][:-1]).all(), path
        assert np.abs(leaf[-1] - params[path][-1]).max() > 0, path
    if name != "adafactor":  # which clips the update of a leaf with all its layers
        assert_same(found[1], found[0], 1e-3)  # Adam enlarges what rounding leaves


def test_lora_trains_its_leaves_alone_and_merges_to_the_same_logits(params, examples):
    adapters = lora.init(jax.random.key(0), params, rank=4, targets=lora.DECODER)
    assert len(adapters) == 14
    base = {**params, **adapters}
    recipe = dataclasses.replace(RECIPE, lora_alpha=8.0)
    batch = batch_of([[e] for e in examples[:3]])
    state, _ = run_steps(base, set(adapters), batch, recipe, steps=3)
    assert set(state["trained"]) == set(adapters)
    moments = {
        str(path[-1].key)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state["opt"])
        if leaf.ndim
    }
    assert moments == set(adapters)
    trained, frozen = state["trained"], state["frozen"]
    assert all(np.abs(trained[p]).max() > 0 for p in trained if p.endswith("lora_b"))
    unmerged = grad_fn(recipe)(trained, frozen, batch=batch)[1]
    merged = lora.merge(frozen, trained, 8.0)
    plain = grad_fn()(merged, {}, batch=batch)[1]
    before = grad_fn()(params, {}, batch=batch)[1]
    assert_same(plain, unmerged)
    assert abs(before["loss"] - plain["loss"]) > 1e-3 * before["loss"]


def test_encoder_targets_and_targets_that_match_nothing(params):
    both = lora.init(jax.random.key(0), params, 2, f"{lora.DECODER}|{lora.ENCODER}")
    assert len(both) == 20
    with pytest.raises(UsageError, match="matches no linear kernel"):
        lora.init(jax.random.key(0), params, 2, "nothing")


def test_an_update_that_is_not_finite_is_skipped_and_counted(params, examples):
    batch = batch_of([[examples[0]]])
    broken = {**batch, "mels": np.where(batch["mels"] == batch["mels"], np.nan, 0).astype("f4")}
    optimizer, step = small_step(frozenset(params), frozenset(params))
    state = init_state(params, set(params), optimizer, RECIPE)
    for count in (1, 2):
        state, metrics = step(state, broken)
        assert not metrics["finite"]
        assert state["skipped"] == count
    assert all((state["trained"][path] == params[path]).all() for path in params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["opt"]))
    state, metrics = step(state, batch)
    assert metrics["finite"]
    assert state["skipped"] == 0
    assert state["step"] == 3


def test_weights_and_tasks_are_summed_apart(params, examples):
    rows = [[examples[0], examples[1]], [examples[3]]]
    _, sums = grad_fn()(params, {}, batch=batch_of(rows))
    labels = [int((e.labels != -100).sum()) for e in examples]
    weights = [e.weights * n for e, n in zip(examples, labels, strict=True)]
    np.testing.assert_allclose(sums["task_weight"], [weights[0] + weights[3], weights[1], 0])
    np.testing.assert_allclose(sums["task_loss"].sum(), sums["loss"], rtol=1e-5)


def test_z_loss_and_adafactor_and_ema(params, examples):
    batch = batch_of([[examples[1]]])
    recipe = dataclasses.replace(RECIPE, z_loss=1e-2, ema=0.5)
    plain = grad_fn()(params, {}, batch=batch)[0]
    with_z = grad_fn(recipe)(params, {}, batch=batch)[0]
    assert np.abs(with_z["lm_head/kernel"] - plain["lm_head/kernel"]).max() > 0
    state, _ = run_steps(params, set(params), batch, recipe, steps=1, name="adafactor")
    path = "lm_head/kernel"
    middle = 0.5 * params[path] + 0.5 * state["trained"][path]
    np.testing.assert_allclose(state["ema"][path], middle, atol=1e-6)
    adam, _ = run_steps(params, set(params), batch, steps=1)
    size = [sum(x.size for x in jax.tree.leaves(s["opt"])) for s in (state, adam)]
    assert size[0] < 0.51 * size[1]  # no first moment; and these are too small to factor


def _spread(matrix):
    """The middle singular value divided by the largest."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return values[len(values) // 2] / values[0]


def test_muon_turns_matrices_and_leaves_the_rest_to_adam(params, examples):
    batch = batch_of([[e] for e in examples])
    start = {path: jnp.asarray(leaf) for path, leaf in params.items()}
    muon, adam = (
        run_steps(params, set(params), batch, steps=1, name=name)[0]["trained"]
        for name in ("muon", "adamw")
    )

    def step(state, path):
        return np.asarray(state[path] - start[path])

    layer = "language_model/layers/mlp/up_proj/kernel"
    # The directions that the gradients have come out nearly alike, for each layer by itself.
    for turned, plain in zip(step(muon, layer), step(adam, layer), strict=True):
        assert _spread(turned) > 0.5 > 2 * _spread(plain)
    sizes = [np.sqrt(np.mean(step(state, layer) ** 2)) for state in (muon, adam)]
    assert 0.1 < sizes[0] / sizes[1] < 1
    conv = step(muon, "audio_encoder/stem/conv2/kernel")
    assert _spread(conv.reshape(-1, conv.shape[-1])) > 0.5
    for path in ("lm_head/kernel", "language_model/embed_tokens/embedding"):
        np.testing.assert_array_equal(muon[path], adam[path])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.25, 0.5, 1, 1, 1]),
        ("linear", [0.25, 0.5, 1, 0.55, 0.1]),
        ("cosine", [0.25, 0.5, 1, 0.55, 0.1]),
        ("wsd", [0.25, 0.5, 1, 1, 0.1]),
    ],
)
def test_schedules(name, expected):
    from moss_audio_jax.train.defaults import get_config

    config = get_config().optimizer
    config.schedule, config.learning_rate, config.warmup = name, 1.0, 4
    config.final, config.decay = 0.1, 0.25
    rate = schedule(config, 24)
    np.testing.assert_allclose([rate(s) for s in (0, 1, 4, 14, 24)], expected, atol=1e-6)


def test_groups_must_cover_every_path():
    with pytest.raises(UsageError, match="no pattern matches b/kernel"):
        factors(["a/kernel", "b/kernel"], (("^a/", 1.0),))
    with pytest.raises(UsageError, match="nothing is left"):
        factors(["a/kernel"], ((".*", 0.0),))


def test_trees_survive_flattening(params):
    assert flatten(unflatten(params)).keys() == params.keys()
