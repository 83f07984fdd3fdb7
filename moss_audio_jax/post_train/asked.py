"""What a row asks, and what a model said: the two arguments of every reward.

A row is one of the official fine-tuning JSONL or of a world. Its expected answer is its "answer",
or else the assistant's last message. Besides "task" and "id" it may have

    "choices"     of a multiple choice; by default the lines "A. text" of the prompt
    "think"       whether a thinking block is wanted; by default whether the expected answer has one
    "tolerance"   how far off each number may be
    "language"    of a transcript, such as "zh"; by default told by its script
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from moss_audio_jax.errors import InputError
from moss_audio_jax.evaluate.metrics import closed
from moss_audio_jax.evaluate.metrics.choice import listed
from moss_audio_jax.evaluate.reading import json_kind
from moss_audio_jax.files import brief
from moss_audio_jax.text.prompt import split_thinking
from moss_audio_jax.text.tasks import NO_SPEECH

# How an answer is compared. A row's task may also be one of these.
KINDS = (
    "choice",
    "asr",
    "words",
    "sentences",
    "events",
    "fields",
    "caption",
    "number",
    "text",
)
_KINDS = {
    **{kind: kind for kind in KINDS},
    "choice_letter": "choice",
    "choice_text": "choice",
    "asr_words": "words",
    "asr_sentences": "sentences",
    "caption_speech_json": "fields",
    "caption_speech": "caption",
    "caption_sound": "caption",
    "caption_music": "caption",
}
# Tasks of a world whose answers are one number, one time or a few words.
_NAMES = """
absent any_music any_speech background count count_kinds count_speakers count_words drums
instrument instruments key language loudness mode order order_first order_next overlap pace present
reason_beat reason_beats reason_before reason_faster reason_gap reason_longest reason_more
reason_sentence reason_sum reason_word silence speaker_accent speaker_pitch speaker_sex
speaker_speed speaker_tone speaker_whisper tempo time_what time_when which_sound who_said word_what
word_when
"""
_CLOSED = frozenset(_NAMES.split())
TASKS = frozenset(_KINDS) | _CLOSED


@dataclasses.dataclass(frozen=True)
class Said:
    """One answer of a model.

    Attributes:
      raw: all that was generated, with the tags of its thinking block, without the stop token.
      tokens: how many were generated.
      finish_reason: of `generate.request.Reply`.
    """

    raw: str
    tokens: int
    finish_reason: str = "stop"

    @functools.cached_property
    def thinking(self) -> str | None:
        """The contents of the thinking block; None without one."""
        return split_thinking(self.raw)[0]

    @functools.cached_property
    def text(self) -> str:
        """The answer without its thinking."""
        return split_thinking(self.raw)[1].strip()


@dataclasses.dataclass(frozen=True)
class Asked:
    """A row's question.

    Attributes:
      name: the row's id, for messages.
      task: as the row says it; None if it does not.
      kind: one of KINDS; None for a task that is not in TASKS.
      prompt: the user's last text.
      answer: the expected one, without its thinking.
      thinks: whether an answer has a thinking block.
    """

    name: str
    task: str | None
    kind: str | None
    prompt: str
    answer: str
    thinks: bool
    choices: tuple[str, ...] = ()
    tolerance: float | None = None
    language: str | None = None


def read(row: Mapping[str, Any]) -> Asked:
    """The question of a row.

    Raises:
      InputError: no conversation, no question, no expected answer, or a key of a wrong type; the
        row is named.
    """
    name = brief(repr(row["id"])) if row.get("id") else "without an id"
    messages = row.get("conversation")
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise InputError(f'row {name}: no "conversation"; expected a list of messages')
    prompt, last = _texts(messages)
    answer = row.get("answer")
    answer = last if answer is None else answer
    if type(answer) is int or (type(answer) is float and math.isfinite(answer)):
        answer = str(answer)
    if not isinstance(answer, str) or not prompt:
        wanted = "a text of the user" if not prompt else '"answer", or an assistant\'s last message'
        raise InputError(f"row {name}: nothing to compare with; expected {wanted}")
    thinking, answer = split_thinking(answer)
    answer = answer.strip()
    if not any(map(str.isalnum, answer)):
        what = f"{brief(repr(answer))}, without letters or digits" if answer else "empty"
        raise InputError(f"row {name}: the expected answer is {what}")
    task = _checked(row, "task", name, (str,), None)
    choices = _checked(row, "choices", name, (list,), listed(prompt))
    tolerance = _checked(row, "tolerance", name, (int, float), None)
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise InputError(f'row {name}: "tolerance" is {tolerance}; expected a number from 0')
    return Asked(
        name,
        task,
        _kind(task, answer),
        prompt,
        answer,
        _checked(row, "think", name, (bool,), thinking is not None),
        tuple(map(str, choices)),
        tolerance,
        _checked(row, "language", name, (str,), None),
    )


def _texts(messages: list[Mapping[str, Any]]) -> tuple[str, str | None]:
    """The text of the last user turn, and of the assistant's message after it, if there is one."""
    said: list[str] = []
    answer = None
    for message in messages:
        if message.get("message_type") != "text" or not isinstance(message.get("content"), str):
            continue
        if message.get("role") == "assistant":
            answer = message["content"]
        elif message.get("role") == "user":
            if answer is not None:
                said, answer = [], None
            said.append(message["content"])
    return "\n".join(said), answer


def _checked(
    row: Mapping[str, Any], key: str, name: str, types: tuple[type, ...], default: Any
) -> Any:
    value = row.get(key)
    if value is None:
        return default
    if type(value) not in types:
        wanted = " or ".join(each.__name__ for each in types)
        raise InputError(f'row {name}: "{key}" is {json_kind(value)}; expected {wanted}')
    return value


def _kind(task: str | None, answer: str) -> str | None:
    if task in _CLOSED or (task == "asr" and answer == NO_SPEECH):
        return "number" if closed.spans(answer) else "text"
    return _KINDS.get(task)
