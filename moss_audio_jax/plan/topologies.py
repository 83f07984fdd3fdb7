"""TPU generations and slices: what a device holds and how fast it is.

A device is what JAX calls one: a chip, or on tpu7x one of a chip's two chiplets.
"""

from __future__ import annotations

import dataclasses
import math
import re

from moss_audio_jax.errors import UsageError

GIB = 2**30


def _gib(n: float) -> int:
    return int(n * GIB)


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation of chips; every number is that of one device.

    Attributes:
      hbm: bytes of memory by the data sheet.
      usable: bytes that the compiler lets a program have.
      peak: bfloat16 FLOP/s.
      clock: Hz of the TensorCore, for cycles of the compiler's cost model.
      hbm_bandwidth: bytes/s.
      link: bytes/s of one interconnect link, one way.
      links: links of a device.
      dimensions: of a slice's name.
      devices_per_chip: 2 on tpu7x.
    """

    hbm: int
    usable: int
    peak: float
    clock: float
    hbm_bandwidth: float
    link: float
    links: int
    dimensions: int
    devices_per_chip: int = 1

    @property
    def interconnect(self) -> float:
        """Bytes/s that leave a device over all its links: collectives over a whole slice."""
        return self.link * self.links


# hbm, peak, hbm_bandwidth and links: the system tables of docs.cloud.google.com/tpu/docs/v4, /v5e,
# /v5p, /v6e and /tpu7x. The interconnect stands there for all links of a chip and both ways (v5e
# 400 GB/s, v5p 1200, v6e 800, tpu7x 1200 for two devices; v4 2400 Gbit/s one way), over 4 links in
# a 2D torus and 6 in a 3D one. usable: what libtpu 0.0.42 names as available HBM when it refuses a
# program. clock: v4 1.05 GHz (arXiv 2304.01433); the others as peak = 2 * multipliers * clock gives
# it (v5e 4 units of 128 x 128, v5p 8 of them, v6e and a tpu7x device 4 * 256 x 256 multipliers).
GENERATIONS = {
    "v4": Generation(32 * GIB, _gib(30.75), 275e12, 1.05e9, 1.2e12, 50e9, 6, 3),
    "v5e": Generation(16 * GIB, _gib(15.75), 197e12, 1.5e9, 8.19e11, 50e9, 4, 2),
    "v5p": Generation(95 * GIB, _gib(95.74), 459e12, 1.75e9, 2.765e12, 100e9, 6, 3),
    "v6e": Generation(32 * GIB, _gib(31.25), 918e12, 1.75e9, 1.64e12, 100e9, 4, 2),
    "tpu7x": Generation(96 * GIB, _gib(94.75), 1153.5e12, 2.2e9, 3.69e12, 50e9, 6, 3, 2),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, e.g. v5e:16x16, or several of them; `chips` counts those of all."""

    name: str
    generation: str
    chips: int
    slices: int = 1

    @property
    def device(self) -> Generation:
        return GENERATIONS[self.generation]

    @property
    def devices(self) -> int:
        return self.chips * self.device.devices_per_chip


def parse(name: str, slices: int = 1) -> Topology:
    """`slices` slices of a name like v5e:16x16 or v5p:4x4x8.

    Raises:
      UsageError: an unknown generation or a shape that its slices do not have.
    """
    generation, _, shape = name.partition(":")
    if generation not in GENERATIONS:
        known = ", ".join(GENERATIONS)
        raise UsageError(f"topology {name!r}: expected GENERATION:SHAPE, one of {known}")
    dimensions = GENERATIONS[generation].dimensions
    example = "x".join("4" * dimensions)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != dimensions - 1:
        raise UsageError(
            f"topology {name!r}: {generation} slices have {dimensions} sides, like "
            f"{generation}:{example}"
        )
    chips = math.prod(int(side) for side in shape.split("x"))
    return Topology(name, generation, slices * chips, slices)
