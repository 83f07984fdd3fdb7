"""Cross entropy over a large vocabulary without ever holding [B, T, V].

Each device multiplies the labelled positions of its own rows, `chunk` at a time, with the whole
head (or its share of the vocabulary, on a mesh with `tensor`). The head is gathered once, not for
each chunk, and its gradient is summed in float32 and reduced once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moss_audio_jax.ops.linear import precision
from moss_audio_jax.sharding import ACTIVATIONS, constrain, fit

IGNORE = -100  # a label that does not count


def shift_labels(labels: jax.Array) -> jax.Array:
    """Labels [B, T] aligned with their tokens -> the label each position must predict [B, T]."""
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, chunk: int = 1024
) -> tuple[jax.Array, jax.Array]:
    """Next-token cross entropy of each position.

    Args:
      hidden: [B, T, D].
      kernel: the output head [D, V]; rounded to hidden's dtype; its gradient stays float32 until
        the end.
      targets: int [B, T], the token each position must predict, or IGNORE.
      chunk: labelled positions that a device processes at a time. Each chunk reads and writes the
        head's whole gradient, so few chunks are faster; each chunk holds chunk * V scores.

    Returns:
      float32 [B, T] each: -log p(target), 0 where ignored; and log Z (for a z-loss), 0 likewise.
    """
    return _forward(hidden, kernel, targets, chunk)[0]


def _forward(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, chunk: int):
    def here(hidden, kernel, targets):  # a device's rows [b, T]
        def part(xs):
            hidden, targets = xs
            logits = _logits(hidden, kernel)
            log_z = jax.nn.logsumexp(logits, axis=-1)
            label = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
            counts = targets != IGNORE
            return jnp.where(counts, log_z - label, 0.0), jnp.where(counts, log_z, 0.0)

        def none(xs):
            return (jnp.zeros(xs[1].shape, jnp.float32),) * 2

        order = _Order(targets, chunk)
        found = jax.lax.map(
            lambda xs: jax.lax.cond(xs[0], part, none, xs[1:]),
            (order.used, order.chunks(hidden), order.chunks(targets, IGNORE)),
        )
        return tuple(order.back(x) for x in found)

    out = _on_devices(here, hidden, kernel, (targets,))
    return out, (hidden, kernel, targets, out[1])


def _backward(chunk: int, saved: tuple, cotangents: tuple[jax.Array, jax.Array]):
    hidden, kernel, targets, log_z = saved

    def here(hidden, kernel, targets, log_z, d_loss, d_log_z):
        def part(d_kernel, xs):
            targets, hidden, log_z, d_loss, d_log_z = xs
            counts = targets != IGNORE
            d_loss, d_log_z = (jnp.where(counts, d, 0.0)[:, None] for d in (d_loss, d_log_z))
            logits = _logits(hidden, kernel)
            d_logits = (d_loss + d_log_z) * jnp.exp(logits - log_z[:, None])
            target = jnp.arange(logits.shape[-1]) == targets[:, None]
            d_logits = (d_logits - jnp.where(target, d_loss, 0.0)).astype(hidden.dtype)
            exact = precision(hidden.dtype)
            d_hidden = jnp.matmul(d_logits, kernel.T, precision=exact)
            d_kernel += jnp.matmul(
                hidden.T, d_logits, precision=exact, preferred_element_type=jnp.float32
            )
            return d_kernel, d_hidden

        def none(d_kernel, xs):
            return d_kernel, jnp.zeros_like(xs[1])

        order = _Order(targets, chunk)
        rows = [order.chunks(x) for x in (hidden, log_z, d_loss, d_log_z)]
        d_kernel, d_hidden = jax.lax.scan(
            lambda carry, xs: jax.lax.cond(xs[0], part, none, carry, xs[1:]),
            constrain(jnp.zeros(kernel.shape, jnp.float32), None, "vocab"),
            (order.used, order.chunks(targets, IGNORE), *rows),
        )
        return order.back(d_hidden), d_kernel

    d_hidden, d_kernel = _on_devices(
        here, hidden, kernel, (targets, log_z, *cotangents), reduce=True
    )
    return d_hidden, d_kernel.astype(kernel.dtype), None


cross_entropy.defvjp(_forward, _backward)


def _logits(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    logits = jnp.matmul(
        hidden, kernel, precision=precision(hidden.dtype), preferred_element_type=jnp.float32
    )
    return constrain(logits, None, "vocab")


class _Order:
    """A device's positions in chunks, labelled ones first, so that most chunks hold no label.

    Attributes:
      used: bool [N], whether a chunk holds labels on any device: all devices take the same branch.
    """

    def __init__(self, targets: jax.Array, chunk: int):
        self._shape = targets.shape
        self._chunk = min(chunk, targets.size)
        self._order = jnp.argsort(targets.reshape(-1) == IGNORE, stable=True)
        self.used = jnp.any(self.chunks(targets, IGNORE) != IGNORE, axis=1)
        if axes := _manual_axes():
            self.used = jax.lax.pmax(self.used.astype(jnp.int32), axes) > 0

    def chunks(self, x: jax.Array, fill: int = 0) -> jax.Array:
        """[b, T, ...] -> [N, chunk, ...], padded at the end."""
        x = x.reshape(-1, *x.shape[2:])[self._order]
        pad = [(0, -len(x) % self._chunk)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, pad, constant_values=fill).reshape(-1, self._chunk, *x.shape[1:])

    def back(self, x: jax.Array) -> jax.Array:
        """[N, chunk, ...] -> [b, T, ...], each position in its place."""
        x = x.reshape(-1, *x.shape[2:])[: len(self._order)][jnp.argsort(self._order)]
        return x.reshape(*self._shape, *x.shape[1:])


def _on_devices(
    here: Callable, hidden: jax.Array, kernel: jax.Array, others: tuple, reduce: bool = False
) -> Any:
    """`here(hidden, kernel, *others)` on each device's rows, with the whole head.

    With `reduce`, its second result is the head's gradient from these rows; it is summed over all
    devices and returned split like the head.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = P() if mesh.empty else fit(hidden.shape[:1], [ACTIVATIONS["batch"]], mesh)
    axes = set(jax.tree.leaves(tuple(spec)))
    if not axes:
        return here(hidden, kernel.astype(hidden.dtype), *others)
    split = "fsdp" in axes and kernel.shape[0] % mesh.shape["fsdp"] == 0
    head = P("fsdp") if split else P()

    def on_device(hidden, kernel, *others):
        whole = kernel.astype(hidden.dtype)
        if split:
            whole = jax.lax.all_gather(whole, "fsdp", axis=0, tiled=True)
        first, second = here(hidden, constrain(whole, None, "vocab"), *others)
        if reduce:
            if split:
                second = jax.lax.psum_scatter(second, "fsdp", scatter_dimension=0, tiled=True)
            if rest := axes - ({"fsdp"} if split else set()):
                second = jax.lax.psum(second, tuple(rest))
        return first, second

    return jax.shard_map(
        on_device,
        in_specs=(spec, head, *[spec] * len(others)),
        out_specs=(spec, head if reduce else spec),
        axis_names=axes,
        check_vma=False,
    )(hidden, kernel, *others)


def _manual_axes() -> tuple[str, ...]:
    """The mesh axes over which this code runs device by device."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)
