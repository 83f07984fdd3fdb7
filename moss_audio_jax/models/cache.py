"""The key/value cache of the decoder: an argument and a result, never hidden state.

Keys and values lie in pages of PAGE tokens each. A table says which pages hold a prompt and its
answer, so that memory is taken as tokens come, and prompts that begin alike share pages (the idea
of PagedAttention, arXiv 2309.06180).

Whatever has a cache runs through unrolled layers, so a cache is one `LayerCache` for each layer.

Letters: G groups of devices (`data`), each with pages of its own, N pages of a group, P tokens of
a page, KV heads, H head size, R rows, of which each group has R / G, T tokens, n pages of a table.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moss_audio_jax.config import Compute, DecoderConfig
from moss_audio_jax.models.blocks import as_dtype
from moss_audio_jax.models.quantize import to_int8
from moss_audio_jax.ops import paged
from moss_audio_jax.ops.attention import attention
from moss_audio_jax.ops.linear import Int8
from moss_audio_jax.sharding import constrain, platform

PAGE = 16  # tokens
DIMENSIONS = ("batch", "heads", None, None, None)  # of every leaf, on the mesh


class LayerCache(NamedTuple):
    """Keys (rotated) and values of one layer: [G, KV, N, P, H] each.

    In int8 each token's head has a scale, [G, KV, N, P], in compute's dtype; otherwise None.
    """

    key: jax.Array
    value: jax.Array
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None


Cache = tuple[LayerCache, ...]


def init_cache(config: DecoderConfig, groups: int, pages: int, compute: Compute) -> Cache:
    """An empty cache of `pages` pages a group, in compute's dtype or, if it says so, int8."""
    shape = (groups, config.kv_heads, pages, PAGE, config.head_dim)
    stored = jnp.int8 if compute.quantize == "weights+cache" else as_dtype(compute)

    def layer() -> LayerCache:
        scales = ()
        if stored == jnp.int8:
            scales = (jnp.zeros(shape[:-1], as_dtype(compute)) for _ in range(2))
        return LayerCache(jnp.zeros(shape, stored), jnp.zeros(shape, stored), *scales)

    return pin(tuple(layer() for _ in range(config.layers)))


def pages_for(tokens: int) -> int:
    """How many pages hold so many tokens."""
    return -(-tokens // PAGE)


def groups_of(cache: Cache) -> int:
    return cache[0].key.shape[0]


def pages_of(cache: Cache) -> int:
    """The pages of one group."""
    return cache[0].key.shape[2]


def pin(cache: Cache) -> Cache:
    """The cache placed on the mesh: groups over `data`, heads over `tensor`."""
    return jax.tree.map(lambda x: constrain(x, *DIMENSIONS[: x.ndim]), cache)


def at_positions(tables: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The page and the place in it of tokens at some positions.

    Args:
      tables: int [R, n].
      positions: int [R, T]. Beyond the table, the page is one that does not exist.

    Returns:
      int [R, T] each.
    """
    number = positions // PAGE
    page = jnp.take_along_axis(tables, jnp.minimum(number, tables.shape[1] - 1), axis=1)
    return jnp.where(number < tables.shape[1], page, NOWHERE), positions % PAGE


NOWHERE = 2**30  # a page that no cache has: what is written there is dropped


# --- one layer -----------------------------------------------------------------------------------


def write(
    cache: LayerCache, place: tuple[jax.Array, jax.Array], key: jax.Array, value: jax.Array
) -> LayerCache:
    """Stores key and value [R, T, KV, H] of some tokens at their `place` (`at_positions`).

    Places on pages that do not exist are dropped.
    """
    groups, heads = cache.key.shape[:2]

    def grouped(x: jax.Array) -> jax.Array:  # [R, T, ...] -> [G, R / G * T, ...]
        return x.reshape(groups, -1, *x.shape[2:])

    page, inside = (grouped(x)[:, None] for x in place)
    # Heads are indexed one by one, so that each write is [H] and does not force a layout.
    at = (jnp.arange(groups)[:, None, None], jnp.arange(heads)[:, None], page, inside)
    key, value = (jnp.swapaxes(grouped(x), 1, 2) for x in (key, value))
    return jax.tree.map(
        lambda old, new: old.at[at].set(new, mode="drop"), cache, stored(cache, key, value)
    )


def read(cache: LayerCache, tables: jax.Array) -> tuple[jax.Array | Int8, jax.Array | Int8]:
    """Keys and values of the pages in `tables` [R, n], [R, n * P, KV, H] each, as `attention` takes
    them. Instead of a page that does not exist it reads another one."""
    groups = cache.key.shape[0]
    by_group = tables.reshape(groups, -1, tables.shape[1])

    def take(x: jax.Array) -> jax.Array:  # [G, KV, N, P, ...] -> [R, n * P, KV, ...]
        taken = jax.vmap(functools.partial(jnp.take, axis=1, mode="clip"))(x, by_group)
        taken = jnp.moveaxis(taken, 1, 4)  # [G, R / G, n, P, KV, ...]
        return taken.reshape(len(tables), -1, *taken.shape[4:])

    key, value, key_scale, value_scale = jax.tree.map(take, cache)
    if key_scale is None:
        return key, value
    return Int8(key, key_scale), Int8(value, value_scale)


def attend(
    cache: LayerCache, tables: jax.Array, query: jax.Array, positions: jax.Array
) -> jax.Array:
    """Attention of a few newest tokens to what the pages hold up to each of them, itself included.

    Args:
      tables: int [R, n].
      query: [R, T, A, H].
      positions: int [R, T].

    Returns:
      [R, T, A, H] in query's dtype.
    """
    if platform() == "cpu":
        return paged.row_by_row(tuple(cache), tables, query, positions)
    if platform() == "tpu" and paged.fits(cache.key, query):
        there = jnp.minimum(tables, cache.key.shape[2] - 1)
        # A token beyond its table belongs to an answer that has ended.
        last = jnp.minimum(positions[:, 0], tables.shape[1] * PAGE - 1)
        return paged.kernel(cache.key, cache.value, there, query, last)
    return attention(query, *read(cache, tables), causal=True, query_positions=positions)


def as_stored(
    cache: LayerCache, key: jax.Array, value: jax.Array
) -> tuple[jax.Array | Int8, jax.Array | Int8]:
    """Keys and values [R, T, KV, H] as `read` gives them back: rounded if the cache is int8."""
    if cache.key_scale is None:
        return key, value
    key, value, key_scale, value_scale = stored(cache, key, value)
    return Int8(key, key_scale), Int8(value, value_scale)


def stored(cache: LayerCache, key: jax.Array, value: jax.Array) -> LayerCache:
    """Keys and values [..., H] as this cache stores them."""
    if cache.key_scale is None:
        return LayerCache(key.astype(cache.key.dtype), value.astype(cache.value.dtype))
    parts = [to_int8(x, -1, cache.key_scale.dtype) for x in (key, value)]
    (key, key_scale), (value, value_scale) = parts
    return LayerCache(key, value, key_scale[..., 0], value_scale[..., 0])
