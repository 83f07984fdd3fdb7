"""A run that learns from rewards (`train.source`): DAPO, GRPO or GSPO in the loop of every run.

A phase draws questions, samples a group of answers to each, rewards them and, if
`policy.dynamic`, draws further questions for groups whose answers all earn the same, which teach
nothing. Its groups are then learned from, in `policy.updates` steps.

WORKDIR/rollouts.jsonl keeps each answer, its rewards and their reasons. A checkpoint holds which
questions were drawn and the groups that wait; with these and the seeds, a run that is killed at any
moment repeats the uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from moss_audio_jax import files
from moss_audio_jax.data.loader_config import LoaderConfig
from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.data.pipeline import HostBatch, example_maker
from moss_audio_jax.data.reports import COUNTS, Reports
from moss_audio_jax.data.workers import Workers
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.generate.engine import Output
from moss_audio_jax.post_train import dapo
from moss_audio_jax.post_train import mixture as rewarding
from moss_audio_jax.post_train.batches import (
    lay_out,
    pieces_of,
    read_back,
    restored,
    rows_needed,
    saved,
)
from moss_audio_jax.post_train.mixture import Judged, default_options, default_rewards
from moss_audio_jax.post_train.policy import Policy
from moss_audio_jax.post_train.questions import Question, Questions
from moss_audio_jax.post_train.rollout import Group, Sampler, answer_of, line_of, said_of
from moss_audio_jax.train.metrics import cut_back
from moss_audio_jax.train.setup import Setup
from moss_audio_jax.train.step import State, batch_shardings, label_logprobs

_log = logging.getLogger(__name__)

LOG = "rollouts.jsonl"


def get_config() -> ConfigDict:
    """The keys of `policy`."""
    c = ConfigDict()
    c.objective = "dapo"  # dapo | grpo | gspo
    c.prompts = 128  # groups of a step
    c.answers = 16  # of a group
    c.prompt_tokens = 2048  # rows whose prompt has more are left out
    c.new_tokens = 2048  # of an answer
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
    if not policy.temperature > 0:
        raise UsageError(f"policy.temperature is {policy.temperature}; expected above 0")
    for key, wanted in (("data.echo", 1), ("data.branches", 1), ("train.z_loss", 0)):
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
    _rewards(policy)


def objective(config: ConfigDict) -> Policy:
    policy = config.policy
    variant = dapo.VARIANTS[policy.objective]
    clips = {
        key: policy[key] if policy[key] >= 0 else getattr(variant, key)
        for key in ("clip_low", "clip_high")
    }
    changed = dataclasses.replace(variant, tis_cap=policy.tis_cap, **clips)
    return Policy(changed, policy.temperature)


def batches(
    run: Setup, mixture: Mixture, workdir: Path, state: Callable[[], State]
) -> RewardedBatches:
    return RewardedBatches(run, mixture, workdir, state)


class RewardedBatches:
    """An endless iterator of batches (`train.source.Batches`). Each process makes them alike, and
    gives its own rows."""

    def __init__(
        self, run: Setup, mixture: Mixture, workdir: Path, state: Callable[[], State]
    ) -> None:
        self._run, self._mixture, self._workdir, self._state = run, mixture, workdir, state
        self._policy = policy = run.config.policy
        self._pay = _rewards(policy)
        self._jobs = mixture.jobs()
        loader: LoaderConfig = run.loader
        maker = example_maker(run.start.tokenizer, run.start.model.encoder, loader)
        questions = Questions(maker, policy.prompt_tokens)
        self._workers = Workers(questions, loader.workers, loader.row_seconds)
        # All processes see the same rows; the first one lists what is wrong with them.
        self._reports = Reports(None if jax.process_index() else str(workdir), 0)
        self._counts = dict.fromkeys(COUNTS, 0)
        sizes = policy.answers, policy.prompt_tokens, policy.new_tokens, policy.slots
        self._sampler = Sampler(run, *sizes)
        self._scored = policy.updates > 1 or policy.ahead > 0
        whole = NamedSharding(run.mesh, PartitionSpec())
        self._score = jax.jit(
            functools.partial(label_logprobs, recipe=run.recipe), out_shardings=whole
        )
        self._step = self._next = 0
        self._waiting: deque[list[Group]] = deque()  # of each step to come

    def __enter__(self) -> RewardedBatches:
        if not jax.process_index():
            cut_back(self._workdir / LOG, self._step)
        return self

    def __exit__(self, *_: Any) -> None:
        self._workers.close()

    def __next__(self) -> HostBatch:
        """Raises InputError once too many rows are bad, or their file is gone."""
        told: dict[str, float] = {}
        while len(self._waiting) <= self._policy.ahead:
            groups, told = self._phase()
            size = max(1, -(-len(groups) // self._policy.updates))
            self._waiting += [
                groups[n * size : (n + 1) * size] for n in range(self._policy.updates)
            ]
        batch = self._batch(self._waiting.popleft(), told)
        self._step += 1
        return batch

    def state(self) -> dict[str, Any]:
        return {
            "version": 1,
            "config": self._fingerprint(),
            "step": self._step,
            "next": self._next,
            "counts": self._counts,
            "waiting": [[saved(group) for group in groups] for groups in self._waiting],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        own = self._fingerprint()
        for key, value in own.items():
            if state.get("config", {}).get(key) != value:
                raise InputError(
                    f"{key}: the saved run has {state.get('config', {}).get(key)!r}, this one "
                    f"{value!r}; rollouts cannot be continued with another (start anew with "
                    "init_from)"
                )
        self._mixture.check_content(state["config"]["content"])
        self._step, self._next = state["step"], state["next"]
        self._counts = dict(state["counts"])
        self._waiting.clear()
        for groups in state["waiting"]:
            questions = self._make([each["index"] for each in groups])
            self._waiting.append(
                [restored(each, one) for each, one in zip(groups, questions, strict=True)]
            )

    def held_out(self, mixture: Mixture, step: int) -> dict[str, float]:
        """The mean reward of greedy answers to held-out rows, and that of each kind."""
        jobs = mixture.in_order()
        asked = [jobs[i] for i in range(min(len(jobs), self._policy.held_out))]
        questions = [each for each in self._workers.submit(asked)() if isinstance(each, Question)]
        self._sampler.take(self._state())
        outputs = self._sampler.greedy(questions)
        self._sampler.free()
        judged = [
            self._judged(question, output)
            for question, output in zip(questions, outputs, strict=True)
        ]
        rewards: dict[str, list[float]] = {}
        for each in filter(None, judged):
            rewards.setdefault("eval_reward", []).append(each.total)
            rewards.setdefault(f"eval_reward/{each.entry}", []).append(each.total)
        return {name: float(np.mean(values)) for name, values in sorted(rewards.items())}

    # --- a phase ---

    def _phase(self) -> tuple[list[Group], dict[str, float]]:
        """New groups by the weights of now, and what metrics.jsonl says of them."""
        policy, begun = self._policy, time.perf_counter()
        before = self._sampler.counts
        handoff = self._sampler.take(self._state())
        wanted = policy.prompts * policy.updates
        kept: list[Group] = []
        lines: list[dict] = []
        generating = 0.0
        told: dict[str, list[float]] = {}
        for _ in range(1 + policy.refills * policy.dynamic):
            questions = self._ask(wanted - len(kept))
            started = time.perf_counter()
            sampled = self._sampler.sample(questions, policy.temperature)
            generating += time.perf_counter() - started
            for question, outputs in zip(questions, sampled, strict=True):
                judged = [self._judged(question, output) for output in outputs]
                if None in judged:
                    continue
                rewards = np.array([each.total for each in judged], np.float32)
                spread = bool((rewards != rewards[0]).any())
                if spread or not policy.dynamic:
                    advantages = np.asarray(dapo.group_advantages(rewards[None]))[0].tolist()
                    answers = [*map(answer_of, outputs, advantages)]
                    kept.append(Group(question, answers))
                for output, each in zip(outputs, judged, strict=True):
                    said = said_of(output, self._run.start.tokenizer)
                    learned = spread or not policy.dynamic
                    lines.append(line_of(self._step + 1, question, said, each, learned))
                    _count(told, output, each)
                told.setdefault("reward/groups_without_spread", []).append(not spread)
            if len(kept) == wanted:
                break
        else:
            _log.warning(
                f"step {self._step + 1}: {len(kept)} of {wanted} groups teach anything; the batch "
                "is smaller"
            )
        self._sampler.free()
        scoring = time.perf_counter()
        kept = self._with_old(kept) if self._scored else kept
        ended = time.perf_counter()
        self._write(lines)
        after = self._sampler.counts
        new = {name: after[name] - before.get(name, 0) for name in after}
        return kept, {name: float(np.mean(values)) for name, values in told.items()} | {
            "rollout/groups": len(kept),
            "rollout/answers": len(lines),
            "rollout/new_tokens": new["new_tokens"],
            "rollout/prompt_tokens_run": new["prompt_tokens"] - new["cached_tokens"],
            "rollout/encoded_seconds": new["encoded_frames"] / 100,
            "rollout/tokens_per_second": new["new_tokens"] / generating,
            "time/handoff": handoff,
            "time/generate": generating,
            "time/reward_and_data": scoring - begun - handoff - generating,
            "time/score": ended - scoring,
        }

    def _ask(self, count: int) -> list[Question]:
        """The next questions, without rows that cannot be used."""
        questions: list[Question] = []
        while len(questions) < count:
            more = range(self._next, self._next + count - len(questions))
            made = self._workers.submit([self._jobs[i] for i in more])()
            self._next = more.stop
            self._reports.count(made, self._counts)
            loader = self._run.loader
            self._reports.judge(self._counts, loader.max_bad_share, loader.min_seen)
            questions += [each for each in made if isinstance(each, Question)]
        return questions

    def _make(self, indices: Sequence[int]) -> list[Question]:
        """Questions that were made before."""
        return self._workers.submit([self._jobs[i] for i in indices])()

    def _judged(self, question: Question, output: Output) -> Judged | None:
        """What an answer earns; None, and a warning, if that cannot be told."""
        try:
            return self._pay(said_of(output, self._run.start.tokenizer), question.row)
        except InputError as error:
            _log.warning(f"no reward, so its group is left out: {error}")
            return None

    def _with_old(self, groups: list[Group]) -> list[Group]:
        """The groups with the log-probabilities of now, as the trainer computes them."""
        state, old = self._state(), {}
        for start in range(0, len(groups), self._policy.prompts):
            part = groups[start : start + self._policy.prompts]
            pieces, arrays, rows = self._laid_out(part, False)
            place = batch_shardings(arrays, self._run.mesh)
            arrays = {name: jax.device_put(x, place[name]) for name, x in arrays.items()}
            values = np.asarray(self._score(state["trained"], state["frozen"], arrays))
            found = read_back(values, pieces, rows)
            old |= {(start + group, number): each for (group, number), each in found.items()}
        return [
            group._replace(answers=[a._replace(old=old[n, k]) for k, a in enumerate(group.answers)])
            for n, group in enumerate(groups)
        ]

    def _batch(self, groups: list[Group], told: dict[str, float]) -> HostBatch:
        pieces, arrays, rows = self._laid_out(groups, self._scored)
        count, index = jax.process_count(), jax.process_index()
        each = len(arrays["tokens"]) // count
        own = slice(index * each, (index + 1) * each)
        row_ids = [[pieces[i].example.row_id for i in row] for row in rows]
        row_ids += [[] for _ in range(len(arrays["tokens"]) - len(rows))]
        return HostBatch({name: x[own] for name, x in arrays.items()}, row_ids[own], {}, told)

    def _laid_out(self, groups: list[Group], scored: bool) -> tuple[list, dict, list]:
        run = self._run
        pieces = pieces_of(groups, run.shape.tokens)
        multiple = run.mesh.shape["data"] * run.mesh.shape["fsdp"] * run.recipe.accumulate
        arrays, rows = lay_out(
            pieces,
            run.shape,
            multiple,
            run.start.model.encoder,
            run.start.tokenizer.processor,
            scored,
        )
        return pieces, arrays, rows

    def _write(self, lines: list[dict]) -> None:
        if not jax.process_index():
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            files.append(self._workdir / LOG, text)

    def _fingerprint(self) -> dict[str, Any]:
        """What decides which questions are asked, and what is sampled."""
        run, policy = self._run, self._policy
        keys = ("prompts", "answers", "prompt_tokens", "new_tokens", "temperature", "dynamic")
        return {
            **{f"policy.{key}": policy[key] for key in (*keys, "refills", "updates", "ahead")},
            "train.seed": run.config.train.seed,
            "data.length": run.config.data.length,
            "data.train": self._mixture.describe(),
            "content": self._mixture.content(),
        }


def _count(told: dict[str, list[float]], output: Output, judged: Judged) -> None:
    """Adds one answer to what metrics.jsonl says."""
    values = {
        "reward": judged.total,
        f"reward/{judged.entry}": judged.total,
        **{f"reward/{judged.entry}/{name}": r.value for name, r in judged.parts.items()},
        "answer/tokens": len(output.ids),
        "answer/cut": output.finish_reason == "length",
        "answer/looped": output.finish_reason == "loop",
    }
    for name, value in values.items():
        told.setdefault(name, []).append(value)


def _rewards(policy: ConfigDict) -> rewarding.Mixture:
    options = policy.options.to_dict()
    length = options.get("length", {})
    if not length.get("longest"):
        length["longest"] = policy.new_tokens
    if not length.get("margin"):
        length["margin"] = max(1, length["longest"] // 4)
    return rewarding.mixture(policy.rewards.to_dict(), options)
