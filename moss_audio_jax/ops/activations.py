"""Activations whose backward pass keeps their arguments alone."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x * P(N(0, 1) < x), in float32, of x's dtype and shape (arXiv 1606.08415).

    It uses erf. `jax.nn.gelu` uses erfc, which keeps the digits of results near 0 but takes a TPU
    more cycles (docs/findings/2026-11-28-modelled-train-step.md).
    """
    wide = x.astype(jnp.float32)
    return (wide * _below(wide)).astype(x.dtype)


def _below(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) * (1 / math.sqrt(2 * math.pi))
    return (((_below(wide) + wide * density) * gradient).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def silu_times(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, of their shape."""
    return jax.nn.silu(gate) * up


def _silu_times_backward(
    saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    gate, up = saved
    open_ = jax.nn.sigmoid(gate)
    through = gate * open_
    return gradient * up * (open_ + through * (1 - open_)), gradient * through


silu_times.defvjp(lambda gate, up: (silu_times(gate, up), (gate, up)), _silu_times_backward)
