"""Groups of answers as the rows of a train step.

The answers to a question are branches behind its prompt, so that a clip is encoded once and a
prompt is run once for all of them. As an answer's first token is predicted by the prompt's last
one, each branch begins with that.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moss_audio_jax.config import EncoderConfig
from moss_audio_jax.data.batch import IGNORE, Shape, TrainExample, make_train_batch, size_of
from moss_audio_jax.data.packing import Size, pack
from moss_audio_jax.post_train.questions import Question
from moss_audio_jax.post_train.rollout import Answer, Group


class Piece(NamedTuple):
    """Some answers of one group in one row.

    Attributes:
      example: prompt and answers.
      answers: they, in order; `group` and `numbers` say which ones they are.
      starts: where each begins in the example.
    """

    example: TrainExample
    answers: list[Answer]
    group: int
    numbers: list[int]
    starts: list[int]


def rows_needed(prompts: int, answers: int, length: int, prompt: int, new: int) -> int:
    """Rows of `length` tokens that hold so many groups at worst; 0 if one answer does not fit."""
    each = (length - prompt + 1) // (new + 1)  # each begins with the last token of the prompt
    return prompts * -(-answers // each) if each else 0


def pieces_of(groups: Sequence[Group], length: int) -> list[Piece]:
    """The groups in as few pieces as fit into rows of `length` tokens."""
    return [
        piece
        for number, group in enumerate(groups)
        for piece in _pieces(group.question, group.answers, number, length)
    ]


def _pieces(
    question: Question, answers: Sequence[Answer], group: int, length: int
) -> Iterator[Piece]:
    opening, last = question.prompt.ids[:-1], question.prompt.ids[-1:]
    ids, branches, starts, numbers = [opening], [], [], []
    used = len(opening)
    for number, answer in enumerate(answers):
        tokens = 1 + len(answer.ids)
        if numbers and used + tokens > length:
            yield _piece(question, answers, group, numbers, starts, ids, branches)
            ids, branches, starts, numbers, used = [opening], [], [], [], len(opening)
        ids.append(np.concatenate([last, np.array(answer.ids, np.int32)]))
        branches.append(tokens)
        starts.append(used + 1)
        numbers.append(number)
        used += tokens
    yield _piece(question, answers, group, numbers, starts, ids, branches)


def _piece(
    question: Question,
    answers: Sequence[Answer],
    group: int,
    numbers: list[int],
    starts: list[int],
    ids: list[np.ndarray],
    branches: list[int],
) -> Piece:
    shared = len(ids[0])
    whole = np.concatenate(ids).astype(np.int32)
    labels = np.full(len(whole), IGNORE, np.int32)
    for start, number in zip(starts, numbers, strict=True):
        here = slice(start, start + len(answers[number].ids))
        labels[here] = whole[here]
    alone = [np.arange(shared), *(shared + np.arange(tokens) for tokens in branches)]
    counts = [shared, *branches]
    example = TrainExample(
        ids=whole,
        mels=question.prompt.mels,
        labels=labels,
        weights=1.0,
        tasks=question.made.tasks[-1] if np.ndim(question.made.tasks) else question.made.tasks,
        row_id=question.made.row_id,
        index=question.index,
        seconds=question.made.seconds,
        positions=np.concatenate(alone).astype(np.int32),
        branches=np.repeat(np.arange(len(counts)), counts).astype(np.int32),
    )
    return Piece(example, [answers[number] for number in numbers], group, numbers, starts)


def lay_out(
    pieces: Sequence[Piece],
    shape: Shape,
    multiple: int,
    encoder: EncoderConfig,
    processor: Any,
    scores: Sequence[str] = (),
) -> tuple[dict[str, np.ndarray], list[list[int]]]:
    """The arrays of a step, and which pieces are in each row.

    Args:
      shape: the most rows. Half of them are taken if the pieces fit, or a quarter, and so on, while
        they are a multiple of `multiple`: each number of rows is its own program.
      scores: names of the answers' `scores` that are laid out too.

    Returns:
      Those of `make_train_batch`, and of `train.step.ANSWERED`.
    """
    sizes = [Size(len(p.example.ids), size_of(p.example.mels, encoder)) for p in pieces]
    rows = pack(sizes, shape.room()) if pieces else []
    count = shape.rows
    while count % (2 * multiple) == 0 and count // 2 >= max(len(rows), 1):
        count //= 2
    shape = Shape(count, shape.tokens, shape.chunks, shape.frames)
    batch = make_train_batch(
        [[pieces[i].example for i in row] for row in rows],
        shape,
        encoder,
        processor.audio_token_id,
        processor.mel_dtype,
        branched=True,
    )
    names = ("advantages", "sampler_logprobs", *scores)
    batch |= {name: np.zeros(batch["tokens"].shape, np.float32) for name in names}
    batch["answers"] = np.zeros(batch["tokens"].shape, np.int32)
    for row, held in enumerate(rows):
        token, number = 0, 0
        for piece in (pieces[i] for i in held):
            for start, answer in zip(piece.starts, piece.answers, strict=True):
                number += 1
                here = slice(token + start, token + start + len(answer.ids))
                batch["answers"][row, here] = number
                batch["advantages"][row, here] = answer.advantage
                batch["sampler_logprobs"][row, here] = answer.logprobs
                for name in scores:
                    batch[name][row, here] = answer.scores[name]
            token += len(piece.example.ids)
    return batch, rows


def read_back(
    values: np.ndarray, pieces: Sequence[Piece], rows: Sequence[Sequence[int]]
) -> dict[tuple[int, int], np.ndarray]:
    """{(group, number of an answer): its values [n]} from an array [B, T] at the tokens."""
    found = {}
    for row, held in enumerate(rows):
        token = 0
        for piece in (pieces[i] for i in held):
            each = zip(piece.starts, piece.answers, piece.numbers, strict=True)
            for start, answer, number in each:
                here = slice(token + start, token + start + len(answer.ids))
                found[piece.group, number] = values[row, here].copy()
            token += len(piece.example.ids)
    return found


# --- what a checkpoint holds of groups that wait -------------------------------------------------


def saved(group: Group) -> dict[str, Any]:
    """A group as JSON; its question is made again from its place in the mixture."""
    return {
        "index": group.question.index,
        "answers": [
            {
                "ids": answer.ids,
                "logprobs": _text(answer.logprobs),
                "advantage": answer.advantage,
                "scores": {name: _text(values) for name, values in answer.scores.items()},
            }
            for answer in group.answers
        ],
    }


def restored(raw: Mapping[str, Any], question: Question) -> Group:
    """What `saved` gave."""
    answers = [
        Answer(
            each["ids"],
            _floats(each["logprobs"]),
            each["advantage"],
            {name: _floats(text) for name, text in each["scores"].items()},
        )
        for each in raw["answers"]
    ]
    return Group(question, answers)


def _text(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")
