"""The encoder's convolution: kernel 3, stride 2, padding 1."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moss_audio_jax.ops.linear import matmul, precision
from moss_audio_jax.sharding import platform, ways


def conv3x3_stride2(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """[N, T, F, in] * [3, 3, in, out] + [out] -> [N, ceil(T/2), ceil(F/2), out]."""
    convolve = _on_cpu if platform() == "cpu" else _convolve
    return convolve(x, kernel.astype(x.dtype)) + bias.astype(x.dtype)


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(2, 2),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision(x.dtype),
    )


# On a CPU only XLA's forward convolution is fast. The backward ones take twice the time of the
# products below, and inside a loop 30 times (docs/findings/2026-11-29-training-on-cpus.md).
@jax.custom_vjp
def _on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _convolve(x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple:
    """The gradients of x and kernel, one image a device at a time, which its caches hold."""
    x, kernel = saved
    count = ways((len(x),), "batch")

    def by_turns(y: jax.Array) -> jax.Array:  # [N, ...] -> [N / count, count, ...]
        return jnp.swapaxes(y.reshape(count, -1, *y.shape[1:]), 0, 1)

    def step(total: jax.Array, turn: tuple[jax.Array, jax.Array]) -> tuple:
        x, gradient = turn
        return total + _of_kernel(x, gradient), _of_input(kernel, gradient, x.shape)

    zero = jnp.zeros((kernel.shape[3], kernel[..., 0].size), x.dtype)
    of_kernel, of_x = jax.lax.scan(step, zero, (by_turns(x), by_turns(gradient)))
    return jnp.swapaxes(of_x, 0, 1).reshape(x.shape), of_kernel.T.reshape(kernel.shape)


_on_cpu.defvjp(lambda x, kernel: (_on_cpu(x, kernel), (x, kernel)), _backward)


def _of_kernel(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """[out, 9 * in], the patches' axis last, in which order the product is fastest."""
    t, f, out = gradient.shape[1:]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [x[:, i : i + 2 * t - 1 : 2, j : j + 2 * f - 1 : 2] for i in range(3) for j in range(3)]
    patches = jnp.concatenate(taps, axis=-1)
    return jax.lax.dot_general(
        gradient.reshape(-1, out),
        patches.reshape(-1, patches.shape[-1]),
        (((0,), (0,)), ((), ())),
        precision=precision(x.dtype),
    )


def _of_input(kernel: jax.Array, gradient: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Of `shape` [N, T, F, in]. A place in an even row and column was read by one tap, in an odd
    row or column by two, in both by four: a product for each of these four kinds."""
    n, t, f, _ = gradient.shape
    here = jnp.pad(gradient, ((0, 0), (0, 1), (0, 1), (0, 0)))
    taps = jnp.swapaxes(kernel, 2, 3)  # [3, 3, out, in]

    def read_by(rows: tuple, columns: tuple) -> jax.Array:
        """Of (tap, distance of its output) by row and by column."""
        parts = [here[:, i : i + t, j : j + f] for _, i in rows for _, j in columns]
        kernels = [taps[a, b] for a, _ in rows for b, _ in columns]
        return matmul(jnp.concatenate(parts, axis=-1), jnp.concatenate(kernels))

    even, odd = ((1, 0),), ((2, 0), (0, 1))
    kinds = [jnp.stack([read_by(rows, even), read_by(rows, odd)], axis=3) for rows in (even, odd)]
    x = jnp.stack(kinds, axis=2).reshape(n, 2 * t, 2 * f, -1)
    return x[:, : shape[1], : shape[2]]
