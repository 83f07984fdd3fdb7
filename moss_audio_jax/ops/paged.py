"""Attention of the newest tokens to keys and values that lie in pages (`models.cache`).

Letters: G groups of devices, KV key/value heads, N pages of a group, P tokens of a page, R rows,
T tokens, A query heads, H head size, n pages of a table, S = n * P.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from moss_audio_jax.sharding import ACTIVATIONS, alone, fit, ways

_LANES = 128  # of a TPU
_BLOCK = 512  # tokens of keys that the TPU's kernel reads at a time; not tuned on a chip


def row_by_row(
    pages: tuple[jax.Array | None, ...],
    tables: jax.Array,
    query: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """For CPUs and few tokens: one row of each group at a time.

    Its keys and values then stay in a core's own caches, and for so few queries multiplying and
    summing is faster than a matrix product.

    Args:
      pages: key, value [G, KV, N, P, H] and, of int8, their scales [G, KV, N, P], else None.
      tables: int [R, n].
      query: [R, T, A, H].
      positions: int [R, T]; a token sees all keys up to its own.

    Returns:
      [R, T, A, H] in query's dtype.
    """
    groups = pages[0].shape[0]

    def turns(x: jax.Array) -> jax.Array:  # [R, ...] -> [R / G, G, ...]
        return jnp.swapaxes(x.reshape(groups, -1, *x.shape[1:]), 0, 1)

    rows = tuple(map(turns, (tables, query, positions)))
    # With a dimension of 1 in front, XLA sums much more slowly for several tokens.
    out = jax.lax.map(
        lambda row: (_row_alone if groups == 1 else jax.vmap(_row))(pages, *row), rows
    )
    return jnp.swapaxes(out, 0, 1).reshape(query.shape)


def _row_alone(pages: tuple[jax.Array | None, ...], *row: jax.Array) -> jax.Array:
    """`_row` of the only group, whose dimension stays."""
    of_group = tuple(None if x is None else x[0] for x in pages)
    return _row(of_group, *(x[0] for x in row))[None]


def _row(
    pages: tuple[jax.Array | None, ...], table: jax.Array, query: jax.Array, positions: jax.Array
) -> jax.Array:
    """A row of one group: pages [KV, N, P, ...], table [n], query [T, A, H], positions [T]."""
    (tokens, heads, dim), dtype = query.shape, query.dtype

    def take(x: jax.Array) -> jax.Array:  # [KV, N, P, ...] -> float32 [KV, S, ...]
        taken = jnp.take(x, table, axis=1, mode="clip")
        return taken.reshape(x.shape[0], -1, *x.shape[3:]).astype(jnp.float32)

    key, value, key_scale, value_scale = (None if x is None else take(x) for x in pages)
    query = query.reshape(tokens, key.shape[0], -1, dim).astype(jnp.float32)
    query = jnp.moveaxis(query, 0, 2)[:, :, :, None]  # [KV, A / KV, T, 1, H]
    scores = jnp.sum(query * key[:, None, None], axis=-1) / math.sqrt(dim)
    if key_scale is not None:
        scores = scores * key_scale[:, None, None]
    seen = jnp.arange(key.shape[1]) <= positions[:, None]  # [T, S]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    if value_scale is not None:
        weights = weights * value_scale[:, None, None]
    out = jnp.sum(weights[..., None] * value[:, None, None], axis=3)  # [KV, A / KV, T, H]
    return jnp.moveaxis(out, 2, 0).reshape(tokens, heads, dim).astype(dtype)


def fits(key: jax.Array, query: jax.Array) -> bool:
    """Can the TPU's kernel take these pages [G, KV, N, P, H] and queries [R, T, A, H], rows and
    heads split over the mesh in context?"""
    able = query.shape[1] == 1 and query.shape[3] % _LANES == 0 and key.dtype == jnp.bfloat16
    groups, heads = ways(query.shape, "batch"), ways(query.shape[2:], "heads")
    return able and key.shape[0] == groups and ways(key.shape[1:], "heads") == heads


def kernel(
    key: jax.Array,
    value: jax.Array,
    tables: jax.Array,
    query: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """JAX's Pallas kernel for TPUs, on every device's own rows and heads: it reads the pages where
    they lie, and of each row no more than it has.

    Args:
      key, value: [G, KV, N, P, H], as `fits` allows; on a device there is one group.
      tables: int [R, n]; every entry is a page that exists.
      query: [R, 1, A, H].
      positions: int [R], of the tokens.
    """
    if alone():
        return _on_device(key, value, tables, query, positions)
    mesh = jax.sharding.get_abstract_mesh()
    rows, heads = ACTIVATIONS["batch"], ACTIVATIONS["heads"]
    pages = fit(key.shape, (rows, heads), mesh)
    ours = fit(query.shape, (rows, (), heads), mesh)
    of_rows = fit(tables.shape, (rows,), mesh)
    return jax.shard_map(
        _on_device,
        in_specs=(pages, pages, of_rows, ours, of_rows),
        out_specs=ours,
        check_vma=False,  # kernels do not say along which axes they vary
    )(key, value, tables, query, positions)


def _on_device(
    key: jax.Array, value: jax.Array, tables: jax.Array, query: jax.Array, positions: jax.Array
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    dim, page = query.shape[-1], key.shape[3]
    attend = functools.partial(
        paged_attention, pages_per_compute_block=math.gcd(tables.shape[1], _BLOCK // page)
    )
    # The kernel does not divide by the root of H.
    scaled = (query[:, 0] / math.sqrt(dim)).astype(query.dtype)
    lengths = positions.astype(jnp.int32) + 1
    out = attend(scaled, key[0], value[0], lengths, tables.astype(jnp.int32))
    return out[:, None].astype(query.dtype)
