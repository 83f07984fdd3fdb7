"""The fields of requests: which exist, their ranges, and which are refused.

Like OpenAI's API, an unknown field is refused. Fields of that API that change no answer here are
accepted (`user`, `metadata`, `store` and the like). Those that would change it, but that this
server does not have (tools, penalties by presence), are refused unless they ask for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator

from moss_audio_jax.files import brief
from moss_audio_jax.generate.options import LEAST_FACTOR
from moss_audio_jax.serve.errors import ApiError, invalid

Text = Annotated[str, Field(max_length=200_000)]


class _Strict(BaseModel):
    # Numbers in strings, and booleans as numbers, are refused; 1.0 is a whole number in JSON.
    model_config = ConfigDict(extra="forbid", strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return int(value) if isinstance(value, float) and value.is_integer() else value


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class JsonSchema(_Strict):
    name: str = Field(max_length=64)
    description: Text | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    # beyond OpenAI's API
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=LEAST_FACTOR, le=10)
    thinking_budget: int | None = Field(None, ge=0, lt=2**31)
    # of OpenAI's API, without effect here
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    # of OpenAI's API, refused unless they ask for nothing
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    logit_bias: dict[str, Any] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    web_search_options: Any = None

    @field_validator("stop")
    @classmethod
    def _stops(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > 4 or any(not 0 < len(each) <= 200 for each in stops):
            raise ValueError("expected at most 4 texts of 1 to 200 characters")
        return stop

    def refuse(self) -> None:
        """Raises ApiError if it asks for what this server does not have."""
        for name in ("tools", "functions", "audio", "prediction", "logit_bias"):
            if getattr(self, name):
                raise _absent(name)
        if self.web_search_options is not None:
            raise _absent("web_search_options")
        if self.tool_choice not in (None, "none", "auto"):
            raise _absent("tool_choice")
        if self.function_call not in (None, "none", "auto"):
            raise _absent("function_call")
        if self.modalities not in (None, ["text"]):
            raise invalid("modalities: expected ['text']", "modalities", "unsupported_value")
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise invalid(
                    f"{name}: this server has repetition_penalty instead; leave it out or give 0",
                    name,
                    "unsupported_value",
                )


class TranscriptionRequest(BaseModel):
    """The fields of POST /v1/audio/transcriptions beside `file`; a form holds texts."""

    model_config = ConfigDict(extra="forbid")

    model: str
    language: str | None = Field(None, max_length=40)
    prompt: Text | None = None
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    temperature: float | None = Field(None, ge=0, le=1)
    timestamp_granularities: list[Literal["word", "segment"]] = []
    stream: bool | None = None
    chunking_strategy: Text | None = None
    include: list[str] = []
    user: str | None = None

    @field_validator("include")
    @classmethod
    def _included(cls, include: list[str]) -> list[str]:
        if include:
            raise ValueError("expected none: log-probabilities are in chat completions only")
        return include


def read(kind: type[BaseModel], values: Any) -> Any:
    """The values as such a request. Raises ApiError, naming the first field that is wrong."""
    try:
        return kind.model_validate(values)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # Of a union pydantic names the branch, too ("stop.str").
        names = [str(each) for each in first["loc"] if each not in ("str", "list[str]")]
        field = ".".join(names) or None
        if first["type"] == "extra_forbidden":
            raise invalid(
                f"Unknown parameter: {brief(repr(field), 80)}.", field, "unknown_parameter"
            ) from None
        if first["type"] == "missing":
            raise invalid(
                f"Missing required parameter: '{field}'.", field, "missing_required_parameter"
            ) from None
        message = first["msg"].removeprefix("Value error, ")
        raise invalid(f"{field or 'the body'}: {message}", field) from None


def _absent(name: str) -> ApiError:
    return invalid(f"{name}: this model has none; leave it out", name, "unsupported_parameter")
