"""cuDNN's attention: when it is used, and with which arguments. The kernel itself is not run.

XLA's own implementation replaces it behind the same function of JAX.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_audio_jax.config import Compute
from moss_audio_jax.errors import UsageError
from moss_audio_jax.models.blocks import rematerialised
from moss_audio_jax.ops import attention as attention_module
from moss_audio_jax.ops import cudnn
from moss_audio_jax.ops.attention import attention
from moss_audio_jax.ops.cudnn import fused, segment_offsets
from moss_audio_jax.ops.linear import Int8
from moss_audio_jax.sharding import make_mesh


def qkv(length=256, heads=4, kv=2, dim=16, dtype=jnp.float32, rows=2):
    rng = np.random.default_rng(0)
    shapes = [(rows, length, n, dim) for n in (heads, kv, kv)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def sorted_ids(groups, length=256, rows=2, seed=1):
    ids = np.random.default_rng(seed).integers(0, groups, (rows, length))
    return jnp.asarray(np.sort(ids, axis=1), jnp.int32)


@pytest.fixture
def gpu(monkeypatch):
    """A machine that reports that it has the kernel."""
    monkeypatch.setattr(attention_module, "platform", lambda: "gpu")
    monkeypatch.setattr(cudnn, "present", lambda capability=8.0: capability <= 9.0)


@pytest.fixture
def calls(monkeypatch):
    """The arguments of the kernel's calls; XLA computes them."""
    real, found = jax.nn.dot_product_attention, []

    def stand_in(*args, implementation, **options):
        assert implementation == "cudnn"
        found.append(options)
        return real(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    return found


@pytest.mark.parametrize(
    ("causal", "window", "packed", "branched", "sizes"),
    [
        (True, None, False, False, (1,)),
        (True, None, True, False, (1,)),
        (True, None, True, True, (1,)),
        (False, (40, 20), True, False, (1,)),
        (True, (30, 0), False, False, (1,)),
        (False, None, False, False, (1,)),
        (True, None, True, True, (2, 1, 2, 1)),
    ],
)
def test_what_it_is_handed_equals_plain(
    gpu, calls, monkeypatch, causal, window, packed, branched, sizes
):
    monkeypatch.setattr(cudnn, "fits", lambda *_: True)  # float32, to compare to rounding
    segments, branches = sorted_ids(4), sorted_ids(3, seed=2)

    def grads(implementation):
        def loss(*arrays):
            out = attention(
                *arrays,
                causal=causal,
                window=window,
                implementation=implementation,
                segment_ids=(segments, segments) if packed else None,
                branch_ids=branches if branched else None,
            )
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*qkv())

    with jax.set_mesh(make_mesh(*sizes)):
        found = grads("cudnn")
    assert len(calls) >= 1
    assert calls[0]["is_causal"] == causal
    assert (calls[0]["mask"] is None) == (window is None and not packed and not branched)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=5e-5), found, grads("xla")
    )


def test_a_query_that_sees_nothing_is_finite_and_so_is_its_gradient(gpu, calls):
    arrays = qkv(dtype=jnp.bfloat16)
    segments = sorted_ids(3)
    nobodys = segments.at[:, -9:].set(7)

    def total(*arrays):
        out = attention(
            *arrays, causal=True, segment_ids=(nobodys, segments), implementation="cudnn"
        )
        return jnp.sum(out.astype(jnp.float32))

    found = jax.value_and_grad(total, (0, 1, 2))(*arrays)
    assert calls
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))


def test_auto_takes_it_on_a_gpu_where_it_can(gpu, calls):
    def taken(arrays, **options):
        before = len(calls)
        attention(*arrays, causal=True, **options)
        return len(calls) > before

    half = qkv(dtype=jnp.bfloat16)
    positions = jnp.broadcast_to(jnp.arange(256), (2, 256))
    assert taken(half)
    assert taken(half, branch_ids=sorted_ids(3), segment_ids=(sorted_ids(2),) * 2)
    assert not taken(half, implementation="xla")
    assert not taken(qkv())  # float32
    assert not taken(qkv(192, dtype=jnp.bfloat16))  # too short to gain
    assert not taken(qkv(288, dtype=jnp.bfloat16))
    assert not taken(half, query_positions=positions)
    steps = Int8(jnp.ones(half[1].shape, jnp.int8), jnp.ones(half[1].shape[:3], jnp.bfloat16))
    assert not taken([half[0], steps, steps])


def test_auto_stays_plain_on_a_cpu(calls):
    attention(*qkv(dtype=jnp.bfloat16), causal=True)
    assert not calls


