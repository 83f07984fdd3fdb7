"""Estimates the cost of a compiled step: memory by owner, a modelled step time, MFU.

The modelled time is a way to rank settings, not a measurement:

    sum of the compiler's estimated cycles, loops multiplied out, / clock
  + attention FLOPs of Pallas kernels (which the compiler does not estimate) / peak
  + bytes of collectives that do not overlap compute / bandwidth of a device's links
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

import numpy as np

from moss_audio_jax.models import flops
from moss_audio_jax.plan.compile import Compiled, Run, held_bytes
from moss_audio_jax.plan.hlo import Collective, Module
from moss_audio_jax.plan.slices import Crossing, crossings
from moss_audio_jax.plan.topologies import Topology
from moss_audio_jax.sharding import slices

METHOD = (
    "compiler's estimated cycles x loop trips / clock + Pallas attention FLOPs at peak + bytes of "
    "collectives that do not overlap / link bandwidth (all-reduce twice); modelled, not measured"
)
# Cost of attention in a step, in forward passes: 1 forward, 3.5 backward (both of its kernels
# compute the scores again), and 1 more if the layer is rematerialised. Other policies than these
# keep what the backward pass needs.
_ATTENTION_PASSES = {"full": 5.5, "offload": 5.5}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, by owner; `margin` is negative if the step does not fit.

    Attributes:
      parameters: trained and frozen.
      optimizer: moments, average of the weights, counters.
      batch: the input of a step.
      gradients: of the trained parameters, float32, sharded like them.
      activations: the inputs of the decoder's layers, which every remat policy keeps.
      temporaries: the rest of the peak that the compiler reports.
    """

    parameters: int
    optimizer: int
    batch: int
    gradients: int
    activations: int
    temporaries: int
    peak: int
    usable: int

    @property
    def margin(self) -> int:
        return self.usable - self.peak

    def parts(self) -> dict[str, int]:
        """Bytes by owner; they add up to `peak`."""
        names = ("parameters", "optimizer", "batch", "gradients", "activations", "temporaries")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Modelled seconds of a step, by cause, and the resulting MFU."""

    compute: float
    kernels: float
    exposed: float
    mfu: float

    @property
    def seconds(self) -> float:
        return self.compute + self.kernels + self.exposed


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that is known about one setting on one slice."""

    topology: Topology
    fits: bool
    memory: Memory
    tokens: int
    flops: float
    compile_seconds: float
    mesh: dict[str, int]
    remat: str
    rows: int
    length: int
    collectives: tuple[Collective, ...] = ()
    across: tuple[Crossing, ...] = ()
    kernels: int = 0
    warnings: tuple[str, ...] = ()
    compiler_flags: str = ""
    estimate: Estimate | None = None
    refusal: str = ""


def plan(run: Run, compiled: Compiled, topology: Topology) -> Plan:
    """Memory, work and modelled time of a compiled step."""
    memory = split_memory(run, compiled, topology)
    shape = run.shape
    work = flops.train_step(run.model, shape.rows, shape.tokens, shape.chunks, shape.frames)
    found: dict[str, Any] = {}
    if compiled.module is not None:
        module = compiled.module
        collectives = tuple(module.collectives())
        kernels = module.kernels()
        attention = attention_flops(run) if kernels else 0.0
        seconds = estimate(
            module.cycles(), attention / topology.devices, collectives, topology, work
        )
        found = {
            "collectives": collectives,
            "across": tuple(crossings(module, slices(run.mesh.devices.ravel()))),
            "kernels": len(kernels),
            "warnings": tuple(full_gathers(run, module)),
            "estimate": seconds,
        }
    return Plan(
        topology=topology,
        fits=compiled.module is not None and memory.margin >= 0,
        memory=memory,
        tokens=shape.rows * shape.tokens,
        flops=work,
        compile_seconds=compiled.seconds,
        compiler_flags=compiled.flags,
        mesh=dict(run.mesh.shape),
        remat=run.recipe.compute.remat,
        rows=shape.rows,
        length=shape.tokens,
        refusal=compiled.refusal,
        **found,
    )


def split_memory(run: Run, compiled: Compiled, topology: Topology) -> Memory:
    """Divides the compiler's peak among its owners; see Memory."""
    state = run.state
    parameters = held_bytes([state["trained"], state["frozen"]])
    given = held_bytes(state)
    batch = held_bytes(run.batch)
    rest = max(0, compiled.peak - given - batch)
    gradients = min(rest, held_bytes(state["trained"]))
    activations = min(rest - gradients, layer_inputs(run))
    return Memory(
        parameters=parameters,
        optimizer=given - parameters,
        batch=batch,
        gradients=gradients,
        activations=activations,
        temporaries=compiled.peak - given - batch - gradients - activations,
        peak=compiled.peak,
        usable=compiled.limit or topology.device.usable,
    )


