"""What a compiled step sends from one slice to another, over the data center's network.

On a TPU the compiler exchanges between slices by `send`s to a runtime on the host (Megascale), each
of which says what it is part of. On other platforms an exchange between slices is a collective
whose groups have devices of several slices.

The bytes are those of one device, if an exchange first goes through each slice, as on TPUs: of an
array that k devices of a slice reduce, each sends a k-th.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from moss_audio_jax.plan.hlo import KINDS, Instruction, Module, size_of

_SEND = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Crossing:
    """One exchange between slices.

    Attributes:
      kind: one of KINDS.
      bytes: that one device sends to other slices, in one execution.
      times: executions per step.
      source: the operation of the model, or the compiler's name of the exchange.
    """

    kind: str
    bytes: float
    times: int
    source: str


def crossings(module: Module, slice_of: Sequence[int]) -> list[Crossing]:
    """The exchanges between slices in a step.

    Args:
      slice_of: the slice of each device, in the mesh's order.
    """
    count, found = len(set(slice_of)), []
    if count == 1:
        return []
    for computation, times in module.executed():
        for i in module.computations[computation]:
            kind, size, inside = i.op.removesuffix("-start"), 0, 1
            if sent := _SEND.search(i.rest) if i.op == "send" else None:
                # Its array is the device's own part, before it is exchanged.
                kind = sent.group(1).lower().replace("_", "-")
                size = size_of(i.type, lambda sizes: sizes[0])
                size *= count if kind == "all-gather" else 1
            elif kind in KINDS:
                size, inside = _between(i, kind, slice_of)
            if size:
                shares = {"all-reduce": 2 * (count - 1) / count, "collective-permute": 1}
                share = shares.get(kind, (count - 1) / count)
                name = re.search(r'(?:op_name|_rendezvous)="([^"]*)"', i.rest)
                found.append(Crossing(kind, share * size / inside, times, name[1] if name else ""))
    return found


def _between(i: Instruction, kind: str, slice_of: Sequence[int]) -> tuple[int, int]:
    """Bytes of a collective's array, and over how many devices of a slice it is shared; 0, 1 if it
    stays within slices."""
    group = next(
        (g for g in groups(i.rest, len(slice_of)) if len({slice_of[d] for d in g}) > 1), ()
    )
    if not group:
        return 0, 1
    size = size_of(i.type, max if i.op.endswith("-start") else sum)
    if kind == "reduce-scatter":
        size *= len(group)
    shared = kind in ("all-reduce", "all-gather", "reduce-scatter")
    return size, len(group) // len({slice_of[d] for d in group}) if shared else 1


def groups(rest: str, devices: int) -> list[list[int]]:
    """The devices of each group of a collective, from what follows its operands.

    Raises:
      ValueError: the groups are written in a form that this does not know.
    """
    if found := _LISTED.search(rest):
        return [[int(d) for d in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := _IOTA.search(rest):
        shape, order = _numbers(found[1]), _numbers(found[3])
        return _iota(_numbers(found[2]), order).reshape(shape).tolist()
    if found := _MESH.search(rest):
        axes = re.findall(r"'([^']+)'=(\d+)", found[1])
        sizes = [int(size) for _, size in axes]
        own = re.findall(r"'([^']+)'", found[4])
        along = [index for index, (name, _) in enumerate(axes) if name in own]
        order = _numbers(found[2]) or sizes
        ids = _iota(order, _numbers(found[3])).reshape(sizes)
        last = np.moveaxis(ids, along, range(-len(along), 0))
        return last.reshape(-1, int(np.prod([sizes[k] for k in along]))).tolist()
    if "replica_groups={}" in rest:
        return [list(range(devices))]
    raise ValueError(f"groups of a collective in an unknown form: {rest[:200]}")


def _iota(shape: Sequence[int], order: Sequence[int]) -> np.ndarray:
    ids = np.arange(np.prod(shape)).reshape(shape)
    return ids.transpose(order) if order else ids


def _numbers(text: str | None) -> list[int]:
    return [int(part) for part in (text or "").split(",") if part]
