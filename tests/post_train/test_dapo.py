"""The objectives against their formulas, written a second time in float64 and answer by answer.

That old, new and sampler's log-probabilities agree for a model is not tested here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_audio_jax.post_train import dapo
from moss_audio_jax.post_train.dapo import (
    VARIANTS,
    Objective,
    dapo_loss,
    group_advantages,
    loss_weights,
    means,
    policy_loss,
    token_sums,
)
from moss_audio_jax.sharding import make_mesh


def batch(seed=0, rows=6, length=17, scale=0.4):
    """Ragged answers, each of its own length and place; nothing counts in the last row."""
    draw = np.random.default_rng(seed)
    new = -draw.exponential(1.5, (rows, length))
    old = new + draw.normal(0, scale, new.shape)
    sampler = old + draw.normal(0, scale, new.shape)
    mask = np.zeros(new.shape)
    for row, size in enumerate([length, 1, 5, 9, 13][: rows - 1]):
        start = draw.integers(0, length - size + 1)
        mask[row, start : start + size] = 1
    return new, old, sampler, draw.normal(0, 1.5, rows), mask


def as_float32(*arrays):
    return [jnp.asarray(array, jnp.float32) for array in arrays]


def reference_loss(objective, new, old, sampler, advantages, mask, reference=None):
    """The loss by its formula, token after token."""
    of_answers = []
    for b in range(len(new)):
        places = [t for t in range(new.shape[1]) if mask[b, t]]
        terms = []
        for t in places:
            over = places if objective.ratio == "answer" else [t]
            ratio = np.exp(np.mean([new[b, i] - old[b, i] for i in over]))
            weight = np.exp(np.mean([old[b, i] - sampler[b, i] for i in over]))
            clipped = min(max(ratio, 1 - objective.clip_low), 1 + objective.clip_high)
            gain = min(ratio * advantages[b], clipped * advantages[b])
            terms.append(-min(weight, objective.tis_cap) * gain)
            if objective.kl:
                log = reference[b, t] - new[b, t]
                terms[-1] += objective.kl * (np.exp(log) - log - 1)
        if terms:
            of_answers.append(terms)
    if objective.mean == "answers":
        return np.mean([np.mean(terms) for terms in of_answers])
    return np.mean([term for terms in of_answers for term in terms])


def differences(loss, at, step=1e-6):
    """The gradient of a float64 function by central differences."""
    gradient = np.zeros_like(at)
    for place in np.ndindex(at.shape):
        nudge = np.zeros_like(at)
        nudge[place] = step
        gradient[place] = (loss(at + nudge) - loss(at - nudge)) / (2 * step)
    return gradient


OBJECTIVES = {
    **VARIANTS,
    "gspo_wide": Objective(ratio="answer", mean="answers", clip_low=0.1, clip_high=0.15),
    "grpo_kl": Objective(mean="answers", clip_high=0.2, kl=0.04),
    "dapo_kl": Objective(kl=0.3, tis_cap=1.1),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_are_those_of_the_formula(name, seed):
    # GSPO's clip is so narrow that larger changes would all be clipped.
    objective, arrays = OBJECTIVES[name], batch(seed, scale=1e-3 if name == "gspo" else 0.4)
    reference = arrays[0] + np.random.default_rng(9).normal(0, 0.5, arrays[0].shape)
    new, *others = as_float32(*arrays, reference)
    (loss, _), gradient = jax.value_and_grad(
        lambda new: policy_loss(objective, new, *others), has_aux=True
    )(new)
    expected = functools.partial(reference_loss, objective, reference=reference)
    assert float(loss) == pytest.approx(expected(*arrays), rel=1e-5, abs=1e-6)
    wanted = differences(lambda new: expected(new, *arrays[1:]), arrays[0])
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("clip", [(0.2, 0.28, 2.0), (0.05, 0.5, 1.05)])
def test_the_public_loss_is_dapos_with_its_arguments(clip):
    arrays = batch(3)
    loss, metrics = jax.jit(dapo_loss)(*as_float32(*arrays), *clip)
    objective = Objective(clip_low=clip[0], clip_high=clip[1], tis_cap=clip[2])
    assert float(loss) == pytest.approx(reference_loss(objective, *arrays), rel=1e-5)
    assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())


def test_metrics_are_those_of_their_words():
    arrays = batch(4)
    new, old, sampler, advantages, mask = arrays
    _, metrics = dapo_loss(*as_float32(*arrays))
    here = mask > 0
    ratio, importance = np.exp(new - old)[here], np.exp(old - sampler)[here]
    sign = np.broadcast_to(advantages[:, None], mask.shape)[here]
    expected = {
        "clipped_low": np.mean((ratio < 0.8) & (sign < 0)),
        "clipped_high": np.mean((ratio > 1.28) & (sign > 0)),
        "importance": np.mean(np.minimum(importance, 2)),
        "capped": np.mean(importance > 2),
        "kl": np.mean(ratio - 1 - np.log(ratio)),
        "entropy_estimate": -np.mean(new[here]),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert value > 0, "a case that does not happen here shows nothing"
        assert float(metrics[name]) == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.1, 1.0, 1.1, 1.1),  # within the clip
        (1.5, 1.0, 1.28, 0.0),  # already likelier: no more to gain
        (1.5, -1.0, -1.5, -1.5),  # likelier though worse: not clipped
        (0.5, -1.0, -0.8, 0.0),  # already less likely
        (0.5, 1.0, 0.5, 0.5),  # less likely though better: not clipped
    ],
)
def test_the_clip_on_both_sides_and_both_signs(ratio, advantage, value, slope):
    def loss(new):
        zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
        return dapo_loss(new, zero, zero, jnp.array([advantage]), one)[0]

    at = jnp.full((1, 1), np.log(ratio), jnp.float32)
    assert float(loss(at)) == pytest.approx(-value, rel=1e-6)
    assert float(jax.grad(loss)(at)[0, 0]) == pytest.approx(-slope, rel=1e-6)


def test_importance_is_capped_and_has_no_gradient():
    new, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
    for sampler, expected in ((-np.log(1.5), 1.5), (-np.log(7.0), 2.0), (np.log(4.0), 0.25)):
        arrays = (new, new, jnp.full((1, 1), sampler, jnp.float32))

        def loss(new, old, sampler):
            return dapo_loss(new, old, sampler, jnp.ones(1), one)[0]

        assert float(loss(*arrays)) == pytest.approx(-expected, rel=1e-6)
        gradients = jax.grad(loss, argnums=(0, 1, 2))(*arrays)
        # Through r alone: old has the opposite gradient, and the sampler none.
        assert [float(g[0, 0]) for g in gradients] == pytest.approx([-expected, expected, 0])


def test_where_nothing_moved_w_is_1_and_the_loss_minus_the_mean_advantage():
    new, _, _, advantages, mask = batch(5)
    loss, metrics = dapo_loss(*as_float32(new, new, new, advantages, mask))
    assert float(loss) == pytest.approx(-np.sum(mask * advantages[:, None]) / mask.sum(), rel=1e-6)
    assert float(metrics["importance"]) == 1.0
    for name in ("clipped_low", "clipped_high", "capped", "kl"):
        assert float(metrics[name]) == 0.0
    full = mask.any(1)
    for name in ("grpo", "gspo"):
        loss, _ = policy_loss(VARIANTS[name], *as_float32(new, new, new, advantages, mask))
        assert float(loss) == pytest.approx(-advantages[full].mean(), rel=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_masked_may_hold_anything(name):
    objective, arrays = OBJECTIVES[name], batch(6)
    new, old, sampler, advantages, mask = as_float32(*arrays)
    out = mask == 0
    advantages = advantages.at[-1].set(jnp.nan)  # a row in which nothing counts

    def loss(new, old, sampler, reference):
        return policy_loss(objective, new, old, sampler, advantages, mask, reference)

    clean = jax.value_and_grad(loss, has_aux=True)(new, old, sampler, old)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        spoilt = [jnp.where(out, bad, x) for x in (new, old, sampler, old)]
        found = jax.value_and_grad(loss, has_aux=True)(*spoilt)
        jax.tree.map(np.testing.assert_array_equal, found, clean)
    assert np.isfinite(clean[0][0])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_empty_mask_gives_0(name):
    new, old, sampler, advantages, mask = as_float32(*batch(6))
    (loss, metrics), gradient = jax.value_and_grad(
        lambda new: policy_loss(OBJECTIVES[name], new, old, sampler, advantages, 0 * mask, old),
        has_aux=True,
    )(new)
    assert float(loss) == 0
    assert not np.any(gradient)
    assert all(float(value) == 0 for value in metrics.values())


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_ratios_beyond_float32_stay_finite(advantage):
    far = jnp.full((1, 2), 300.0)

    def loss(new, old):
        return dapo_loss(new, old, old - far, jnp.array([advantage]), jnp.ones((1, 2)))

    for new, old in ((far, 0 * far), (0 * far, far)):
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(new, old)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        assert all(np.isfinite(list(metrics.values())))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_rows_and_parts_of_a_batch_add_up_to_the_batch(name):
    """Answers side by side in rows, summed in two parts, give the loss of one answer a row."""
    objective, arrays = OBJECTIVES[name], batch(7, rows=5)
    new, old, sampler, advantages, mask = arrays
    loss, metrics = policy_loss(objective, *as_float32(*arrays), jnp.asarray(old, jnp.float32))
    rows = [[0, 1], [2, 3, 4]]
    width = 3 * new.shape[1] + 2
    packed = np.zeros((6, len(rows), width))
    answers = np.zeros((len(rows), width), np.int32)
    for row, members in enumerate(rows):
        at = 1  # padding before and after, of answer 0
        for number, b in enumerate(members, 1):
            here = slice(at, at := at + new.shape[1])
            spread = np.full(new.shape[1], advantages[b])
            for part, values in enumerate((new[b], old[b], sampler[b], spread, mask[b], old[b])):
                packed[part, row, here] = values
            answers[row, here] = number
    parts = []
    for row in range(len(rows)):
        *logs, spread, counted, reference = as_float32(*packed[:, row : row + 1])
        ids = jnp.asarray(answers[row : row + 1])
        parts.append(token_sums(objective, *logs, spread, counted, ids, reference))
        weights = loss_weights(objective, counted, ids)
        assert float(weights.sum()) == pytest.approx(float(parts[-1]["weight"]), rel=1e-6)
    found = means(jax.tree.map(jnp.add, *parts))
    assert float(found[0]) == pytest.approx(float(loss), rel=1e-5)
    for key, value in metrics.items():
        assert float(found[1][key]) == pytest.approx(float(value), rel=1e-5, abs=1e-7), key


@pytest.mark.parametrize("name", ["dapo", "gspo_wide", "grpo_kl"])
def test_a_mesh_changes_nothing(name):
    """Rows over data and fsdp, tokens over sequence, as in the train step."""
    mesh = make_mesh(data=2, fsdp=2, sequence=2)
    new, old, sampler, advantages, mask = batch(8, rows=8, length=16)
    answers = np.cumsum(np.random.default_rng(0).random(mask.shape) < 0.2, axis=1)
    arrays = as_float32(new, old, sampler, np.repeat(advantages[:, None], 16, 1), mask)
    arrays = [*arrays, jnp.asarray(answers, jnp.int32), arrays[1]]

    def loss(*arrays):
        return means(token_sums(OBJECTIVES[name], *arrays))

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    expected = step(*arrays)
    split = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "sequence"))
    with jax.set_mesh(mesh):
        found = step(*jax.device_put(arrays, split))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), found, expected)


def test_advantages_are_those_of_the_formula():
    rewards = np.random.default_rng(0).random((5, 16))
    rewards[1] = rewards[1] > 0.5
    found = group_advantages(jnp.asarray(rewards, jnp.float32))
    mean, spread = rewards.mean(1, keepdims=True), rewards.std(1, keepdims=True)
    np.testing.assert_allclose(found, (rewards - mean) / (spread + 1e-6), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, 1.0])
def test_advantages_without_spread_are_exactly_0(reward):
    for size in (1, 3, 7, 16):
        assert not np.any(group_advantages(np.full((2, size), reward)))


def test_a_small_spread_is_not_blown_up():
    found = group_advantages(np.array([[0.0, 0.0, 0.0, 1e-6]]))
    expected = np.array([0.0, 0.0, 0.0, 1e-6])
    expected = (expected - expected.mean()) / (expected.std() + 1e-6)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_every_variant_is_a_reading_of_the_core():
    assert set(VARIANTS) == {"dapo", "grpo", "gspo"}
    assert VARIANTS["grpo"].clip_low == VARIANTS["grpo"].clip_high
    assert dapo.VARIANTS["dapo"] == Objective()
