"""The key/value cache of the decoder: an argument and a result, never hidden state."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moss_audio_jax.config import DecoderConfig
from moss_audio_jax.sharding import constrain


class Cache(NamedTuple):
    """Keys (rotated) and values of every layer: [L, B, S, KV, H] each."""

    key: jax.Array
    value: jax.Array


def init_cache(config: DecoderConfig, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    shape = (config.layers, batch, slots, config.kv_heads, config.head_dim)
    return pin(Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))


def pin(cache: Cache) -> Cache:
    """The cache's place on the mesh: rows over `data`, heads over `tensor`."""
    return Cache(*(constrain(x, None, "batch", None, "heads", None) for x in cache))


def write_prefix(cache: Cache, layer: jax.Array, key: jax.Array, value: jax.Array) -> Cache:
    """Stores key and value [B, T, KV, H] in one layer's slots 0..T-1 (T <= S)."""
    start = (layer, 0, 0, 0, 0)
    return Cache(
        jax.lax.dynamic_update_slice(cache.key, key[None].astype(cache.key.dtype), start),
        jax.lax.dynamic_update_slice(cache.value, value[None].astype(cache.value.dtype), start),
    )


def write_token(
    cache: Cache, layer: jax.Array, slots: jax.Array, key: jax.Array, value: jax.Array
) -> Cache:
    """Stores one token's key and value [B, 1, KV, H] of each row in its slot; slots [B].

    A slot beyond the cache is dropped: rows that are done may run past their end.
    """
    at = (layer, jnp.arange(slots.shape[0]), slots)
    return Cache(
        cache.key.at[at].set(key[:, 0].astype(cache.key.dtype), mode="drop"),
        cache.value.at[at].set(value[:, 0].astype(cache.value.dtype), mode="drop"),
    )


def read(cache: Cache, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One layer's keys and values, [B, S, KV, H] each."""
    return (
        jax.lax.dynamic_index_in_dim(cache.key, layer, keepdims=False),
        jax.lax.dynamic_index_in_dim(cache.value, layer, keepdims=False),
    )


def insert_rows(cache: Cache, rows: Cache, slots: jax.Array) -> Cache:
    """Copies `rows` [L, b, T, KV, H] over the first T slots of the batch rows `slots` [b].

    A row number beyond the cache's batch is dropped.
    """
    length = rows.key.shape[2]
    return pin(
        Cache(
            cache.key.at[:, slots, :length].set(rows.key, mode="drop"),
            cache.value.at[:, slots, :length].set(rows.value, mode="drop"),
        )
    )
