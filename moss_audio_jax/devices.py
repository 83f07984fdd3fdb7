"""A table of accelerators: speed and memory of a device; and the host's memory.

A device is one of JAX's: a chip, or on tpu7x one of a chip's two chiplets. Needs no JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of device; all numbers are for one device.

    Attributes:
      kinds: possible beginnings of `jax.Device.device_kind`.
      peak: bfloat16 FLOP/s.
      hbm_bandwidth: bytes/s of its memory; None if cards of this name differ.
    """

    kinds: tuple[str, ...]
    peak: float
    hbm_bandwidth: float | None


@dataclasses.dataclass(frozen=True)
class Tpu(Device):
    """A TPU device, and the torus that it is part of.

    Attributes:
      hbm: bytes of memory by the data sheet.
      usable: bytes that the compiler lets a program use.
      clock: Hz of the TensorCore, for cycles of the compiler's cost model.
      link: bytes/s of one interconnect link in one direction.
      links: number of links of a device.
      dcn: bytes/s of the data center's network, between slices.
      dimensions: number of sides in a slice's name.
      devices_per_chip: 2 on tpu7x.
    """

    hbm: int
    usable: int
    clock: float
    link: float
    links: int
    dcn: float
    dimensions: int
    devices_per_chip: int = 1

    @property
    def interconnect(self) -> float:
        """Bytes/s that leave a device over all its links, as in collectives over a whole slice."""
        return self.link * self.links


def _tpu(kinds: tuple[str, ...], hbm: float, usable: float, **numbers: float) -> Tpu:
    """`hbm` and `usable` in GiB."""
    return Tpu(kinds, hbm=int(hbm * GIB), usable=int(usable * GIB), **numbers)


# hbm, peak, hbm_bandwidth and links: the system tables of docs.cloud.google.com/tpu/docs/v4, /v5e,
# /v5p, /v6e and /tpu7x. They give the interconnect for all links of a chip in both directions (v5e
# 400 GB/s, v5p 1200, v6e 800, tpu7x 1200 for two devices; v4 2400 Gbit/s in one direction), over 4
# links in a 2D torus and 6 in a 3D one. usable: the available HBM that libtpu 0.0.42 names when it
# refuses a program. clock: v4 1.05 GHz (arXiv 2304.01433); the others follow from
# peak = 2 * multipliers * clock (v5e has 4 units of 128 x 128 multipliers, v5p 8 of them, v6e and a
# tpu7x device 4 units of 256 x 256). dcn: those tables give v5e 6.4 and v6e 25.6 Tbit/s for a pod
# of 256 chips; v4 and v5p are assumed to have 200 Gbit/s for a host of four chips, tpu7x 400.
TPUS = {
    "v4": _tpu(("TPU v4",), 32, 30.75, peak=275e12, hbm_bandwidth=1.2e12, clock=1.05e9,
               link=50e9, links=6, dcn=6.25e9, dimensions=3),
    "v5e": _tpu(("TPU v5 lite", "TPU v5e"), 16, 15.75, peak=197e12, hbm_bandwidth=8.19e11,
                clock=1.5e9, link=50e9, links=4, dcn=3.125e9, dimensions=2),
    "v5p": _tpu(("TPU v5", "TPU v5p"), 95, 95.74, peak=459e12, hbm_bandwidth=2.765e12,
                clock=1.75e9, link=100e9, links=6, dcn=6.25e9, dimensions=3),
    "v6e": _tpu(("TPU v6",), 32, 31.25, peak=918e12, hbm_bandwidth=1.64e12, clock=1.75e9,
                link=100e9, links=4, dcn=12.5e9, dimensions=2),
    "tpu7x": _tpu(("TPU7",), 96, 94.75, peak=1153.5e12, hbm_bandwidth=3.69e12, clock=2.2e9,
                  link=50e9, links=6, dcn=6.25e9, dimensions=3, devices_per_chip=2),
}  # fmt: skip

# NVIDIA's data sheets, without sparsity.
GPUS = (
    Device(("NVIDIA A100",), 312e12, None),
    Device(("NVIDIA A100-SXM4-40GB",), 312e12, 1.555e12),
    Device(("NVIDIA A100-SXM4-80GB",), 312e12, 2.039e12),
    Device(("NVIDIA H100",), 989e12, 3.35e12),
    Device(("NVIDIA H200",), 989e12, 4.8e12),
)


def host_memory() -> int | None:
    """Bytes of the host's memory that a process may still take; None where nobody says.

    On Linux what is free or could be freed, at most what a container has left; elsewhere all of
    the machine's memory.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = {name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines)}
        free = 1024 * fields["MemAvailable"]
    except (OSError, KeyError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        limit = int((_CGROUP / "memory.max").read_text())
        stat = (_CGROUP / "memory.stat").read_text().splitlines()
        files = int(next(line.split()[1] for line in stat if line.startswith("inactive_file ")))
        free = min(free, limit - int((_CGROUP / "memory.current").read_text()) + files)
    return free


def of(device_kind: str) -> Device | None:
    """The device of a `jax.Device.device_kind`; None if it is not in the table, like a CPU."""
    found = [
        (len(kind), device)
        for device in (*TPUS.values(), *GPUS)
        for kind in device.kinds
        if device_kind.startswith(kind)
    ]
    return max(found, key=lambda each: each[0])[1] if found else None
