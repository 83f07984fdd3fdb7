"""What DeepStack adds after the first layers, and where its gradients go."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import tiny_config

from moss_audio_jax.config import Compute
from moss_audio_jax.models import decoder
from moss_audio_jax.models.blocks import REMAT, RMSNorm
from moss_audio_jax.ops.attention import attention
from moss_audio_jax.ops.rotary import rotary_angles

B, T, K = 2, 6, 2


@pytest.fixture(scope="module")
def given():
    config = tiny_config().decoder
    assert config.layers > K
    params = decoder.init_decoder(jax.random.key(0), config)
    keys = jax.random.split(jax.random.key(1), 2)
    x = jax.random.normal(keys[0], (B, T, config.hidden_size))
    return config, params, x, jax.random.normal(keys[1], (K, B, T, config.hidden_size))


def attend(query, key, value, cache):
    return attention(query, key, value, causal=True, implementation="xla"), cache


POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))


def gates_of(size):
    """So large that the factors lie anywhere in 0 .. 2."""
    return 0.3 * jax.random.normal(jax.random.key(7), (K, size))


def one_by_one(config, params, x, injected, gates=None):
    """`decode`, layer after layer."""
    angles = rotary_angles(POSITIONS, config.head_dim, config.rope_theta)
    for index in range(config.layers):
        own = jax.tree.map(lambda p: p[index], params["layers"])  # noqa: B023  used at once
        layer = decoder.DecoderLayer(config)
        x, _ = layer.apply({"params": own}, x, angles, lambda *qkv: attend(*qkv, None))
        if index < len(injected) and gates is None:
            x = x + injected[index]
        elif index < len(injected):
            size = jnp.sqrt(jnp.mean(x**2, axis=-1) + config.norm_eps)
            score = jnp.einsum("btd,d->bt", x, gates[index], precision="highest") / size
            x = x + (1 + jnp.tanh(score))[..., None] * injected[index]
    return RMSNorm(config.norm_eps).apply({"params": params["norm"]}, x)


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "offload"])
def test_values_and_gradients_are_those_of_layers_one_by_one(given, remat):
    config, params, x, injected = given
    compute = Compute("float32", remat=remat)

    def ours(params, x, injected):
        return decoder.decode(params, config, compute, x, POSITIONS, attend, injected=injected)[0]

    def loss(run):
        return lambda *args: jnp.sum(jnp.sin(run(*args)))

    value, gradients = jax.jit(jax.value_and_grad(loss(ours), (0, 1, 2)))(params, x, injected)
    plain = jax.jit(jax.value_and_grad(loss(lambda *a: one_by_one(config, *a)), (0, 1, 2)))
    expected, theirs = plain(params, x, injected)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours_, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(ours_, other, atol=2e-4, rtol=1e-4)
    assert float(jnp.abs(gradients[2]).max(axis=(1, 2, 3)).min()) > 0


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "offload"])
def test_gates_and_their_gradients_are_those_of_layers_one_by_one(given, remat):
    config, params, x, injected = given
    compute, gates = Compute("float32", remat=remat), gates_of(config.hidden_size)

    def ours(params, x, injected, gates):
        more = {"injected": injected, "gates": gates}
        return decoder.decode(params, config, compute, x, POSITIONS, attend, **more)[0]

    def loss(run):
        return lambda *args: jnp.sum(jnp.sin(run(*args)))

    of_all, args = (0, 1, 2, 3), (params, x, injected, gates)
    value, gradients = jax.jit(jax.value_and_grad(loss(ours), of_all))(*args)
    plain = jax.jit(jax.value_and_grad(loss(lambda *a: one_by_one(config, *a)), of_all))
    expected, theirs = plain(*args)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours_, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(ours_, other, atol=2e-4, rtol=1e-4)
    assert float(jnp.abs(gradients[3]).max(axis=1).min()) > 1e-2  # of the gate of every layer


def test_gradients_of_gates_are_the_slopes(given):
    """Central differences, along random directions."""
    config, params, x, injected = given
    args = {"x": x, "injected": injected, "gates": gates_of(config.hidden_size)}

    @jax.jit
    def loss(args):
        args = dict(args)
        start = args.pop("x")
        out, _ = decoder.decode(
            params, config, Compute("float32"), start, POSITIONS, attend, **args
        )
        return jnp.sum(jnp.sin(out))

    gradients = jax.grad(loss)(args)
    for number, name in enumerate(args):
        along = jax.random.normal(jax.random.key(number), args[name].shape)
        along /= jnp.linalg.norm(along)
        step = 1e-2
        up, down = (loss(args | {name: args[name] + sign * step * along}) for sign in (1, -1))
        slope = float(jnp.vdot(gradients[name], along))
        assert (float(up) - float(down)) / (2 * step) == pytest.approx(slope, rel=0.02, abs=1e-2)


def test_gates_of_zero_change_no_bit_and_layers_unrolled_no_value(given):
    config, params, x, injected = given

    @functools.partial(jax.jit, static_argnames="apart")
    def run(params, x, injected, gates, apart=False):
        layers = decoder.unstack(params["layers"]) if apart else params["layers"]
        params = params | {"layers": layers}
        more = {"injected": injected, "gates": gates}
        return decoder.decode(params, config, Compute("float32"), x, POSITIONS, attend, **more)[0]

    gates = gates_of(config.hidden_size)
    plain, gated = run(params, x, injected, None), run(params, x, injected, gates)
    np.testing.assert_array_equal(run(params, x, injected, 0 * gates), plain)
    np.testing.assert_allclose(run(params, x, injected, gates, apart=True), gated, atol=2e-5)
    assert float(jnp.abs(gated - plain).max()) > 0.1


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_layer_keeps_or_adds_up_what_is_injected(given, remat, gated):
    config, params, x, injected = given
    compute = Compute("float32", remat=remat)
    gates = gates_of(config.hidden_size) if gated else None

    def loss(params, x, injected):
        more = {"injected": injected, "gates": gates}
        out, _ = decoder.decode(params, config, compute, x, POSITIONS, attend, **more)
        return jnp.sum(out)

    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(params, x, injected))
    assert ("tanh" in text) == gated
    of_all = ",".join(map(str, injected.shape))
    assert f"f32[{of_all}]" in text
    assert f"f32[{config.layers},{of_all}]" not in text
    # Nothing of its size is summed within the loops.
    assert not any("add_any" in line and f"f32[{of_all}]" in line for line in text.splitlines())
