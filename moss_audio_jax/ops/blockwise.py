"""Attention of packed rows on a CPU, a block at a time.

Most pairs of blocks of a packed row lie in different segments. They are skipped, forward and
backward. Scores are never stored; the backward pass computes them again (arXiv 2205.14135).

Letters: B rows, T tokens, N query heads, KV key/value heads, G = N / KV, H head size.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from moss_audio_jax.ops.linear import precision
from moss_audio_jax.sharding import ways

_BLOCK = 128
_LEAST = -1e30  # below every score, and finite: of two of them the difference is no NaN


def fits(query: jax.Array, key: jax.Array) -> bool:
    return query.shape[1] == key.shape[1] and query.shape[1] % _BLOCK == 0


def blockwise_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> jax.Array:
    """Softmax attention of [B, T, N, H] queries, softmax in float32.

    Args:
      query: [B, T, N, H].
      key, value: [B, T, KV, H].
      mask: bool [B, T, T], which query sees which key: each at least one.

    Returns:
      [B, T, N, H] in query's dtype.
    """
    batch, length, heads, dim = query.shape
    kv = key.shape[2]
    query = jnp.moveaxis(query.reshape(batch, length, kv, -1, dim), 1, 3)  # [B, KV, G, T, H]
    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)  # [B, KV, T, H]
    devices = ways((batch,), "batch")

    def turns(x: jax.Array) -> jax.Array:  # a row of each device at a time
        return jnp.swapaxes(x.reshape(devices, -1, *x.shape[1:]), 0, 1)

    rows = tuple(turns(x) for x in (query, key, value, mask))
    out = jax.lax.map(lambda row: jax.vmap(_row)(*row), rows)  # [B / D, D, KV, G, T, H]
    out = jnp.swapaxes(out, 0, 1).reshape(batch, heads, length, dim)
    return jnp.swapaxes(out, 1, 2)


@jax.custom_vjp
def _row(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """[KV, G, T, H], [KV, T, H] twice, [T, T] -> [KV, G, T, H]."""
    return _forward(query, key, value, mask)[0]


def _forward(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> tuple:
    first, end = _ranges(mask)

    def block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        here = _cut(query, i)

        def step(j: jax.Array, carry: tuple) -> tuple:
            out, most, total = carry
            scores = _scores(here, _cut(key, j), mask, i, j)
            new = jnp.maximum(most, jnp.max(scores, axis=-1, keepdims=True))
            weights, old = jnp.exp(scores - new), jnp.exp(most - new)
            out = out * old + _dot("kgqs,ksh->kgqh", weights.astype(value.dtype), _cut(value, j))
            return out, new, total * old + jnp.sum(weights, axis=-1, keepdims=True)

        start = jnp.zeros(here.shape, jnp.float32)
        none = start[..., :1]
        carry = start, none + _LEAST, none
        out, most, total = jax.lax.fori_loop(first[i], end[i], step, carry)
        return out / total, most + jnp.log(total)

    out, log_z = (_joined(x) for x in jax.lax.map(block, jnp.arange(len(first))))
    return out.astype(query.dtype), (query, key, value, mask, out, log_z)


def _backward(saved: tuple, gradient: jax.Array) -> tuple:
    query, key, value, mask, out, log_z = saved
    first, end = _ranges(mask.T)
    delta = jnp.sum(gradient.astype(jnp.float32) * out, axis=-1, keepdims=True)

    def block(of_query: jax.Array, j: jax.Array) -> tuple:
        key_j, value_j = _cut(key, j), _cut(value, j)

        def step(i: jax.Array, carry: tuple) -> tuple:
            of_query, of_key, of_value = carry
            query_i, gradient_i = _cut(query, i), _cut(gradient, i)
            weights = jnp.exp(_scores(query_i, key_j, mask, i, j) - _cut(log_z, i))
            of_value += _dot("kgqs,kgqh->ksh", weights.astype(value.dtype), gradient_i)
            of_weights = _dot("kgqh,ksh->kgqs", gradient_i, value_j)
            of_scores = weights * (of_weights - _cut(delta, i)) / math.sqrt(query.shape[-1])
            of_scores = of_scores.astype(query.dtype)
            of_key += _dot("kgqs,kgqh->ksh", of_scores, query_i)
            sum_i = _cut(of_query, i) + _dot("kgqs,ksh->kgqh", of_scores, key_j)
            of_query = jax.lax.dynamic_update_slice_in_dim(of_query, sum_i, i * _BLOCK, 2)
            return of_query, of_key, of_value

        zero = jnp.zeros(key_j.shape, jnp.float32)
        of_query, *others = jax.lax.fori_loop(first[j], end[j], step, (of_query, zero, zero))
        return of_query, tuple(others)

    of_query, others = jax.lax.scan(
        block, jnp.zeros(query.shape, jnp.float32), jnp.arange(len(first))
    )
    of_key, of_value = (_joined(x).astype(key.dtype) for x in others)
    return of_query.astype(query.dtype), of_key, of_value, None


_row.defvjp(_forward, _backward)


def _ranges(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each block of rows of a mask [T, T]: the first block of columns with a visible pair, and
    the end of the last one."""
    count = len(mask) // _BLOCK
    seen = jnp.any(mask.reshape(count, _BLOCK, count, _BLOCK), axis=(1, 3))
    return jnp.argmax(seen, axis=1), count - jnp.argmax(seen[:, ::-1], axis=1)


def _cut(x: jax.Array, block: jax.Array) -> jax.Array:
    """[..., T, H] -> [..., b, H]."""
    return jax.lax.dynamic_slice_in_dim(x, block * _BLOCK, _BLOCK, axis=x.ndim - 2)


def _joined(blocks: jax.Array) -> jax.Array:
    """[T / b, ..., b, H] -> [..., T, H]."""
    x = jnp.moveaxis(blocks, 0, -3)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _scores(query: jax.Array, key: jax.Array, mask: jax.Array, i: jax.Array, j: jax.Array):
    """float32 [KV, G, b, b]; `_LEAST` where a query does not see a key."""
    mask = jax.lax.dynamic_slice(mask, (i * _BLOCK, j * _BLOCK), (_BLOCK, _BLOCK))
    scores = _dot("kgqh,ksh->kgqs", query, key) / math.sqrt(query.shape[-1])
    return jnp.where(mask, scores, _LEAST)


def _dot(letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(
        letters, a, b, precision=precision(a.dtype), preferred_element_type=jnp.float32
    )
