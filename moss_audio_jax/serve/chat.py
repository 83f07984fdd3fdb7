"""POST /v1/chat/completions: from a request's fields to answers, whole or piece by piece."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from moss_audio_jax import __version__
from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.generate.options import Sampling
from moss_audio_jax.generate.request import Clip, Prepared, Request
from moss_audio_jax.serve.answers import Answers, Pieces, sse
from moss_audio_jax.serve.errors import TOO_LONG, ApiError, invalid
from moss_audio_jax.serve.fetch import fetch
from moss_audio_jax.serve.schemas import ChatRequest, read
from moss_audio_jax.serve.state import State
from moss_audio_jax.text import messages as conversations

LOOPED = "the answer repeated itself and was ended"
_MOST_SCHEMA, _MOST_DEPTH = 100_000, 60  # characters and nesting of a schema


class Chat:
    """One request: its prompts, one for each choice, all of one conversation."""

    def __init__(
        self, state: State, service: Any, asked: ChatRequest, prompts: list[Prepared]
    ) -> None:
        self._state, self._service, self._asked, self._prompts = state, service, asked, prompts
        self._started = time.monotonic()
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": f"moss_audio_jax-{__version__}",
        }

    @property
    def stream(self) -> bool:
        return bool(self._asked.stream)

    def begin(self, stack: contextlib.ExitStack) -> Answers:
        """Submits the prompts. They are cancelled when the stack is left."""
        service, metrics = self._service, self._state.metrics
        seconds = self._state.limits.request_seconds
        answers = stack.enter_context(Answers(service, metrics, seconds, self.stream))
        for prompt in self._prompts:
            answers.begin(prompt)
        return answers

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """The body of a reply that is not streamed."""
        outputs: list[Any] = [None] * len(self._prompts)
        async for number, progress in self._timed(answers):
            if progress.output is not None:
                outputs[number] = progress.output
        choices = []
        for number, (output, prompt) in enumerate(zip(outputs, self._prompts, strict=True)):
            reply = self._state.model.reply(output, prompt)
            message = {"role": "assistant", "content": reply.text, "refusal": None}
            if reply.thinking is not None:
                message["reasoning_content"] = reply.thinking
            choices.append(
                {
                    "index": number,
                    "message": message,
                    "logprobs": self._logprobs(output.logprobs or []),
                    "finish_reason": _reason(output),
                }
            )
        body = {**self._head, "object": "chat.completion", "choices": choices}
        return body | {"usage": self._usage(outputs)} | self._warned(outputs)

    async def events(self, answers: Answers) -> AsyncIterator[str]:
        """The events of a streamed reply. An error becomes the last event."""
        options = self._asked.stream_options
        with_usage = options is not None and options.include_usage
        head = {**self._head, "object": "chat.completion.chunk"}
        if with_usage:
            head["usage"] = None
        outputs: list[Any] = [None] * len(self._prompts)
        pieces = [Pieces(self._state.model.tokenizer, p.sampling.stop) for p in self._prompts]
        given = [0] * len(self._prompts)  # tokens whose log-probabilities were sent
        try:
            for number in range(len(self._prompts)):
                yield _event(head, number, {"role": "assistant", "content": ""})
            async for number, progress in self._timed(answers):
                outputs[number] = output = progress.output
                new = pieces[number].push(progress.ids, output is not None)
                for kind, piece in new.items():
                    name = "content" if kind == "text" else "reasoning_content"
                    fresh = (progress.logprobs or [])[given[number] : pieces[number].sure]
                    given[number] += len(fresh)
                    yield _event(head, number, {name: piece}, self._logprobs(fresh))
                if output is not None:
                    rest = (output.logprobs or [])[given[number] :]
                    yield _event(head, number, {}, self._logprobs(rest), _reason(output))
            warned = self._warned(outputs)
            if with_usage or warned:
                last = {**head, "choices": []} | warned
                yield sse(last | ({"usage": self._usage(outputs)} if with_usage else {}))
        except ApiError as error:
            yield sse(error.body)
        yield "data: [DONE]\n\n"

    async def _timed(self, answers: Answers) -> AsyncIterator[tuple[int, Any]]:
        """The progress of all answers, measured."""
        before: dict[int, tuple[float, int]] = {}
        metrics = self._state.metrics
        async for number, progress in answers:
            now, count = time.monotonic(), len(progress.ids)
            if number not in before:
                metrics.first.observe(now - self._started)
            else:
                then, told = before[number]
                for _ in range(count - told):
                    metrics.between.observe((now - then) / (count - told))
            before[number] = now, count
            yield number, progress

    def _usage(self, outputs: list[Any]) -> dict[str, Any]:
        """Tokens of the prompt, once, and of all answers, each without the one that ended it."""
        ids = self._prompts[0].ids
        prompt, made = len(ids), sum(len(output.ids) for output in outputs)
        audio = int((ids == self._state.model.processor.audio_token_id).sum())
        # Of the answer that ran most of it: the other choices find what that one has just run.
        cached = min(output.cached_tokens for output in outputs)
        thought = sum(self._thought(output.ids) for output in outputs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"audio_tokens": audio, "cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": thought},
        }

    def _thought(self, ids: list[int]) -> int:
        tags = self._state.model.tokenizer.think_ids
        if tags is None or tags[0] not in ids:
            return 0
        return ids.index(tags[1]) + 1 if tags[1] in ids else len(ids)

    def _warned(self, outputs: list[Any]) -> dict[str, Any]:
        # All answers are about the same clips.
        warnings = [*self._state.model.reply(outputs[0], self._prompts[0]).warnings]
        if any(output.finish_reason == "loop" for output in outputs):
            warnings.append(LOOPED)
        return {"warnings": warnings} if warnings else {}

    def _logprobs(self, told: list[Any]) -> dict[str, Any] | None:
        """Of some tokens of an answer."""
        if not self._asked.logprobs:
            return None
        return {"content": [self._token(*each) for each in told], "refusal": None}

    def _token(self, token: int, logprob: float, top: list[tuple[int, float]]) -> dict[str, Any]:
        tokenizer = self._state.model.tokenizer

        def one(index: int, value: float) -> dict[str, Any]:
            piece = tokenizer.token_bytes(int(index), skip_special=False)
            text = piece.decode("utf-8", "replace")
            logprob = min(max(float(value), -9999.0), 0.0)  # JSON has no infinity
            return {"token": text, "logprob": logprob, "bytes": list(piece)}

        return {**one(token, logprob), "top_logprobs": [one(*each) for each in top]}


async def read_chat(state: State, body: dict[str, Any]) -> Chat:
    """A request's prompts; takes the messages out of the body.

    Raises:
      ApiError: a field, which is named, is wrong.
    """
    asked: ChatRequest = read(ChatRequest, body)
    service = state.named(asked.model)
    asked.refuse()
    sampling, count = _sampling(state, asked)
    schema, where = _schema(asked)
    guides = []
    if where is not None:
        for _ in range(count):
            guides.append(await state.in_thread(state.guides.of, schema, where))
    body.pop("messages")
    messages, asked.messages = asked.messages, []  # encoded sound is not kept while it is answered
    heard, notes = await _heard(state, messages)
    del messages
    prepared = await state.prepare(Request(messages=heard, sampling=sampling))
    prepared = dataclasses.replace(prepared, warnings=(*notes, *prepared.warnings))
    prompts = []
    for number in range(count):
        own = dataclasses.replace(sampling, seed=(sampling.seed + number) % 2**31)
        guide = guides[number] if guides else None
        prompts.append(dataclasses.replace(prepared, sampling=own, guide=guide))
    return Chat(state, service, asked, prompts)


def _sampling(state: State, asked: ChatRequest) -> tuple[Sampling, int]:
    """How to sample, and how many answers."""
    limits = state.limits
    most = asked.max_completion_tokens or asked.max_tokens
    if (most or 0) > limits.max_new_tokens:
        name = "max_completion_tokens" if asked.max_completion_tokens else "max_tokens"
        raise invalid(
            f"{name} is {most}; this server gives at most {limits.max_new_tokens} tokens",
            name,
        )
    count = asked.n or 1
    if count > limits.max_choices:
        raise invalid(f"n is {count}; expected at most {limits.max_choices}", "n")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    given = {
        "max_new_tokens": most or min(Sampling.max_new_tokens, limits.max_new_tokens),
        "seed": secrets.randbits(31) if asked.seed is None else asked.seed,
        "stop": (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ()),
        "logprobs": (asked.top_logprobs or 0) if asked.logprobs else None,
    }
    for name in (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "thinking_budget",
    ):
        if getattr(asked, name) is not None:
            given[name] = getattr(asked, name)
    try:
        return Sampling(**given), count
    except UsageError as error:
        raise invalid(str(error)) from None


def _schema(asked: ChatRequest) -> tuple[dict[str, Any] | None, str | None]:
    """The schema of the answer and the field that holds it; (None, None) for a free answer."""
    form = asked.response_format
    if form is None or form.type == "text":
        return None, None
    if form.type == "json_object":
        return None, "response_format"
    where = "response_format.json_schema"
    if form.json_schema is None:
        raise invalid(f"Missing required parameter: '{where}'.", where)
    schema = form.json_schema.schema_
    if _depth(schema) > _MOST_DEPTH or len(json.dumps(schema)) > _MOST_SCHEMA:
        raise invalid(
            f"{where}: too large; expected at most {_MOST_SCHEMA:,} characters and {_MOST_DEPTH} "
            "levels",
            where,
            "invalid_schema",
        )
    return schema, where


def _depth(value: Any) -> int:
    """How deeply a JSON value nests, counted up to a little beyond the limit."""
    level, depth = [value], 0
    while level and depth <= _MOST_DEPTH:
        depth += 1
        held = [each for each in level if isinstance(each, dict | list)]
        level = [v for each in held for v in (each.values() if isinstance(each, dict) else each)]
    return depth


async def _heard(
    state: State, messages: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The conversation with decoded clips in place of sound, and warnings about them."""
    limits = state.limits
    if len(messages) > limits.max_messages:
        raise invalid(
            f"{len(messages)} messages; expected at most {limits.max_messages}", "messages"
        )
    try:
        # A client names no file of this machine, so there are no parts of the type audio.
        encoded = conversations.ENCODED
        found = [conversations.parts(m, f"messages[{i}]", encoded) for i, m in enumerate(messages)]
    except InputError as error:
        raise invalid(str(error), "messages") from None
    clips = sum(part["type"] in conversations.SOUNDS for parts in found for part, _ in parts)
    if clips > limits.max_clips:
        raise invalid(f"{clips} clips; expected at most {limits.max_clips}", "messages")
    texts = [p.get("text") or p.get("refusal") for parts in found for p, _ in parts]
    characters = sum(len(text) for text in texts if isinstance(text, str))
    if characters > limits.max_characters:
        raise invalid(
            f"the texts have {characters} characters; expected at most {limits.max_characters}",
            "messages",
            TOO_LONG,
        )
    heard, notes, left = [], [], limits.max_audio_seconds
    for message, parts in zip(messages, found, strict=True):
        content = []
        for part, where in parts:
            if part["type"] in conversations.SOUNDS:
                data = await _file(state, part, where)
                decoded = await state.decode(data, left, where, "messages")
                # A clip of 0 s is refused by `prepare`; here the limit must stay above 0.
                left = max(left - len(decoded.wav) / SAMPLE_RATE, 0.01)
                notes += [f"{where}: {note}" for note in decoded.warnings]
                part = {"type": "audio", "audio": Clip(decoded.wav, where)}
            content.append(part)
        heard.append({**message, "content": content})
    return heard, notes


async def _file(state: State, part: dict[str, Any], where: str) -> Any:
    """The bytes of a sound in a request."""
    url = part.get("audio_url")
    url = url.get("url") if isinstance(url, dict) else None
    try:
        if isinstance(url, str) and state.audio_hosts and url[:5].lower() != "data:":
            return await state.in_thread(
                fetch, url, state.audio_hosts, state.limits.body_bytes, state.limits.decode_seconds
            )
        held = await state.in_thread(conversations.encoded, part, where)
        return held.getbuffer()
    except InputError as error:
        message = str(error) if str(error).startswith(where) else f"{where}.audio_url.url {error}"
        raise invalid(message, "messages", "invalid_audio") from None


def _reason(output: Any) -> str:
    """OpenAI's word for why an answer ended: one that looped was cut, too."""
    return "stop" if output.finish_reason == "stop" else "length"


def _event(
    head: dict[str, Any], number: int, delta: dict[str, Any], logprobs: Any = None, why: Any = None
) -> str:
    choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": why}
    return sse({**head, "choices": [choice]})
