"""TPU slices by name."""

from __future__ import annotations

import dataclasses
import math
import re

from moss_audio_jax.devices import TPUS, Tpu
from moss_audio_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more slices of one shape, e.g. v5e:16x16; `chips` counts those of all slices."""

    name: str
    generation: str
    chips: int
    slices: int = 1

    @property
    def device(self) -> Tpu:
        return TPUS[self.generation]

    @property
    def devices(self) -> int:
        return self.chips * self.device.devices_per_chip


def parse(name: str, slices: int = 1) -> Topology:
    """The topology of `slices` slices with a name like v5e:16x16 or v5p:4x4x8.

    Raises:
      UsageError: an unknown generation or a shape that its slices do not have.
    """
    generation, _, shape = name.partition(":")
    if generation not in TPUS:
        known = ", ".join(TPUS)
        raise UsageError(f"topology {name!r}: expected GENERATION:SHAPE, one of {known}")
    dimensions = TPUS[generation].dimensions
    example = "x".join("4" * dimensions)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != dimensions - 1:
        raise UsageError(
            f"topology {name!r}: {generation} slices have {dimensions} sides, like "
            f"{generation}:{example}"
        )
    chips = math.prod(int(side) for side in shape.split("x"))
    return Topology(name, generation, slices * chips, slices)
