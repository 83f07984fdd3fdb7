"""Cross entropy over a large vocabulary without ever holding [B, T, V]."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moss_audio_jax.ops.linear import precision
from moss_audio_jax.sharding import constrain

IGNORE = -100  # a label that does not count


def shift_labels(labels: jax.Array) -> jax.Array:
    """Labels [B, T] aligned with their tokens -> the label each position must predict [B, T]."""
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)


def cross_entropy(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, chunk: int = 128
) -> tuple[jax.Array, jax.Array]:
    """Next-token cross entropy of each position, `chunk` labelled positions of a row at a time.

    Args:
      hidden: [B, T, D].
      kernel: the output head [D, V].
      targets: int [B, T], the token each position must predict, or IGNORE.

    Returns:
      float32 [B, T] each: -log p(target), 0 where ignored; and log Z (for a z-loss), 0 likewise.
    """
    batch, length, dim = hidden.shape
    # Labelled positions first: most chunks then hold none, and need no logits at all.
    order = jnp.argsort(targets == IGNORE, axis=1, stable=True)
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    targets = jnp.take_along_axis(targets, order, axis=1)

    def part(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, targets = xs
        # Rounded here, not before: its gradient then adds up over the chunks in its own dtype.
        logits = jnp.matmul(
            hidden,
            kernel.astype(hidden.dtype),
            precision=precision(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        logits = constrain(logits, "batch", "tokens", "vocab")
        log_z = jax.nn.logsumexp(logits, axis=-1)
        label = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        counts = targets != IGNORE
        return jnp.where(counts, log_z - label, 0.0), jnp.where(counts, log_z, 0.0)

    def nothing(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return (jnp.zeros(xs[1].shape, jnp.float32),) * 2

    def labelled(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jax.lax.cond(jnp.any(xs[1] != IGNORE), part, nothing, xs)

    chunk = min(chunk, length)
    if length % chunk:
        pad = chunk - length % chunk
        hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
        targets = jnp.pad(targets, ((0, 0), (0, pad)), constant_values=IGNORE)
    xs = (
        jnp.moveaxis(hidden.reshape(batch, -1, chunk, dim), 1, 0),
        jnp.moveaxis(targets.reshape(batch, -1, chunk), 1, 0),
    )
    # The backward pass computes each chunk's logits again instead of keeping them.
    found = jax.lax.map(jax.checkpoint(labelled), xs)
    back = jnp.argsort(order, axis=1)

    def in_place(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length], back, 1)

    return tuple(in_place(x) for x in found)
