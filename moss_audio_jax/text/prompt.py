"""Prompts and conversations as token ids: the chat around a text, audio spans, time markers.

    <|im_start|>system\\n{system}<|im_end|>\\n
    <|im_start|>user\\n{start}{audio span}{end}\\n{text}<|im_end|>\\n
    <|im_start|>assistant\\n{answer}<|im_end|>

The text between two special tokens is tokenised in one piece ("\\n{text}", "user\\n{text}"),
because byte pairs merge across line ends.
"""

from __future__ import annotations

import dataclasses
import operator
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moss_audio_jax.audio import lengths
from moss_audio_jax.config import ProcessorConfig
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.files import brief
from moss_audio_jax.text.tokenizer import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    THINK,
    TURN_END,
    TURN_START,
    Tokenizer,
)

DEFAULT_SYSTEM = "You are a helpful assistant."
AUDIO_SPAN = f"{AUDIO_START}{AUDIO}{AUDIO_END}"
_SPAN = re.compile(f"{re.escape(AUDIO_START)}(?:{re.escape(AUDIO)})+{re.escape(AUDIO_END)}")


class Conversation(NamedTuple):
    """Token ids [L] int32, and [L] bool: True on each answer's tokens and its `<|im_end|>`."""

    ids: np.ndarray
    answer_mask: np.ndarray


def audio_span(
    n_tokens: int,
    processor: ProcessorConfig,
    digit_ids: Sequence[int],
    time_markers: bool = True,
) -> list[int]:
    """Ids of one clip's placeholders, without the start and end tokens.

    Args:
      n_tokens: audio tokens of the clip (12.5 per second).
      processor: gives the placeholder's id.
      digit_ids: ids of "0" to "9".
      time_markers: after every 25 placeholders, write the seconds passed: 2, 4, 6, ...
    """
    ids: list[int] = []
    placed = 0
    if time_markers:
        for second in lengths.marker_seconds(n_tokens):
            ids += [processor.audio_token_id] * lengths.MARKER_TOKENS
            ids += [digit_ids[int(digit)] for digit in str(second)]
            placed += lengths.MARKER_TOKENS
    return ids + [processor.audio_token_id] * (n_tokens - placed)


def build_prompt(
    tokenizer: Tokenizer,
    text: str,
    mel_frames: Sequence[int] = (),
    time_markers: bool = True,
    system: str | None = None,
    official_specials: bool = False,
) -> np.ndarray:
    """Ids of a prompt, up to where the answer begins.

    Args:
      tokenizer: also gives the special ids.
      text: what the user says; the chat is put around it, audio first. A text that holds
        `<|audio_bos|><|AUDIO|><|audio_eos|>` is the whole prompt instead, verbatim: special
        tokens are recognised in it, and each such span becomes one clip.
      mel_frames: mel frames (100 per second) of each clip, in order.
      time_markers: write the seconds between the placeholders; see `audio_span`.
      system: replaces the default system text.
      official_specials: recognise special tokens in `text` and `system` as the official code
        does. By default a user's text is text.

    Returns:
      int32 [L].

    Raises:
      InputError: a text is not a string, a clip has no frames, or spans do not match clips.
      UsageError: a system text with a verbatim prompt.
    """
    _require_text(text, "the prompt")
    if system is not None:
        _require_text(system, "the system text")
    clips = _clip_spans(tokenizer, mel_frames, time_markers)
    if _SPAN.search(text):
        if system is not None:
            raise UsageError(
                "a prompt that holds audio spans is used verbatim: write the system text into it"
            )
        return _int32(_verbatim(tokenizer, text, clips))
    system = DEFAULT_SYSTEM if system is None else system
    if official_specials:
        spans = f"{AUDIO_SPAN}\n" * len(clips)
        prompt = (
            f"{TURN_START}system\n{system}{TURN_END}\n"
            f"{TURN_START}user\n{spans}{text}{TURN_END}\n{TURN_START}assistant\n"
        )
        return _int32(_verbatim(tokenizer, prompt, clips))
    newline = tokenizer.encode("\n")
    end = [tokenizer.turn_end_id]
    return _int32(
        _turn(tokenizer, "system", [], system)
        + end
        + newline
        + _turn(tokenizer, "user", clips, text)
        + end
        + newline
        + _turn(tokenizer, "assistant", [], "")
    )


