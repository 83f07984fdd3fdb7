"""LoRA (arXiv 2106.09685) as a transform of the parameter tree; the model does not know of it.

A kernel [..., in, out] has lora_a [..., in, r] and lora_b [..., r, out] beside it, stacked like it.
While `attached` is active, a Linear that finds them adds x @ lora_a @ lora_b * alpha / r; `merge`
merges them into the kernels instead.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moss_audio_jax.errors import UsageError
from moss_audio_jax.models.blocks import Linear
from moss_audio_jax.ops.linear import matmul

# What the official fine-tuning script adapts: all seven projections of the decoder.
DECODER = r"language_model/layers/(self_attn|mlp)/(q|k|v|o|gate|up|down)_proj"
ENCODER = r"audio_encoder/layers/self_attn/(q|k|v)_proj"

Flat = dict[str, Any]  # path -> leaf


def init(key: jax.Array, params: Flat, rank: int, targets: str) -> Flat:
    """Fresh adapters (float32) for every linear kernel that matches; lora_b starts at zero.

    Args:
      params: the base parameters (or their ShapeDtypeStructs) by path.
      targets: a regular expression searched in "module/path" (without "/kernel").

    Raises:
      UsageError: nothing matches.
    """
    adapters: Flat = {}
    for path, kernel in params.items():
        module, _, leaf = path.rpartition("/")
        # Convolutions (four axes) are computed differently, and PEFT has another layout for them.
        if leaf != "kernel" or len(kernel.shape) > 3 or not re.search(targets, module):
            continue
        *stack, n_in, n_out = kernel.shape
        key, here = jax.random.split(key)
        bound = n_in**-0.5
        adapters[f"{module}/lora_a"] = jax.random.uniform(
            here, (*stack, n_in, rank), minval=-bound, maxval=bound
        )
        adapters[f"{module}/lora_b"] = jnp.zeros((*stack, rank, n_out))
    if not adapters:
        raise UsageError(f"lora.targets {targets!r} matches no linear kernel")
    return adapters


@contextlib.contextmanager
def attached(alpha: float) -> Iterator[None]:
    """Within it, every Linear adds what its adapters (if it has any) contribute."""

    def add(call: Any, args: tuple, kwargs: dict, context: Any) -> jax.Array:
        y = call(*args, **kwargs)
        module = context.module
        is_linear = isinstance(module, Linear) and context.method_name == "__call__"
        if not is_linear or not module.has_variable("params", "lora_a"):
            return y
        a, b = (module.get_variable("params", name) for name in ("lora_a", "lora_b"))
        inner = matmul(args[0], a, axes=module.axes)
        return y + matmul(inner, b, shape=y.shape[inner.ndim - 1 :]) * (alpha / a.shape[-1])

    with nn.intercept_methods(add):
        yield


def merge(params: Flat, adapters: Flat, alpha: float) -> Flat:
    """The base parameters with every adapter merged into its kernel, in the kernels' dtypes."""
    merged = {path: leaf for path, leaf in params.items() if not is_adapter(path)}
    for path, a in adapters.items():
        module, _, leaf = path.rpartition("/")
        if leaf != "lora_a":
            continue
        b, kernel = adapters[f"{module}/lora_b"], merged[f"{module}/kernel"]
        delta = jnp.einsum(
            "...ir,...ro->...io", a, b, precision="highest", preferred_element_type=jnp.float32
        )
        both = kernel.astype(jnp.float32) + delta * (alpha / a.shape[-1])
        merged[f"{module}/kernel"] = both.astype(kernel.dtype)
    return merged


def is_adapter(path: str) -> bool:
    return path.endswith(("/lora_a", "/lora_b"))
