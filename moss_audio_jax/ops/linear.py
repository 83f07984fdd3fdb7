"""Matrix products with the precision their dtype promises."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 means float32, also where the hardware would rather use bfloat16 or TF32 passes."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[..., in] @ [in, out] -> [..., out] in x's dtype."""
    return jnp.matmul(x, kernel.astype(x.dtype), precision=precision(x.dtype))
