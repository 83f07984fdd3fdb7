"""The batches of a run that learns from rewards.

A phase draws questions, samples a group of answers to each, rewards them and, if
`policy.dynamic`, draws further questions for groups whose answers all earn the same, which teach
nothing. Its groups are then learned from, in `policy.updates` steps.

WORKDIR/rollouts.jsonl keeps each answer, its rewards and their reasons. A checkpoint holds which
questions were drawn and the groups that wait; with these and the seeds, a run that is killed at any
moment repeats the uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from moss_audio_jax.data.augment import Augment
from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.data.pipeline import HostBatch, example_maker
from moss_audio_jax.data.reports import COUNTS, Reports
from moss_audio_jax.data.workers import Workers
from moss_audio_jax.errors import InputError
from moss_audio_jax.generate.engine import Output
from moss_audio_jax.journal import Log
from moss_audio_jax.post_train import dapo
from moss_audio_jax.post_train import mixture as rewarding
from moss_audio_jax.post_train.batches import lay_out, pieces_of, read_back, restored, saved
from moss_audio_jax.post_train.mixture import Judged
from moss_audio_jax.post_train.page import LOG, write_page
from moss_audio_jax.post_train.questions import Question, Questions
from moss_audio_jax.post_train.rollout import Group, Sampler, answer_of, line_of, said_of
from moss_audio_jax.post_train.scoring import scorers
from moss_audio_jax.train.metrics import cut_back
from moss_audio_jax.train.setup import Setup
from moss_audio_jax.train.step import State, batch_shardings

_log = logging.getLogger(__name__)

_CHEAP = 2**26  # letters of rollouts that a page is made of at each save
_IDLE = 10_000  # rows, one after another, that may give no question
_UNPAID = 32  # groups in a row without a reward that end a run


def questions_of(run: Setup) -> Questions:
    """What makes the questions of a run."""
    plain = dataclasses.replace(run.loader, augment=Augment())
    maker = example_maker(run.start.tokenizer, run.start.model.encoder, plain)
    return Questions(maker, run.config.policy.prompt_tokens, run.config.policy.new_tokens)


def rewards_of(policy: ConfigDict) -> rewarding.Mixture:
    """The rewards of a run. Raises UsageError as `mixture.mixture` does."""
    options = policy.options.to_dict()
    length = options.setdefault("length", {})
    if not length.get("longest"):
        length["longest"] = policy.new_tokens
    if not length.get("margin"):
        length["margin"] = max(1, length["longest"] // 4)
    return rewarding.mixture(policy.rewards.to_dict(), options)


class RewardedBatches:
    """An endless iterator of batches (`train.source.Batches`). Each process makes them alike, and
    gives its own rows."""

    def __init__(
        self, run: Setup, mixture: Mixture, workdir: Path, state: Callable[[], State]
    ) -> None:
        self._run, self._mixture, self._workdir, self._state = run, mixture, workdir, state
        self._policy = policy = run.config.policy
        self._pay = rewards_of(policy)
        self._jobs = mixture.jobs()
        self._workers = Workers(questions_of(run), run.loader.workers, run.loader.row_seconds)
        # All processes see the same rows; the first one lists what is wrong with them.
        self._reports = Reports(None if jax.process_index() else str(workdir), 0, mixture.rows)
        self._counts = dict.fromkeys(COUNTS, 0)
        sizes = policy.answers, policy.prompt_tokens, policy.new_tokens, policy.slots
        self._sampler = Sampler(run, *sizes)
        self._scorers = scorers(run)
        self._log = Log(workdir / LOG)
        self._letters = 0  # written to it by this process
        self._step = self._next = 0
        self._unpaid = 0  # groups in a row without a reward
        self._waiting: deque[list[Group]] = deque()  # of each step to come

    def __enter__(self) -> RewardedBatches:
        if not jax.process_index():
            cut_back(self._workdir / LOG, self._step)
        return self

    def __exit__(self, *_: Any) -> None:
        self._workers.close()
        self._reports.flush()
        self._log.flush()
        self._draw()

    def __next__(self) -> HostBatch:
        """Raises InputError once too many rows are bad, or their file is gone."""
        told: dict[str, list[float]] = {}
        while len(self._waiting) <= self._policy.ahead:
            groups, about = self._phase()
            for name, value in about.items():
                told.setdefault(name, []).append(value)
            size = max(1, -(-len(groups) // self._policy.updates))
            self._waiting += [
                groups[n * size : (n + 1) * size] for n in range(self._policy.updates)
            ]
        batch = self._batch(self._waiting.popleft(), _means(told))
        self._step += 1
        return batch

    def state(self) -> dict[str, Any]:
        return {
            "version": 1,
            "config": self._fingerprint(),
            "step": self._step,
            "next": self._next,
            "counts": dict(self._counts),
            "waiting": [[saved(group) for group in groups] for groups in self._waiting],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        own = self._fingerprint()
        del own["content"]
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
            questions = self._made([each["index"] for each in groups])
            self._waiting.append(
                [restored(each, one) for each, one in zip(groups, questions, strict=True)]
            )

    def held_out(self, mixture: Mixture, step: int) -> dict[str, float]:
        """The mean reward of greedy answers to held-out rows, that of each kind, and the share of
        rows that gave none."""
        jobs = mixture.in_order()
        asked = [jobs[i] for i in range(min(len(jobs), self._policy.held_out))]
        questions = [each for each in self._workers.submit(asked)() if isinstance(each, Question)]
        self._sampler.take(self._state())
        outputs = self._sampler.greedy(questions)
        self._sampler.free()
        told: dict[str, list[float]] = {"eval_left_out": [1.0] * (len(asked) - len(questions))}
        for question, output in zip(questions, outputs, strict=True):
            judged = self._judged(question, [output])
            told["eval_left_out"].append(not judged)
            for each in judged or ():
                told.setdefault("eval_reward", []).append(each.total)
                told.setdefault(f"eval_reward/{each.entry}", []).append(each.total)
        return _means(told)

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
                judged = self._judged(question, outputs)
                told.setdefault("rollout/groups_without_reward", []).append(judged is None)
                if judged is None:
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
        kept = self._scored(kept)
        ended = time.perf_counter()
        self._write(lines)
        after = self._sampler.counts
        new = {name: after[name] - before.get(name, 0) for name in after}
        return kept, _means(told) | {
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
        """The next questions, without rows that cannot be used.

        Raises InputError if too many rows are bad, or row after row gives no question.
        """
        questions: list[Question] = []
        idle = 0
        while len(questions) < count:
            more = range(self._next, self._next + count - len(questions))
            made = self._workers.submit([self._jobs[i] for i in more])()
            self._next = more.stop
            self._reports.count(made, self._counts)
            loader = self._run.loader
            self._reports.judge(self._counts, loader.max_bad_share, loader.min_seen)
            found = [each for each in made if isinstance(each, Question)]
            questions += found
            idle = 0 if found else idle + len(made)
            if idle >= min(_IDLE, self._mixture.rows):
                raise InputError(
                    f"{idle} rows one after another give no question, the last because "
                    f"{made[-1].reason}; see bad_rows.jsonl and overlong_rows.jsonl in "
                    f"{self._workdir}"
                )
        return questions

    def _made(self, indices: Sequence[int]) -> list[Question]:
        """Questions that were made before. Raises InputError if one cannot be made again."""
        made = self._workers.submit([self._jobs[i] for i in indices])()
        for each in made:
            if not isinstance(each, Question):
                raise InputError(
                    f"{each.source} line {each.line}: its answers wait to be learned from, but the "
                    f"row cannot be read again: {each.reason}"
                )
        return made

    def _judged(self, question: Question, outputs: Sequence[Output]) -> list[Judged] | None:
        """What each answer earns; None, and a warning, if that cannot be told.

        Raises:
          InputError: nor could it for many groups before, as with a reward that always fails.
        """
        tokenizer = self._run.start.tokenizer
        try:
            judged = [self._pay(said_of(output, tokenizer), question.row) for output in outputs]
        except InputError as error:
            self._unpaid += 1
            if self._unpaid >= _UNPAID:
                raise InputError(
                    f"{self._unpaid} groups in a row could not be rewarded; the last: {error}"
                ) from error
            _log.warning(f"no reward, so its group is left out: {error}")
            return None
        self._unpaid = 0
        return judged

    def _scored(self, groups: list[Group]) -> list[Group]:
        """The groups with what `scoring` adds to their answers."""
        scores: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        for start in range(0, len(groups) if self._scorers else 0, self._policy.prompts):
            pieces, arrays, rows = self._laid_out(groups[start : start + self._policy.prompts])
            place = batch_shardings(arrays, self._run.mesh)
            arrays = {name: jax.device_put(x, place[name]) for name, x in arrays.items()}
            for name, score in self._scorers.items():
                values = np.asarray(score(self._state(), arrays))
                for (group, number), each in read_back(values, pieces, rows).items():
                    scores.setdefault((start + group, number), {})[name] = each
        return [
            group._replace(
                answers=[
                    answer._replace(scores=scores.get((n, k), {}))
                    for k, answer in enumerate(group.answers)
                ]
            )
            for n, group in enumerate(groups)
        ]

    def _batch(self, groups: list[Group], told: dict[str, float]) -> HostBatch:
        pieces, arrays, rows = self._laid_out(groups, tuple(self._scorers))
        count, index = jax.process_count(), jax.process_index()
        each = len(arrays["tokens"]) // count
        own = slice(index * each, (index + 1) * each)
        row_ids = [[pieces[i].example.row_id for i in row] for row in rows]
        row_ids += [[] for _ in range(len(arrays["tokens"]) - len(rows))]
        # All processes read the same rows.
        counts = dict.fromkeys(COUNTS, 0) if index else dict(self._counts)
        return HostBatch({name: x[own] for name, x in arrays.items()}, row_ids[own], counts, told)

    def _laid_out(self, groups: list[Group], scores: Sequence[str] = ()) -> tuple[list, dict, list]:
        run = self._run
        pieces = pieces_of(groups, run.shape.tokens)
        multiple = run.mesh.shape["data"] * run.mesh.shape["fsdp"] * run.recipe.accumulate
        arrays, rows = lay_out(
            pieces,
            run.shape,
            multiple,
            run.start.model.encoder,
            run.start.tokenizer.processor,
            scores,
        )
        return pieces, arrays, rows

    def _write(self, lines: list[dict]) -> None:
        if not jax.process_index():
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            self._log.append(text)
            self._letters += len(text)

    def flush(self) -> None:
        """Writes what buckets lack, and the page while that is soon done."""
        self._reports.flush()
        self._log.flush()
        if self._letters < _CHEAP:
            self._draw()

    def _draw(self) -> None:
        """The page of all that is written so far; what is wrong with it must not end a run."""
        if jax.process_index():
            return
        try:
            write_page(self._workdir)
        except (InputError, OSError) as error:
            _log.warning(f"rollouts.html is not written: {error}")

    def _fingerprint(self) -> dict[str, Any]:
        """What decides which questions are asked, and what is sampled."""
        run, policy = self._run, self._policy
        keys = ("prompts", "answers", "prompt_tokens", "new_tokens", "temperature", "slots")
        keys += ("dynamic", "refills", "updates", "ahead", "kl")
        return {
            **{f"policy.{key}": policy[key] for key in keys},
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


def _means(told: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in told.items() if len(values)}
