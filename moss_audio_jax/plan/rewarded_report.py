"""The plan of a run that learns from rewards as a table and as JSON, and the price of the run."""

from __future__ import annotations

import argparse
import json
from typing import Any

from moss_audio_jax import files
from moss_audio_jax.config import read_json
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.plan import budget, report
from moss_audio_jax.plan.budget import listed
from moss_audio_jax.plan.budget_report import rates
from moss_audio_jax.plan.goodput import goodput
from moss_audio_jax.plan.report import readable
from moss_audio_jax.plan.rewarded import RewardedPlan
from moss_audio_jax.plan.topologies import Topology

METHOD = (
    "the step's method for the train step and scoring; a decode step takes at least the time of "
    "its reads at the mean reach; every pass ends with its longest answer; without the host, the "
    "encoder's hearing of prompts, and rewards; modelled, not measured"
)
# A plan is of the run whose price is asked if these are equal.
_SAME = ("prompts", "answers", "prompt_tokens", "new_tokens", "slots", "dynamic", "refills")
_SAME += ("updates", "ahead", "kl")


def as_json(plan: RewardedPlan) -> dict[str, Any]:
    """What `report.as_json` says of the train step, and "rewards": the whole of a step. Bytes are
    of one device."""
    policy, decode = plan.run.policy, plan.rollouts.decode
    rollouts = plan.run.rollouts
    return report.as_json(plan.step) | {
        "fits": plan.fits,
        "rewards": {
            "policy": {name: policy[name] for name in _SAME},
            "mesh": dict(plan.run.learning.mesh.shape),
            "generating_mesh": dict(rollouts.mesh.shape),
            "rows": plan.step.rows,
            "length": plan.step.length,
            "filled_share": plan.full,
            "peak_bytes": plan.peaks,
            "weights_bytes": plan.rollouts.weights,
            "cache_bytes": plan.rollouts.cache,
            "handoff_bytes": plan.moved,
            "groups_asked": list(plan.asked.passes),
            "decode_steps": plan.asked.steps,
            "decode_step_seconds": decode.estimate and decode.estimate.seconds,
            "new_tokens_per_second": _speed(plan),
            "scores": list(plan.run.scores),
            "seconds": plan.seconds,
            "step_seconds": plan.seconds and sum(plan.seconds.values()),
            "refusals": plan.refusals,
            "assumed": listed(plan.assumed),
            "method": METHOD,
        },
    }


def table(plan: RewardedPlan) -> str:
    """The plan as lines of text: the train step, then the whole run."""
    policy, asked, rollouts = plan.run.policy, plan.asked, plan.run.rollouts
    mesh = ", ".join(f"{axis} {n}" for axis, n in rollouts.mesh.shape.items() if n > 1) or "one"
    lines = [
        "the train step alone",
        report.table(plan.step),
        "",
        f"a step with its rollouts: {'fits' if plan.fits else 'DOES NOT FIT'}",
        f"  {policy.prompts} groups of {policy.answers} answers of at most {policy.new_tokens} "
        f"tokens; {policy.slots} written together on mesh {mesh}",
        "  peak of one device, with the train state",
        *(f"    {moment:<9}{readable(peak):>11}" for moment, peak in plan.peaks.items()),
        f"    {'usable':<9}{readable(plan.usable):>11}",
        f"  of rollouts: weights {readable(plan.rollouts.weights)}, cache "
        f"{readable(plan.rollouts.cache)}; a device receives {readable(plan.moved)} in the handoff",
        f"  asked of a phase: {' + '.join(map(str, asked.passes))} groups; {asked.steps:,.0f} "
        f"decode steps; {plan.full:.0%} of the step's tokens are filled",
    ]
    if plan.seconds:
        total = sum(plan.seconds.values())
        lines += [
            f"  modelled step {total:.3g} s",
            *(
                f"    {phase:<9}{seconds:>9.3g} s {seconds / total:>6.1%}"
                for phase, seconds in plan.seconds.items()
            ),
            f"  a decode step {1000 * plan.rollouts.decode.estimate.seconds:.2f} ms (its reads "
            f"{1000 * plan.rollouts.floor:.2f}); {_speed(plan):,.0f} new tokens/s while decoding",
        ]
    lines += [f"  the compiler says of {name}: {why}" for name, why in plan.refusals.items()]
    lines += ["  assumed (--assume KEY=VALUE)", *rates(listed(plan.assumed))]
    return "\n".join([*lines, f"  method: {METHOD}"])


