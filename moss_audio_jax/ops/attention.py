"""The one attention door: one definition of what a query may see, for every implementation.

A query sees a key if all of these hold:
  * causal:      the key's position <= the query's position
  * window:      query position - left <= key position <= query position + right
  * segment_ids: both carry the same segment (packing; padding is a segment of its own)
  * branch_ids:  the key's branch is 0 (what the branches of a segment share) or the query's own

Positions are places in the key array. The queries' positions are 0..T-1 unless `query_positions`
says otherwise (decoding into a cache).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from moss_audio_jax.errors import UsageError
from moss_audio_jax.ops import blockwise, cudnn, splash
from moss_audio_jax.ops.linear import Int8, precision
from moss_audio_jax.sharding import platform, ways

IMPLEMENTATIONS = ("auto", "xla", "splash", "cudnn", "blockwise")

# What each kernel needs, for error messages.
_NEEDS = {
    "splash": "rows of a multiple of 128 tokens that are not split over devices, no branches and "
    "no cache",
    "cudnn": "an NVIDIA GPU (A100 or newer), bfloat16, rows of a multiple of 64 tokens that are "
    "not split over devices, heads of at most 128 and no cache",
    "blockwise": "packed rows of a multiple of 128 tokens and no cache",
}

# Above this many scores on a device (256 MB) queries are processed in blocks, so that memory stays
# linear.
_MAX_SCORES = 2**26
# Causal attention runs in at most this many steps of at least this many queries.
_MAX_STEPS, _MIN_STEP = 8, 128


def attention(
    query: jax.Array,
    key: jax.Array | Int8,
    value: jax.Array | Int8,
    *,
    causal: bool,
    window: tuple[int, int] | None = None,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    branch_ids: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    most_segments: int = 0,
    implementation: str = "auto",
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads; softmax in float32.

    Args:
      query: [B, T, N, H].
      key: [B, S, KV, H]; key head j serves query heads j * N/KV .. (j + 1) * N/KV - 1. Or Int8,
        with a scale for each head of a token: [B, S, KV].
      value: [B, S, KV, H], or Int8 likewise.
      causal: see the module's docstring.
      window: (left, right) in positions, or None for no window.
      segment_ids: int (queries' [B, T], keys' [B, S]), or None for one segment.
      branch_ids: int [B, T] of queries and keys alike, or None for no branches.
      query_positions: int [B, T], or None for 0..T-1.
      most_segments: above 0, the caller promises that queries and keys have the same segments, that
        a row has at most so many of them, and that their ids never fall along it, but for 0 at its
        end. The cudnn kernel, if causal and without window and branches, then computes nothing
        between segments. Rows that break the promise become NaN.
      implementation: "xla" (plain); "splash" (TPU); "cudnn" (NVIDIA GPU); "blockwise" (CPU); or
        "auto": that of the platform if it supports the arguments and rows are long enough to gain,
        else plain.

    Returns:
      [B, T, N, H] in query's dtype. A query that sees nothing gets the mean of all values (with
      causal cudnn attention, the mean of those up to its own).

    Raises:
      UsageError: unknown implementation, or one that does not support the arguments.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UsageError(f"attention is {implementation!r}; expected one of {IMPLEMENTATIONS}")
    batch, length = query.shape[:2]
    query_segments, key_segments = segment_ids if segment_ids is not None else (None, None)
    uncached = query_positions is None and not isinstance(key, Int8)
    able = {
        "splash": uncached and branch_ids is None and splash.fits(query, key),
        "cudnn": uncached and cudnn.fits(query, key) and cudnn.present(),
        "blockwise": uncached and segment_ids is not None and blockwise.fits(query, key),
    }
    if not able.get(implementation, True):
        raise UsageError(
            f"attention {implementation!r} needs {_NEEDS[implementation]}; got {query.dtype} "
            f"{query.shape} queries on {key.shape} keys, on a {platform()}; use 'auto' or 'xla'"
        )
    if implementation == "auto" and length >= 2 * _MIN_STEP:
        kernel = {"tpu": "splash", "gpu": "cudnn", "cpu": "blockwise"}[platform()]
        implementation = kernel if able[kernel] else "xla"
    if implementation == "splash":
        return splash.splash_attention(
            query, key, value, causal=causal, window=window, segment_ids=segment_ids
        )
    if implementation == "cudnn":
        alone = causal and window is None and branch_ids is None and query_segments is not None
        if alone and most_segments and cudnn.packs(query):
            return cudnn.packed_attention(query, key, value, query_segments, most_segments)
    if implementation in ("cudnn", "blockwise"):
        positions = jnp.arange(length)
        mask = visible(
            jnp.broadcast_to(positions, (batch, length)),
            positions,
            causal=causal and implementation != "cudnn",  # which has a term of its own
            window=window,
            query_segments=query_segments,
            key_segments=key_segments,
            query_branches=branch_ids,
            key_branches=branch_ids,
        )
        if implementation == "blockwise":
            return blockwise.blockwise_attention(query, key, value, mask)
        return cudnn.cudnn_attention(query, key, value, causal=causal, mask=mask)
    staircase = causal and window is None and query_positions is None and key.shape[1] == length
    if query_positions is None:
        query_positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    queries = (query, query_positions, query_segments, branch_ids)
    keys = (key, value, key_segments, branch_ids)
    part = functools.partial(_in_blocks, causal=causal, window=window)
    if not staircase or length < 2 * _MIN_STEP:
        return part(queries, keys)
    # One step of queries at a time, with the keys up to its end: nearly half of the scores are
    # never computed.
    step = max(_MIN_STEP, -(-length // _MAX_STEPS))
    outs = []
    for start in range(0, length, step):
        end = min(start + step, length)
        here = jax.tree.map(lambda x: x[:, start:end], queries)  # noqa: B023  used at once
        outs.append(part(here, jax.tree.map(lambda x: x[:, :end], keys)))  # noqa: B023
    return jnp.concatenate(outs, axis=1)


def _in_blocks(queries: tuple, keys: tuple, causal: bool, window: tuple[int, int] | None):
    """`_plain`, in blocks of queries if all scores at once would be too many."""
    query, key = queries[0], keys[0]
    batch, length = query.shape[:2]
    plain = functools.partial(_plain, causal=causal, window=window)
    block = _query_block(query.shape, key.shape[1])
    if block == length:
        return plain(queries, keys)

    def blocks(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [T / block, B, block, ...]
        return jnp.moveaxis(x.reshape(batch, -1, block, *x.shape[2:]), 1, 0)

    # Rematerialised, because the backward pass would otherwise keep every block's scores.
    rows = jax.tree.map(blocks, queries)
    out = jax.lax.map(jax.checkpoint(lambda row: plain(row, keys)), rows)
    return jnp.moveaxis(out, 0, 1).reshape(query.shape)


def _query_block(query_shape: tuple[int, ...], keys: int) -> int:
    """The number of queries in a block: all, halved until a device's scores fit."""
    batch, block, heads, _ = query_shape
    others = batch * heads * keys // ways((batch, heads), "batch", "heads")
    while others * block > _MAX_SCORES and block % 2 == 0:
        block //= 2
    return block


