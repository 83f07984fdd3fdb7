"""The key/value cache of the decoder: an argument and a result, never hidden state.

Whatever has a cache runs through unrolled layers, so a cache is one `Cache` for each layer.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moss_audio_jax.config import Compute, DecoderConfig
from moss_audio_jax.models.blocks import as_dtype
from moss_audio_jax.models.quantize import to_int8
from moss_audio_jax.ops.linear import Int8
from moss_audio_jax.sharding import constrain

DIMENSIONS = ("batch", "heads", None, None)  # of every leaf, on the mesh


class LayerCache(NamedTuple):
    """Keys (rotated) and values of one layer: [B, KV, S, H] each, S tokens of each of B slots.

    In int8 each token's head has a scale, [B, KV, S], in compute's dtype; otherwise None. The token
    axis is next to H, the order in which the products read it. With the head axis there, of which
    a device may have two, a TPU would transpose every layer at every step.
    """

    key: jax.Array
    value: jax.Array
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None


Cache = tuple[LayerCache, ...]


def init_cache(config: DecoderConfig, batch: int, length: int, compute: Compute) -> Cache:
    """An empty cache for `length` tokens a slot, in compute's dtype or, if it says so, int8."""
    shape = (batch, config.kv_heads, length, config.head_dim)
    stored = jnp.int8 if compute.quantize == "weights+cache" else as_dtype(compute)

    def layer() -> LayerCache:
        scales = ()
        if stored == jnp.int8:
            scales = (jnp.zeros(shape[:-1], as_dtype(compute)) for _ in range(2))
        return LayerCache(jnp.zeros(shape, stored), jnp.zeros(shape, stored), *scales)

    return pin(tuple(layer() for _ in range(config.layers)))


def slots_of(cache: Cache) -> int:
    return cache[0].key.shape[0]


def length_of(cache: Cache) -> int:
    return cache[0].key.shape[2]


def pin(cache: Cache) -> Cache:
    """The cache placed on the mesh: slots over `data`, heads over `tensor`."""
    return jax.tree.map(lambda x: constrain(x, *DIMENSIONS[: x.ndim]), cache)


# --- one layer -----------------------------------------------------------------------------------


def write_prefix(cache: LayerCache, key: jax.Array, value: jax.Array) -> LayerCache:
    """Stores key and value [B, T, KV, H] at positions 0..T-1 (T <= S)."""

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(old, new, [0] * old.ndim)

    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    return jax.tree.map(write, cache, _stored(cache, key, value))


def write(cache: LayerCache, positions: jax.Array, key: jax.Array, value: jax.Array) -> LayerCache:
    """Stores key and value [B, T, KV, H] of some tokens of each slot at their positions [B, T].

    Positions beyond the cache are dropped, because finished answers may run past their end.
    """
    slots, heads = jnp.arange(key.shape[0]), jnp.arange(key.shape[2])
    # Heads are indexed one by one, so that each write is [H] and does not force a layout.
    at = (slots[:, None, None], heads[:, None], positions[:, None])
    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    return jax.tree.map(
        lambda old, new: old.at[at].set(new, mode="drop"), cache, _stored(cache, key, value)
    )


def read(cache: LayerCache, length: int | None = None) -> tuple[jax.Array | Int8, jax.Array | Int8]:
    """Keys and values, [B, S, KV, H] each, as `attention` takes them; only the first `length`
    positions if that is given."""
    first = jax.tree.map(lambda x: jnp.swapaxes(x[:, :, :length], 1, 2), cache)
    key, value, key_scale, value_scale = first
    if key_scale is None:
        return key, value
    return Int8(key, key_scale), Int8(value, value_scale)


# --- slots ---------------------------------------------------------------------------------------


def insert_slots(cache: Cache, new: Cache, at: jax.Array) -> Cache:
    """Copies `new`, T tokens each, over the first T positions of the slots `at` [b].

    A number beyond the cache's slots is dropped.
    """

    def insert(old: jax.Array, one: jax.Array) -> jax.Array:
        return old.at[at, :, : one.shape[2]].set(one, mode="drop")

    return pin(jax.tree.map(insert, cache, new))


def store_as(cache: Cache, new: Cache) -> Cache:
    """`new`, whose keys and values are in compute's dtype, as `cache` stores them."""
    return tuple(_stored(old, one.key, one.value) for old, one in zip(cache, new, strict=True))


def take_slots(cache: Cache, slots: jax.Array, length: int) -> Cache:
    """A cache of the slots `slots` [b], which may repeat, with room for `length` tokens (at
    least as many as `cache` has)."""

    def take(x: jax.Array) -> jax.Array:
        room = [(0, 0)] * x.ndim
        room[2] = (0, length - x.shape[2])
        return jnp.pad(jnp.take(x, slots, axis=0), room)

    return pin(jax.tree.map(take, cache))


def _stored(cache: LayerCache, key: jax.Array, value: jax.Array) -> LayerCache:
    """Keys and values [..., H] as this cache stores them."""
    if cache.key_scale is None:
        return LayerCache(key.astype(cache.key.dtype), value.astype(cache.value.dtype))
    parts = [to_int8(x, -1, cache.key_scale.dtype) for x in (key, value)]
    (key, key_scale), (value, value_scale) = parts
    return LayerCache(key, value, key_scale[..., 0], value_scale[..., 0])
