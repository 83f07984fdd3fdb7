"""Data echoing (Choi et al. 2019): rows stay on the device and are trained on several times.

This helps if an accelerator consumes rows faster than its host makes them. Each step brings batch /
k new rows and draws the other rows of its batch from the newest ones, without repetition. A row is
seen k times on average, far apart, each time behind other masks (SpecAugment).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moss_audio_jax.data.augment import Augment
from moss_audio_jax.train.step import batch_shardings

Batch = dict[str, jax.Array]


class Echo:
    """The newest rows, kept on the device.

    They are not part of a checkpoint. A continued run fills them anew, and repeats the rows that it
    has until then.
    """

    def __init__(self, batch: int, kept: int, seed: int, mesh: Mesh, masks: Augment | None = None):
        """`batch`: rows of a step; `kept`: how many rows are kept; `masks` for their mels."""
        self._batch, self._kept, self._seed, self._mesh = batch, kept, seed, mesh
        self._masks = masks or Augment()
        self._rows: Batch | None = None
        self._seen = 0

    def __call__(self, step: int, fresh: Batch) -> Batch:
        """The batch [B, ...] of a step, including the `fresh` rows [B / k, ...]."""
        count = len(fresh["tokens"])
        if self._rows is None:
            self._rows = {
                name: jnp.zeros((self._kept, *x.shape[1:]), x.dtype) for name, x in fresh.items()
            }
            shapes = {
                name: jax.ShapeDtypeStruct((self._batch, *x.shape[1:]), x.dtype)
                for name, x in fresh.items()
            }
            self._exchange = jax.jit(
                functools.partial(_exchange, self._masks),
                donate_argnums=0,
                out_shardings=(None, batch_shardings(shapes, self._mesh)),
            )
        at = (self._seen + np.arange(count)) % self._kept
        self._seen += count
        held = min(self._seen, self._kept)
        others = np.setdiff1d(np.arange(held), at)
        needed = self._batch - count
        draw = np.random.default_rng([self._seed, step])
        if len(others) >= needed:
            drawn = draw.choice(others, needed, replace=False)
        else:  # in the first steps there are not enough rows yet
            drawn = draw.choice(held, needed)
        places = np.concatenate([at, drawn]).astype(np.int32)
        key = jax.random.fold_in(jax.random.key(self._seed), step)
        self._rows, batch = self._exchange(self._rows, fresh, at.astype(np.int32), places, key)
        return batch


def _exchange(
    masks: Augment, rows: Batch, fresh: Batch, at: Any, places: Any, key: jax.Array
) -> tuple[Batch, Batch]:
    rows = {name: x.at[at].set(fresh[name]) for name, x in rows.items()}
    batch = {name: x[places] for name, x in rows.items()}
    if masks.masked:
        batch["mels"] = mask_mels(batch["mels"], batch["frames"], masks, key)
    return rows, batch


def mask_mels(mels: jax.Array, frames: jax.Array, masks: Augment, key: jax.Array) -> jax.Array:
    """`data.augment.mask_mel` of each chunk, on the device.

    Args:
      mels: [B, C, F, bins]; frames: int [B, C, F / 8], how many of each token's 8 are sound.
    """
    *chunks, size, bins = mels.shape
    inside = (jnp.arange(8) < frames[..., None]).reshape(mels.shape[:-1])  # [B, C, F]
    frames = jnp.max(jnp.where(inside, 1 + jnp.arange(size), 0), axis=-1)  # [B, C]
    blank = jnp.min(jnp.where(inside[..., None], mels, jnp.inf), axis=(-1, -2), keepdims=True)
    freq, time = jax.random.split(key)
    widest = jnp.full(chunks, min(masks.freq_width, bins))
    hidden = _stretches(freq, masks.freq_masks, widest, jnp.full(chunks, bins), bins)[..., None, :]
    longest = jnp.minimum(masks.time_width, (frames * masks.time_share).astype(int))
    late = _stretches(time, masks.time_masks, longest, frames, size)[..., None]
    return jnp.where((hidden | late) & inside[..., None], blank, mels).astype(mels.dtype)


def _stretches(
    key: jax.Array, count: int, longest: jax.Array, room: jax.Array, size: int
) -> jax.Array:
    """bool [..., size]: `count` random stretches of 0 to `longest` positions within `room`."""
    width, start = jax.random.uniform(key, (2, count, *longest.shape))
    width = jnp.floor(width * (longest + 1))
    start = jnp.floor(start * (room - width + 1))
    places = jnp.arange(size)
    stretches = (places >= start[..., None]) & (places < (start + width)[..., None])
    return jnp.any(stretches, axis=0)
