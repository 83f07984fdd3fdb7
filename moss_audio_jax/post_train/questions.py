"""Questions from rows: the prompt that is answered, and the row by which answers are rewarded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from moss_audio_jax.data.batch import Example, TrainExample
from moss_audio_jax.data.examples import ExampleMaker, Job, rejected
from moss_audio_jax.data.records import (
    Branch,
    Rejected,
    Row,
    answered,
    conversations,
    parse_row,
    reason_of,
)
from moss_audio_jax.data.sources import SourceError, read_location
from moss_audio_jax.post_train import asked
from moss_audio_jax.post_train.mixture import Mixture


class Question(NamedTuple):
    """One question.

    Attributes:
      index: where it stands in the mixture.
      row: as rewards take it (`asked`), without branches.
      made: the whole conversation, with the expected answer.
      prompt: its beginning, up to the answer.
    """

    index: int
    row: Mapping[str, Any]
    made: TrainExample
    prompt: Example


@dataclasses.dataclass(frozen=True)
class Questions:
    """Makes questions; like `ExampleMaker`, by which it makes them, a function of the job alone.

    Attributes:
      make: of one branch a row, without augmentation.
      prompt_tokens, new_tokens: the most of a prompt, and of an answer; rows whose prompt or
        expected answer has more are left out.
    """

    make: ExampleMaker
    prompt_tokens: int
    new_tokens: int

    def __call__(self, job: Job) -> Question | Rejected:
        """The question, or the reason why there is none.

        Raises:
          SourceError: the file that holds the row cannot be read.
        """
        row = None
        try:
            row = parse_row(read_location(job.location))
            row = self.alone(row, job)
            made = self.make.make(row, job)
        except SourceError:
            raise
        except Exception as error:
            return rejected(job, reason_of(error), row.id if row else None)
        if long := made if isinstance(made, str) else self.over_long(made):
            return rejected(job, long, row.id, bad=False)
        prompt = Example(made.ids[: _prompt_of(made)], made.mels)
        return Question(job.index, _told(row, job), made, prompt)

    def alone(self, row: Row, job: Job) -> Row:
        """The row with one of its branches, and its answer as the assistant's last message.

        Raises InputError if it asks nothing.
        """
        branch, *_ = [*self.make.chosen(row, job.index), None]
        row = _alone(row, branch)
        asked.read(_told(row, job))
        return row

    def over_long(self, made: TrainExample) -> str | None:
        """Which limit a question's example is beyond."""
        first = _prompt_of(made)
        for what, key, tokens in (
            ("prompt", "prompt_tokens", first),
            ("expected answer", "new_tokens", len(made.ids) - first),
        ):
            if tokens > (most := getattr(self, key)):
                return f"its {what} has {tokens} tokens; policy.{key} is {most}"
        return None

    def rows_of(self, job: Job) -> Iterator[Mapping[str, Any]]:
        """All that may be asked about a job's row, as rewards take it; its sound is not read.

        Raises:
          InputError: the row is bad, or the file that holds it cannot be read (SourceError).
        """
        row = parse_row(read_location(job.location))
        every = dataclasses.replace(self.make, branches=max(1, len(row.branches)))
        for branch in every.chosen(row, job.index) or [None]:
            yield _told(_alone(row, branch), job)


@dataclasses.dataclass(frozen=True)
class PaidQuestions(Questions):
    """Questions whose rewards are tried, too (`Mixture.check`), before a run.

    Attributes:
      rewards: makes them, in each process that makes questions.
    """

    rewards: Callable[[], Mixture]

    def alone(self, row: Row, job: Job) -> Row:
        """As of `Questions`. Raises InputError also if the row cannot be rewarded."""
        row = super().alone(row, job)
        self._pay.check(_told(row, job))
        return row

    @functools.cached_property
    def _pay(self) -> Mixture:
        return self.rewards()


def lacks_answer(job: Job) -> str | None:
    """The name of a job's row if it has no assistant's message, without which it has no loss."""
    row = parse_row(read_location(job.location))
    alone = [messages[-1].get("role") != "assistant" for messages in conversations(row)]
    return row.id or job.row_id if any(alone) else None


def _alone(row: Row, branch: Branch | None) -> Row:
    """The row with one of its branches, and its answer as the assistant's last message."""
    if branch:
        messages, task = [*row.messages, *branch.messages], branch.task or row.task
        row = dataclasses.replace(row, messages=messages, branches=(), task=task)
    return answered(row)


def _prompt_of(made: TrainExample) -> int:
    """How many tokens come before the last answer: up to the last that is not learned."""
    learned = made.labels >= 0
    last = np.flatnonzero(learned)[-1] + 1
    return int(last - np.argmin(learned[:last][::-1]))


def _told(row: Row, job: Job) -> dict[str, Any]:
    told = {**row.more, "conversation": list(row.messages), "id": row.id or job.row_id}
    return told | ({"task": row.task} if row.task else {})
