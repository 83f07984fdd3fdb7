"""Splash attention, JAX's Pallas kernel for TPUs, on every device's own rows and heads.

Scores never leave the chip, and blocks that the mask empties are skipped. The tensors that the
backward pass needs (outputs and log-sum-exps) are named RESIDUALS, so that a remat policy can keep
them.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from moss_audio_jax.sharding import on_each_device, splits_whole

RESIDUALS = "attention_residuals"
_LANES = 128  # blocks are multiples of it
_BLOCK = 1024  # at most this many queries or keys at a time; not tuned on a chip


def fits(query: jax.Array, key: jax.Array) -> bool:
    """Can the kernel take these shapes on the mesh in context, heads and rows split over it?"""
    length, keys = query.shape[1], key.shape[1]
    return length == keys and length % _LANES == 0 and splits_whole(query, key)


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool,
    window: tuple[int, int] | None = None,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`attention` (see there) of shapes that `fits` allows.

    Args:
      interpret: run the kernel's program on any machine, slowly.
    """
    here = functools.partial(_on_device, causal=causal, window=window, interpret=interpret)
    return on_each_device(here, query, key, value, *(segment_ids or ()))


def _on_device(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *segments: jax.Array,
    causal: bool,
    window: tuple[int, int] | None,
    interpret: bool,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, length, heads, dim = query.shape
    mask = splash.FullMask((length, length))
    if window is not None:
        mask = splash.LocalMask((length, length), window, offset=0)
    if causal:
        lower = splash.CausalMask((length, length))
        mask = lower if window is None else mask & lower
    block = math.gcd(length, _BLOCK)
    # A separate kernel computes the gradients of queries. The fused one needs two products of seven
    # less, but leaves a partial gradient for each block of keys, and summing those in memory costs
    # twice what it gains (as modelled for v5e).
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes = splash.BlockSizes(
        **dict.fromkeys(names, block),
        block_kv_compute=min(block, 512),
        block_kv_dkv_compute=min(block, 512),
    )
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    # The kernel takes one row, heads first, and does not scale.
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query / math.sqrt(dim), key, value))
    ids = splash.SegmentIds(*segments) if segments else None
    out = jax.vmap(kernel, in_axes=(0, 0, 0, 0 if segments else None))(query, key, value, ids)
    return jnp.swapaxes(out, 1, 2)
