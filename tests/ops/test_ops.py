"""The plain operations: attention's one mask, the loss in chunks, the convolution."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moss_audio_jax.errors import UsageError
from moss_audio_jax.ops import attention as attention_module
from moss_audio_jax.ops import rotary
from moss_audio_jax.ops.activations import gelu, silu_times
from moss_audio_jax.ops.attention import attention
from moss_audio_jax.ops.conv import _convolve, conv3x3_stride2
from moss_audio_jax.ops.linear import matmul
from moss_audio_jax.ops.loss import IGNORE, cross_entropy, shift_labels
from moss_audio_jax.ops.splash import splash_attention
from moss_audio_jax.sharding import make_mesh


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def by_hand(query, key, value, allowed):
    """Softmax attention in float64, one head at a time; allowed bool [B, T, S]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros(query.shape)
    group = query.shape[2] // key.shape[2]
    for b in range(query.shape[0]):
        for n in range(query.shape[2]):
            scores = query[b, :, n] @ key[b, :, n // group].T / np.sqrt(query.shape[-1])
            scores = np.where(allowed[b], scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, :, n] = weights / weights.sum(-1, keepdims=True) @ value[b, :, n // group]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (3, 2), (4, 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_one_mask(causal, window, packed):
    query, key, value = arrays((2, 12, 4, 8), (2, 12, 2, 8), (2, 12, 2, 8))
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12])
    offset = np.arange(12)[None, :] - np.arange(12)[:, None]
    allowed = np.ones((2, 12, 12), bool)
    if causal:
        allowed &= offset <= 0
    if window:
        allowed &= (offset >= -window[0]) & (offset <= window[1])
    if packed:
        allowed &= segments[:, :, None] == segments[:, None, :]
    found = attention(
        query,
        key,
        value,
        causal=causal,
        window=window,
        segment_ids=(jnp.asarray(segments),) * 2 if packed else None,
    )
    np.testing.assert_allclose(found, by_hand(query, key, value, allowed), atol=2e-6)


def test_decoding_queries_have_slots_of_their_own():
    query, key, value = arrays((3, 1, 4, 8), (3, 10, 2, 8), (3, 10, 2, 8))
    positions = np.array([[0], [4], [9]])
    allowed = np.arange(10)[None, None, :] <= positions[:, :, None]
    found = attention(query, key, value, causal=True, query_positions=jnp.asarray(positions))
    np.testing.assert_allclose(found, by_hand(query, key, value, allowed), atol=2e-6)


def test_queries_in_blocks_change_neither_values_nor_gradients(monkeypatch):
    query, key, value = arrays((2, 32, 4, 8), (2, 32, 2, 8), (2, 32, 2, 8))
    segments = jnp.asarray(np.repeat([[1, 2, 0, 0], [1, 1, 1, 1]], 8, axis=1))

    def total(query, key, value):
        out = attention(
            query, key, value, causal=True, segment_ids=(segments, segments), window=(9, 0)
        )
        return jnp.sum(jnp.sin(out))

    at_once = jax.value_and_grad(total, (0, 1, 2))(query, key, value)
    monkeypatch.setattr(attention_module, "_MAX_SCORES", 2 * 4 * 8 * 32)
    assert attention_module._query_block(query.shape, 32) == 8
    in_blocks = jax.value_and_grad(total, (0, 1, 2))(query, key, value)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), at_once, in_blocks)


def test_causal_steps_and_branches():
    """Longer than a step, with packed segments whose branches share a beginning."""
    length = 300
    query, key, value = arrays((2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 8))
    segments = np.repeat([[1, 1, 2], [1, 1, 0]], 100, axis=1)
    branches = np.repeat([[0, 1, 2, 0, 1, 2], [0, 1, 1, 2, 3, 0]], 50, axis=1)
    allowed = np.arange(length)[None, :] <= np.arange(length)[:, None]
    allowed = allowed & (segments[:, :, None] == segments[:, None, :])
    allowed &= (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    found = attention(
        query,
        key,
        value,
        causal=True,
        segment_ids=(jnp.asarray(segments),) * 2,
        branch_ids=jnp.asarray(branches),
    )
    np.testing.assert_allclose(found, by_hand(query, key, value, allowed), atol=2e-6)


def test_bfloat16_attention_keeps_its_softmax_in_float32():
    query, key, value = arrays((1, 64, 2, 16), (1, 64, 2, 16), (1, 64, 2, 16))
    allowed = np.ones((1, 64, 64), bool)
    rounded = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    found = attention(*rounded, causal=False)
    assert found.dtype == jnp.bfloat16
    exact = by_hand(*(x.astype(jnp.float32) for x in rounded), allowed)
    assert np.abs(np.asarray(found, np.float64) - exact).max() < 0.01


def test_a_query_that_sees_nothing_is_finite_and_so_is_its_gradient():
    query, key, value = arrays((1, 4, 1, 8), (1, 4, 1, 8), (1, 4, 1, 8))
    segments = (jnp.array([[1, 1, 2, 2]]), jnp.array([[1, 1, 3, 3]]))

    def total(query):
        return jnp.sum(attention(query, key, value, causal=False, segment_ids=segments))

    assert np.isfinite(jax.grad(total)(query)).all()


def test_unknown_implementation():
    query, key, value = arrays((1, 2, 1, 8), (1, 2, 1, 8), (1, 2, 1, 8))
    with pytest.raises(UsageError, match="'flash'"):
        attention(query, key, value, causal=True, implementation="flash")


@pytest.mark.parametrize(
    ("dim", "causal", "window", "sizes"),
    [(64, True, None, (1,)), (128, False, (40, 20), (1,)), (64, True, None, (2, 1, 2, 1))],
)
def test_splash_equals_plain(dim, causal, window, sizes):
    shapes = [(2, 256, heads, dim) for heads in (4, 2, 2)]
    rows = np.sort(np.random.default_rng(1).integers(0, 4, (2, 256)), axis=1)
    segments = jnp.asarray(rows, jnp.int32)

    def grads(attend, **options):
        def loss(*qkv):
            out = attend(
                *qkv, causal=causal, window=window, segment_ids=(segments, segments), **options
            )
            return jnp.sum(out**2)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*arrays(*shapes))

    with jax.set_mesh(make_mesh(*sizes)):
        found = grads(splash_attention, interpret=True)
    expected = grads(attention, implementation="xla")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=5e-5), found, expected
    )


