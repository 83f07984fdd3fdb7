"""Sampling of one token on the device."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moss_audio_jax.generate.options import LEAST_FACTOR, MAX_STOP_IDS, Sampling

__all__ = ["MAX_STOP_IDS", "Knobs", "Sampling", "choose", "heat"]


class Knobs(NamedTuple):
    """The fields of `Sampling` that decide which token is taken, one array [B] each."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    seed: jax.Array


def choose(
    logits: jax.Array, knobs: Knobs, seen: jax.Array, step: jax.Array, sampled: bool
) -> jax.Array:
    """Samples one token for each row.

    Args:
      logits: float32 [B, V]; -inf where a token is forbidden.
      knobs: each [B].
      seen: bool [B, V], tokens in the prompt or the answer so far.
      step: int [B], tokens generated so far. The random key comes from it and the seed, so a row's
        token does not depend on other rows or on the row's index.
      sampled: False takes the most likely token of each row, whatever its temperature.

    Returns:
      int32 [B].
    """
    penalty = knobs.repetition_penalty[:, None]
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen, penalised, logits)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not sampled:
        return greedy
    scaled = logits / heat(knobs)
    kept = jnp.where(scaled >= _threshold(scaled, knobs), scaled, -jnp.inf)
    # The noise is indexed by token, not by rank, so rounding cannot reorder it.
    noise = jax.vmap(
        lambda seed, n: jax.random.gumbel(
            jax.random.fold_in(jax.random.key(seed), n), logits.shape[-1:]
        )
    )(knobs.seed, step)
    chosen = jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)
    return jnp.where(knobs.temperature > 0, chosen, greedy)


def heat(knobs: Knobs) -> jax.Array:
    """What logits are divided by [B, 1]: the temperature; 1 where that is 0."""
    least = jnp.maximum(knobs.temperature, LEAST_FACTOR)
    return jnp.where(knobs.temperature > 0, least, 1)[:, None]


def _threshold(logits: jax.Array, knobs: Knobs) -> jax.Array:
    """The lowest logit [B, 1] that top-k, then top-p, then min-p keep (in that order)."""
    vocab = logits.shape[-1]

    def by_rank() -> jax.Array:
        ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        k = jnp.where(knobs.top_k > 0, knobs.top_k, vocab)[:, None]
        ordered = jnp.where(jnp.arange(vocab) < k, ordered, -jnp.inf)
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # probability of all that rank higher
        # The first always stays: a device takes a tiny p as 0.
        kept = (before < knobs.top_p[:, None]) | (jnp.arange(vocab) == 0)
        kept = kept & (ordered > -jnp.inf)
        return jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)

    ranked = jnp.any((knobs.top_k > 0) | (knobs.top_p < 1))
    lowest = jax.lax.cond(ranked, by_rank, lambda: jnp.full((logits.shape[0], 1), -jnp.inf))
    top = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.maximum(lowest, top + jnp.log(knobs.min_p)[:, None])