def visible(
    query_positions: jax.Array,
    key_positions: jax.Array,
    *,
    causal: bool,
    window: tuple[int, int] | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    query_branches: jax.Array | None = None,
    key_branches: jax.Array | None = None,
) -> jax.Array | None:
    """bool [B, T, S]: may query t see key s? None where every query sees every key.

    `query_positions` [B, T], `key_positions` [S], segments and branches [B, T] and [B, S].
    """
    offset = key_positions[None, None, :] - query_positions[:, :, None]
    terms = []
    if causal:
        terms.append(offset <= 0)
    if window is not None:
        terms.append((offset >= -window[0]) & (offset <= window[1]))
    if query_segments is not None:
        terms.append(query_segments[:, :, None] == key_segments[:, None, :])
    if query_branches is not None:
        branches = key_branches[:, None, :]
        terms.append((branches == 0) | (branches == query_branches[:, :, None]))
    return functools.reduce(jnp.logical_and, terms) if terms else None


def _plain(queries: tuple, keys: tuple, causal: bool, window: tuple[int, int] | None) -> jax.Array:
    """Every score at once.

    Args:
      queries: query [B, T, N, H], positions, segments or None, branches or None [B, T].
      keys: key, value [B, S, KV, H] or Int8, segments or None, branches or None [B, S].
    """
    query, query_positions, query_segments, query_branches = queries
    key, value, key_segments, key_branches = keys
    key, key_scale = _unscaled(key, query.dtype)
    value, value_scale = _unscaled(value, query.dtype)
    batch, length, heads, dim = query.shape
    positions, kv = key.shape[1], key.shape[2]
    mask = visible(
        query_positions,
        jnp.arange(positions),
        causal=causal,
        window=window,
        query_segments=query_segments,
        key_segments=key_segments,
        query_branches=query_branches,
        key_branches=key_branches,
    )
    exact = precision(query.dtype)
    # The query heads of a key head are laid along the query axis: plain matrix products, and no
    # transposed scores.
    query = query.reshape(batch, length, kv, -1, dim)
    query = jnp.moveaxis(query, 1, 3).reshape(batch, kv, -1, dim)  # [B, KV, G * T, H]
    scores = jnp.einsum(
        "bkqh,bskh->bkqs", query, key, precision=exact, preferred_element_type=jnp.float32
    )
    if key_scale is not None:
        scores = scores * key_scale
    scores = scores.reshape(batch, kv, -1, length, positions) / math.sqrt(dim)
    if mask is not None:
        bias = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)
        scores = scores + bias[:, None, None]
    weights = jax.nn.softmax(scores, axis=-1)
    if value_scale is not None:
        weights = weights * value_scale[:, :, None]
    weights = weights.astype(value.dtype).reshape(batch, kv, -1, positions)
    out = jnp.einsum("bkqs,bskh->bkqh", weights, value, precision=exact)
    out = jnp.moveaxis(out.reshape(batch, kv, heads // kv, length, dim), 3, 1)
    return out.reshape(batch, length, heads, dim)


def _unscaled(x: jax.Array | Int8, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """The factor of the products, [B, S, KV, H], and the scale of each position [B, KV, 1, S].

    Scores and weights are multiplied by the scales, of which there are H times fewer than keys and
    values.
    """
    if not isinstance(x, Int8):
        return x, None
    return x.values.astype(dtype), jnp.moveaxis(x.scale, 2, 1)[:, :, None].astype(jnp.float32)