@pytest.mark.parametrize("sizes", [(1,), (2, 2, 2, 1)])
@pytest.mark.parametrize("of", ["branches", "window", "half"])
def test_blockwise_equals_plain(of, sizes):
    """Packed rows whose segments end within blocks and at their edges, padding behind them."""
    query, key, value = arrays((4, 512, 4, 16), (4, 512, 2, 16), (4, 512, 2, 16))
    ends = [[130, 256, 300], [512], [1, 2, 511], [128, 384, 390]]
    places = np.arange(512)
    rows = [1 + np.searchsorted(row, places, side="right") for row in ends]
    segments = jnp.asarray(np.where(np.stack(rows) > 3, 0, np.stack(rows)), jnp.int32)
    options = {"causal": of != "window", "segment_ids": (segments, segments)}
    if of == "window":
        options["window"] = (70, 20)
    if of == "branches":
        options["branch_ids"] = jnp.asarray(np.tile(places // 100 % 3, (4, 1)), jnp.int32)
    if of == "half":
        query, key, value = (x.astype(jnp.bfloat16) for x in (query, key, value))

    def grads(implementation):
        def loss(*qkv):
            out = attention(*qkv, implementation=implementation, **options)
            return jnp.sum(jnp.sin(out.astype(jnp.float32)))

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(query, key, value)

    with jax.set_mesh(make_mesh(*sizes)):
        found = grads("blockwise")
    close = {"rtol": 0.02, "atol": 0.05} if of == "half" else {"rtol": 2e-5, "atol": 2e-5}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), **close
        ),
        found,
        grads("xla"),
    )


def test_blockwise_computes_no_block_of_two_segments():
    """NaN in a segment's values reach no other segment, though zero times NaN would."""
    query, key, value = arrays((1, 512, 4, 16), (1, 512, 2, 16), (1, 512, 2, 16))
    segments = jnp.repeat(jnp.arange(1, 5), 128)[None]
    value = value.at[:, 128:256].set(jnp.nan)
    out = attention(
        query,
        key,
        value,
        causal=True,
        segment_ids=(segments, segments),
        implementation="blockwise",
    )
    there = jnp.isnan(out).all(axis=(0, 2, 3))
    np.testing.assert_array_equal(there, segments[0] == 2)
    assert not jnp.isnan(out[:, segments[0] != 2]).any()


def test_a_gated_activation_and_its_gradients():
    gate, up = arrays((3, 5), (3, 5))

    def grads(of):
        return jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(of(*a))), (0, 1))(gate, up)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        grads(silu_times),
        grads(lambda gate, up: jax.nn.silu(gate) * up),
    )


def test_splash_is_refused_what_it_cannot_do():
    query, key, value = arrays((1, 200, 4, 8), (1, 200, 2, 8), (1, 200, 2, 8))
    with pytest.raises(UsageError, match="multiple of 128"):
        attention(query, key, value, causal=True, implementation="splash")
    query, key, value = arrays((1, 256, 4, 8), (1, 256, 2, 8), (1, 256, 2, 8))
    ids = jnp.zeros((1, 256), jnp.int32)
    with pytest.raises(UsageError, match="no branches"):
        attention(query, key, value, causal=True, branch_ids=ids, implementation="splash")


