"""The cost of a run that learns from rewards (`post_train`): one step of it, phase by phase.

A phase hands the weights to the generating layout, asks for groups of answers until enough of them
have spread, scores these if the loss needs it, and learns from them in `policy.updates` steps. The
programs are those of the run, compiled for the slice: the train step with as many rows as a batch
may have, the scoring of as many, a prefill of the longest prompts, and the decoding of all slots.

    handoff   bytes that the fullest device receives / its links + what is copied / its memory
    prefill   tokens of prompts, and 64 for the last page of each answer after the first, at the
              speed of the prefill
    decode    steps x time of a decode step at the mean reach; to each pass of questions
              max(longest, answers x mean / slots + longest - mean) steps, because the last answers
              end alone and a step takes as long with empty slots

The host is not in it: data, rewards, and what the engine does between turns; nor is the encoder's
hearing of the prompts. `Assumed` says what is guessed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

from moss_audio_jax.models import cache as kv_cache
from moss_audio_jax.plan import compile as compiling
from moss_audio_jax.plan import estimate, serving, serving_report
from moss_audio_jax.plan.budget import assumption
from moss_audio_jax.plan.compile import Compiled, Run, compile_lowered, held_bytes, placed
from moss_audio_jax.plan.estimate import Estimate, Plan
from moss_audio_jax.plan.serving import Load, Serving
from moss_audio_jax.plan.serving_report import ServingPlan
from moss_audio_jax.plan.topologies import Topology
from moss_audio_jax.post_train.rollout import size_on
from moss_audio_jax.post_train.scoring import program, scores_of
from moss_audio_jax.sharding import param_shardings, serving_mesh
from moss_audio_jax.train.export import whole_model
from moss_audio_jax.train.step import ANSWERED

_LAST_PAGE = 64  # tokens of the row in which an answer's own end of the prompt is prefilled


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What is assumed of questions and answers; --assume KEY=VALUE changes one."""

    answer_share: float = assumption(0.5, "share", "of policy.new_tokens in a mean answer; assumed")
    prompt_share: float = assumption(
        0.5, "share", "of policy.prompt_tokens in a mean prompt; assumed"
    )
    no_spread: float = assumption(
        0.5, "share", "of groups whose answers all earn the same: as many are asked again", True
    )


@dataclasses.dataclass(frozen=True)
class Rewarded:
    """A run with rewards without arrays.

    Attributes:
      policy: config.policy.
      learning: the train step.
      rollouts: generation in the same processes.
      scores: the log-probabilities that are computed between the two.
    """

    policy: Any
    learning: Run
    rollouts: Serving
    scores: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a phase of rollouts asks for, by `Assumed`.

    Attributes:
      passes: groups of each pass: of all that are wanted, then in the place of those without
        spread.
      answer, prompt: mean tokens.
      steps: decode steps of all passes.
    """

    passes: tuple[int, ...]
    answer: float
    prompt: float
    steps: float

    @property
    def groups(self) -> int:
        return sum(self.passes)


@dataclasses.dataclass(frozen=True)
class RewardedPlan:
    """One step of a run with rewards.

    Attributes:
      step, rollouts: of their programs.
      scoring: modelled time of scoring a step's batch once; None without it, or if it was refused.
      peaks: the most bytes of one device at each moment.
      moved: bytes that the fullest device receives in the handoff.
      asked: in a phase.
      seconds: of a step by phase; None if a program was refused.
      refusals: of the compiler, by program.
    """

    run: Rewarded
    topology: Topology
    assumed: Assumed
    step: Plan
    rollouts: ServingPlan
    scoring: Estimate | None
    peaks: dict[str, int]
    moved: int
    asked: Asked
    seconds: dict[str, float] | None
    refusals: dict[str, str]

    @property
    def usable(self) -> int:
        return self.step.memory.usable

    @property
    def fits(self) -> bool:
        return not self.refusals and max(self.peaks.values()) <= self.usable

    @property
    def full(self) -> float:
        """The share of a step's tokens that the assumed answers and their prompts fill."""
        policy, asked = self.run.policy, self.asked
        return (
            policy.prompts
            * (asked.prompt + policy.answers * (asked.answer + 1))
            / (self.step.tokens)
        )


