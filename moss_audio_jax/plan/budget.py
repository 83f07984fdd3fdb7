"""Estimates a whole run: chips, days, hosts, checkpoints, failures. Needs no TPU compiler.

    work of a step      train_step(config) FLOPs, padding included (models/flops.py)
    step seconds        work / (MFU x peak x chips), or a plan's modelled step
    tokens per second   rows x tokens of a row that are not padding / step seconds
    goodput             useful seconds / all seconds (goodput.py)

Step time and rows per chip are those of one slice at every number of chips: the cost of
communication between slices is not modelled. Every rate that is not computed is a field of
`Assumed`, with its source.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from typing import Any, TypeVar

from moss_audio_jax import files
from moss_audio_jax.audio import lengths
from moss_audio_jax.config import EncoderConfig, ModelConfig, ProcessorConfig, read_json
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.models import flops
from moss_audio_jax.plan.budget_report import picture, table
from moss_audio_jax.plan.goodput import Saving, goodput
from moss_audio_jax.plan.topologies import Topology, parse

T = TypeVar("T")

CHIPS = (256, 512, 1024, 2048, 4096, 8192)
SEED = 0  # seed of the simulation
MFU = 0.45
DAY = 86400.0


def assumption(value: float, unit: str, source: str, zero: bool = False) -> Any:
    return dataclasses.field(default=value, metadata={"unit": unit, "source": source, "zero": zero})


_BENCH = "tools/bench/pipeline.py"


@dataclasses.dataclass(frozen=True)
class Assumed:
    """Assumed rates; --assume KEY=VALUE changes one.

    The rates from tools/bench/pipeline.py are processor times of one thread (OMP_NUM_THREADS=1) of
    an AMD EPYC.
    """

    text_share: float = assumption(
        0.0, "share", "of tokens in rows without audio: the weight of data.mixture.text", zero=True
    )
    clip_seconds: float = assumption(10.0, "s", f"mean clip of the mixture in {_BENCH}")
    text_tokens: float = assumption(180.0, "tokens", "mean text and chat of a row in that mixture")
    text_bytes: float = assumption(4.0, "bytes/token", "assumed: English text")
    fill: float = assumption(0.9976, "share", f"of a packed row's tokens; measured, {_BENCH}")
    audio_hours_per_core_second: float = assumption(
        0.21,
        "h/s",
        f"decode to packed batch, 44.1 kHz mp3 (flac 0.22, 16 kHz wav 0.45); measured, {_BENCH}",
    )
    chips_per_host: float = assumption(
        4.0, "chips", "a VM of a multi-host slice; on v5e it has 112 vCPUs"
    )
    flac: float = assumption(135.0, "kbit/s", "LibriSpeech: 30 GB for 497 h, openslr.org/12")
    opus: float = assumption(32.0, "kbit/s", "full-band speech, RFC 7587 section 3.1.1")
    host_copy: float = assumption(5e9, "bytes/s", "assumed: from a host's devices to its memory")
    host_storage: float = assumption(1e9, "bytes/s", "assumed: from a host to storage, and back")
    all_storage: float = assumption(25e9, "bytes/s", "assumed: from all hosts together to storage")
    save_sync: float = assumption(2.0, "s", "assumed: barrier of a save", zero=True)
    detect: float = assumption(
        100.0, "s", "default heartbeat_timeout_seconds of jax.distributed", zero=True
    )
    replace: float = assumption(
        300.0, "s", "assumed: another host replaces the lost one", zero=True
    )
    start: float = assumption(120.0, "s", "assumed: processes start, the step compiles", zero=True)
    chip_mtbf_hours: float = assumption(
        54 * 24 * 16384 / 419,
        "h",
        "419 unexpected stops of 16,384 GPUs in 54 days, arXiv 2407.21783",
    )

    def hosts(self, chips: int) -> int:
        return math.ceil(chips / self.chips_per_host)


def assume(text: str, base: T) -> T:
    """`base`, whose fields are `assumption`s, with the values of "KEY=VALUE,...".

    Raises:
      UsageError: an unknown key, or an impossible value.
    """
    known = {field.name: field.metadata for field in dataclasses.fields(base)}
    values = {}
    for part in filter(None, text.split(",")):
        key, _, given = part.partition("=")
        if key not in known:
            raise UsageError(f"--assume {part!r}: expected KEY=VALUE, one of {', '.join(known)}")
        try:
            value = float(given)
        except ValueError:
            value = math.nan
        most = 1 if known[key]["unit"] == "share" else math.inf
        if not (0 <= value <= most and value < math.inf and (value or known[key]["zero"])):
            raise UsageError(f"--assume {part!r}: expected a number of {known[key]['unit']}")
        values[key] = value
    return dataclasses.replace(base, **values)


def listed(assumed: Any) -> dict[str, dict[str, Any]]:
    """The assumptions by name, each with its value, unit and source."""
    return {
        field.name: {
            "value": getattr(assumed, field.name),
            "unit": field.metadata["unit"],
            "source": field.metadata["source"],
        }
        for field in dataclasses.fields(assumed)
    }


# --- what a token is -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mix:
    """Averages per decoder token: seconds of audio, audio tokens, encoder chunks."""

    seconds: float
    audio_tokens: float
    chunks: float
    text_tokens: float
    row_tokens: float  # of one example with audio


def mix(assumed: Assumed, encoder: EncoderConfig) -> Mix:
    """The average token: clips of `clip_seconds` with markers and text; `text_share` has none."""
    from moss_audio_jax.text.prompt import audio_span

    frames = lengths.mel_frames(round(assumed.clip_seconds * lengths.SAMPLE_RATE))
    audio = lengths.audio_tokens(frames)
    span = len(audio_span(audio, ProcessorConfig(), range(10))) + 2  # start and end
    row = span + assumed.text_tokens
    whole = encoder.attention != "chunked"
    chunks = 1 if whole else len(lengths.chunk_frames(frames, encoder.chunk_frames))
    each = (1 - assumed.text_share) / row
    text = assumed.text_share + each * assumed.text_tokens
    return Mix(each * assumed.clip_seconds, each * audio, each * chunks, text, row)


def flops_per_token(model: ModelConfig, length: int, frames: int, of: Mix) -> dict[str, float]:
    """Training FLOPs of an average token, by part: forward, and backward at twice the forward.

    Args:
      length: tokens of a row; causal attention sees half of them on average.
      frames: mel frames of an encoder chunk, padding included.
    """
    decoder = flops.decoder_forward(model.decoder, 1, length)
    encoder = of.chunks * flops.encoder_forward(model.encoder, 1, frames)
    adapter = of.audio_tokens * flops.adapter_forward(model, 1)
    return {"decoder": 3 * decoder, "encoder": 3 * encoder, "adapter": 3 * adapter}


def tokens_in_use(length: int, chunks: int, fill: float, of: Mix) -> float:
    """Tokens of a row that are not padding; a row ends when its tokens or its chunks are full."""
    return min(fill * length, chunks / of.chunks if of.chunks else math.inf)


def hours_to_tokens(hours: float, of: Mix) -> float:
    """Tokens of one epoch over `hours` of audio."""
    return hours * 3600 / of.seconds


# --- hosts ---------------------------------------------------------------------------------------


def host_needs(tokens_per_second: float, of: Mix, chips: int, assumed: Assumed) -> dict[str, Any]:
    """What input processing needs.

    cores = hours of audio per second / the rate of a core; bytes/s = audio x bit rate + text.
    """
    audio = tokens_per_second * of.seconds
    hosts = assumed.hosts(chips)
    cores = audio / 3600 / assumed.audio_hours_per_core_second
    text = tokens_per_second * of.text_tokens * assumed.text_bytes
    read = {name: audio * bits / 8 + text for name, bits in bit_rates(assumed).items()}
    return {
        "hosts": hosts,
        "audio_hours_per_second": audio / 3600,
        "cores": cores,
        "cores_per_host": cores / hosts,
        "read_bytes_per_second": read,
        "read_bytes_per_second_per_host": {name: rate / hosts for name, rate in read.items()},
    }


def bit_rates(assumed: Assumed) -> dict[str, float]:
    """bit/s of audio in each format that a row may hold; mel: 100 frames of 128 bfloat16."""
    mel = lengths.SAMPLE_RATE / lengths.HOP * EncoderConfig().mel_bins * 16
    return {"flac": 1000 * assumed.flac, "opus": 1000 * assumed.opus, "mel": mel}


# --- checkpoints ---------------------------------------------------------------------------------


def saving(size: int, chips: int, assumed: Assumed) -> Saving:
    """Times for a checkpoint of `size` bytes; each host copies, writes and reads its part."""
    hosts = assumed.hosts(chips)
    block = assumed.save_sync + size / hosts / assumed.host_copy
    write = max(size / hosts / assumed.host_storage, size / assumed.all_storage)
    return Saving(block, write, assumed.detect + assumed.replace + assumed.start + write)


def alone(config: Any) -> Any:
    """The `compile.Run` of a config on one device: enough where only shapes matter."""
    import jax

    from moss_audio_jax.plan import compile as compiling

    jax.config.update("jax_platforms", "cpu")
    config = config.copy_and_resolve_references()
    config.mesh.update(data=1, fsdp=1, tensor=1, sequence=1)
    return compiling.build(config, jax.devices()[:1])


def checkpoint_bytes(run: Any) -> int:
    """Bytes of a checkpoint of a `compile.Run`; what is frozen is not saved."""
    import jax

    kept = {name: value for name, value in run.state.items() if name != "frozen"}
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(kept))


# --- the command ---------------------------------------------------------------------------------

_OPTIONS = ("tokens", "audio_hours", "plan", "mfu")


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--budget", action="store_true", help="chips, days, hosts, failures; needs no libtpu"
    )
    group = options.add_argument_group("budget")
    group.add_argument("--tokens", type=float, help="tokens of the run; default 1.2e12")
    group.add_argument("--audio-hours", type=float, help="hours of the data; default 1e6")
    group.add_argument("--plan", metavar="FILE.json", help="use the step time of a plan (--output)")
    group.add_argument("--mfu", type=float, help=f"or assume an MFU; default {MFU}")
    group.add_argument(
        "--assume",
        metavar="KEY=VALUE,...",
        help="change rates that the table lists; also those of a run with rewards",
    )


def wanted(args: argparse.Namespace) -> bool:
    """Whether the budget runs instead of the compiler. Raises UsageError if options contradict."""
    given = [name for name in _OPTIONS if getattr(args, name) is not None]
    if given and not args.budget:
        raise UsageError(f"--{given[0].replace('_', '-')} is an option of --budget; add --budget")
    if args.budget and args.sweep:
        raise UsageError("--budget and --sweep cannot be combined; use one")
    if args.plan and args.mfu is not None:
        raise UsageError("--plan and --mfu both give the step time; use one")
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise UsageError(f"--mfu {args.mfu:g}: expected a share above 0, at most 1")
    for name in ("tokens", "audio_hours"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} {value:g}: expected a number above 0")
    return args.budget


def run(args: argparse.Namespace, config: Any, topology: Topology) -> int:
    """Prints the budget; writes --output and --picture. Returns 0."""
    written = budget(args, config, topology)
    print(table(written))
    if args.output:
        files.write_whole(args.output, json.dumps(written, indent=1) + "\n")
    if args.picture:
        files.write_whole(args.picture, picture(written))
    return 0


def budget(args: argparse.Namespace, config: Any, topology: Topology) -> dict[str, Any]:
    """The budget of one config as a JSON object; seconds, bytes, FLOPs."""
    given = args.assume or ""
    share = 0.0 if "text_share=" in given else text_share(config)
    assumed = assume(given, Assumed(text_share=share))

    built = alone(config)
    size = checkpoint_bytes(built)

    shape, model = built.shape, built.model
    average, heard = (
        mix(dataclasses.replace(assumed, text_share=share), model.encoder)
        for share in (assumed.text_share, 0.0)
    )
    if heard.row_tokens > shape.tokens:
        raise UsageError(
            f"a clip of {assumed.clip_seconds:g} s and its text are {heard.row_tokens:.0f} tokens; "
            f"data.length is {shape.tokens}: see --assume clip_seconds=, text_tokens="
        )
    work = flops.train_step(model, shape.rows, shape.tokens, shape.chunks, shape.frames)
    step = _step(args, topology, work, shape)

    def rate(chips: int, of: Mix) -> float:
        used = tokens_in_use(shape.tokens, shape.chunks, assumed.fill, of)
        return step["rows_per_chip"] * chips * used / step["seconds"]

    tokens = args.tokens or 1.2e12
    hours = args.audio_hours or 1e6
    sizes = []
    for chips in CHIPS:
        speed = rate(chips, average)
        useful = tokens / speed
        mtbf = assumed.chip_mtbf_hours * 3600 / chips
        every = config.checkpoint.every * step["seconds"]
        fate = goodput(useful, every, saving(size, chips, assumed), mtbf, [SEED, chips])
        heard_days = hours_to_tokens(hours, heard) / rate(chips, heard) / DAY
        sizes.append(
            {
                "chips": chips,
                "step_tokens": step["rows_per_chip"] * chips * shape.tokens,
                "tokens_per_second": speed,
                "days_without_failures": useful / DAY,
                "days": useful / DAY / fate["goodput"],
                "chip_days": chips * useful / DAY / fate["goodput"],
                "audio_days": heard_days / fate["goodput"],
                **fate,
                "hosts": host_needs(speed, average, chips, assumed),
            }
        )
    stored = {name: 450.0 * hours * bits for name, bits in bit_rates(assumed).items()}  # 3600 / 8
    return {
        "config": args.config,
        "topology": topology.name,
        "tokens": tokens,
        "audio_hours": hours,
        "audio_hours_tokens": hours_to_tokens(hours, heard),
        "audio_hours_in_tokens": tokens * average.seconds / 3600,
        "audio_hours_bytes": stored,
        "step": step,
        "every_steps": config.checkpoint.every,
        "mix": dataclasses.asdict(average),
        "flops_per_token": flops_per_token(model, shape.tokens, shape.frames, average),
        "step_flops_per_place": work / shape.rows / shape.tokens,
        "checkpoint_bytes": size,
        "pod": host_needs(rate(topology.chips, average), average, topology.chips, assumed)
        | {"chips": topology.chips},
        "sizes": sizes,
        "assumed": listed(assumed),
    }


def text_share(config: Any) -> float:
    """The weight of `text` in data.mixture, taken as a share of tokens; 0 without one."""
    mixture = {} if config.data.train else config.data.mixture
    if "text" not in mixture:
        return 0.0
    weights = {name: part.get("weight") for name, part in mixture.items()}
    if not all(isinstance(weight, int | float) for weight in weights.values()):
        raise UsageError("data.mixture gives no numeric weights: give --assume text_share=")
    return weights["text"] / sum(weights.values())


def _step(args: argparse.Namespace, topology: Topology, work: float, shape: Any) -> dict[str, Any]:
    """The step: its seconds on the slice, MFU, rows per chip, and the source of these figures."""
    peak = topology.devices * topology.device.peak
    if not args.plan:
        mfu = args.mfu or MFU
        source = "MFU assumed" + ("" if args.mfu else ", no --plan or --mfu given")
        rows = shape.rows / topology.chips
        return {"seconds": work / mfu / peak, "mfu": mfu, "rows_per_chip": rows, "source": source}
    raw = read_json(args.plan)
    keys = ("topology", "chips", "tokens_per_step", "model_flops_per_step", "estimate")
    if missing := [key for key in keys if key not in raw]:
        raise InputError(f"{args.plan}: {missing[0]} is missing; expected what plan --output wrote")
    if not raw["estimate"]:
        raise InputError(
            f"{args.plan}: this step does not fit, so it has no time; use one that fits"
        )
    if parse(raw["topology"]).generation != topology.generation:
        raise UsageError(f"{args.plan} is for {raw['topology']}, --topology {topology.name}")
    place = raw["model_flops_per_step"] / raw["tokens_per_step"]
    if not math.isclose(place, work / shape.rows / shape.tokens, rel_tol=1e-6):
        raise UsageError(
            f"{args.plan}: {place:.6g} FLOPs a token, but the config's rows take "
            f"{work / shape.rows / shape.tokens:.6g}; give the plan's config and overrides"
        )
    return {
        "seconds": raw["estimate"]["step_seconds"],
        "mfu": raw["estimate"]["mfu"],
        "rows_per_chip": raw["tokens_per_step"] / shape.tokens / raw["chips"],
        "source": f"modelled, {args.plan} on {raw['topology']}",
    }
