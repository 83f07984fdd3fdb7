"""The encoder's convolution: kernel 3, stride 2, padding 1."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moss_audio_jax.ops.linear import matmul, precision


def conv3x3_stride2(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """[N, T, F, in] * [3, 3, in, out] + [out] -> [N, ceil(T/2), ceil(F/2), out]."""
    kernel = kernel.astype(x.dtype)
    y = jax.lax.platform_dependent(x, kernel, cpu=_on_cpu, default=_as_conv)
    return y + bias.astype(x.dtype)


def _as_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(2, 2),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision(x.dtype),
    )


@jax.custom_vjp
def _on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """XLA's convolution where nothing is learned; where something is, the matrix product: there
    XLA's own backward pass takes up to twice the time."""
    return _as_conv(x, kernel)


def _as_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    n, t, f, channels = x.shape
    t_out, f_out = (t + 1) // 2, (f + 1) // 2
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [
        x[:, i : i + 2 * t_out - 1 : 2, j : j + 2 * f_out - 1 : 2]
        for i in range(3)
        for j in range(3)
    ]
    patches = jnp.concatenate(taps, axis=-1).reshape(n * t_out * f_out, 9 * channels)
    return matmul(patches, kernel.reshape(9 * channels, -1)).reshape(n, t_out, f_out, -1)


_on_cpu.defvjp(
    lambda x, kernel: jax.vjp(_as_matmul, x, kernel),
    lambda backward, gradient: backward(gradient),
)
