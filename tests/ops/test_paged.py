"""Attention to keys and values in pages, against attention to the same in one piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from moss_audio_jax.config import Compute, DecoderConfig
from moss_audio_jax.models import cache as kv_cache
from moss_audio_jax.ops import paged
from moss_audio_jax.ops.attention import attention
from moss_audio_jax.sharding import as_mesh, serving_mesh

ROWS, PAGES = 4, 3  # of a table
LAST = np.array([0, 17, 30, 47])


def filled(compute, groups=1, dim=8):
    """A layer's cache whose pages hold noise, and tables in which rows share a page."""
    config = DecoderConfig(
        hidden_size=16, ffn_dim=16, layers=1, heads=4, kv_heads=2, head_dim=dim, vocab_size=8
    )
    (kv,) = kv_cache.init_cache(config, groups, 12, compute)
    rng = np.random.default_rng(0)
    each = ROWS // groups
    tables = np.stack([rng.permutation(12)[:PAGES] for _ in range(ROWS)])
    tables[1, 0] = tables[0, 0] if each > 1 else tables[1, 0]
    key, value = (
        jnp.asarray(rng.normal(size=(ROWS, PAGES * kv_cache.PAGE, 2, dim)), jnp.float32)
        for _ in range(2)
    )
    here = jnp.broadcast_to(jnp.arange(PAGES * kv_cache.PAGE), key.shape[:2])
    tables = jnp.asarray(tables)
    kv = kv_cache.write(kv, kv_cache.at_positions(tables, here), key, value)
    query = jnp.asarray(rng.normal(size=(ROWS, 3, 4, dim)), jnp.float32)
    return kv, tables, query


@pytest.mark.parametrize("quantize", ["none", "weights+cache"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_row_by_row(quantize, tokens):
    kv, tables, query = filled(Compute("float32", quantize=quantize), groups=2)
    query = query[:, :tokens]
    positions = jnp.asarray(np.minimum(LAST[:, None] + np.arange(tokens), 47))
    expected = attention(query, *kv_cache.read(kv, tables), causal=True, query_positions=positions)
    found = paged.row_by_row(tuple(kv), tables, query, positions)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_pages_that_are_not_reached_matter_to_nobody():
    kv, tables, query = filled(Compute("float32"))
    positions = jnp.asarray(LAST[:, None])
    found = paged.row_by_row(tuple(kv), tables, query[:, :1], positions)
    number = jnp.arange(PAGES) > positions // kv_cache.PAGE
    nowhere = jnp.where(number, kv_cache.NOWHERE, tables)
    again = paged.row_by_row(tuple(kv), nowhere, query[:, :1], positions)
    np.testing.assert_array_equal(found, again)


@pytest.mark.parametrize("mesh", [None, {"data": 2, "tensor": 2}])
def test_the_kernel_of_tpus(mesh):
    """As interpreted on a CPU, on one device and with rows and heads split over four."""
    groups = mesh["data"] if mesh else 1
    kv, tables, query = filled(Compute("bfloat16"), groups, dim=128)
    query, positions = query[:, :1].astype(jnp.bfloat16), jnp.asarray(LAST)
    expected = paged.row_by_row(tuple(kv), tables, query, positions[:, None])
    on = serving_mesh(as_mesh(mesh))
    with jax.set_mesh(on), pltpu.force_tpu_interpret_mode():
        found = jax.jit(paged.kernel)(kv.key, kv.value, tables, query, positions)
    scale = np.abs(np.float32(expected)).max()
    np.testing.assert_allclose(np.float32(found), np.float32(expected), atol=0.02 * scale)


def test_what_the_kernel_of_tpus_cannot_take_is_gathered():
    kv, _, query = filled(Compute("bfloat16"), dim=128)
    assert paged.fits(kv.key, query[:, :1])
    assert not paged.fits(kv.key, query)  # three tokens
    assert not paged.fits(kv.key.astype(jnp.float32), query[:, :1])
    assert not paged.fits(kv.key[..., :64], query[:, :1, :, :64])
    with jax.set_mesh(serving_mesh(as_mesh({"tensor": 4}))):
        assert not paged.fits(kv.key, query[:, :1])  # two heads of keys over four devices
    with jax.set_mesh(serving_mesh(as_mesh({"tensor": 2}))):
        assert paged.fits(kv.key, query[:, :1])
    with jax.set_mesh(serving_mesh(as_mesh({"data": 2}))):
        assert not paged.fits(kv.key, query[:, :1])  # one group
