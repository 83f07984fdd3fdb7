"""Conversations in OpenAI's form, as `build_conversation` takes them. No sound is decoded here.

    [{"role": "system", "content": "Answer in one sentence."},
     {"role": "user", "content": [
         {"type": "text", "text": "What is heard?"},
         {"type": "input_audio", "input_audio": {"data": BASE64, "format": "wav"}}]},
     {"role": "assistant", "content": "A bell."},
     {"role": "user", "content": "How often?"}]

A user's sound is `input_audio` (base64), `audio_url` with a `data:` URL, or in Python
`{"type": "audio", "audio": ...}` with a path, an array or whatever else `api.Audio` names. A
`format` or a media type is not looked at: the contents decide. In a turn the clips come before the
texts, wherever they stand, because the models were trained so.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moss_audio_jax.errors import InputError
from moss_audio_jax.files import brief

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
ENCODED = ("input_audio", "audio_url")  # parts with sound that can be sent
SOUNDS = (*ENCODED, "audio")
_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)


class Conversed(NamedTuple):
    """`messages` for `build_conversation`, and the clips that its audio messages stand for."""

    messages: list[dict[str, str]]
    clips: list[Any]


def from_openai(messages: Sequence[Mapping[str, Any]]) -> Conversed:
    """Translates a conversation; its last message is the user's.

    Returns:
      Conversed(messages, clips): a clip is an `io.BytesIO` of an encoded file, or what an `audio`
      part holds.

    Raises:
      InputError: a message or a part cannot be used; its place is named.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError(f"messages is a {type(messages).__name__}; expected a list of messages")
    if not messages:
        raise InputError("messages is empty; expected at least one, of the user")
    said: list[dict[str, str]] = []
    clips: list[Any] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise InputError(f"{where} is a {type(message).__name__}; expected an object")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise InputError(
                f"{where}.role is {_shown(role)}; expected system, developer, user or assistant"
            )
        if message.get("tool_calls") or message.get("function_call"):
            raise InputError(f"{where}.tool_calls: this model calls no tools; leave them out")
        for part, place in parts(message, where):
            if part["type"] not in SOUNDS:
                content = part["text" if part["type"] == "text" else "refusal"]
                said.append({"role": ROLES[role], "message_type": "text", "content": content})
                continue
            if role != "user":
                raise InputError(f"{place}: sound of the {role}; expected it in a user's message")
            clips.append(part["audio"] if part["type"] == "audio" else encoded(part, place))
            name = f"clip {len(clips)}"
            said.append({"role": "user", "message_type": "audio", "content": name})
    return Conversed(said, clips)


def parts(
    message: Mapping[str, Any], where: str, sounds: Sequence[str] = SOUNDS
) -> list[tuple[Mapping[str, Any], str]]:
    """The parts of a message's content, each checked, with its place for messages.

    A content that is a string is one part of text. `sounds`: the types of parts with sound.
    """
    content = message.get("content")
    if isinstance(content, str):
        return [({"type": "text", "text": content}, f"{where}.content")]
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        what = "empty" if content == [] else _shown(content)
        raise InputError(f"{where}.content is {what}; expected a text or a list of parts")
    found = []
    for number, part in enumerate(content):
        place = f"{where}.content[{number}]"
        if not isinstance(part, Mapping):
            raise InputError(f"{place} is a {type(part).__name__}; expected an object")
        kind = part.get("type")
        if kind in ("text", "refusal"):
            if not isinstance(part.get(kind), str):
                raise InputError(f"{place}.{kind} is {_shown(part.get(kind))}; expected a string")
        elif not isinstance(kind, str) or kind not in sounds:
            raise InputError(f"{place}.type is {_shown(kind)}; expected text, {', '.join(sounds)}")
        elif kind not in part:
            raise InputError(f"{place}.{kind} is missing; expected the sound")
        found.append((part, place))
    return found


def encoded(part: Mapping[str, Any], where: str) -> io.BytesIO:
    """The file in an `input_audio` or `audio_url` part."""
    kind = part["type"]
    key = "data" if kind == "input_audio" else "url"
    held = part[kind]
    data = held.get(key) if isinstance(held, Mapping) else None
    if not isinstance(data, str) or not data:
        raise InputError(f"{where}.{kind}.{key} is {_shown(data)}; expected a string")
    if opening := _DATA_URL.match(data):
        data = data[opening.end() :]
    elif kind == "audio_url":
        raise InputError(
            f"{where}.audio_url.url: expected data:audio/...;base64,... (nothing is fetched)"
        )
    try:
        return io.BytesIO(base64.b64decode(data, validate=True))
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}.{kind}.{key}: not base64 ({brief(error)})") from None


def _shown(value: Any) -> str:
    return brief(repr(value), 60) if isinstance(value, str | int | None) else type(value).__name__
