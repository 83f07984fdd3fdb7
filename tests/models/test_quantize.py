"""int8 weights and int8 keys and values: close to the originals, the same on every mesh."""

import argparse
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import paged
import pytest
import soundfile

import moss_audio_jax as mj
from moss_audio_jax import cli
from moss_audio_jax.config import Compute
from moss_audio_jax.data.batch import Example, Shape, make_batch
from moss_audio_jax.evaluate.infer import settings_of
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.models import cache as kv_cache
from moss_audio_jax.models import decoder, moss_audio
from moss_audio_jax.models.quantize import held, to_int8
from moss_audio_jax.ops.linear import Int8, dense, matmul
from moss_audio_jax.tree import path_name
from moss_audio_jax.weights.convert import load_params
from moss_audio_jax.weights.opening import read_config

OWN = Path(__file__).parents[1] / "golden" / "tiny"
BOTH = Compute("float32", quantize="weights+cache")


@pytest.fixture(scope="module")
def prompts():
    golden = np.load(OWN / "a" / "golden.npz")
    made = []
    for i in (1, 2):
        clips = np.cumsum(golden[f"s{i}_clips"])[:-1]
        made.append((golden[f"s{i}_ids"], np.split(golden[f"s{i}_mel"], clips, axis=1)))
    return made


def ids_of(model, prompts, slots):
    requests = [
        (model._example(ids, mels), Sampling(16, loop_guard=False)) for ids, mels in prompts
    ]
    with model._engine(slots) as engine:
        return [output.ids for output in engine.run(requests)]


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [-1, -2])
def test_a_round_trip_is_within_half_a_step(axis, dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 40, 56)) * 10.0 ** rng.uniform(-6, 6, size=(3, 40, 56))
    x[0] = x[1, :5] = x[2, :, 7] = 0
    x = x.astype(np.float32)
    steps, scale = to_int8(jnp.asarray(x), axis, jnp.dtype(dtype))
    assert (steps.dtype, scale.dtype) == ("int8", dtype)
    assert scale.shape == np.sum(x, axis=axis, keepdims=True).shape
    steps, scale = np.asarray(steps, np.float64), np.asarray(scale, np.float64)
    error = np.abs(steps * scale - x) / scale
    assert error.max() <= 0.5 + 1e-5
    assert np.abs(steps).max() == 127  # the whole range is used, and -128 is not
    assert not steps[x == 0].any()


def test_the_product_is_that_of_what_the_steps_stand_for():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 5, 48)).astype(np.float32)
    kernel = rng.normal(size=(48, 72)).astype(np.float32) * rng.uniform(0.1, 10, 72)
    whole = Int8(*to_int8(jnp.asarray(kernel, jnp.float32), -2, jnp.float32))
    expected = x.astype(np.float64) @ np.asarray(dense(whole), np.float64)
    np.testing.assert_allclose(matmul(x, whole), expected, rtol=0, atol=2e-6 * abs(expected).max())
    half = matmul(jnp.asarray(x, jnp.bfloat16), whole)
    assert half.dtype == "bfloat16"
    np.testing.assert_allclose(np.asarray(half, "f8"), expected, atol=0.02 * expected.std())
    # An embedding: the rows are the channels, and its transpose is the head.
    table = Int8(*to_int8(jnp.asarray(kernel, jnp.float32).T, -1, jnp.float32))
    params = {"language_model": {"embed_tokens": {"embedding": table}}}
    np.testing.assert_array_equal(dense(decoder.head_kernel(params)), dense(whole))
    np.testing.assert_allclose(
        decoder.logits(params, jnp.asarray(x)), expected, rtol=0, atol=2e-6 * abs(expected).max()
    )
    found = decoder.embed_tokens(params["language_model"], jnp.array([[3, 70]]), jnp.float32)
    np.testing.assert_array_equal(found[0], dense(whole).T[jnp.array([3, 70])])


