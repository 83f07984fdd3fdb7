"""The key/value cache of the decoder: an argument and a result, never hidden state."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moss_audio_jax.config import Compute, DecoderConfig
from moss_audio_jax.models.blocks import as_dtype
from moss_audio_jax.models.quantize import to_int8
from moss_audio_jax.ops.linear import Int8
from moss_audio_jax.sharding import constrain

DIMENSIONS = (None, "batch", "heads", None, None)  # of every leaf, on the mesh


class Cache(NamedTuple):
    """Keys (rotated) and values of L layers: [L, B, KV, S, H] each.

    In int8 each token's head has a scale, [L, B, KV, S], in compute's dtype; else None. Slots stand
    beside H, as the products read them: heads there, of which a device may have two, would make
    a TPU lay every layer out anew at every step.
    """

    key: jax.Array
    value: jax.Array
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None


Caches = Cache | tuple[Cache, ...]  # of all layers together, or one of each (decoder.unstack)


def init_cache(
    config: DecoderConfig, batch: int, slots: int, compute: Compute, unstacked: bool = False
) -> Caches:
    """An empty cache, in compute's dtype or, where it says so, in int8."""
    if unstacked:
        one = dataclasses.replace(config, layers=1)
        return tuple(init_cache(one, batch, slots, compute) for _ in range(config.layers))
    shape = (config.layers, batch, config.kv_heads, slots, config.head_dim)
    dtype = as_dtype(compute)
    if compute.quantize != "weights+cache":
        return pin(Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
    scale = jnp.zeros(shape[:-1], dtype)
    return pin(Cache(jnp.zeros(shape, jnp.int8), jnp.zeros(shape, jnp.int8), scale, scale))


def rows_of(cache: Caches) -> int:
    return jax.tree.leaves(cache)[0].shape[1]


def slots_of(cache: Caches) -> int:
    return jax.tree.leaves(cache)[0].shape[3]


def pin(cache: Caches) -> Caches:
    """The cache's place on the mesh: rows over `data`, heads over `tensor`."""
    return jax.tree.map(lambda x: constrain(x, *DIMENSIONS[: x.ndim]), cache)


def write_prefix(cache: Cache, layer: jax.Array, key: jax.Array, value: jax.Array) -> Cache:
    """Stores key and value [B, T, KV, H] in one layer's slots 0..T-1 (T <= S)."""

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(old, new[None], (layer, *[0] * (old.ndim - 1)))

    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    return jax.tree.map(write, cache, _stored(cache, key, value))


def write_token(
    cache: Cache, layer: jax.Array, slots: jax.Array, key: jax.Array, value: jax.Array
) -> Cache:
    """Stores one token's key and value [B, 1, KV, H] of each row in its slot; slots [B].

    A slot beyond the cache is dropped: rows that are done may run past their end.
    """
    return write_tokens(cache, layer, slots[:, None], key, value)


def write_tokens(
    cache: Cache, layer: jax.Array, slots: jax.Array, key: jax.Array, value: jax.Array
) -> Cache:
    """Stores key and value [B, T, KV, H] of some tokens of each row in their slots [B, T].

    A slot beyond the cache is dropped.
    """
    rows, heads = jnp.arange(key.shape[0]), jnp.arange(key.shape[2])
    # Each head by its number: what is written at once is [H], and says nothing of the layout.
    at = (layer, rows[:, None, None], heads[:, None], slots[:, None])
    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    return jax.tree.map(
        lambda old, new: old.at[at].set(new, mode="drop"), cache, _stored(cache, key, value)
    )


def read(
    cache: Cache, layer: jax.Array, slots: int | None = None
) -> tuple[jax.Array | Int8, jax.Array | Int8]:
    """One layer's keys and values, [B, S, KV, H] each, as `attention` takes them; of the first
    `slots` slots alone, where that is given."""

    def take(x: jax.Array) -> jax.Array:
        sizes = (1, *x.shape[1:3], slots or x.shape[3], *x.shape[4:])
        part = jax.lax.dynamic_slice(x, (layer, *[0] * (x.ndim - 1)), sizes)
        return jnp.swapaxes(part[0], 1, 2)

    key, value, key_scale, value_scale = jax.tree.map(take, cache)
    if key_scale is None:
        return key, value
    return Int8(key, key_scale), Int8(value, value_scale)


def insert_rows(cache: Caches, rows: Caches, slots: jax.Array) -> Caches:
    """Copies `rows` of T slots over the first T slots of the batch rows `slots` [b].

    A row number beyond the cache's batch is dropped.
    """

    def insert(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[:, slots, :, : new.shape[3]].set(new, mode="drop")

    return pin(jax.tree.map(insert, cache, rows))


def store_as(cache: Caches, rows: Caches) -> Caches:
    """`rows`, whose keys and values are in compute's dtype, as `cache` stores them."""
    if isinstance(cache, Cache):
        return _stored(cache, rows.key, rows.value)
    return tuple(map(store_as, cache, rows))


def take_rows(cache: Caches, rows: jax.Array, slots: int) -> Caches:
    """A cache of the batch rows `rows` [b], any of them any number of times, with `slots` slots
    (at least as many as `cache` has)."""

    def take(x: jax.Array) -> jax.Array:
        room = [(0, 0)] * x.ndim
        room[3] = (0, slots - x.shape[3])
        return jnp.pad(jnp.take(x, rows, axis=1), room)

    return pin(jax.tree.map(take, cache))


def _stored(cache: Cache, key: jax.Array, value: jax.Array) -> Cache:
    """Keys and values [..., H] as this cache stores them."""
    if cache.key_scale is None:
        return Cache(key.astype(cache.key.dtype), value.astype(cache.value.dtype))
    parts = [to_int8(x, -1, cache.key_scale.dtype) for x in (key, value)]
    (key, key_scale), (value, value_scale) = parts
    return Cache(key, value, key_scale[..., 0], value_scale[..., 0])
