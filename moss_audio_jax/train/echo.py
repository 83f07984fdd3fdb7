"""Data echoing (Choi et al. 2019): rows stay on the device and are trained on several times.

For an accelerator that takes rows faster than its host makes them. Each step brings batch / k new
rows and draws the others of its batch among the newest rows, without drawing one twice, so that a
row is seen k times on average, far apart.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moss_audio_jax.train.step import batch_shardings

Batch = dict[str, jax.Array]


class Echo:
    """The newest rows, kept on the device.

    It is no part of a checkpoint: a run that is continued fills it anew, and repeats the rows that
    it has until then.
    """

    def __init__(self, batch: int, kept: int, seed: int, mesh: Mesh):
        """`batch`: rows of a step; `kept`: so many rows are drawn from."""
        self._batch, self._kept, self._seed, self._mesh = batch, kept, seed, mesh
        self._rows: Batch | None = None
        self._seen = 0

    def __call__(self, step: int, fresh: Batch) -> Batch:
        """The batch [B, ...] of a step, the `fresh` rows [B / k, ...] among it."""
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
                _exchange, donate_argnums=0,
                out_shardings=(None, batch_shardings(shapes, self._mesh)),
            )  # fmt: skip
        at = (self._seen + np.arange(count)) % self._kept
        self._seen += count
        held = min(self._seen, self._kept)
        others = np.setdiff1d(np.arange(held), at)
        needed = self._batch - count
        draw = np.random.default_rng([self._seed, step])
        if len(others) >= needed:
            drawn = draw.choice(others, needed, replace=False)
        else:  # the first steps: there are not enough yet
            drawn = draw.choice(held, needed)
        places = np.concatenate([at, drawn]).astype(np.int32)
        self._rows, batch = self._exchange(self._rows, fresh, at.astype(np.int32), places)
        return batch


def _exchange(rows: Batch, fresh: Batch, at: Any, places: Any) -> tuple[Batch, Batch]:
    rows = {name: x.at[at].set(fresh[name]) for name, x in rows.items()}
    return rows, {name: x[places] for name, x in rows.items()}
