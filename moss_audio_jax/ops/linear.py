"""Matrix products with the precision their dtype promises; kernels plain or in int8."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moss_audio_jax.sharding import platform


class Int8(NamedTuple):
    """An array in int8, with the scale of each of its channels.

    It is a NamedTuple of arrays, so functions that map over parameter trees (scans, shardings,
    transfers) map over it too. Linen checks the first leaf's shape and accepts it as the kernel.

    Attributes:
      values: int8, -127 to 127. Of a kernel [..., in, out].
      scale: of a kernel float32 [..., 1, out]; of an embedding, whose rows are the channels,
        [..., 1]; of keys and values see ops.attention.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def T(self) -> Int8:
        return Int8(self.values.T, self.scale.T)


Kernel = jax.Array | Int8


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 means float32, even where the hardware defaults to bfloat16 or TF32 passes."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def matmul(
    x: jax.Array,
    kernel: Kernel,
    dtype: jnp.dtype | None = None,
    *,
    axes: int = 1,
    shape: tuple[int, ...] = (-1,),
) -> jax.Array:
    """[..., in] @ [in, out] -> [..., out] in `dtype`, by default x's.

    An int8 kernel is multiplied unscaled, because every dtype holds its integers exactly, and the
    product is scaled afterwards. The conversion can then be fused into the product, so memory is
    read as int8.

    Args:
      axes: how many of x's last axes make up `in`: 2 for heads [..., N, H].
      shape: of `out`: (N, H) for heads. The kernel is reshaped, not the activations, because a
        TPU's compiler copies activations that are reshaped beside a product
        (docs/findings/2026-11-28-modelled-train-step.md).
    """
    values = kernel.values if isinstance(kernel, Int8) else kernel
    if platform() == "cpu" and values is kernel and dtype in (None, x.dtype):
        width = math.prod(x.shape[-axes:])
        y = _product(x.reshape(-1, width), kernel.astype(x.dtype))
        return y.reshape(*x.shape[:-axes], *(shape if shape != (-1,) else y.shape[-1:]))
    y = jnp.tensordot(
        x,
        values.astype(x.dtype).reshape(*x.shape[-axes:], *shape),
        axes,
        precision=precision(x.dtype),
        preferred_element_type=dtype,
    )
    if isinstance(kernel, Int8):
        y = (y * kernel.scale[0].reshape(shape)).astype(y.dtype)
    return y


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[M, in] @ [in, out] -> [M, out].

    The derivative that JAX derives is a transposed product, for which a CPU's compiler writes a
    transposed copy of the gradient.
    """
    return jnp.dot(x, kernel, precision=precision(x.dtype))


def _product_backward(
    saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    dot = functools.partial(jax.lax.dot_general, precision=precision(x.dtype))
    return (
        dot(gradient, kernel, (((1,), (1,)), ((), ()))),
        dot(x, gradient, (((0,), (0,)), ((), ()))),
    )


_product.defvjp(lambda x, kernel: (_product(x, kernel), (x, kernel)), _product_backward)


def dense(kernel: Kernel) -> jax.Array:
    """The kernel as an array: float32 where it is int8."""
    return kernel.values * kernel.scale if isinstance(kernel, Int8) else kernel
