"""Matrix products with the precision their dtype promises; kernels plain, in int8 or as bits.

A CPU multiplies in float32. If a compiled program holds a bfloat16 or int8 kernel, XLA converts all
of it first, and moves the conversion out of the loop over tokens, so that all kernels are in memory
as float32 at once. There `matmul` converts a kernel block by block, in a loop that XLA cannot take
apart because the kernel is an array of integers (docs/findings/2026-11-29-bfloat16-on-a-cpu.md).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moss_audio_jax.sharding import alone, platform

_BLOCK = 2**20  # weights that are converted at a time: 4 MB, which caches hold
_ROWS = 16, 256  # at least so many of a kernel; that many are enough for any number of tokens


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


class Bits(NamedTuple):
    """A bfloat16 kernel as its bits, for CPUs; see the head of this file.

    `np.asarray` gives the bfloat16 array.

    Attributes:
      values: uint16 [..., in, out].
    """

    values: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(jnp.bfloat16)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(np.asarray(self.values).view(self.dtype), dtype, copy=copy)

    @property
    def T(self) -> Bits:
        return Bits(self.values.T)


Kernel = jax.Array | Int8 | Bits


def to_bits(kernel: jax.Array) -> Bits:
    """The same memory, if the kernel is an array on a CPU and not one of a program."""
    if isinstance(kernel, jax.core.Tracer):
        return Bits(jax.lax.bitcast_convert_type(kernel, jnp.uint16))
    return Bits(jax.device_put(np.asarray(kernel).view(np.uint16)))


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
    values = kernel.values if isinstance(kernel, Int8 | Bits) else kernel
    if isinstance(kernel, Bits) or (isinstance(kernel, Int8) and platform() == "cpu" and alone()):
        y = _by_blocks(x.reshape(-1, values.shape[0]), values)
        y = y.reshape(*x.shape[:-axes], *shape)
        dtype = x.dtype if dtype is None else dtype
    else:
        product = _on_cpu if platform() == "cpu" else _product
        y = product(x, values.astype(x.dtype).reshape(*x.shape[-axes:], *shape), axes, dtype)
        dtype = y.dtype
    if isinstance(kernel, Int8):
        y = y * kernel.scale[0].reshape(shape)
    return y.astype(dtype)


def _by_blocks(x: jax.Array, values: jax.Array) -> jax.Array:
    """[M, in] @ [in, out] -> float32 [M, out], a block of the kernel's rows at a time.

    There are always two blocks, because XLA takes a loop of one apart.
    """
    n_in, n_out = values.shape
    least, enough = _ROWS
    most = min(max(_BLOCK // n_out, min(len(x), enough), least), n_in // 2)
    rows = next(rows for rows in range(max(most, 1), 0, -1) if n_in % rows == 0)
    x = x.astype(jnp.float32)

    def add(block: jax.Array, y: jax.Array) -> jax.Array:
        start = block * rows
        part = _float32(jax.lax.dynamic_slice_in_dim(values, start, rows))
        return y + jax.lax.dynamic_slice_in_dim(x, start, rows, axis=1) @ part

    return jax.lax.fori_loop(0, n_in // rows, add, jnp.zeros((len(x), n_out)))


def _float32(values: jax.Array) -> jax.Array:
    """Integers as float32, or what they are the bits of."""
    if values.dtype == jnp.uint16:
        values = jax.lax.bitcast_convert_type(values, jnp.bfloat16)
    return values.astype(jnp.float32)


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
    if isinstance(kernel, Bits):
        return jax.lax.bitcast_convert_type(kernel.values, jnp.bfloat16)
    return kernel.values * kernel.scale if isinstance(kernel, Int8) else kernel