def build_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    mel_frames: Sequence[int] = (),
    time_markers: bool = True,
    generation_prompt: bool = False,
) -> Conversation:
    """Ids of a conversation of any number of turns, and which of them are answers.

    Messages have the official fine-tuning form `{"role": "system" | "user" | "assistant",
    "message_type": "audio" | "text", "content": str}`. Adjacent messages of one role form one
    turn: its clips first, one per line, then its texts joined by newlines. The first turn may be a
    system turn, which replaces the default; then user and assistant take turns. Up to the first
    answer the ids equal `build_prompt` of the same text and clips. An answer is tokenised by
    itself; a thinking block at its start gets the ids of `<think>` and `</think>`. Everything else
    in a message is text, special tokens and audio spans included.

    Args:
      tokenizer: also gives the special ids.
      messages: the conversation.
      mel_frames: mel frames of each audio message, in order.
      time_markers: see `build_prompt`.
      generation_prompt: the conversation ends with a user turn; open the assistant's.

    Returns:
      Conversation(ids int32 [L], answer_mask bool [L]).

    Raises:
      InputError: a message cannot be used (its index is named), turns are out of order, an answer
        is empty, or clips do not match the audio messages.
    """
    turns = _turns(messages)
    n_audio = sum(turn.n_clips for turn in turns)
    if n_audio != len(mel_frames):
        raise InputError(
            f"the conversation has {n_audio} audio messages but {len(mel_frames)} clips are given; "
            "expected one clip for each"
        )
    expected = "user" if generation_prompt else "assistant"
    if turns[-1].role != expected:
        raise InputError(
            f"messages[{len(messages) - 1}]: the conversation ends with the {turns[-1].role}; "
            f"expected the {expected} (generation_prompt is {generation_prompt})"
        )
    clips = iter(_clip_spans(tokenizer, mel_frames, time_markers))
    newline = tokenizer.encode("\n")
    if turns[0].role != "system":
        turns.insert(0, _Turn("system", 0, [DEFAULT_SYSTEM]))
    ids: list[int] = []
    mask: list[bool] = []
    for turn in turns:
        if ids:
            ids += newline
        text = "\n".join(turn.texts)
        if turn.role == "assistant":
            ids += _turn(tokenizer, "assistant", [], "")
            answer = [*_answer_ids(tokenizer, text), tokenizer.turn_end_id]
        else:
            ids += _turn(tokenizer, turn.role, [next(clips) for _ in range(turn.n_clips)], text)
            ids.append(tokenizer.turn_end_id)
            answer = []
        mask += [False] * (len(ids) - len(mask)) + [True] * len(answer)
        ids += answer
    if generation_prompt:
        ids += newline + _turn(tokenizer, "assistant", [], "")
        mask += [False] * (len(ids) - len(mask))
    return Conversation(_int32(ids), np.array(mask, dtype=bool))


class Branched(NamedTuple):
    """An opening that several conversations share, and the rest of each."""

    opening: np.ndarray  # int32 [P]
    branches: list[Conversation]  # without the opening


def build_branches(
    tokenizer: Tokenizer,
    opening: Sequence[Mapping[str, Any]],
    branches: Sequence[Sequence[Mapping[str, Any]]],
    mel_frames: Sequence[int],
    time_markers: bool = True,
) -> Branched:
    """Ids of conversations that share their audio: `build_conversation` of each, cut after it.

    Args:
      opening: messages up to the audio; at least one clip.
      branches: for each question the messages that follow, ending with an answer; may be empty.

    Raises:
      InputError: see `build_conversation`; the branch is named.
    """
    whole = build_conversation(tokenizer, opening, mel_frames, time_markers, generation_prompt=True)
    end = 1 + int(np.flatnonzero(whole.ids == tokenizer.processor.audio_end_id)[-1])
    cut = []
    for number, messages in enumerate(branches):
        try:
            each = build_conversation(tokenizer, [*opening, *messages], mel_frames, time_markers)
        except InputError as error:
            raise InputError(f"branches[{number}]: {error}") from None
        cut.append(Conversation(each.ids[end:], each.answer_mask[end:]))
    return Branched(whole.ids[:end], cut)


def split_thinking(text: str) -> tuple[str | None, str]:
    """Splits the thinking block off an answer `<think>\\n...\\n</think>\\n\\nanswer`.

    Returns:
      (thinking, answer): thinking is None without a block and "" for an empty one. A block that
      is never closed was cut short: all of it is thinking and the answer is "". If only the
      closing tag is there (the prompt held the opening one), the text before it is thinking.
    """
    opening, closing = THINK
    before, opened, rest = text.partition(opening)
    if opened and not before.strip():
        thinking, _, answer = rest.partition(closing)
        return thinking.strip(), answer.lstrip()
    thinking, closed, answer = text.partition(closing)
    if closed and opening not in thinking:
        return thinking.strip(), answer.lstrip()
    return None, text