def build(config: Any, devices: list[Any]) -> Rewarded:
    """The run of a config with rewards on these devices.

    Raises:
      UsageError, InputError: the same errors as in training, naming the key.
    """
    policy, learning = config.policy, compiling.build(config, devices)
    mesh = serving_mesh(learning.mesh)
    size = size_on(mesh, policy.answers, policy.prompt_tokens, policy.new_tokens, policy.slots)
    load = Load(policy.slots, policy.prompt_tokens, 0.0, policy.new_tokens)
    compute = learning.recipe.compute
    rollouts = serving.on_mesh(learning.model, compute, load, size, mesh)
    return Rewarded(policy, learning, rollouts, scores_of(policy))


def compile_scoring(run: Rewarded) -> Compiled | None:
    """Compiles the scoring of a batch of answers; None if the run needs none."""
    if not run.scores:
        return None
    learning = run.learning
    score = program(learning.mesh, learning.recipe)
    batch = {name: x for name, x in learning.batch.items() if name not in ANSWERED}
    given = learning.state["trained"], learning.state["frozen"], batch
    with jax.set_mesh(learning.mesh):
        lowered = score.lower(*given)
    return compile_lowered(lowered, held_bytes(given), learning.mesh.size)


def plan(run: Rewarded, topology: Topology, assumed: Assumed) -> RewardedPlan:
    """Compiles the run's programs; memory and modelled time of a step."""
    prefill, decode = serving.compile_prefill(run.rollouts), serving.compile_decode(run.rollouts)
    scoring, step = compile_scoring(run), compiling.compile_step(run.learning)
    return assess(run, topology, assumed, prefill, decode, scoring, step)


def assess(
    run: Rewarded,
    topology: Topology,
    assumed: Assumed,
    prefill: Compiled,
    decode: Compiled,
    scoring: Compiled | None,
    step: Compiled,
) -> RewardedPlan:
    """Memory and modelled time from the compiled programs."""
    asked = asked_of(run.policy, assumed)
    learned = estimate.plan(run.learning, step, topology)
    share = _cache_share(run.rollouts, asked)
    rollouts = serving_report.assess(run.rollouts, prefill, decode, topology, share)
    state = run.learning.state
    held = held_bytes(state)
    models = training_layout(run.learning)
    moved = moved_bytes(models, param_shardings(models, run.learning.model, run.rollouts.mesh))
    layers = held_bytes(run.rollouts.params["language_model"]["layers"])
    both = rollouts.weights + max(held_bytes(models), layers + held_bytes(run.rollouts.state))
    peaks = {
        "handoff": held + both,
        "rollouts": held + max(rollouts.prefill.peak, rollouts.decode.peak),
    }
    scored = None
    if scoring is not None:
        peaks["scoring"] = scoring.peak + held - held_bytes([state["trained"], state["frozen"]])
        scored = _scored(run.learning, scoring, topology)
    peaks["step"] = step.peak
    if "reference_logprobs" in run.scores and not run.learning.recipe.lora_alpha:
        kept = held_bytes(state["trained"]) // 2  # float32, and the copy bfloat16
        peaks = {moment: peak + kept for moment, peak in peaks.items()}
    programs = {"prefill": prefill, "decode": decode, "scoring": scoring, "step": step}
    refusals = {name: x.refusal for name, x in programs.items() if x and not x.module}
    seconds = None
    if not refusals:
        copied = held + held_bytes(models) + rollouts.weights + 2 * layers
        seconds = {
            "handoff": moved / topology.device.interconnect
            + copied / topology.device.hbm_bandwidth,
            "prefill": _prefilled(run, asked) * rollouts.prefill.estimate.seconds,
            "decode": asked.steps * rollouts.decode.estimate.seconds,
        }
        seconds = {name: value / run.policy.updates for name, value in seconds.items()}
        if scored:
            seconds["scoring"] = len(run.scores) * scored.seconds
        seconds["step"] = learned.estimate.seconds
    return RewardedPlan(
        run, topology, assumed, learned, rollouts, scored, peaks, moved, asked, seconds, refusals
    )