def test_rotary_by_product_equals_by_halves():
    x, gradient = arrays((2, 7, 3, 8), (2, 7, 3, 8))
    places = jnp.arange(14.0).reshape(2, 7)
    cos, sin = (a[:, :, None] for a in rotary.rotary_angles(places, 8, 1e4))
    for dtype in (jnp.float32, jnp.bfloat16):
        ours, back = jax.vjp(lambda x: rotary.rotate_by_product(x, cos, sin), x.astype(dtype))
        halves, theirs = jax.vjp(lambda x: rotary.rotate_by_halves(x, cos, sin), x.astype(dtype))
        step = jnp.finfo(dtype).eps
        np.testing.assert_allclose(*(a.astype(jnp.float32) for a in (ours, halves)), atol=4 * step)
        pair = (f(gradient.astype(dtype))[0].astype(jnp.float32) for f in (back, theirs))
        np.testing.assert_allclose(*pair, atol=8 * step)


@pytest.mark.parametrize("shape", [(2, 8, 16, 1), (1, 7, 5, 3), (3, 1, 1, 2), (8, 6, 4, 2)])
@pytest.mark.parametrize("sizes", [(1,), (2, 2, 2, 1)])
def test_gradients_of_the_convolution(shape, sizes):
    """On a CPU they are our own; XLA's are the reference."""
    x, kernel = arrays(shape, (3, 3, shape[-1], 4))
    bias = jnp.ones(4)

    def grads(convolve):
        return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(convolve(*a))), (0, 1)))(x, kernel)

    theirs = grads(lambda x, kernel: _convolve(x, kernel) + bias)
    with jax.set_mesh(make_mesh(*sizes)):
        ours = grads(lambda *a: conv3x3_stride2(*a, bias))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("axes", [1, 2])
def test_gradients_of_a_product(axes):
    x, kernel, turn = arrays((2, 3, 4, 5), (20 if axes == 2 else 5, 6), (6, 6))

    def grads(product):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(product(*a)) @ turn), (0, 1))(x, kernel)

    ours = grads(lambda x, kernel: matmul(x, kernel, axes=axes, shape=(2, 3)).reshape(-1, 6))
    theirs = grads(lambda x, kernel: x.reshape(-1, len(kernel)) @ kernel)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("chunk", "sizes"), [(4, None), (7, None), (64, None), (3, (2, 2, 2, 1)), (64, (1, 4, 1, 2))]
)
def test_loss_in_chunks_equals_the_plain_one(chunk, sizes):
    mesh = make_mesh(*sizes or (1,))
    hidden, kernel = arrays((4, 10, 8), (8, 32))
    labels = np.random.default_rng(1).integers(0, 32, (4, 10))
    labels[0, :4] = labels[1, 9] = labels[2] = IGNORE
    targets = shift_labels(jnp.asarray(labels))
    assert targets[:, -1].tolist() == [IGNORE] * 4

    def chunked(hidden, kernel):
        loss, log_z = cross_entropy(hidden, kernel, targets, chunk)
        return jnp.sum(loss) + 0.1 * jnp.sum(log_z**2)

    def plain(hidden, kernel):
        logits = hidden @ kernel
        log_z = jax.nn.logsumexp(logits, -1)
        label = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
        return jnp.sum(jnp.where(targets != IGNORE, log_z - label + 0.1 * log_z**2, 0))

    with jax.set_mesh(mesh):
        head = NamedSharding(mesh, P("fsdp", "tensor"))
        rows = NamedSharding(mesh, P(("data", "fsdp"), "sequence"))
        inputs = jax.device_put(hidden, rows), jax.device_put(kernel, head)
        found = jax.jit(jax.value_and_grad(chunked, (0, 1)))(*inputs)
    expected = jax.value_and_grad(plain, (0, 1))(hidden, kernel)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), found, expected
    )


def test_the_head_is_gathered_once_and_its_gradient_reduced_once():
    mesh = make_mesh(fsdp=8)
    specs = [((8, 64, 16), P("fsdp")), ((16, 320), P("fsdp")), ((8, 64), P("fsdp"))]
    hidden, kernel, targets = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (shape, spec), dtype in zip(specs, ("bfloat16", "float32", "int32"), strict=True)
    )

    def loss(hidden, kernel, targets):
        return jnp.sum(cross_entropy(hidden, kernel, targets, 16)[0])

    with jax.set_mesh(mesh):
        out = (hidden.sharding, kernel.sharding)
        step = jax.jit(jax.grad(loss, (0, 1)), out_shardings=out)
        text = step.lower(hidden, kernel, targets).as_text()
    collectives = re.findall(r"stablehlo\.(all_gather|reduce_scatter|all_reduce)", text)
    assert sorted(collectives) == ["all_gather"] * 2 + ["all_reduce"] * 2 + ["reduce_scatter"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_and_its_gradient_by_the_error_function(dtype):
    x = jnp.linspace(-12, 12, 999).astype(dtype)
    exact = np.asarray(x, np.float64)
    below = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in exact])
    slope = below + exact * np.exp(-exact * exact / 2) / math.sqrt(2 * math.pi)
    out, backward = jax.vjp(gelu, x)
    (gradient,) = backward(jnp.full_like(x, 2))
    assert out.dtype == gradient.dtype == x.dtype
    step = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.float64(out), exact * below, rtol=step, atol=1e-6)
    np.testing.assert_allclose(np.float64(gradient), 2 * slope, rtol=step, atol=1e-6)