@pytest.mark.parametrize(("name", "heads"), [("a", ["lm_head/kernel"]), ("b", [])])
def test_what_is_quantised_and_how_near_the_logits_stay(name, heads):
    """Untied (a) and tied (b)."""
    config = read_config(OWN / name)
    params = load_params(OWN / name, config, "float32")
    found = jax.jit(held, static_argnums=1)(params, "weights")
    leaves = jax.tree_util.tree_leaves_with_path(found, is_leaf=lambda x: isinstance(x, Int8))
    small = [path_name(path) for path, leaf in leaves if isinstance(leaf, Int8)]
    layers = "language_model/layers"
    kernels = [f"{layers}/self_attn/{k}_proj/kernel" for k in "qkvo"]
    kernels += [f"{layers}/mlp/{k}_proj/kernel" for k in ("gate", "up", "down")]
    assert sorted(small) == sorted([*kernels, *heads, "language_model/embed_tokens/embedding"])

    # Text alone: the encoder's part is the same.
    tokens = np.arange(48, dtype=np.int32)[None]
    batch = make_batch([[Example(tokens[0])]], Shape(1, 48, 0, 400), config.encoder, -1)
    forward = jax.jit(logits_of, static_argnums=2)
    expected, error = forward(params, batch, config), forward(found, batch, config)
    error = np.asarray(error - expected)
    assert 0 < np.sqrt(np.mean(error**2)) < 0.05 * np.std(expected)


def logits_of(params, batch, config):
    hidden = moss_audio.hidden_states(params, config, Compute("float32"), batch)
    return decoder.logits(params, hidden)


# --- keys and values ---------------------------------------------------------------------------


def test_the_cache_gives_back_what_was_stored_within_half_a_step():
    config = read_config(OWN / "a").decoder
    rng = np.random.default_rng(2)

    def some(length, rows=3):
        shape = (rows, length, config.kv_heads, config.head_dim)
        return [jnp.asarray(rng.normal(size=shape) * 5, jnp.float32) for _ in range(2)]

    prefix, token, more = some(6), some(1), some(2)
    at = jnp.array([6, 3, 99])  # the last one lies beyond the cache
    expected = [np.zeros((3, 8, config.kv_heads, config.head_dim)) for _ in range(2)]
    for whole, first, one, two in zip(expected, prefix, token, more, strict=True):
        whole[:, :6] = first
        whole[0, 6], whole[1, 3] = one[0, 0], one[1, 0]
        whole[:, 4:6] = two
    # Three rows of one page each, of which the last does not exist.
    tables = jnp.array([[3], [1], [kv_cache.NOWHERE]])
    (kv,) = kv_cache.init_cache(config, 1, 5, BOTH)[:1]
    assert {x.dtype.name for x in (kv.key, kv.value)} == {"int8"}

    def write(kv, positions, new):
        return kv_cache.write(kv, kv_cache.at_positions(tables, positions), *new)

    kv = write(kv, jnp.broadcast_to(jnp.arange(6), (3, 6)), prefix)
    kv = write(kv, at[:, None], token)
    kv = write(kv, jnp.broadcast_to(jnp.array([4, 5]), (3, 2)), more)
    for steps, whole in zip(kv_cache.read(kv, tables[:2]), expected, strict=True):
        assert steps.scale.dtype == "float32"
        got = steps.values * steps.scale[..., None]
        bound = np.abs(whole[:2]).max(-1, keepdims=True) / 254 + 1e-6
        assert (np.abs(np.asarray(got)[:, :8] - whole[:2]) <= bound).all()
        assert not np.asarray(got)[:, 8:].any()
    assert not np.asarray(kv.key[:, :, np.array([0, 2, 4])]).any()


def test_groups_have_pages_of_their_own():
    config = read_config(OWN / "a").decoder
    rng = np.random.default_rng(3)
    shape = (4, 20, config.kv_heads, config.head_dim)
    key, value = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    (kv,) = kv_cache.init_cache(config, 2, 5, Compute("float32"))[:1]
    tables = jnp.array([[4, 0], [2, 3], [1, 0], [4, 2]])  # two rows of each group
    place = kv_cache.at_positions(tables, jnp.broadcast_to(jnp.arange(20), (4, 20)))
    kv = kv_cache.write(kv, place, key, value)
    for found, expected in zip(kv_cache.read(kv, tables), (key, value), strict=True):
        np.testing.assert_array_equal(found[:, :20], expected)
    assert not np.asarray(kv.key[0, :, 1]).any()
    assert not np.asarray(kv.key[1, :, 3]).any()


