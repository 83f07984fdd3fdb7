"""The cost of generation on a slice: memory, the bytes that a token must read, modelled times.

A decode step reads every weight of the decoder and the whole cache once:

    floor = (bytes of decoder weights + bytes of cache on one device) / bandwidth of its memory

No step can be faster than this. The modelled time is that of `estimate` (the compiler's cycles,
exposed collectives), but compute takes at least the floor, because the compiler gives no cycles to
prefetched reads. Both are models, not measurements. Of a conditional the costliest branch counts,
so the modelled step includes sampling with top_k.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from moss_audio_jax.audio.lengths import audio_tokens
from moss_audio_jax.models import cache as kv_cache
from moss_audio_jax.models import flops
from moss_audio_jax.plan.compile import Compiled, held_bytes
from moss_audio_jax.plan.estimate import METHOD, Estimate, by_kind, estimate
from moss_audio_jax.plan.hlo import Collective, Made, Module
from moss_audio_jax.plan.report import readable
from moss_audio_jax.plan.serving import Serving, decoder_params
from moss_audio_jax.plan.topologies import Topology

_METHOD = f"{METHOD}; a decode step takes at least the time of its reads"


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program on one device, in bytes and seconds.

    Attributes:
      peak: all memory in use while it runs, including weights and decode state that are not its
        arguments.
      temporaries: the part of the peak that is neither weights nor decode state.
      estimate: of a prefill, or of one decode step; None if the compiler refused the program.
    """

    fits: bool
    peak: int
    temporaries: int
    compile_seconds: float
    collectives: tuple[Collective, ...] = ()
    estimate: Estimate | None = None
    refusal: str = ""


@dataclasses.dataclass(frozen=True)
class ServingPlan:
    """Generation on a slice.

    Attributes:
      weights, cache: bytes on one device; the cache is that of all answers.
      weights_read, cache_read: bytes of them that one decode step reads on one device.
      prefill_flops: FLOPs of one prefill, on all devices.
      copies: arrays as large as a layer's weight or cache that a step writes.
      copies_once: such arrays that are written before or after the loop over steps.
    """

    serving: Serving
    topology: Topology
    weights: int
    cache: int
    weights_read: int
    cache_read: int
    prefill_flops: float
    prefill: Program
    decode: Program
    copies: tuple[Made, ...]
    copies_once: tuple[Made, ...]

    @property
    def fits(self) -> bool:
        return self.prefill.fits and self.decode.fits

    @property
    def floor(self) -> float:
        """Seconds that the reads of a decode step take."""
        return (self.weights_read + self.cache_read) / self.topology.device.hbm_bandwidth


def assess(
    serving: Serving,
    prefill: Compiled,
    decode: Compiled,
    topology: Topology,
    cache_share: float = 1.0,
) -> ServingPlan:
    """Memory, bytes read and modelled times of the two compiled programs; a decode step reads
    `cache_share` of the cache, which is above 1 where answers share pages."""
    model, load = serving.model, serving.load
    weights, state = held_bytes(serving.params), held_bytes(serving.state)
    decoder = held_bytes(decoder_params(serving))
    groups = kv_cache.groups_of(serving.state.cache)
    prompts, each = load.prefill()
    tokens = groups * prompts * each
    head = 2 * model.decoder.hidden_size * model.decoder.vocab_size
    seen = 2 * load.prompt_tokens - each  # twice what a token sees on average
    sound = groups * prompts * min(each, audio_tokens(round(100 * load.audio_seconds)))
    work = (
        flops.decoder_forward(model.decoder, tokens, seen)
        - (tokens - groups * prompts) * head  # logits are computed for last tokens only
        + flops.adapter_forward(model, sound)
    )
    kernels = bool(prefill.module and prefill.module.kernels())
    attention = kernels * 2 * model.decoder.heads * model.decoder.head_dim * seen
    step = decode.module.turn() if decode.module else None
    step_work = flops.decoder_forward(model.decoder, load.batch, 2 * load.cache_positions)
    cache, weights_read = held_bytes(serving.state.cache), _weights_read(serving)
    cache_read = round(cache * cache_share)
    return ServingPlan(
        serving=serving,
        topology=topology,
        weights=weights,
        cache=cache,
        weights_read=weights_read,
        cache_read=cache_read,
        prefill_flops=work,
        prefill=_program(
            prefill,
            prefill.module,
            weights,
            state,
            topology,
            work,
            attention * tokens * model.decoder.layers / topology.devices,
        ),
        decode=_program(
            decode,
            step,
            decoder + state,
            weights - decoder,
            topology,
            step_work,
            read=weights_read + cache_read,
        ),
        copies=tuple(step.made(_large(serving))) if step else (),
        copies_once=tuple(decode.module.made(_large(serving), loops=False)) if step else (),
    )


