"""The choice of one token against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_audio_jax.data.batch import Example
from moss_audio_jax.errors import UsageError
from moss_audio_jax.generate import decode_state
from moss_audio_jax.generate.sampling import Knobs, Sampling, choose
from moss_audio_jax.generate.vocabulary import Vocabulary

VOCAB = 12
SAMPLE = jax.jit(decode_state.sample, static_argnames=("vocab", "sampled"))


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


@pytest.mark.parametrize("top_p", [1e-3, 1e-30, 1e-40, 1e-300])
def test_a_tiny_top_p_keeps_the_most_likely_token(top_p):
    """A device takes what is below the normal float32 as 0."""
    logits = np.random.default_rng(2).normal(size=VOCAB)
    logits[0] = -np.inf  # what argmax takes if nothing is kept
    assert set(draw(logits, n=50, top_p=top_p)) == {logits.argmax()}
    assert set(draw(logits, n=50, top_p=top_p, top_k=5)) == {logits.argmax()}


def told(logits, sampling):
    """A new answer's first token and what is kept of its log-probabilities."""
    vocab = Vocabulary(VOCAB, -1)
    asked = Example(np.array([1], np.int32)), sampling
    answers = decode_state.new_answers([asked], [4], 4, vocab, logprobs=True)
    new = SAMPLE(answers, jnp.asarray(logits, jnp.float32)[None], vocab, True)
    kept = new.logprobs
    return int(new.token[0]), float(kept.token[0, 0]), kept.top_ids[0, 0], kept.top[0, 0]


@pytest.mark.parametrize("temperature", [0, 0.7, 1, 1e6])
def test_log_probabilities_are_of_the_whole_softmax(temperature):
    logits = np.random.default_rng(3).normal(0, 3, VOCAB).astype(np.float32)
    token, logprob, top_ids, top = told(logits, Sampling(temperature=temperature, logprobs=5))
    exact = logits.astype(np.float64) / (temperature or 1)
    exact -= np.logaddexp.reduce(exact)
    np.testing.assert_allclose(logprob, exact[token], atol=1e-5)
    np.testing.assert_allclose(top, exact[top_ids], atol=1e-5)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-36, 1e-10, 1e-6, 1e-3])
@pytest.mark.parametrize("more", [{}, {"top_p": 1e-40}, {"repetition_penalty": 1e-6}], ids=str)
def test_log_probabilities_at_a_tiny_temperature(temperature, more):
    """At such a temperature the likeliest token is certain, and its log-probability 0."""
    logits = np.random.default_rng(4).normal(0, 9, VOCAB).astype(np.float32)
    logits[1] = 3.0  # said in the prompt
    options = {"temperature": temperature, "logprobs": 5} | more
    token, logprob, top_ids, top = told(logits, Sampling(**options))
    assert top_ids[0] == logits.argmax()
    assert (token == logits.argmax()) == ("repetition_penalty" not in more)
    assert np.isfinite(logprob)
    assert logprob <= 0
    assert top[0] == pytest.approx(0, abs=1e-6)
    assert np.all(top <= 0)


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
        {"stop": [b"x"]},
        {"stop": [["a"]]},
        {"stop_ids": ["a"]},
        {"stop_ids": (10**30,)},
        {"stop_ids": (-1,)},
        {"stop_ids": [511.9]},
        {"stop_ids": range(9)},
        {"logprobs": 2.0},
        {"logprobs": True},
        {"thinking_budget": 2.5},
        {"loop_guard": "no"},
        {"temperature": np.array([1.0, 2.0])},
        {"temperature": np.eye(3)},
        {"temperature": float("inf")},
        {"temperature": 1e300},
        {"temperature": 1e38},
        {"temperature": "1"},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e40},
        {"repetition_penalty": float("nan")},
    ],
    ids=str,
)
def test_options_out_of_range_are_named(bad):
    with pytest.raises(UsageError) as raised:
        Sampling(**bad)
    line = str(raised.value)
    assert line.startswith(f"{next(iter(bad))} is ")
    assert "; expected " in line
    assert "\n" not in line


def test_a_refusal_says_the_value_and_what_is_expected():
    with pytest.raises(UsageError) as raised:
        Sampling(stop_ids=[511.9])
    assert str(raised.value) == (
        "stop_ids is (511.9,); expected a tuple or list of at most 8 token ids, each a whole "
        "number from 0 to 2**31 - 1"
    )


def test_options_may_be_numbers_of_numpy():
    options = {"seed": np.int64(3), "top_k": np.int32(5), "temperature": np.float32(0.5)}
    sampling = Sampling(**options, stop=["a", "b"], stop_ids=[np.int32(7)])
    assert sampling == Sampling(seed=3, top_k=5, temperature=0.5, stop=("a", "b"), stop_ids=(7,))
