"""Matrix products with the precision their dtype promises; kernels as they are or in int8."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moss_audio_jax.sharding import gradient_axes


class Int8(NamedTuple):
    """An array in int8, with what a step is worth in each of its channels.

    A NamedTuple of arrays: what maps over parameter trees (scans, shardings, transfers) maps over
    it, and linen, which looks at the first leaf's shape, takes it for the kernel.

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
    """float32 means float32, also where the hardware would rather use bfloat16 or TF32 passes."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def matmul(
    x: jax.Array, kernel: Kernel, dtype: jnp.dtype | None = None, split: int | None = None
) -> jax.Array:
    """[..., in] @ [in, out] -> [..., out] in `dtype`, by default x's.

    Of an int8 kernel the product meets the steps themselves, which every dtype holds exactly, and
    is scaled afterwards: the conversion can take place inside the product, and memory is read as
    int8.

    `split`: the dimension of the kernel that lies split over the mesh axis `fsdp` (where it
    divides). Its gradient is then summed right into those parts: see `_gradient_in_parts`.
    """
    if split is not None and dtype is None and not isinstance(kernel, Int8):
        axes = gradient_axes(x.shape[0], kernel.shape[split])
        if axes:
            return _matmul_in_parts(x, kernel, split, axes)
    return _matmul(x, kernel, dtype)


def _matmul(x: jax.Array, kernel: Kernel, dtype: jnp.dtype | None = None) -> jax.Array:
    values = kernel.values if isinstance(kernel, Int8) else kernel
    y = jnp.matmul(
        x, values.astype(x.dtype), precision=precision(x.dtype), preferred_element_type=dtype
    )
    if isinstance(kernel, Int8):
        y = (y * kernel.scale[0]).astype(y.dtype)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul_in_parts(x: jax.Array, kernel: jax.Array, split: int, axes: tuple) -> jax.Array:
    return _matmul(x, kernel)


def _forward(x: jax.Array, kernel: jax.Array, split: int, axes: tuple) -> tuple:
    return _matmul(x, kernel), (x, kernel)


def _gradient_in_parts(split: int, axes: tuple, kept: tuple, dy: jax.Array) -> tuple:
    """The kernel's gradient by reduce-scatter over `fsdp`, in float32.

    Left to itself the partitioner sums the whole gradient on every device (all-reduce, twice the
    bytes) and then keeps a part.
    """
    x, kernel = kept

    def sum_up(x: jax.Array, dy: jax.Array) -> jax.Array:
        whole = jnp.einsum(
            "...i,...o->io", x, dy,
            precision=precision(x.dtype), preferred_element_type=jnp.float32,
        )  # fmt: skip
        part = jax.lax.psum_scatter(whole, "fsdp", scatter_dimension=split, tiled=True)
        return jax.lax.psum(part, [axis for axis in axes if axis != "fsdp"])

    gradient = jax.shard_map(
        sum_up,
        in_specs=(P(axes), P(axes)),
        out_specs=P(*("fsdp" if dimension == split else None for dimension in range(2))),
        axis_names=set(axes),
        check_vma=False,
    )(x, dy)
    return _matmul(dy, kernel.T), gradient.astype(kernel.dtype)


_matmul_in_parts.defvjp(_forward, _gradient_in_parts)


def dense(kernel: Kernel) -> jax.Array:
    """The kernel as an array: float32 where it is int8."""
    return kernel.values * kernel.scale if isinstance(kernel, Int8) else kernel