def _program(
    compiled: Compiled,
    module: Module | None,
    given: int,
    beside: int,
    topology: Topology,
    work: float,
    kernel_flops: float = 0.0,
    read: int = 0,
) -> Program:
    peak = compiled.peak + beside
    found: dict[str, Any] = {}
    if module is not None:
        collectives = tuple(module.collectives())
        found["collectives"] = collectives
        device = topology.device
        cycles = max(module.cycles(), read / device.hbm_bandwidth * device.clock)
        found["estimate"] = estimate(cycles, kernel_flops, collectives, topology, work)
    return Program(
        fits=module is not None and peak <= topology.device.usable,
        peak=peak,
        temporaries=max(0, compiled.peak - given),
        compile_seconds=compiled.seconds,
        refusal=compiled.refusal,
        **found,
    )


def _weights_read(serving: Serving) -> int:
    """Bytes of weights that a step reads, without an untied embedding (one row per answer)."""
    decoder = serving.params["language_model"]
    parts = [decoder["layers"], decoder["norm"]]
    tied = serving.model.decoder.tie_embeddings
    parts.append(decoder["embed_tokens"] if tied else serving.params["lm_head"])
    return held_bytes(parts)


def _large(serving: Serving) -> set[int]:
    """Numbers of elements, on one device, of the matrices and layer caches that a step reads."""
    decoder = serving.params["language_model"]
    of_layers = [
        x for x in jax.tree.leaves(decoder["layers"]) if len(x.shape) == 2 and x.shape[0] > 1
    ]
    of_layers += [x for kv in serving.state.cache for x in (kv.key, kv.value)]
    sizes = set(map(_elements, of_layers))
    tied = serving.model.decoder.tie_embeddings
    head = decoder["embed_tokens"] if tied else serving.params["lm_head"]
    return sizes | {max(map(_elements, jax.tree.leaves(head)))}


def _elements(leaf: jax.ShapeDtypeStruct) -> int:
    count = 1
    for side in leaf.sharding.shard_shape(leaf.shape):
        count *= side
    return count


# --- JSON and table ------------------------------------------------------------------------------


def as_json(plan: ServingPlan) -> dict[str, Any]:
    """The plan as a JSON object; bytes are of one device, FLOPs and tokens of all devices."""
    load, (prompts, tokens) = plan.serving.load, plan.serving.load.prefill()
    step = plan.decode.estimate
    return {
        "topology": plan.topology.name,
        "chips": plan.topology.chips,
        "mesh": dict(plan.serving.mesh.shape),
        "quantize": plan.serving.compute.quantize,
        **dataclasses.asdict(load),
        "cache_positions": load.cache_positions,
        "fits": plan.fits,
        "hbm_bytes": plan.topology.device.usable,
        "weights_bytes": plan.weights,
        "cache_bytes": plan.cache,
        "decode": _program_json(plan.decode)
        | {
            "weights_read_bytes": plan.weights_read,
            "cache_read_bytes": plan.cache_read,
            "floor_seconds": plan.floor,
            "floor_tokens_per_second": load.batch / plan.floor,
            "modelled_seconds": step and step.seconds,
            "copies": [dataclasses.asdict(made) for made in plan.copies],
            "copies_once": [dataclasses.asdict(made) for made in plan.copies_once],
        },
        "prefill": _program_json(plan.prefill)
        | {
            "prompts": prompts,
            "tokens": prompts * tokens,
            "model_flops": plan.prefill_flops,
            "modelled_seconds": plan.prefill.estimate and plan.prefill.estimate.seconds,
            "mfu": plan.prefill.estimate and plan.prefill.estimate.mfu,
        },
        "method": _METHOD,
    }