def layer_inputs(run: Run) -> int:
    """Bytes on one device of the inputs of all decoder layers, for one micro-batch."""
    axes = run.mesh.shape
    rows = math.ceil(run.shape.rows / run.recipe.accumulate / (axes["data"] * axes["fsdp"]))
    tokens = rows * math.ceil(run.shape.tokens / axes["sequence"])
    width = 2 if run.recipe.compute.dtype == "bfloat16" else 4
    decoder = run.model.decoder
    return decoder.layers * tokens * decoder.hidden_size * width * bool(run.recipe.decoder_loss)


def estimate(
    cycles: float,
    kernel_flops: float,
    collectives: tuple[Collective, ...],
    topology: Topology,
    work: float,
) -> Estimate:
    """The modelled time, as the module's docstring defines it.

    Args:
      cycles: the compiler's estimate for one device.
      kernel_flops: FLOPs of Pallas kernels on one device.
      collectives: those of the module.
      topology: gives clock, peak and link bandwidth.
      work: the step's model FLOPs on all devices.
    """
    device = topology.device
    exposed = sum(c.moved for c in collectives if not c.overlapped) / device.interconnect
    # The matrix units of v6e and tpu7x are 256 wide; a head of 128 fills half of one.
    half = 2.0 if topology.generation in ("v6e", "tpu7x") else 1.0
    compute, kernels = cycles / device.clock, half * kernel_flops / device.peak
    seconds = compute + kernels + exposed
    mfu = work / (seconds * topology.devices * device.peak) if seconds else 0.0
    return Estimate(compute, kernels, exposed, mfu)


def attention_flops(run: Run) -> float:
    """FLOPs of the decoder's attention kernels in a step, on all devices."""
    decoder, tokens = run.model.decoder, run.shape.rows * run.shape.tokens
    forward = 4 * decoder.heads * decoder.head_dim * run.shape.tokens / 2 * tokens * decoder.layers
    return forward * _ATTENTION_PASSES.get(run.recipe.compute.remat, 4.5)


def full_gathers(run: Run, module: Module) -> list[str]:
    """Messages about arrays that are whole on one device although they should be split."""
    decoder, shape = run.model.decoder, run.shape
    if run.mesh.size == 1:
        return []
    wide = (decoder.vocab_size, decoder.hidden_size)
    suspects = {
        "embedding": wide,
        "head": wide[::-1],
        "logits": (shape.rows, shape.tokens, decoder.vocab_size),
    }
    found = []
    for name, dims in suspects.items():
        # The result of a collective, not an argument that is whole.
        if any(_is_collective(i) for i in module.holds(*dims)):
            found.append(f"{name} {list(dims)} is gathered whole")
    master = max((np.prod(x.shape) for x in run.state["trained"].values()), default=0)
    for c in module.collectives():
        if c.kind == "all-gather" and "adam" in c.source and c.bytes >= 4 * master:
            found.append(f"optimizer state is gathered whole ({c.source})")
    return found


def by_kind(collectives: tuple[Collective, ...]) -> dict[str, dict[str, float]]:
    """{kind: {"count", "bytes", "exposed_bytes"}} of a step.

    Bytes are those that leave a device; exposed ones do not overlap compute.
    """
    table: dict[str, dict[str, float]] = collections.defaultdict(
        lambda: {"count": 0, "bytes": 0, "exposed_bytes": 0}
    )
    for c in collectives:
        entry = table[c.kind]
        entry["count"] += c.times
        entry["bytes"] += c.moved
        entry["exposed_bytes"] += 0 if c.overlapped else c.moved
    return dict(table)


def between_slices(plan: Plan, dcn: float | None = None) -> dict[str, Any]:
    """What a step sends between slices, and how long that takes where nothing overlaps it.

    Args:
      dcn: bytes/s of a device; None: by the table of devices.
    """
    kinds: dict[str, float] = collections.defaultdict(float)
    for crossing in plan.across:
        kinds[crossing.kind] += crossing.bytes * crossing.times
    each, rate = sum(kinds.values()), dcn or plan.topology.device.dcn
    return {
        "bytes_per_device": each,
        "bytes_per_slice": each * plan.topology.devices / plan.topology.slices,
        "bytes_per_device_by_kind": dict(kinds),
        "dcn_bytes_per_second": rate,
        "seconds": each / rate,
    }


def _is_collective(name: str) -> bool:
    return name.startswith(("all-gather", "all-reduce", "all-to-all"))
