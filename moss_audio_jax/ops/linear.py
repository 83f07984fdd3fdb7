"""Matrix products with the precision their dtype promises; kernels plain or in int8."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

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
    product = _on_cpu if platform() == "cpu" else _product
    y = product(x, values.astype(x.dtype).reshape(*x.shape[-axes:], *shape), axes, dtype)
    if isinstance(kernel, Int8):
        y = (y * kernel.scale[0].reshape(shape)).astype(y.dtype)
    return y


def _product(x: jax.Array, kernel: jax.Array, axes: int, dtype: jnp.dtype | None) -> jax.Array:
    exact = precision(x.dtype)
    return jnp.tensordot(x, kernel, axes, precision=exact, preferred_element_type=dtype)


# JAX's own gradient of the kernel is a transposed product, for which a CPU's compiler writes the
# gradient that comes in once more, transposed.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _on_cpu(x: jax.Array, kernel: jax.Array, axes: int, dtype: jnp.dtype | None) -> jax.Array:
    return _product(x, kernel, axes, dtype)


def _backward(axes: int, _: Any, saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple:
    x, kernel = saved
    rows = tuple(range(x.ndim - axes))
    out = tuple(range(len(rows), gradient.ndim)), tuple(range(axes, kernel.ndim))
    dot = functools.partial(
        jax.lax.dot_general, precision=precision(x.dtype), preferred_element_type=x.dtype
    )
    gradient = gradient.astype(x.dtype)
    return dot(gradient, kernel, (out, ((), ()))), dot(x, gradient, ((rows, rows), ((), ())))


_on_cpu.defvjp(lambda x, kernel, *static: (_on_cpu(x, kernel, *static), (x, kernel)), _backward)


def dense(kernel: Kernel) -> jax.Array:
    """The kernel as an array: float32 where it is int8."""
    return kernel.values * kernel.scale if isinstance(kernel, Int8) else kernel
