"""What a client may say on WS /v1/realtime: the fields of each event, and those that are refused.

As in `schemas`, an unknown field is refused, a field without effect here is accepted, and one that
would change an answer, but that this server does not have, is refused unless it asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moss_audio_jax.errors import InputError
from moss_audio_jax.files import brief, parse_json
from moss_audio_jax.serve.errors import ApiError, invalid
from moss_audio_jax.serve.schemas import Text, read

Id = Annotated[str, Field(max_length=512)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Format(_Strict):
    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Literal[16000, 24000] = 24000


class Transcription(_Strict):
    """`model` is one of the server's names; the rest is accepted, without effect here."""

    model: str | None = None
    language: str | None = Field(None, max_length=40)
    languages: list[str] | None = None
    prompt: Text | None = None
    keywords: list[str] | None = None
    delay: str | None = None


class Input(_Strict):
    format: Format | None = None
    transcription: Transcription | None = None
    turn_detection: Any = None
    noise_reduction: Any = None


class Audio(_Strict):
    input: Input | None = None
    output: Any = None


class SessionFields(_Strict):
    type: Literal["transcription", "realtime"] | None = None
    audio: Audio | None = None
    include: list[str] | None = None
    model: str | None = None
    instructions: Text | None = None
    output_modalities: list[str] | None = None
    max_output_tokens: Any = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    # without effect here
    tracing: Any = None
    truncation: Any = None
    parallel_tool_calls: bool | None = None

    def refuse(self) -> None:
        """Raises ApiError if it asks for what this server does not have."""
        heard = (self.audio and self.audio.input) or Input()
        for name in ("turn_detection", "noise_reduction"):
            if getattr(heard, name) is not None:
                raise invalid(
                    f"session.audio.input.{name}: this server has none; send null, and commit the "
                    "buffer yourself",
                    f"session.audio.input.{name}",
                    "unsupported_parameter",
                )
        if self.include:
            raise invalid("session.include: expected none", "session.include")
        _refuse(self, "session")


class Content(_Strict):
    type: Literal["input_text"]
    text: Text


class Item(_Strict):
    """A text of the user. Sound goes through the buffer."""

    type: Literal["message"]
    role: Literal["user"]
    content: list[Content] = Field(min_length=1, max_length=64)
    id: Id | None = None
    object: str | None = None
    status: str | None = None

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content)


class ResponseFields(_Strict):
    instructions: Text | None = None
    input: list[Item] | None = Field(None, max_length=64)
    output_modalities: list[str] | None = None
    max_output_tokens: Any = None
    metadata: dict[Id, Text] | None = Field(None, max_length=16)
    tools: list[Any] | None = None
    tool_choice: Any = None
    # without effect here
    conversation: str | None = None
    parallel_tool_calls: bool | None = None

    def refuse(self) -> None:
        """Raises ApiError if it asks for what this server does not have."""
        _refuse(self, "response")


class _Event(_Strict):
    type: str
    event_id: Id | None = None


class SessionUpdate(_Event):
    session: SessionFields


class Append(_Event):
    audio: str


class Plain(_Event):
    """input_audio_buffer.commit and input_audio_buffer.clear."""


class ItemCreate(_Event):
    item: Item
    previous_item_id: Id | None = None


class ResponseCreate(_Event):
    response: ResponseFields | None = None


class ResponseCancel(_Event):
    response_id: Id | None = None


EVENTS: dict[str, type[_Event]] = {
    "session.update": SessionUpdate,
    "input_audio_buffer.append": Append,
    "input_audio_buffer.commit": Plain,
    "input_audio_buffer.clear": Plain,
    "conversation.item.create": ItemCreate,
    "response.create": ResponseCreate,
    "response.cancel": ResponseCancel,
}


def read_event(text: str | None) -> _Event:
    """A message as an event.

    Raises:
      ApiError: it is none, or a field, which is named, is wrong. Its attribute `event_id` is that
        of the event, if it has one.
    """
    values: Any = None
    try:
        if text is None:
            raise invalid("a binary message; expected JSON, with sound in base64", None)
        try:
            values = parse_json(text, "the message")
        except InputError as error:
            raise invalid(str(error), code="invalid_json") from None
        if not isinstance(values, dict):
            raise invalid("the message must be a JSON object")
        kind = values.get("type")
        if not isinstance(kind, str) or kind not in EVENTS:
            raise invalid(
                f"type is {brief(repr(kind), 80)}; expected one of {', '.join(EVENTS)}", "type"
            )
        return read(EVENTS[kind], values)
    except ApiError as error:
        named = values.get("event_id") if isinstance(values, dict) else None
        error.event_id = brief(named, 512) if isinstance(named, str) else None
        raise


def most_tokens(asked: Any, where: str, most: int) -> int | Literal["inf"] | None:
    """`max_output_tokens` of an event; None if the event does not have it."""
    if asked in (None, "inf"):
        return asked
    if isinstance(asked, float) and asked.is_integer():  # 5.0, as in the other routes
        asked = int(asked)
    if not isinstance(asked, int) or isinstance(asked, bool) or not 1 <= asked <= most:
        raise invalid(f"{where}: expected 1 to {most}, or 'inf'", where)
    return asked


def _refuse(fields: SessionFields | ResponseFields, where: str) -> None:
    if fields.output_modalities not in (None, ["text"]):
        name = f"{where}.output_modalities"
        raise invalid(f"{name}: expected ['text']", name, "unsupported_value")
    if fields.tools or fields.tool_choice not in (None, "none", "auto"):
        raise invalid(f"{where}.tools: this model has none", f"{where}.tools")
