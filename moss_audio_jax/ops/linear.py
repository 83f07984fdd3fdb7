"""Matrix products with the precision their dtype promises; kernels as they are or in int8.

A CPU multiplies in float32 alone. Its compiler turns a bfloat16 or int8 kernel into float32 as a
whole, moves that out of the loop over tokens, and then holds every layer's copy at once: a 4B in
bfloat16 takes 17 GB more. So on one CPU such kernels are multiplied a block at a time (`_blocked`):
only a block is ever there in float32, and memory is read as it is stored.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moss_audio_jax.sharding import platform

_BLOCK_BYTES = 8 << 20  # of a block in float32: it stays in a core's cache


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
    def dtype(self) -> jnp.dtype:
        return self.values.dtype

    @property
    def T(self) -> Int8:
        return Int8(self.values.T, self.scale.T)


class Bits(NamedTuple):
    """A bfloat16 array as its bits, for a CPU, whose compiler turns bfloat16 into float32 wherever
    it meets it; integers it leaves alone. `values` is uint16 of the array's shape."""

    values: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.bfloat16)


Kernel = jax.Array | Int8 | Bits


def as_bits(array: jax.Array) -> Bits:
    """bfloat16 -> its bits."""
    return Bits(jax.lax.bitcast_convert_type(array, jnp.uint16))


def take(table: Kernel, rows: jax.Array) -> jax.Array:
    """Rows of an embedding [V, D], of any form: [..., D], float32 where it is int8."""
    picked = jax.tree.map(lambda x: jnp.take(x, rows, axis=0), table)
    return _floats(picked.values) if isinstance(picked, Bits) else dense(picked)


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
    if isinstance(kernel, (Int8, Bits)) and on_one_cpu():
        x = x.reshape(*x.shape[: x.ndim - axes], -1)
        y = _blocked(x, kernel.values)
        if isinstance(kernel, Int8):
            y = y * kernel.scale[0]
        return y.astype(dtype or x.dtype).reshape(*x.shape[:-1], *_known(shape, y.shape[-1]))
    values = kernel.values if isinstance(kernel, Int8) else dense(kernel)
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


def dense(kernel: Kernel) -> jax.Array:
    """The kernel as an array: float32 where it is int8."""
    if isinstance(kernel, Bits):
        return jax.lax.bitcast_convert_type(kernel.values, jnp.bfloat16)
    return kernel.values * kernel.scale if isinstance(kernel, Int8) else kernel


def on_one_cpu() -> bool:
    """A block of a kernel that is split over devices would be fetched from one of them."""
    mesh = jax.sharding.get_abstract_mesh()
    return platform() == "cpu" and (mesh.empty or mesh.size == 1)


def _blocked(x: jax.Array, values: jax.Array) -> jax.Array:
    """x [..., in] @ values [in, out], int8 or the bits of bfloat16, in float32."""
    n_in, n_out = values.shape
    rows = x.reshape(-1, n_in).astype(jnp.float32)
    # The same blocks for any number of rows: sums are added up in one order in every batch.
    block = _divisor(n_in, max(_BLOCK_BYTES // (4 * n_out), 1))
    values = values.reshape(-1, block, n_out)
    rows = jnp.moveaxis(rows.reshape(len(rows), -1, block), 1, 0)

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_index_in_dim(values, index, keepdims=False)
        row = jax.lax.dynamic_index_in_dim(rows, index, keepdims=False)
        return total + jnp.matmul(row, _floats(part), precision=precision(jnp.float32))

    total = jnp.zeros((rows.shape[1], n_out), jnp.float32)
    total = jax.lax.fori_loop(0, len(values), add, total)
    return total.reshape(*x.shape[:-1], n_out)


def _floats(values: jax.Array) -> jax.Array:
    """float32 of int8, or of bfloat16's bits: the upper half of a float32's."""
    if values.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.uint32) << 16, jnp.float32)
    return values.astype(jnp.float32)


def _divisor(number: int, most: int) -> int:
    """The largest divisor that is at most `most`."""
    return max(d for d in range(1, min(most, number) + 1) if number % d == 0)


def _known(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """A shape with at most one -1, which is worked out."""
    known = -math.prod(shape) if -1 in shape else 1
    return tuple(size // known if n == -1 else n for n in shape)