def _speed(plan: RewardedPlan) -> float | None:
    """New tokens a second while decoding, on the slice."""
    if not plan.seconds:
        return None
    policy, asked = plan.run.policy, plan.asked
    return asked.groups * policy.answers * asked.answer / policy.updates / plan.seconds["decode"]


# --- the price of a run --------------------------------------------------------------------------


def price(args: argparse.Namespace, config: Any, topology: Topology) -> int:
    """Prints what a whole run takes on this slice, from its plan; writes --output. Returns 0."""
    written = priced(args, config, topology)
    print(priced_table(written))
    if args.output:
        files.write_whole(args.output, json.dumps(written, indent=1) + "\n")
    return 0


def priced(args: argparse.Namespace, config: Any, topology: Topology) -> dict[str, Any]:
    """The price as a JSON object.

    Raises:
      UsageError: no plan is given, or it is of another run or slice.
      InputError: the file is no plan of a run with rewards, or it does not fit.
    """
    for name in ("tokens", "audio_hours", "mfu", "picture"):
        if getattr(args, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} is of a run over rows; a run with rewards has "
                "train.steps steps"
            )
    if not args.plan:
        raise UsageError(
            "a run with rewards is priced by its plan: run plan with --output FILE.json, then "
            "--budget --plan FILE.json"
        )
    raw = read_json(args.plan)
    found = raw.get("rewards")
    if not found:
        raise InputError(f"{args.plan}: rewards is missing; expected the plan of such a config")
    if not raw["fits"]:
        raise InputError(f"{args.plan}: this run does not fit; use one that fits")
    if (raw["topology"], raw["chips"]) != (topology.name, topology.chips):
        raise UsageError(f"{args.plan} is for {raw['topology']}, --topology {topology.name}")
    for name in _SAME:
        if found["policy"][name] != config.policy[name]:
            raise UsageError(
                f"{args.plan}: policy.{name} is {found['policy'][name]}, in the config "
                f"{config.policy[name]}; give the plan's config and overrides"
            )
    assumed = budget.assume(args.assume or "", budget.Assumed())
    steps, seconds, chips = config.train.steps, found["step_seconds"], topology.chips
    size = budget.checkpoint_bytes(budget.alone(config))
    useful, every = steps * seconds, config.checkpoint.every * seconds
    mtbf = assumed.chip_mtbf_hours * 3600 / chips
    fate = goodput(useful, every, budget.saving(size, chips, assumed), mtbf, [budget.SEED, chips])
    days = useful / budget.DAY / fate["goodput"]
    mean = found["assumed"]["answer_share"]["value"] * config.policy.new_tokens
    answers = steps * sum(found["groups_asked"]) * config.policy.answers / config.policy.updates
    used = ("host_copy", "host_storage", "all_storage", "chips_per_host", "save_sync", "detect")
    used += ("replace", "start", "chip_mtbf_hours")
    return {
        "config": args.config,
        "topology": topology.name,
        "chips": chips,
        "steps": steps,
        "step_seconds": seconds,
        "seconds": found["seconds"],
        "answers": answers,
        "new_tokens": answers * mean,
        "days_without_failures": useful / budget.DAY,
        "days": days,
        "chip_days": chips * days,
        "every_steps": config.checkpoint.every,
        "checkpoint_bytes": size,
        **fate,
        "source": f"modelled, {args.plan}",
        "assumed": found["assumed"]
        | {name: entry for name, entry in listed(assumed).items() if name in used},
    }


def priced_table(found: dict[str, Any]) -> str:
    """The price as lines of text."""
    shares = ", ".join(
        f"{phase} {seconds / found['step_seconds']:.0%}"
        for phase, seconds in found["seconds"].items()
    )
    return "\n".join(
        [
            f"{found['config']} on {found['topology']}, {found['chips']} chips: "
            f"{found['steps']:,} steps, {found['answers']:,.0f} answers, "
            f"{found['new_tokens']:.3g} new tokens",
            f"  step {found['step_seconds']:.3g} s: {shares} ({found['source']})",
            f"  {found['days']:.2f} days, {found['chip_days']:,.0f} chip-days; goodput "
            f"{found['goodput']:.2%}, saved every {found['every_steps']:,} steps "
            f"{found['goodput_as_configured']:.2%}",
            f"  checkpoint {found['checkpoint_bytes'] / 1e9:,.1f} GB",
            "  rates (--assume KEY=VALUE)",
            *rates(found["assumed"]),
        ]
    )
