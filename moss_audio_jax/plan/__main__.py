"""Does a run fit a TPU slice, and how fast would it be? Asks the TPU compiler; needs no TPU.

example:
  moss-audio-jax plan --config sft:8b --topology v5e:16x16
  moss-audio-jax plan --config sft --topology v6e:4x4 --sweep --output plan.json
  moss-audio-jax plan --config pretrain_full:8b --topology v5e:16x16 --budget
  moss-audio-jax plan --config sft:8b --topology v5e:2x4 --generate --quantize weights
  moss-audio-jax plan --config dapo:8b --topology v5p:4x4x8 --output plan.json
  moss-audio-jax plan --config dapo:8b --topology v5p:4x4x8 --budget --plan plan.json

--config NAME[:ARG] is a packaged config (`moss-audio-jax` lists them), or the path of your own.

Compiles the train step of the config for the slice. Reports the memory of one device by owner, the
collectives, and a modelled step time, which ranks settings but is not a measurement. No weights are
read. --config.KEY=VALUE overrides a key as in `train`.

--sweep tries rows per device, row lengths, remat policies and tensor splits, and reports the best
setting that fits. With --output, a sweep that was killed continues where it stopped.
--budget estimates a whole run (chips, days, hosts, failures) by formulas, without the compiler.
--generate compiles prefill and decoding instead of the train step, for a model of the config's
sizes. It reports whether they fit and how much memory a decoded token must read.

Of a config that learns from rewards (`train.source`), prefill, decoding and scoring are compiled
too, and a step is modelled by phase. --assume changes what is assumed of its answers. Its --budget
needs the plan: --plan FILE.json.

Needs the extra `plan` (libtpu, the TPU compiler), except for --budget: pip install -e '.[plan]'.
Exit code 3: it does not fit.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, so that Ctrl-C ends those too
    from moss_audio_jax import cli

    cli.run_verb("plan")

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from moss_audio_jax import command, files
from moss_audio_jax.config import QUANTIZE, Compute
from moss_audio_jax.devices import GIB
from moss_audio_jax.errors import UsageError
from moss_audio_jax.plan import budget, topologies

DOES_NOT_FIT = 3  # the exit code for a run that does not fit
_LOAD = ("batch", "prompt_tokens", "audio_seconds", "new_tokens")
_GENERATE = (*_LOAD, "quantize", "mesh")


def main(argv: Sequence[str]) -> int:
    options = command.parser("plan", __doc__)
    options.add_argument("--config", required=True, metavar="NAME[:ARG]")
    options.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="v4:2x2x1, v5e:16x16, v5p:4x4x8, v6e:4x4, tpu7x:2x2x1",
    )
    options.add_argument(
        "--slices",
        type=command.positive,
        default=1,
        metavar="N",
        help="number of slices, which mesh.data spans; default 1",
    )
    options.add_argument(
        "--dcn",
        type=_bandwidth,
        metavar="GB/S",
        help="of a device between slices; default: a table's",
    )
    options.add_argument("--output", type=Path, metavar="FILE.json")
    options.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw memory by owner")
    options.add_argument("--sweep", action="store_true", help="find the best setting")
    group = options.add_argument_group("options of --sweep, each a list like 1,2,4")
    group.add_argument("--rows", type=_numbers, default=(1, 2, 4, 8), help="per device")
    group.add_argument("--lengths", type=_numbers, help="tokens per row; default: as in the config")
    group.add_argument("--remat", type=_words, help="policies; default: as in the config")
    group.add_argument("--tensor", type=_numbers, default=(1,), help="mesh axis; the rest is fsdp")
    budget.add_options(options)
    options.add_argument("--generate", action="store_true", help="plan prefill and decoding")
    group = options.add_argument_group("generate")
    group.add_argument(
        "--batch", type=command.positive, metavar="N", help="answers decoded together; default 64"
    )
    group.add_argument("--prompt-tokens", type=command.positive, metavar="N", help="default 2048")
    group.add_argument(
        "--audio-seconds", type=float, metavar="S", help="audio in each prompt; default 120"
    )
    group.add_argument("--new-tokens", type=command.positive, metavar="N", help="default 512")
    group.add_argument("--quantize", choices=QUANTIZE, help="int8; default none")
    group.add_argument(
        "--mesh",
        type=command.mesh_sizes,
        metavar="AXIS=N,...",
        help="default: tensor as large as the key/value heads allow, the rest data",
    )
    args, rest = options.parse_known_args(argv)

    on_paper = budget.wanted(args)
    given = [name for name in _GENERATE if getattr(args, name) is not None]
    if given and not args.generate:
        raise UsageError(f"--{given[0].replace('_', '-')} is an option of --generate; add it")
    if args.generate and (args.budget or args.sweep or args.picture):
        raise UsageError("--generate can be combined with none of --budget, --sweep, --picture")
    topology = topologies.parse(args.topology, args.slices)
    from moss_audio_jax.train.__main__ import load_config

    config = load_config(args.config, rest)
    rewarding = bool(config.train.source)
    if args.assume and not (args.budget or rewarding):
        raise UsageError("--assume is an option of --budget and of a run with rewards")
    if on_paper and rewarding:
        from moss_audio_jax.plan import rewarded_report

        return rewarded_report.price(args, config, topology)
    if on_paper:
        return budget.run(args, config, topology)
    from moss_audio_jax.plan import compile as compiling

    compiling.prepare_environment()
    from moss_audio_jax.plan import estimate, report, sweep

    devices = compiling.slice_devices(topology)
    if len(devices) != topology.devices:
        raise UsageError(
            f"topology {topology.name} has {len(devices)} devices; expected {topology.devices}"
        )

    if args.generate:
        return _generate(args, compiling.model_of(config), topology, devices)
    if rewarding and not args.sweep:
        return _rewarded(args, config, topology, devices)

    def planned(config) -> estimate.Plan:
        run = compiling.build(config, devices)
        return estimate.plan(run, compiling.compile_step(run), topology)

    if not args.sweep:
        result = planned(config)
        written = report.as_json(result, args.dcn)
    else:
        series = sweep.settings(
            args.rows,
            args.lengths or (config.data.length,),
            args.remat or (config.train.remat,),
            args.tensor,
            len(devices),
            config.model.decoder.kv_heads,
        )

        kept = sweep.Kept(args.output)
        compiler = compiling.versions()

        def tried(setting: sweep.Setting) -> estimate.Plan:
            applied = setting.apply(config, len(devices))
            question = {"config": applied.to_dict(), "topology": topology, **compiler}
            plan = kept.plan(question, lambda: planned(applied))
            command.say(_line(setting, plan))
            return plan

        found = sweep.search(series, tried)
        chosen = sweep.best(found)
        if chosen is None and not found:
            raise UsageError("no setting of the sweep divides the slice; see --tensor")
        # If nothing fits, the nearest setting shows why.
        result = chosen[1] if chosen else min(found, key=lambda pair: pair[1].memory.peak)[1]
        written = report.as_json(result, args.dcn)
        written["sweep"] = [
            {
                "rows": s.rows,
                "length": s.length,
                "remat": s.remat,
                "tensor": s.tensor,
                **report.as_json(plan, args.dcn),
            }
            for s, plan in found
        ]
    print(report.table(result, args.dcn))
    if args.output:
        files.write_whole(args.output, json.dumps(written, indent=1) + "\n")
        if args.sweep:
            kept.drop()
    if args.picture:
        files.write_whole(args.picture, report.picture(result))
    return 0 if result.fits else DOES_NOT_FIT


def _generate(args: argparse.Namespace, model, topology: topologies.Topology, devices) -> int:
    from moss_audio_jax.plan import serving, serving_report

    given = {name: getattr(args, name) for name in _LOAD if getattr(args, name) is not None}
    compute = Compute(quantize=args.quantize or "none")
    made = serving.build(model, compute, serving.Load(**given), devices, args.mesh)
    plan = serving_report.assess(
        made, serving.compile_prefill(made), serving.compile_decode(made), topology
    )
    print(serving_report.table(plan))
    if args.output:
        written = json.dumps(serving_report.as_json(plan), indent=1)
        files.write_whole(args.output, f"{written}\n")
    return 0 if plan.fits else DOES_NOT_FIT


def _rewarded(args: argparse.Namespace, config, topology: topologies.Topology, devices) -> int:
    from moss_audio_jax.plan import report, rewarded, rewarded_report

    assumed = budget.assume(args.assume or "", rewarded.Assumed())
    plan = rewarded.plan(rewarded.build(config, devices), topology, assumed)
    print(rewarded_report.table(plan))
    if args.output:
        written = json.dumps(rewarded_report.as_json(plan), indent=1)
        files.write_whole(args.output, f"{written}\n")
    if args.picture:
        files.write_whole(args.picture, report.picture(plan.step))
    return 0 if plan.fits else DOES_NOT_FIT


def _line(setting, plan) -> str:
    what = f"{plan.estimate.seconds:.2f} s, MFU {plan.estimate.mfu:.0%}" if plan.estimate else ""
    return (
        f"{setting.rows} x {setting.length} a device, remat {setting.remat}, tensor "
        f"{setting.tensor}: peak {plan.memory.peak / GIB:.2f} GiB, "
        f"{'fits' if plan.fits else 'does not fit'} {what}".rstrip()
    )


def _bandwidth(text: str) -> float:
    try:
        rate = 1e9 * float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of GB/s above 0")
    return rate


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(command.positive(part) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    from moss_audio_jax.models.blocks import REMAT  # imports JAX, which --help does not need

    words = tuple(text.split(","))
    for word in words:
        if word not in REMAT:
            raise argparse.ArgumentTypeError(f"{word!r}: expected one of {', '.join(REMAT)}")
    return words
