"""Shares items among several processes that evaluate together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Crew:
    """The processes of a run. This one answers items index, index + count, and so on.

    If one mesh spans the processes, all of them answer every item and only one `writes`.
    """

    count: int = 1
    index: int = 0
    writes: bool = True


def crew_and_mesh(sizes: Mapping[str, int] | None) -> tuple[Crew, Any]:
    """This process's share of the items, and its mesh.

    If the mesh fits the devices of one process, each process has its own and the items are shared.
    A larger mesh spans the processes, and they answer every item together.

    Raises:
      UsageError: sizes that the devices cannot fill.
    """
    import jax

    from moss_audio_jax.sharding import make_mesh

    alone = Crew(jax.process_count(), jax.process_index())
    if jax.process_count() == 1 or sizes is None:
        return alone, sizes
    if math.prod(size for size in sizes.values() if size != -1) > jax.local_device_count():
        return Crew(writes=jax.process_index() == 0), make_mesh(**sizes)
    return alone, make_mesh(**sizes, devices=jax.local_devices())


def barrier(name: str) -> None:
    """Returns when every process of the run has called it."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