def test_it_is_refused_what_it_cannot_do(gpu, monkeypatch):
    half = qkv(dtype=jnp.bfloat16)
    positions = jnp.broadcast_to(jnp.arange(256), (2, 256))
    for arrays, options in (
        (qkv(), {}),
        (qkv(200, dtype=jnp.bfloat16), {}),
        (qkv(dim=136, dtype=jnp.bfloat16), {}),
        (half, {"query_positions": positions}),
        ([half[0][:, :128], *half[1:]], {}),
    ):
        with pytest.raises(UsageError, match="bfloat16, rows of a multiple of 64"):
            attention(*arrays, causal=True, implementation="cudnn", **options)
    with (
        jax.set_mesh(make_mesh(sequence=2)),
        pytest.raises(UsageError, match="not split over devices"),
    ):
        attention(*half, causal=True, implementation="cudnn")
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"an NVIDIA GPU .* on a cpu"):
        attention(*half, causal=True, implementation="cudnn")


def kernels_for_cuda(loss, sizes):
    """cuDNN's calls, forward and backward, in the program for a GPU."""
    arrays = qkv(heads=8, dim=128, dtype=jnp.bfloat16)
    with jax.set_mesh(make_mesh(*sizes)):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = [line for line in text.splitlines() if "@__cudnn$" in line]
    assert len(kernels) == 2
    return kernels


@pytest.mark.parametrize("sizes", [(1,), (2, 1, 2, 1)])
def test_a_program_for_cuda_holds_the_kernel(gpu, monkeypatch, sizes):
    """As lowered for a GPU: the causal term as cuDNN's own, the rest as its bias, both passes."""
    # Which cuDNN there is decides on sizes that are not asked for here.
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    segments = sorted_ids(3)

    def loss(*arrays):
        out = attention(*arrays, causal=True, segment_ids=(segments, segments))
        return jnp.sum(out.astype(jnp.float32))

    kernels = kernels_for_cuda(loss, sizes)
    assert "fmhaScaleBiasSoftmax(" in kernels[0]
    assert "fmhaScaleBiasSoftmaxBackward(" in kernels[1]
    rows, heads = (1, 4) if len(sizes) > 1 else (2, 8)  # of a device
    for line in kernels:
        assert r"mask_type\22: \22CAUSAL\22" in line
        assert f"tensor<{rows}x256x{heads}x128xbf16>" in line
        assert f"tensor<{rows}x1x256x256xbf16>" in line


# --- the packed layout ---------------------------------------------------------------------------


def rows_of(*lengths, length=256):
    """Segment ids of rows: 1, 2, ... of so many tokens each, then padding."""
    ids = np.zeros((len(lengths), length), np.int32)
    for row, sizes in zip(ids, lengths, strict=True):
        row[: sum(sizes)] = np.repeat(1 + np.arange(len(sizes)), sizes)
    return jnp.asarray(ids)


PACKED = rows_of([100, 1, 56], [64, 64, 64, 64])  # four segments each, with padding and without


def test_offsets_of_segments():
    ids = rows_of([3, 1], [8], [], [2, 2, 2, 2], length=8)
    offsets, lengths, valid = segment_offsets(ids, 4)
    assert offsets.tolist() == [
        [0, 3, 4, -1, -1],
        [0, -1, -1, -1, -1],
        [0, -1, -1, -1, -1],
        [0, 2, 4, 6, -1],
    ]
    assert lengths.tolist() == [[3, 1, 4, -1], [8, -1, -1, -1], [8, -1, -1, -1], [2, 2, 2, 2]]
    assert valid.all()


def test_rows_that_break_the_promise_are_known():
    ids = jnp.array([[1, 2, 3, 0], [1, 2, 1, 1], [1, 0, 1, 1], [2, 2, 3, 3], [0, 0, 0, 0]])
    assert segment_offsets(ids, 3)[2].tolist() == [False, False, False, True, True]
    assert segment_offsets(ids, 4)[2].tolist() == [True, False, False, True, True]


@pytest.fixture
def packed_calls(monkeypatch):
    """What the packed kernel was asked for. The stand-in goes by offsets and lengths alone; what
    they leave out is NaN, as memory that no kernel writes may be."""
    found = []

    def stand_in(query, key, value, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, **options):
        assert kv_seqlen is q_seqlen
        assert kv_offsets is q_offsets
        assert options["mask_type"] is fused.MaskType.PADDING_CAUSAL
        found.append((query, key, q_offsets, q_seqlen))
        places = jnp.arange(query.shape[1])
        begins = jnp.where(q_offsets[:, :-1] < 0, 2**30, q_offsets[:, :-1])[..., None]
        inside = (begins <= places) & (places < begins + q_seqlen[..., None])  # [B, M, T]
        mask = jnp.einsum("bmq,bmk->bqk", inside, inside) & (places[:, None] >= places)
        scores = jnp.einsum("bqnh,bknh->bnqk", query, key) * options["scale"]
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
        out = jnp.einsum("bnqk,bknh->bqnh", weights, value)
        return jnp.where(inside.any(1)[..., None, None], out, jnp.nan)

    monkeypatch.setattr(fused, "dot_product_attention", stand_in)
    return found