def _program_json(program: Program) -> dict[str, Any]:
    return {
        "fits": program.fits,
        "peak_bytes": program.peak,
        "temporaries_bytes": program.temporaries,
        "collectives": by_kind(program.collectives),
        "compile_seconds": program.compile_seconds,
        "refusal": program.refusal,
    }


def table(plan: ServingPlan) -> str:
    """The plan as lines of text."""
    load, (prompts, tokens) = plan.serving.load, plan.serving.load.prefill()
    sizes = plan.serving.mesh.shape
    mesh = ", ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1) or "one"
    lines = [
        f"{plan.topology.name}: {'fits' if plan.fits else 'DOES NOT FIT'}",
        f"  mesh {mesh}; int8: {plan.serving.compute.quantize}; {load.batch} answers, "
        f"{load.cache_positions} cache positions each",
        "  memory of one device",
        *(
            f"    {name:<22}{readable(count):>11}"
            for name, count in (
                ("weights", plan.weights),
                ("cache", plan.cache),
                ("temporaries, decode", plan.decode.temporaries),
                ("temporaries, prefill", plan.prefill.temporaries),
                ("peak, decode", plan.decode.peak),
                ("peak, prefill", plan.prefill.peak),
                ("usable", plan.topology.device.usable),
            )
        ),
        f"  a decode step reads {readable(plan.weights_read)} of weights and "
        f"{readable(plan.cache_read)} of cache a device:",
        f"    at least {1000 * plan.floor:.2f} ms, at most {load.batch / plan.floor:,.0f} tokens/s "
        "on the slice",
    ]
    if step := plan.decode.estimate:
        lines.append(
            f"  modelled step {1000 * step.seconds:.2f} ms (compute {1000 * step.compute:.2f}, "
            f"exposed collectives {1000 * step.exposed:.2f})"
        )
    lines += _exchanges("decode step", plan.decode)
    lines += [
        f"  warning: a step writes {made.op} {made.name} {made.times} times, "
        f"{readable(made.bytes)} each"
        for made in plan.copies
    ]
    lines += [
        f"  warning: before a run of steps, {made.op} writes {made.name}, {readable(made.bytes)}"
        for made in plan.copies_once
    ]
    lines.append(
        f"  a prefill: {tokens} tokens of {prompts} prompts in each group of devices, without "
        "the encoder: "
        f"{plan.prefill_flops / 1e12:,.1f} model TFLOP"
    )
    if e := plan.prefill.estimate:
        lines.append(
            f"  modelled prefill {1000 * e.seconds:,.0f} ms (compute {1000 * e.compute:,.0f}, "
            f"kernels {1000 * e.kernels:,.0f}, exposed collectives {1000 * e.exposed:,.0f}), "
            f"MFU {e.mfu:.1%}"
        )
    lines += _exchanges("prefill", plan.prefill)
    for name, program in (("decode", plan.decode), ("prefill", plan.prefill)):
        if program.refusal:
            lines.append(f"  the compiler says of {name}: {program.refusal}")
    seconds = plan.decode.compile_seconds + plan.prefill.compile_seconds
    return "\n".join([*lines, f"  compiled in {seconds:.0f} s", f"  method: {_METHOD}"])


def _exchanges(name: str, program: Program) -> list[str]:
    return [
        f"  {name}: {entry['count']:,} {kind}, {readable(entry['bytes'])} a device, of which "
        f"{readable(entry['exposed_bytes'])} overlap no compute"
        for kind, entry in sorted(by_kind(program.collectives).items())
    ]