@dataclasses.dataclass
class _Turn:
    role: str
    n_clips: int
    texts: list[str]


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[_Turn]:
    """Checks the messages and groups adjacent ones of one role."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise InputError(f"messages is a {type(messages).__name__}; expected a list of messages")
    turns: list[_Turn] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise InputError(f"{where} is a {type(message).__name__}; expected an object")
        role, kind, content = (message.get(key) for key in ("role", "message_type", "content"))
        if role not in ("system", "user", "assistant"):
            raise InputError(f"{where}: role is {_said(role)}; expected system, user or assistant")
        if kind not in ("text", "audio") or (kind == "audio" and role != "user"):
            allowed = "'text' or 'audio'" if role == "user" else f"'text' (role {role})"
            raise InputError(f"{where}: message_type is {_said(kind)}; expected {allowed}")
        if kind == "audio" and (not isinstance(content, (str, os.PathLike)) or content == ""):
            raise InputError(
                f"{where}: content is {_said(content)}; expected the path of an audio file"
            )
        if kind == "text":
            _require_text(content, f"{where}: content")
        if not turns or turns[-1].role != role:
            last = turns[-1].role if turns else None
            if role == "system" and turns:
                raise InputError(f"{where}: a system turn after another; expected it to come first")
            if role == "assistant" and last != "user":
                raise InputError(f"{where}: an answer without a user turn before it; add one")
            turns.append(_Turn(role, 0, []))
        if kind == "audio":
            turns[-1].n_clips += 1
        else:
            turns[-1].texts.append(content)
        # Whether a turn is empty shows only at its end, where the role changes.
        last_of_turn = index + 1 == len(messages) or (
            isinstance(messages[index + 1], Mapping) and messages[index + 1].get("role") != role
        )
        if last_of_turn and not turns[-1].n_clips and not "".join(turns[-1].texts).strip():
            what = "answer" if role == "assistant" else f"{role} turn"
            raise InputError(f"{where}: empty {what}; expected text")
    if not any(turn.role == "user" for turn in turns):
        raise InputError("messages: no user turn; expected at least one")
    return turns


def _turn(tokenizer: Tokenizer, role: str, clips: Sequence[list[int]], text: str) -> list[int]:
    """Ids of a turn without its `<|im_end|>`."""
    ids = [tokenizer.turn_start_id]
    lead = f"{role}\n"
    for clip in clips:
        ids += tokenizer.encode(lead) + clip
        lead = "\n"
    return ids + tokenizer.encode(lead + text)


def _verbatim(tokenizer: Tokenizer, prompt: str, clips: Sequence[list[int]]) -> list[int]:
    """Ids of a prompt that holds one audio span for each clip."""
    spans = list(_SPAN.finditer(prompt))
    if len(spans) != len(clips):
        raise InputError(
            f"the prompt holds {len(spans)} audio spans ({AUDIO_SPAN}) but {len(clips)} clips are "
            "given; expected one span for each clip"
        )
    ids: list[int] = []
    cursor = 0
    for span, clip in zip(spans, clips, strict=True):
        ids += tokenizer.encode(prompt[cursor : span.start()], special=True) + clip
        cursor = span.end()
    return ids + tokenizer.encode(prompt[cursor:], special=True)


def _clip_spans(
    tokenizer: Tokenizer, mel_frames: Sequence[int], time_markers: bool
) -> list[list[int]]:
    """For each clip: start, placeholders with time markers, end."""
    processor = tokenizer.processor
    spans = []
    for number, given in enumerate(mel_frames, 1):
        frames = operator.index(given)
        if frames < 1:
            raise InputError(
                f"clip {number} has {frames} mel frames; expected at least one (10 ms of audio)"
            )
        digit_ids = tokenizer.digit_ids if time_markers else ()
        span = audio_span(lengths.audio_tokens(frames), processor, digit_ids, time_markers)
        spans.append([processor.audio_start_id, *span, processor.audio_end_id])
    return spans


def _answer_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    """Ids of an answer: a thinking block at its start keeps its tags, the rest is text."""
    opening, closing = THINK
    before, opened, rest = answer.partition(opening)
    if tokenizer.think_ids is None or not opened or before.strip():
        return tokenizer.encode(answer)
    open_id, close_id = tokenizer.think_ids
    thinking, closed, after = rest.partition(closing)
    ids = [*tokenizer.encode(before), open_id, *tokenizer.encode(thinking)]
    return [*ids, close_id, *tokenizer.encode(after)] if closed else ids


def _said(value: Any) -> str:
    """A short form of a value for a message; only the type if it may nest deeply."""
    return brief(repr(value), 60) if isinstance(value, str | int | None) else type(value).__name__


def _require_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise InputError(f"{what} is a {type(value).__name__}; expected a string")


def _int32(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)