@pytest.mark.parametrize("sizes", [(1,), (2, 1, 2, 1)])
@pytest.mark.parametrize("most", [4, 7])
def test_the_packed_layout_equals_plain(gpu, packed_calls, monkeypatch, most, sizes):
    monkeypatch.setattr(cudnn, "fits", lambda *_: True)  # float32, to compare to rounding

    def grads(implementation):
        def loss(*arrays):
            out = attention(
                *arrays,
                causal=True,
                implementation=implementation,
                segment_ids=(PACKED, PACKED),
                most_segments=most,
            )
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*qkv())

    with jax.set_mesh(make_mesh(*sizes)):
        found = grads("cudnn")
    assert len(packed_calls) == 1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=5e-5), found, grads("xla")
    )


def test_a_row_that_breaks_the_promise_is_nan_and_no_other(gpu, packed_calls):
    half = qkv(dtype=jnp.bfloat16)
    out = attention(*half, causal=True, segment_ids=(PACKED, PACKED), most_segments=3)
    assert bool(jnp.isnan(out).all())
    ids = PACKED.at[1, 64:].set(2)
    out = attention(*half, causal=True, segment_ids=(ids, ids), most_segments=3)
    assert bool(jnp.isnan(out[0]).all())
    assert bool(jnp.isfinite(out[1]).all())


def test_the_packed_layout_is_taken_where_it_can(gpu, calls, packed_calls, monkeypatch):
    half = qkv(dtype=jnp.bfloat16)

    def packed(causal=True, most_segments=4, segment_ids=(PACKED, PACKED), **options):
        before = len(calls), len(packed_calls)
        given = options | {"segment_ids": segment_ids, "most_segments": most_segments}
        attention(*half, causal=causal, **given)
        taken = len(packed_calls) - before[1]
        assert taken + len(calls) - before[0] == 1  # one of both
        return bool(taken)

    assert packed()
    assert packed(implementation="cudnn")
    assert not packed(most_segments=0)
    assert not packed(causal=False)
    assert not packed(window=(64, 0))
    assert not packed(branch_ids=sorted_ids(3))
    assert not packed(segment_ids=None)
    monkeypatch.setattr(cudnn, "present", lambda capability=8.0: capability <= 8.0)  # an A100
    assert not packed()


@pytest.mark.parametrize("sizes", [(1,), (2, 1, 2, 1)])
def test_a_program_for_cuda_holds_the_packed_kernel(gpu, monkeypatch, sizes):
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)

    def loss(*arrays):
        out = attention(*arrays, causal=True, segment_ids=(PACKED, PACKED), most_segments=5)
        return jnp.sum(out.astype(jnp.float32))

    kernels = kernels_for_cuda(loss, sizes)
    assert "fmhaSoftmax(" in kernels[0]
    assert "fmhaSoftmaxBackward(" in kernels[1]
    rows, heads = (1, 4) if len(sizes) > 1 else (2, 8)  # of a device
    for line in kernels:
        assert r"mask_type\22: \22PADDING_CAUSAL\22" in line
        assert r"max_seg_per_batch\22: 5" in line
        # Queries, and keys for each of their heads; sums of the softmax; lengths; offsets.
        assert line.count(f"tensor<{rows}x256x{heads}x128xbf16>") >= 3
        assert f"tensor<{rows * 5}x{heads}x256xf32>" in line
        assert line.count(f"tensor<{rows}x5xi32>") == 2
        assert line.count(f"tensor<{rows}x6xi32>") == 2
        assert "256x256x" not in line  # no mask


@pytest.mark.parametrize(("remat", "runs"), [("full", 2), ("attention", 1), ("projections", 1)])
def test_remat_policies_that_keep_residuals_run_it_once(gpu, monkeypatch, remat, runs):
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)

    def layer(x, _):
        return x + attention(x, x, x, causal=True), None

    def loss(x):
        body = rematerialised(layer, Compute(remat=remat))
        return jnp.sum(jax.lax.scan(body, x, None, length=3)[0].astype(jnp.float32))

    x = qkv(heads=2, dim=128, dtype=jnp.bfloat16)[0]
    with jax.set_mesh(make_mesh(1)):
        text = jax.jit(jax.grad(loss)).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == runs
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
