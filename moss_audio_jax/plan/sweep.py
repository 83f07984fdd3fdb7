"""Which rows per device, length, remat policy and mesh make the best step that fits?"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moss_audio_jax.plan.estimate import Plan


@dataclasses.dataclass(frozen=True)
class Setting:
    """One point of a sweep; `rows` of a device, `tensor` of the mesh (the rest is fsdp)."""

    rows: int
    length: int
    remat: str
    tensor: int

    def apply(self, config: Any, devices: int) -> Any:
        """The config with this setting on so many devices."""
        config = config.copy_and_resolve_references()
        config.mesh.update(data=1, fsdp=-1, tensor=self.tensor, sequence=1)
        config.data.batch = self.rows * (devices // self.tensor) * config.train.accumulate
        config.data.length = self.length
        config.train.remat = self.remat
        return config


def settings(
    rows: Sequence[int],
    lengths: Sequence[int],
    remats: Sequence[str],
    tensors: Sequence[int],
    devices: int,
    heads: int,
) -> Iterator[list[Setting]]:
    """Series of settings that differ in rows alone, fewest first.

    A mesh that does not divide the devices or the key/value heads is left out.
    """
    for length, remat, tensor in itertools.product(lengths, remats, tensors):
        if devices % tensor == 0 and heads % tensor == 0:
            yield [Setting(n, length, remat, tensor) for n in sorted(rows)]


def search(
    series: Iterator[list[Setting]], evaluate: Callable[[Setting], Plan]
) -> list[tuple[Setting, Plan]]:
    """Plans of all settings, except those with more rows than one that does not fit."""
    found = []
    for group in series:
        for setting in group:
            plan = evaluate(setting)
            found.append((setting, plan))
            if not plan.fits:
                break
    return found


def best(found: Sequence[tuple[Setting, Plan]]) -> tuple[Setting, Plan] | None:
    """The setting that fits with the highest modelled MFU; None where none fits."""
    fitting = [pair for pair in found if pair[1].fits]
    return max(fitting, key=lambda pair: pair[1].estimate.mfu, default=None)
