"""int8 weights for generation: the decoder's projections and the head that chooses tokens.

These are nearly all that a decoding step reads. Each output channel has its own scale, its largest
weight / 127, so its error is at most half of that scale. A tied embedding is also the head: each
token's row is a channel, and the lookup reads the same int8 rows. An untied embedding stays
unchanged, because a step reads one row of it an answer. Norms, encoder and adapters stay unchanged
too; the encoder and the adapters run once a prompt.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from moss_audio_jax.config import ModelConfig
from moss_audio_jax.ops.linear import Int8
from moss_audio_jax.tree import path_name

_KERNELS = r"^(language_model/layers/(self_attn|mlp)/\w+_proj|lm_head)/kernel$"
_EMBEDDING = "language_model/embed_tokens/embedding"
# Smaller than any weight or key; avoids a division by 0 where a whole channel is 0.
_TINY = 1e-30


def quantize(params: Any, config: ModelConfig) -> Any:
    """A whole model's tree with `Int8` in place of the decoder's kernels and the head.

    Under `jax.jit` each is sharded as its kernel was; the scales like the kernel's outputs.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: quantize_leaf(path_name(path), leaf, config), params
    )


def quantize_leaf(path: str, leaf: jax.Array, config: ModelConfig) -> jax.Array | Int8:
    """What `quantize` makes of one parameter."""
    if re.match(_KERNELS, path):
        return Int8(*to_int8(leaf, -2, jnp.float32))
    if path == _EMBEDDING and config.decoder.tie_embeddings:
        return Int8(*to_int8(leaf, -1, jnp.float32))
    return leaf


def to_int8(x: jax.Array, axis: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """x as int8, and its scale along `axis` (which is kept, with size 1).

    The scale is rounded to `dtype` first, so that int8 times scale is within half a scale of x.
    """
    x = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    scale = jnp.maximum(most / 127, _TINY).astype(dtype)
    rounded = jnp.round(x / scale.astype(jnp.float32))
    return jnp.clip(rounded, -127, 127).astype(jnp.int8), scale