def asked_of(policy: Any, assumed: Assumed) -> Asked:
    """What a phase asks for until its groups are full, its passes are used up, or none is left."""
    answer = max(1.0, assumed.answer_share * policy.new_tokens)
    left, passes, steps = float(policy.prompts * policy.updates), [], 0.0
    for _ in range(1 + policy.refills * policy.dynamic):
        if not round(left):
            break
        passes.append(round(left))
        together = passes[-1] * policy.answers * answer / policy.slots
        steps += max(policy.new_tokens, together + policy.new_tokens - answer)
        left *= assumed.no_spread
    prompt = max(1.0, assumed.prompt_share * policy.prompt_tokens)
    return Asked(tuple(passes), answer, prompt, steps)


def training_layout(run: Run) -> Any:
    """The model that is handed over, before it is: ShapeDtypeStructs in the training layout."""
    state = run.state
    model = functools.partial(whole_model, recipe=run.recipe)
    params = jax.eval_shape(model, state["trained"], state["frozen"])
    return placed(params, param_shardings(params, run.model, run.mesh))


def moved_bytes(tree: Any, targets: Any) -> int:
    """The most bytes that one device receives if a tree of ShapeDtypeStructs goes to other
    shardings: of its parts there, what it does not hold already."""
    received: dict[Any, int] = {}
    for leaf, target in zip(jax.tree.leaves(tree), jax.tree.leaves(targets), strict=True):
        held = leaf.sharding.devices_indices_map(leaf.shape)
        for device, wanted in target.devices_indices_map(leaf.shape).items():
            missing = _size(wanted, leaf.shape) - _size(wanted, leaf.shape, held[device])
            received[device] = received.get(device, 0) + missing * leaf.dtype.itemsize
    return max(received.values())


def _size(part: tuple, shape: tuple[int, ...], other: tuple | None = None) -> int:
    """Elements of a part of an array; with `other`, of what is in both parts."""
    sides = []
    for index, (here, side) in enumerate(zip(part, shape, strict=True)):
        start, stop, _ = here.indices(side)
        if other is not None:
            first, last, _ = other[index].indices(side)
            start, stop = max(start, first), min(stop, last)
        sides.append(max(0, stop - start))
    return int(np.prod(sides))


def _scored(run: Run, scoring: Compiled, topology: Topology) -> Estimate | None:
    """The modelled time of scoring; rows with branches have no attention kernel."""
    if scoring.module is None:
        return None
    collectives = tuple(scoring.module.collectives())
    return estimate.estimate(scoring.module.cycles(), 0.0, collectives, topology, 0.0)


def _cache_share(rollouts: Serving, asked: Asked) -> float:
    """How much of the cache a decode step reads, all slots running at the mean reach."""
    groups = kv_cache.groups_of(rollouts.state.cache)
    reach = kv_cache.pages_for(math.ceil(asked.prompt + asked.answer / 2))
    return rollouts.size.slots / groups * reach / kv_cache.pages_of(rollouts.state.cache)


def _prefilled(run: Rewarded, asked: Asked) -> float:
    """How many prefills a phase runs in each group of devices."""
    each = asked.prompt + (run.policy.answers - 1) * _LAST_PAGE
    prompts, tokens = run.rollouts.load.prefill()
    return asked.groups * each / (kv_cache.groups_of(run.rollouts.state.cache) * prompts * tokens)
