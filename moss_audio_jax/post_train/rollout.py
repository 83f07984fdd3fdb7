"""Rollouts: groups of sampled answers, from the engine that serves everybody, in the processes that
train.

The weights go from the training layout to the generating one on the devices. A clip is encoded once
for all answers about it, and, but for its last page of 16 tokens, a prompt is prefilled once. Each
answer has its own random seed, which depends on the run's seed, the question's place in the mixture
and the answer's number alone: rollouts that are lost are made again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moss_audio_jax.generate.engine import Engine, Output, Size
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.generate.vocabulary import vocabulary
from moss_audio_jax.models.cache import PAGE, pages_for
from moss_audio_jax.post_train.asked import Said, read
from moss_audio_jax.post_train.mixture import Judged
from moss_audio_jax.post_train.questions import Question
from moss_audio_jax.sharding import param_shardings, serving_mesh, ways
from moss_audio_jax.train.export import whole_model
from moss_audio_jax.train.setup import Setup
from moss_audio_jax.train.step import State


class Answer(NamedTuple):
    """One sampled answer.

    Attributes:
      ids: its tokens, with the one that ended it if one did.
      logprobs: float32 [n], theirs by the sampler.
      advantage: over its group.
      scores: float32 [n] each, theirs by the trainer ("old_logprobs", "reference_logprobs"), where
        the loss needs them (`scoring`).
    """

    ids: list[int]
    logprobs: np.ndarray
    advantage: float
    scores: Mapping[str, np.ndarray] = {}


class Group(NamedTuple):
    """The answers to one question."""

    question: Question
    answers: list[Answer]


class Sampler:
    """Samples answers of the model in training.

    Args:
      answers: to each question.
      prompt_tokens, new_tokens: the most of a prompt, and of an answer.
      slots: answers that are written together.
    """

    def __init__(
        self, run: Setup, answers: int, prompt_tokens: int, new_tokens: int, slots: int
    ) -> None:
        self._run, self._answers, self._new_tokens = run, answers, new_tokens
        self._mesh = serving_mesh(run.mesh)
        self._size = size_on(self._mesh, answers, prompt_tokens, new_tokens, slots)
        self._engine: Engine | None = None

    def take(self, state: State) -> float:
        """Takes the weights of a train state; returns the seconds it took."""
        begun = time.perf_counter()
        start, recipe = self._run.start, self._run.recipe
        with jax.set_mesh(self._run.mesh):
            params = whole_model(state["trained"], state["frozen"], recipe=recipe)
        params = jax.device_put(params, param_shardings(params, start.model, self._mesh))
        if self._engine is None:
            vocab = vocabulary(start.model, start.tokenizer, start.tokenizer.processor)
            self._engine = Engine(
                params, start.model, recipe.compute, vocab, self._mesh, size=self._size
            )
        else:
            self._engine.renew(params)
        jax.block_until_ready(params)
        return time.perf_counter() - begun

    def free(self) -> None:
        """Frees the weights and the cache until the next `take`."""
        self._engine.renew(None)

    @property
    def counts(self) -> dict[str, int]:
        """The engine's, and mel frames that were encoded, since the start."""
        if self._engine is None:
            return {}
        return self._engine.counts | {"encoded_frames": self._engine.hearing.frames}

    def sample(self, questions: Sequence[Question], temperature: float) -> list[list[Output]]:
        """The answers to each question, with log-probabilities."""
        asked = [
            (question.prompt, self._sampling(question, number, temperature))
            for question in questions
            for number in range(self._answers)
        ]
        outputs = iter(self._engine.run(asked))
        return [[next(outputs) for _ in range(self._answers)] for _ in questions]

    def greedy(self, questions: Sequence[Question]) -> list[Output]:
        """The likeliest answer to each question."""
        sampling = Sampling(self._new_tokens)
        return self._engine.run([(question.prompt, sampling) for question in questions])

    def _sampling(self, question: Question, number: int, temperature: float) -> Sampling:
        seed = self._run.config.train.seed
        words = np.random.SeedSequence([seed, question.index, number]).generate_state(1)
        return Sampling(
            self._new_tokens, temperature=temperature, seed=int(words[0] >> 1), logprobs=0
        )


def size_on(mesh: Mesh, answers: int, prompt_tokens: int, new_tokens: int, slots: int) -> Size:
    """What the decode state is made for, by the arguments of a `Sampler`."""
    with jax.set_mesh(mesh):
        groups = ways((slots,), "batch")
    each = slots // groups
    # The answers to one question share its prompt, but for its last page.
    prompts = 1 + -(-each // answers)
    pages = each * (1 + pages_for(new_tokens + PAGE)) + prompts * pages_for(prompt_tokens)
    return Size(slots, pages, new_tokens)


def answer_of(output: Output, advantage: float) -> Answer:
    """An output as what is learned from it."""
    said = [*(output.logprobs or ()), *([output.ending] if output.ending else [])]
    logprobs = np.array([each.logprob for each in said], np.float32)
    return Answer([each.token for each in said], logprobs, advantage)


def said_of(output: Output, tokenizer: Any) -> Said:
    """An output as rewards read it."""
    return Said(tokenizer.decode(output.ids), len(output.ids), output.finish_reason)


def line_of(step: int, question: Question, said: Said, judged: Judged, kept: bool) -> dict:
    """A line of rollouts.jsonl."""
    asked = read(question.row)
    return {
        "step": step,
        "row": question.made.row_id,
        "index": question.index,
        "id": question.row["id"],
        "task": asked.task,
        "question": asked.prompt,
        "expected": asked.answer,
        "answer": said.raw,
        "tokens": said.tokens,
        "finish_reason": said.finish_reason,
        "reward": round(judged.total, 6),
        "parts": {name: [round(r.value, 6), r.reason] for name, r in judged.parts.items()},
        "learned": kept,
    }
