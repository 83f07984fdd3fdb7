"""A run that learns from rewards (`train.source`): DAPO, GRPO or GSPO in the loop of every run.

Here are its keys, what they may be, and its objective; `phases` makes its batches.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moss_audio_jax.data.examples import ExampleMaker, Job
from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.data.sources import SourceError
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.post_train import dapo, phases
from moss_audio_jax.post_train import mixture as rewarding
from moss_audio_jax.post_train.batches import rows_needed
from moss_audio_jax.post_train.mixture import default_options, default_rewards
from moss_audio_jax.post_train.phases import RewardedBatches
from moss_audio_jax.post_train.policy import Policy
from moss_audio_jax.post_train.questions import PaidQuestions, lacks_answer
from moss_audio_jax.train.setup import Setup
from moss_audio_jax.train.step import State

_log = logging.getLogger(__name__)

_CHECKED = 10_000  # rows whose rewards are tried before a run begins


def get_config() -> ConfigDict:
    """The keys of `policy`."""
    c = ConfigDict()
    c.objective = "dapo"  # dapo | grpo | gspo
    c.prompts = 128  # groups of a step
    c.answers = 16  # of a group
    c.prompt_tokens = 2048  # rows whose prompt has more are left out
    c.new_tokens = 2048  # of an answer; rows whose expected one has more are left out
    c.temperature = 1.0
    c.slots = 256  # answers that are written together
    # Draw further questions for groups whose answers all earn the same, at most so many times; then
    # the batch is smaller.
    c.dynamic = True
    c.refills = 8
    c.updates = 1  # steps for each phase of rollouts
    c.ahead = 0  # steps whose batches are sampled before they are needed, by older weights
    c.clip_low = -1.0  # -1: the objective's own
    c.clip_high = -1.0
    c.tis_cap = 2.0
    c.kl = 0.0  # weight of the divergence from the model of init_from, which is kept for it
    c.held_out = 64  # rows of data.eval that are answered greedily and rewarded
    # By task: which rewards, and their weights (docs/post_train.md).
    c.rewards = default_rewards()
    c.options = default_options()
    c.options.length = {"longest": 0, "margin": 0}  # 0: new_tokens, and a quarter of them
    return c


LIMITS = {
    "prompts": 1,
    "answers": 2,
    "prompt_tokens": 1,
    "new_tokens": 1,
    "slots": 1,
    "refills": 0,
    "updates": 1,
    "ahead": 0,
    "held_out": 1,
    "kl": 0,
}


def check(config: ConfigDict) -> None:
    """Raises UsageError naming a key that cannot be."""
    policy, data = config.policy, config.data
    if policy.objective not in dapo.VARIANTS:
        known = ", ".join(dapo.VARIANTS)
        raise UsageError(f"policy.objective is {policy.objective!r}; expected one of {known}")
    for key, least in LIMITS.items():
        if policy[key] < least:
            raise UsageError(f"policy.{key} is {policy[key]}; expected at least {least}")
    for key in ("temperature", "tis_cap"):
        if not policy[key] > 0:
            raise UsageError(f"policy.{key} is {policy[key]}; expected above 0")
    for key, wanted in (
        ("data.echo", 1),
        ("data.branches", 1),
        ("data.row_examples", 0),
        ("train.z_loss", 0),
    ):
        group, name = key.split(".")
        if config[group][name] != wanted:
            raise UsageError(f"{key} is {config[group][name]}; a run with rewards needs {wanted}")
    if any(config.helpers[name] for name in config.helpers if name not in ("words", "names")):
        raise UsageError("helpers have weights; a run with rewards has no helper losses")
    sizes = policy.prompts, policy.answers, data.length, policy.prompt_tokens, policy.new_tokens
    rows = rows_needed(*sizes)
    if not rows:
        raise UsageError(
            f"data.length {data.length} does not hold policy.prompt_tokens and new_tokens: "
            f"{policy.prompt_tokens} + {policy.new_tokens}"
        )
    if rows > data.batch:
        raise UsageError(
            f"data.batch is {data.batch}; {policy.prompts} groups of {policy.answers} answers may "
            f"need {rows} rows of {data.length} tokens (raise data.batch or data.length)"
        )
    phases.rewards_of(policy)


def objective(config: ConfigDict) -> Policy:
    policy = config.policy
    variant = dapo.VARIANTS[policy.objective]
    clips = {
        key: policy[key] if policy[key] >= 0 else getattr(variant, key)
        for key in ("clip_low", "clip_high")
    }
    changed = dataclasses.replace(variant, tis_cap=policy.tis_cap, kl=policy.kl, **clips)
    return Policy(changed, policy.temperature)


def check_rows(run: Setup, mixture: Mixture, held_out: Mixture | None) -> None:
    """Tries the rewards of up to _CHECKED rows, evenly spread; their sound is not read.

    Raises:
      InputError: more than data.max_bad_share of their questions cannot be rewarded, or one that is
        held out has no assistant's message.
    """
    questions, pay = phases.questions_of(run), phases.rewards_of(run.config.policy)
    for name, rows in (("data.train", mixture), ("data.eval", held_out)):
        if rows is None:
            continue
        jobs, step = rows.in_order(), -(-rows.rows // _CHECKED)
        tried = [jobs[i] for i in range(0, rows.rows, step)]
        asked = _found(questions.rows_of, tried)
        try:
            count = rewarding.check(asked, pay, run.loader.max_bad_share)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        if rows is held_out and (lost := next(_found(_lacking, tried), None)):
            raise InputError(
                f"{name}: row {lost!r} has no assistant's message, which the held-out loss needs"
            )
        _log.info(
            f"{name}: {count:,} questions in {len(tried):,} of {rows.rows:,} rows have rewards"
        )


def asks(config: ConfigDict, make: ExampleMaker) -> PaidQuestions:
    policy = config.policy
    limits = policy.prompt_tokens, policy.new_tokens
    return PaidQuestions(make, *limits, functools.partial(phases.rewards_of, policy))


def _lacking(job: Job) -> list[str]:
    return [name] if (name := lacks_answer(job)) else []


def _found(of: Callable[[Job], Iterable[Any]], jobs: Iterable[Job]) -> Iterator[Any]:
    """All that is found in rows; bad rows are left to the run, which counts and lists them."""
    for job in jobs:
        try:
            found = [*of(job)]
        except SourceError:
            raise
        except Exception:
            continue
        yield from found


def batches(
    run: Setup, mixture: Mixture, workdir: Path, state: Callable[[], State]
) -> RewardedBatches:
    return RewardedBatches(run, mixture, workdir, state)