@pytest.fixture(scope="module")
def model():
    return mj.MossAudio.load(OWN / "a", "float32", quantize="weights+cache")


def test_steps_with_an_int8_cache_stay_near_those_without(model):
    config, tokens = model.config, np.arange(20, dtype=np.int32)
    batch = make_batch([[Example(tokens)]], Shape(1, 24, 0, 400), config.encoder, -1)
    step = jax.jit(moss_audio.decode_step, static_argnums=(1, 2))
    _, first = paged.run(model.params, config, Compute("float32"), batch, 32)
    tables = jnp.arange(2)[None]

    def steps(compute):
        kv = kv_cache.init_cache(config.decoder, 1, 2, compute)
        kv = tuple(
            kv_cache.stored(old, one.key, one.value) for old, one in zip(kv, first, strict=True)
        )
        found = []
        for i, token in enumerate((5, 77, 300, 12)):
            at = jnp.array([len(tokens) + i])
            logits, kv = step(model.params, config, compute, jnp.array([[token]]), at, kv, tables)
            found.append(logits)
        return np.asarray(found)

    expected = steps(Compute("float32"))
    error = steps(BOTH) - expected
    assert 0 < np.sqrt(np.mean(error**2)) < 0.03 * expected.std()


# --- answers -----------------------------------------------------------------------------------


def test_neither_batch_nor_mesh_changes_the_tokens(model, prompts):
    alone = [ids_of(model, [prompt], 1)[0] for prompt in prompts]
    assert len({tuple(ids) for ids in alone}) == len(prompts)
    plain = mj.MossAudio.load(OWN / "a", "float32")
    assert ids_of(plain, prompts, 4) != alone  # or nothing was quantised
    spread = mj.MossAudio.load(OWN / "a", "float32", (2, 2, 2, 1), quantize="weights+cache")
    assert ids_of(spread, prompts, 4) == alone
    attention = spread.stacked_params()["language_model"]["layers"]["self_attn"]
    for name, axis in (("q_proj", -1), ("o_proj", -2)):
        values = attention[name]["kernel"].values
        assert values.sharding.shard_shape(values.shape)[axis] * 4 == values.shape[axis]
    outputs = attention["q_proj"]["kernel"].scale
    assert outputs.sharding.shard_shape(outputs.shape)[-1] * 4 == outputs.shape[-1]


def test_the_option_reaches_the_model_and_what_is_written_of_it(
    model, monkeypatch, capsys, tmp_path
):
    asked = []

    def load(*args, **kwargs):
        asked.append(inspect.signature(original).bind(*args, **kwargs).arguments.get("quantize"))
        raise mj.InputError("enough")

    original = mj.MossAudio.load
    monkeypatch.setattr(mj.MossAudio, "load", load)
    base = ["generate", "--prompt", "What?"]
    for option in ([], ["--quantize", "weights"], ["--quantize", "weights+cache"]):
        assert cli.main([*base, *option]) == 1
    audio = tmp_path / "a.wav"
    soundfile.write(audio, np.zeros(1600), 16_000)
    assert cli.main(["transcribe", "--audio", str(audio), "--quantize", "weights"]) == 1
    assert asked == [None, "weights", "weights+cache", "weights"]
    capsys.readouterr()
    assert cli.main([*base, "--quantize", "int4"]) == 2
    assert "int4" in capsys.readouterr().err
    with pytest.raises(mj.UsageError, match="'int4'; expected one of none, weights, weights"):
        original(OWN / "a", quantize="int4")
    given = argparse.Namespace(checkpoint=OWN / "a", lora=None)
    assert settings_of(model, given, Sampling()).meta()["quantize"] == "weights+cache"
