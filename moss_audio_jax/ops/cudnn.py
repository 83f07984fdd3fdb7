"""cuDNN's fused attention, the kernel of NVIDIA GPUs, on every device's own rows and heads.

Scores never leave the chip. cuDNN applies the causal term itself and skips the blocks above the
diagonal. All other terms of what a query may see are one mask for all heads, added to the scores;
blocks that the mask empties are still computed. The backward pass adds in no fixed order, so two
runs agree only up to rounding (XLA's --xla_gpu_deterministic_ops excludes such kernels).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from moss_audio_jax.sharding import on_each_device, platform, splits_whole

FORWARD = "dot_product_attention_fwd"  # prefix of its primitives that save residuals
_ROWS = 64  # rows are multiples of it; JAX asks for even ones, but not all of those were tried
_HEAD = 128  # the largest head that every chip with the kernel takes
_CAPABILITY = 8.0  # Ampere, the first with the kernel


def present() -> bool:
    """Is the program compiled for GPUs that have the kernel?"""
    if platform() != "gpu":
        return False
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version:  # AMD's are "gpu" too
        return False
    return float(getattr(device, "compute_capability", 0)) >= _CAPABILITY


def fits(query: jax.Array, key: jax.Array) -> bool:
    """Can the kernel take these arrays on the mesh in context, heads and rows split over it?"""
    length, keys, dim = query.shape[1], key.shape[1], query.shape[3]
    half = query.dtype == key.dtype and query.dtype in (jnp.bfloat16, jnp.float16)
    sizes = length == keys and length % _ROWS == 0 and dim % 8 == 0 and dim <= _HEAD
    return half and sizes and splits_whole(query, key)


def cudnn_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool,
    mask: jax.Array | None = None,
) -> jax.Array:
    """`attention` (see there) of arrays that `fits` allows.

    Args:
      query: [B, T, N, H].
      key, value: [B, T, KV, H].
      causal: the causal term.
      mask: bool [B, T, T], all other terms of what query t may see; None: all keys.

    Returns:
      [B, T, N, H]. Masked scores are lowered by a large finite number, so a query that sees
      nothing gets the mean of all values (if causal, of those up to its own).
    """
    masks = () if mask is None else (mask,)
    return on_each_device(functools.partial(_on_device, causal=causal), query, key, value, *masks)


def _on_device(
    query: jax.Array, key: jax.Array, value: jax.Array, *masks: jax.Array, causal: bool
) -> jax.Array:
    mask = masks[0][:, None] if masks else None  # [B, 1, T, T]: one for all heads
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=causal, implementation="cudnn"
    )
