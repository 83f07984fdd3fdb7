"""How generation holds weights: the decoder's as int8 where that is asked for, and bits on CPUs.

int8 weights are those of the decoder's projections, its embedding and the head that chooses tokens.
Each output channel has its own scale, its largest weight / 127, so its error is at most half of
that scale. Of the embedding, and of the head that is tied to it, each token's row is a channel.
Norms, encoder and adapters stay unchanged; the encoder and the adapters run once a prompt.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from moss_audio_jax.config import Quantize
from moss_audio_jax.ops.linear import Bits, Int8, Kernel, dense, to_bits
from moss_audio_jax.sharding import alone, platform
from moss_audio_jax.tree import path_name

_KERNELS = r"^(language_model/layers/(self_attn|mlp)/\w+_proj|lm_head)/kernel$"
_EMBEDDING = "language_model/embed_tokens/embedding"
_MATRICES = r"(_proj|/fc1|/fc2|lm_head)/kernel$|/embedding$"  # read by `ops.linear` alone
# Smaller than any weight or key; avoids a division by 0 where a whole channel is 0.
_TINY = 1e-30


def held(params: Any, quantize: Quantize) -> Any:
    """A whole model's tree, its layers stacked, as generation holds it.

    Under `jax.jit` each is sharded as its kernel was; the scales like the kernel's outputs.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: held_leaf(path_name(path), leaf, quantize), params
    )


def held_leaf(path: str, leaf: jax.Array, quantize: Quantize) -> Kernel:
    """What `held` makes of one parameter, or of one layer of it."""
    if quantize != "none" and re.match(_KERNELS, path):
        return _int8(leaf, -2)
    if quantize != "none" and path == _EMBEDDING:
        return _int8(leaf, -1)
    if (
        leaf.dtype == jnp.bfloat16
        and re.search(_MATRICES, path)
        and platform() == "cpu"
        and alone()
    ):
        return to_bits(leaf)
    return leaf


def plain(params: Any) -> Any:
    """The inverse of `held`, but for what is int8."""
    bits = {"is_leaf": lambda x: isinstance(x, Bits)}
    return jax.tree.map(lambda x: dense(x) if isinstance(x, Bits) else x, params, **bits)


@functools.partial(jax.jit, static_argnums=1)
def _int8(leaf: jax.Array, axis: int) -> Int8:
    return Int8(*to_int8(leaf, axis, jnp.float32))


def to_int8(x: jax.Array, axis: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """x as int8, and its scale along `axis` (which is kept, with size 1).

    The scale is rounded to `dtype` first, so that int8 times scale is within half a scale of x.
    """
    x = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    scale = jnp.maximum(most / 127, _TINY).astype(dtype)
    rounded = jnp.round(x / scale.astype(jnp.float32))
    return jnp.clip(rounded, -127, 127).astype(jnp.int8), scale
