"""Questions from rows: the prompt that is answered, and the row by which answers are rewarded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from moss_audio_jax.data.batch import Example, TrainExample
from moss_audio_jax.data.examples import ExampleMaker, Job, rejected
from moss_audio_jax.data.records import Rejected, Row, parse_row, reason_of
from moss_audio_jax.data.sources import SourceError, read_location
from moss_audio_jax.post_train import asked


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
      longest: tokens of a prompt; rows with more are left out.
    """

    make: ExampleMaker
    longest: int

    def __call__(self, job: Job) -> Question | Rejected:
        """The question, or the reason why there is none.

        Raises:
          SourceError: the file that holds the row cannot be read.
        """
        row = None
        try:
            row = self._alone(parse_row(read_location(job.location)), job)
            made = self.make.make(row, job)
            if isinstance(made, str):
                return rejected(job, made, row.id, bad=False)
            question = _question(row, made, job)
            asked.read(question.row)
        except SourceError:
            raise
        except Exception as error:
            return rejected(job, reason_of(error), row.id if row else None)
        tokens = len(question.prompt.ids)
        if tokens > self.longest:
            reason = f"its prompt has {tokens} tokens; policy.prompt_tokens is {self.longest}"
            return rejected(job, reason, row.id, bad=False)
        return question

    def _alone(self, row: Row, job: Job) -> Row:
        """The row with one of its branches, and with its "answer" as the assistant's message."""
        for branch in self.make.chosen(row, job.index):
            messages, task = [*row.messages, *branch.messages], branch.task or row.task
            row = dataclasses.replace(row, messages=messages, branches=(), task=task)
        answer = row.more.get("answer")
        if answer is not None and row.messages[-1].get("role") != "assistant":
            said = {"role": "assistant", "message_type": "text", "content": str(answer)}
            row = dataclasses.replace(row, messages=[*row.messages, said])
        return row


def _question(row: Row, made: TrainExample, job: Job) -> Question:
    labelled = np.flatnonzero(made.labels >= 0)
    # The last answer's first token: behind the last token that is not learned.
    first = labelled[-1] + 1 - np.argmin((made.labels >= 0)[: labelled[-1] + 1][::-1])
    told = {**row.more, "conversation": list(row.messages), "id": row.id or job.row_id}
    if row.task:
        told["task"] = row.task
    return Question(job.index, told, made, Example(made.ids[:first], made.mels))
