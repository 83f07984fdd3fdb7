"""Positions: rotary embedding (decoder) and sinusoids (encoder)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from moss_audio_jax.ops.linear import precision
from moss_audio_jax.sharding import platform


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, T, head_dim / 2], for positions [B, T] (arXiv 2104.09864)."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions[..., None].astype(jnp.float32) / theta**exponent
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns x [B, T, N, H] by `rotary_angles`, half-split: dimension i pairs with i + H/2."""
    turn = rotate_by_product if platform() == "tpu" else rotate_by_halves
    return turn(x, *(a[:, :, None, :] for a in angles))


def rotate_by_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`rotate` in two halves; cos and sin [B, T, 1, H / 2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def rotate_by_product(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`rotate` with the halves swapped by a product with a signed permutation [H, H].

    A TPU keeps a head in 128 lanes and would copy halves of it between layouts. The product is
    exact in any dtype, runs on the matrix unit, and is fused with the norm and the scaling.
    """
    half = jnp.eye(x.shape[-1] // 2, dtype=x.dtype)
    none = jnp.zeros_like(half)
    traded = jnp.einsum(
        "btnh,hk->btnk",
        x,
        jnp.block([[none, half], [-half, none]]),  # (first, second) -> (-second, first)
        precision=precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
    cos, sin = (jnp.concatenate([a, a], axis=-1) for a in (cos, sin))
    return (x.astype(jnp.float32) * cos + traded * sin).astype(x.dtype)


def sinusoids(length: int, dim: int) -> jax.Array:
    """Whisper's position table, float32 [length, dim]: half sin, half cos (arXiv 2212.04356)."""
    step = math.log(10000.0) / (dim // 2 - 1)
    rates = jnp.exp(-step * jnp.arange(dim // 2, dtype=jnp.float32))
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
