"""The choice of one token against plain numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from moss_audio_jax.errors import UsageError
from moss_audio_jax.generate.sampling import Knobs, Sampling, choose

VOCAB = 12


def knobs(count, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, penalty=1.0):
    def full(value, dtype):
        return jnp.full((count,), value, dtype)

    return Knobs(
        full(temperature, jnp.float32),
        full(top_k, jnp.int32),
        full(top_p, jnp.float32),
        full(min_p, jnp.float32),
        full(penalty, jnp.float32),
        jnp.arange(count, dtype=jnp.int32),
    )


def draw(logits, n=4000, seen=None, **kw):
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, len(logits)))
    seen = jnp.zeros(rows.shape, bool) if seen is None else jnp.broadcast_to(seen, rows.shape)
    return np.asarray(choose(rows, knobs(n, **kw), seen, jnp.zeros((n,), jnp.int32), True))


def distribution(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities after top-k, top-p and min-p, in this order, by their definitions."""
    scaled = np.asarray(logits, np.float64) / temperature
    kept = np.argsort(-scaled)[: top_k or len(scaled)]
    probs = np.exp(scaled[kept] - scaled.max())
    probs /= probs.sum()
    kept = kept[: int(np.searchsorted(np.cumsum(probs), top_p) + 1)]
    full = np.zeros(len(scaled))
    full[kept] = np.exp(scaled[kept] - scaled.max())
    full[full < min_p * full.max()] = 0
    return full / full.sum()


@pytest.mark.parametrize(
    "kw",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 6, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(kw):
    logits = np.random.default_rng(0).normal(0, 1.5, VOCAB)
    expected = distribution(logits, **kw)
    found = np.bincount(draw(logits, **kw), minlength=VOCAB) / 4000
    assert not found[expected == 0].any()
    assert np.abs(found - expected).max() < 0.03  # four standard errors of 4,000 draws


def test_zero_temperature_is_greedy_also_beside_sampled_rows():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(6, VOCAB)), jnp.float32)
    mixed = knobs(6)._replace(temperature=jnp.array([0.0, 1, 0, 1, 0, 1]))
    found = choose(logits, mixed, jnp.zeros(logits.shape, bool), jnp.zeros((6,), jnp.int32), True)
    assert np.array_equal(found[::2], jnp.argmax(logits, -1)[::2])


def test_forbidden_tokens_are_never_drawn():
    logits = np.zeros(VOCAB)
    logits[3] = -np.inf
    assert 3 not in draw(logits)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    seen = jnp.asarray(np.eye(3, dtype=bool)[0] | np.eye(3, dtype=bool)[2])
    assert draw([2.0, 1.1, -1.0], n=1, seen=seen, temperature=0.0, penalty=2.0)[0] == 1
    assert draw([2.0, 0.9, -1.0], n=1, seen=seen, temperature=0.0, penalty=2.0)[0] == 0
    assert draw([-3.0, -1.5, -1.0], n=1, seen=seen, temperature=0.0, penalty=2.0)[0] == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"stop": "END"},
        {"top_k": 2**31},
        {"thinking_budget": 2**31},
        {"temperature": -1},
        {"top_p": 0},
        {"min_p": 2},
        {"max_new_tokens": 0},
        {"stop": ("",)},
    ],
    ids=str,
)
def test_options_out_of_range_are_named(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        Sampling(**bad)
