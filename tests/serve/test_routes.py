"""A real server of the small model, asked by the official `openai` package: every route and form.

What the answers say is the model's; here they equal those of the Python interface.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import os
import random
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import soundfile
from served import serving, until, user

import moss_audio_jax as mj
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.serve import transcriptions
from moss_audio_jax.serve.limits import Limits

DEMO = DEFAULT_CHECKPOINT.parent / "demo"
KEY = "a-key-for-tests"
QUESTION = "What instruments are heard?"
WINDOW = 6.0
CLIP = 94_000  # samples of a clip that is as long as those of the demo
LIMITS = Limits(max_body_mb=2.0, max_audio_seconds=200.0, max_clips=3, max_messages=8)


@pytest.fixture(scope="module")
def model():
    return mj.MossAudio.load()


@pytest.fixture(scope="module")
def served(model):
    with serving(model, LIMITS, KEY, window_seconds=WINDOW) as server:
        yield server


@pytest.fixture(scope="module")
def client(served):
    return served.openai()


@pytest.fixture(scope="module")
def band():
    return (DEMO / "trumpet_band.flac").read_bytes()


@pytest.fixture(scope="module")
def speech():
    return (DEMO / "two_people.flac").read_bytes()


@pytest.fixture(scope="module")
def long_speech(speech):
    """11 s, so that it has several windows."""
    return flac(np.tile(read(speech), 2))


def chat(client, *messages, **options):
    return client.chat.completions.create(model="small", messages=list(messages), **options)


def transcribe(client, data, **options):
    options = {"model": "whisper-1", "file": ("talk.wav", data)} | options
    return client.audio.transcriptions.create(**options)


def flac(wav) -> bytes:
    held = io.BytesIO()
    soundfile.write(held, wav, 16_000, format="FLAC", subtype="PCM_16")
    return held.getvalue()


def read(data: bytes):
    return mj.load_audio(io.BytesIO(data))


def transcript(model, data: bytes, timestamps="none"):
    """Of the Python interface, with an engine as small as that of `generate`."""
    return mj.transcribe(model, read(data), timestamps, window_seconds=WINDOW, batch_size=1)


# --- chat ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["input_audio", "audio_url"])
def test_an_answer_is_that_of_python(client, model, band, kind):
    answer = chat(client, user(QUESTION, band, kind=kind))
    reply = model.generate(QUESTION, [read(band)])
    (choice,) = answer.choices
    assert choice.message.content == reply.text
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    prompt = model.prepare(mj.Request(QUESTION, [read(band)]))
    usage = answer.usage
    assert usage.prompt_tokens == len(prompt.ids)
    assert usage.completion_tokens == len(reply.ids)
    assert usage.total_tokens == len(prompt.ids) + len(reply.ids)
    audio = int((prompt.ids == model.processor.audio_token_id).sum())
    assert usage.prompt_tokens_details.audio_tokens == audio > 0
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")


def test_turns_and_clips(client, model, band, speech):
    """Short clips: all prompts here have the sizes for which programs were compiled before."""
    band, speech = (flac(read(data)[:16_000]) for data in (band, speech))
    messages = [
        {"role": "system", "content": "Answer briefly."},
        user(QUESTION, band),
        {"role": "assistant", "content": "A trumpet."},
        user("Who speaks?", speech, band),
    ]
    reply = model.generate(messages=messages)
    assert chat(client, *messages).choices[0].message.content == reply.text
    assert reply.text


def test_a_stream_is_the_whole_answer(client, band):
    whole = chat(client, user(QUESTION, band), n=2)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(chat(client, user(QUESTION, band), n=2, **options))
    for number, choice in enumerate(whole.choices):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == number]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 4
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # of the first request
    for usage in (chunks[-1].usage, whole.usage):
        usage.prompt_tokens_details.cached_tokens = None
    assert chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_an_asynchronous_client(served, client, band):
    async def ask():
        async with served.async_openai() as other:
            stream = await chat(other, user(QUESTION, band), stream=True)
            return [c.choices[0].delta.content or "" async for c in stream if c.choices]

    text = chat(client, user(QUESTION, band)).choices[0].message.content
    assert "".join(asyncio.run(ask())) == text


def test_sampling(client, model, band):
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 5, "max_tokens": 6}
    more = {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1}
    answer = chat(client, user(QUESTION, band), n=3, extra_body=more, **options)
    options["max_new_tokens"] = options.pop("max_tokens")
    for number, choice in enumerate(answer.choices):
        own = options | more | {"seed": 5 + number}
        reply = model.generate(QUESTION, [read(band)], **own)
        assert choice.message.content == reply.text
        assert choice.finish_reason == ("length" if reply.finish_reason != "stop" else "stop")
    assert len({choice.message.content for choice in answer.choices}) > 1


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_a_limit_of_tokens(client, band, limit):
    answer = chat(client, user(QUESTION, band), **{limit: 3})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


def test_a_stop_string(client, model, band):
    whole = model.generate(QUESTION, [read(band)]).text
    word = whole.split()[2]
    expected = model.generate(QUESTION, [read(band)], stop=[word]).text
    assert chat(client, user(QUESTION, band), stop=word).choices[0].message.content == expected
    chunks = chat(client, user(QUESTION, band), stop=["no such text", word], stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
    assert word not in expected


def test_log_probabilities(client, model, band):
    answer = chat(client, user(QUESTION, band), logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    reply = model.generate(QUESTION, [read(band)])
    assert len(tokens) == len(reply.ids)
    assert b"".join(bytes(t.bytes) for t in tokens).decode().strip() == reply.text
    for token in tokens:
        assert len(token.top_logprobs) == 3
        best = token.top_logprobs[0]
        assert (best.token, best.logprob) == (token.token, token.logprob)  # greedy
        assert token.logprob <= 0


@pytest.mark.parametrize("stop", [None, "word"])
def test_log_probabilities_come_with_their_text(client, model, band, stop):
    if stop:
        stop = model.generate(QUESTION, [read(band)]).text.split()[2]
    options = {"logprobs": True, "top_logprobs": 2, "stop": stop}
    whole = chat(client, user(QUESTION, band), **options).choices[0].logprobs.content
    chunks = [c.choices[0] for c in chat(client, user(QUESTION, band), stream=True, **options)]
    told = [c.logprobs.content for c in chunks if c.logprobs]
    assert [token for each in told for token in each] == whole
    assert sum(bool(each) for each in told) > (1 if stop else 4)
    text, known = "", b""
    for chunk in chunks:
        known += b"".join(
            bytes(t.bytes) for t in (chunk.logprobs.content if chunk.logprobs else ())
        )
        text += chunk.delta.content or ""
        assert known.decode().strip().startswith(text.strip())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [1e-300, 1e-10, 1e-6])
def test_log_probabilities_at_a_tiny_temperature(served, client, band, temperature, stream):
    options = {"max_tokens": 8, "logprobs": True, "top_logprobs": 2}
    greedy = chat(client, user(QUESTION, band), **options).choices[0].logprobs.content
    body = {"model": "small", "messages": [user(QUESTION, band)]} | options
    body |= {"temperature": temperature, "stream": stream}
    with served.http() as http:
        reply = http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200
    lines = (
        [line.removeprefix("data: ") for line in reply.text.splitlines()]
        if stream
        else [reply.text]
    )
    bodies = [json.loads(line, parse_constant=pytest.fail) for line in lines if line[:1] == "{"]
    told = [one["choices"][0]["logprobs"] for one in bodies]
    tokens = [token for each in told if each for token in each["content"]]
    assert [token["token"] for token in tokens] == [token.token for token in greedy]
    for token in tokens:
        assert token["logprob"] == pytest.approx(0, abs=1e-6)
        assert all(-9999 <= each["logprob"] <= 0 for each in [token, *token["top_logprobs"]])


def test_a_grammar_holds_with_a_tiny_top_p(client, band):
    form = {"type": "json_schema", "json_schema": {"name": "heard", "schema": SCHEMA}}
    options = {"temperature": 1, "top_p": 1e-40, "seed": 1, "response_format": form}
    found = json.loads(chat(client, user(QUESTION, band), **options).choices[0].message.content)
    assert found["sound"] in ("bell", "drum")


def test_whole_numbers_may_have_a_point(served):
    """JSON has no type of its own for them."""
    names = ("max_tokens", "max_completion_tokens", "n", "seed", "top_logprobs", "top_k")
    plain = {"model": "small", "messages": [user("hi")], "logprobs": True, "thinking_budget": 2.0}
    with served.http() as http:

        def ask(**fields):
            return http.post("/v1/chat/completions", json=plain | fields)

        whole = dict.fromkeys(names, 2)
        texts = [
            [choice["message"]["content"] for choice in ask(**fields).json()["choices"]]
            for fields in (whole, dict.fromkeys(whole, 2.0))
        ]
        assert texts[0] == texts[1]
        assert len(texts[0]) == 2
        for name in (*names, "thinking_budget"):
            for wrong in (2.5, True, "2", -(2.0**70)):
                reply = ask(**{name: wrong})
                assert reply.status_code == 400
                assert reply.json()["error"]["param"] == name


SCHEMA = {
    "type": "object",
    "properties": {"sound": {"enum": ["bell", "drum"]}, "loud": {"type": "boolean"}},
    "required": ["sound", "loud"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_of_a_schema(client, band, stream):
    form = {"type": "json_schema", "json_schema": {"name": "heard", "schema": SCHEMA}}
    answer = chat(client, user(QUESTION, band), response_format=form, stream=stream)
    if stream:
        text = "".join(c.choices[0].delta.content or "" for c in answer if c.choices)
    else:
        text = answer.choices[0].message.content
    found = json.loads(text)
    assert found["sound"] in ("bell", "drum")
    assert type(found["loud"]) is bool


def test_an_answer_that_is_an_object(client, band):
    form = {"type": "json_object"}
    answer = chat(client, user(QUESTION, band), response_format=form, max_tokens=100)
    choice = answer.choices[0]
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def test_a_warning_about_the_sound_is_in_the_reply(client):
    answer = chat(client, user("What?", flac(np.zeros(CLIP))), max_tokens=2)
    assert any("every sample is 0" in warning for warning in answer.warnings)


def test_sound_that_the_model_does_not_know(client, model):
    data = flac(np.sign(np.sin(np.arange(CLIP) * 90 * 2 * np.pi / 16_000)))
    reply = model.generate("What?", [read(data)], max_new_tokens=2)
    assert reply.warnings
    answer = chat(client, user("What?", data), max_tokens=2)
    assert answer.warnings == list(reply.warnings)
    assert transcribe(client, data).warnings == transcript(model, data).problems


def test_open_webui(served, band):
    """Its fields, with those that it adds for itself."""
    body = {
        "stream": True,
        "model": "small",
        "messages": [user(QUESTION)],
        "temperature": 0,
        "max_tokens": 8,
        "stop": [],
        "metadata": {"chat_id": "1"},
        "user": "someone",
        "stream_options": {"include_usage": True},
    }
    with served.http() as http:
        reply = http.post("/v1/chat/completions", json=body)
        models = http.get("/v1/models").json()
        files = {"file": ("recording.wav", band, "audio/wav")}
        heard = http.post("/v1/audio/transcriptions", files=files, data={"model": "whisper-1"})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [line for line in reply.text.split("\n\n") if line]
    assert events[-1] == "data: [DONE]"
    assert "usage" in json.loads(events[-2].removeprefix("data: "))
    assert [model["id"] for model in models["data"]] == ["small", "whisper-1"]
    assert isinstance(heard.json()["text"], str)


# --- transcriptions ------------------------------------------------------------------------------


def test_a_transcript_in_every_form(client, model, speech):
    none, sentences = (transcript(model, speech, t) for t in ("none", "sentence"))
    assert none.text
    answer = transcribe(client, speech)
    assert answer.text == none.text
    assert answer.usage.type == "tokens"
    assert answer.usage.output_tokens > 0
    assert transcribe(client, speech, response_format="text") == f"{none.text}\n"
    assert transcribe(client, speech, response_format="srt") == mj.to_srt(sentences.segments)
    assert transcribe(client, speech, response_format="vtt") == mj.to_vtt(sentences.segments)


def test_words_and_segments(client, speech):
    words = transcribe(client, speech).text.split()
    options = {"response_format": "verbose_json"}
    both = transcribe(client, speech, timestamp_granularities=["word", "segment"], **options)
    assert [w.word for w in both.words] == words
    assert " ".join(s.text for s in both.segments).split() == words
    assert all(0 <= w.start <= w.end <= both.duration for w in both.words)
    assert both.duration == pytest.approx(len(read(speech)) / 16_000, abs=0.01)
    only = transcribe(client, speech, timestamp_granularities=["word"], language="en", **options)
    assert only.segments is None
    assert only.language == "en"


def test_verbose_json_without_granularities_as_litellm_asks(served, model, speech):
    fields = {"model": "whisper-1", "response_format": "verbose_json", "temperature": "0"}
    with served.http() as http:
        files = {"file": ("talk.wav", speech, "audio/wav")}
        reply = http.post("/v1/audio/transcriptions", files=files, data=fields).json()
    segments = transcript(model, speech, "sentence").segments
    assert [s["text"] for s in reply["segments"]] == [s.text for s in segments]
    assert reply["duration"] > 5
    assert "words" not in reply


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_streamed_transcript_of_several_windows(client, model, long_speech, form):
    events = list(transcribe(client, long_speech, stream=True, response_format=form))
    whole = transcript(model, long_speech)
    assert len(whole.segments) > 1
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == whole.text
    assert "".join(e.delta for e in events[:-1]) == whole.text


def test_what_was_not_heard_is_said(model, long_speech):
    """Each window has two tokens; a text has no place for it but the headers."""
    limits = Limits(max_new_tokens=2)
    with serving(model, limits, window_seconds=WINDOW) as server:
        answer = transcribe(server.openai(), long_speech)
        assert answer.stopped_at == 0
        assert any("cut short (length)" in warning for warning in answer.warnings)
        raw = server.openai().audio.transcriptions.with_raw_response
        text = raw.create(model="whisper-1", file=("a.wav", long_speech), response_format="text")
        assert text.headers["X-Transcript-Stopped-At"] == "0.0"
        assert "cut short" in text.headers["X-Transcript-Warnings"]
        metrics = server.http().get("/metrics").text
    assert "moss_audio_transcripts_stopped_early_total 2.0" in metrics


def test_an_answer_that_ends_before_the_speech_is_named(client, speech, monkeypatch):
    """The model is stopped before the second person speaks."""

    def stopped(*args):
        for window in windows(*args):
            early = dataclasses.replace(window.prompt.sampling, stop=("my",))
            yield window._replace(prompt=dataclasses.replace(window.prompt, sampling=early))

    assert not hasattr(transcribe(client, speech), "warnings")
    windows = transcriptions.each_window
    monkeypatch.setattr(transcriptions, "each_window", stopped)
    answer = transcribe(client, speech)
    assert answer.text.endswith("desert")
    assert answer.stopped_at == pytest.approx(2.7, abs=0.2)
    (warning,) = answer.warnings
    assert warning.endswith(f"more is said from {answer.stopped_at:.2f} s on")
    *_, done = transcribe(client, speech, stream=True)
    assert done.warnings == [warning]


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "code", "param"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model_not_found", "model"),
        ({"temperature": 9}, openai.BadRequestError, "invalid_value", "temperature"),
        (
            {"extra_body": {"repetition_penalty": 1e-40}},
            openai.BadRequestError,
            "invalid_value",
            "repetition_penalty",
        ),
        ({"temperature": "1"}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"n": 99}, openai.BadRequestError, "invalid_value", "n"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "invalid_value", "max_tokens"),
        ({"max_tokens": 0}, openai.BadRequestError, "invalid_value", "max_tokens"),
        ({"stop": ["a"] * 5}, openai.BadRequestError, "invalid_value", "stop"),
        ({"extra_body": {"top_q": 1}}, openai.BadRequestError, "unknown_parameter", "top_q"),
        (
            {"tools": [{"type": "function"}]},
            openai.BadRequestError,
            "unsupported_parameter",
            "tools",
        ),
        ({"presence_penalty": 1}, openai.BadRequestError, "unsupported_value", "presence_penalty"),
        ({"top_logprobs": 2}, openai.BadRequestError, "invalid_value", "top_logprobs"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": 3}},
                }
            },
            openai.BadRequestError,
            "invalid_schema",
            "response_format.json_schema",
        ),
        ({"messages": [{"role": "user"}]}, openai.BadRequestError, "invalid_value", "messages"),
        ({"messages": [user("x")] * 9}, openai.BadRequestError, "invalid_value", "messages"),
        (
            {"messages": [user("x", *[b"x"] * 4)]},
            openai.BadRequestError,
            "invalid_value",
            "messages",
        ),
        (
            {"messages": [user("x", b"no sound")]},
            openai.BadRequestError,
            "invalid_audio",
            "messages",
        ),
        (
            {"messages": [user("x " * 30_000)]},
            openai.BadRequestError,
            "context_length_exceeded",
            "messages",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "audio", "audio": "/etc/passwd"}]}
                ]
            },
            openai.BadRequestError,
            "invalid_value",
            "messages",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "audio_url", "audio_url": {"url": "http://127.0.0.1/a"}}
                        ],
                    }
                ]
            },
            openai.BadRequestError,
            "invalid_audio",
            "messages",
        ),
    ],
)
def test_a_chat_that_is_refused(client, fields, error, code, param):
    with pytest.raises(error) as raised:
        client.chat.completions.create(**{"model": "small", "messages": [user("hi")]} | fields)
    assert (raised.value.code, raised.value.param) == (code, param)
    assert raised.value.body["message"]
    assert raised.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"model": "x"}, "model_not_found", "model"),
        ({"response_format": "docx"}, "invalid_value", "response_format"),
        ({"response_format": "srt", "stream": True}, "invalid_value", "response_format"),
        ({"timestamp_granularities": ["word"]}, "invalid_value", "timestamp_granularities"),
        ({"extra_body": {"beam": 5}}, "unknown_parameter", "beam"),
        ({"file": ("a.wav", b"")}, "invalid_audio", "file"),
        ({"file": ("a.wav", b"RIFF" * 99)}, "invalid_audio", "file"),
    ],
)
def test_a_transcription_that_is_refused(client, speech, fields, code, param):
    with pytest.raises(openai.APIStatusError) as raised:
        transcribe(client, speech, **fields)
    assert (raised.value.code, raised.value.param) == (code, param)
    assert raised.value.status_code in (400, 404)


def test_sound_beyond_the_limit(client):
    held = io.BytesIO()
    soundfile.write(held, np.zeros(250 * 8000), 8000, format="FLAC")  # some kilobytes
    with pytest.raises(openai.BadRequestError, match="more than 200 s"):
        transcribe(client, held.getvalue())
    with pytest.raises(openai.BadRequestError, match="more than"):
        chat(client, user("x", held.getvalue()))


def test_keys(served):
    for key in ("wrong", "", KEY + "x"):
        with pytest.raises((openai.AuthenticationError, openai.APIConnectionError)):
            served.openai(api_key=key or " ").models.list()
    with httpx.Client(base_url=served.url) as http:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            reply = http.get(path)
            assert reply.status_code == 401
            assert reply.json()["error"]["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/ready").json() == {"status": "ready"}
        basic = http.get("/v1/models", headers={"Authorization": f"Basic {KEY}"})
        assert basic.status_code == 401


def test_a_body_that_is_too_large_is_not_read_to_its_end(served):
    with pytest.raises(openai.APIStatusError) as raised:
        transcribe(served.openai(), b"\0" * 3_000_000)
    assert raised.value.status_code == 413
    assert raised.value.code == "body_too_large"


def test_other_routes(served):
    with served.http() as http:
        for method, path, status in (
            ("GET", "/v1/chat/completions", 405),
            ("POST", "/v1/completions", 404),
            ("GET", "/../../etc/passwd", 404),
            ("GET", "/v1/models/%0d%0aX: y", 404),
        ):
            reply = http.request(method, path)
            assert reply.status_code == status
            assert reply.json()["error"]["type"] == "invalid_request_error"
        wrong = http.post("/v1/chat/completions", content=b"{}")
        assert wrong.status_code == 415
        wrong = http.post("/v1/audio/transcriptions", json={"model": "small"})
        assert wrong.status_code == 415
        for path, kind in (
            ("/v1/chat/completions", "Application/JSON; charset=utf-8"),
            ("/v1/audio/transcriptions", "Multipart/Form-Data; boundary=x"),
        ):
            reply = http.post(path, content=b"", headers={"Content-Type": kind})
            assert reply.status_code == 400  # the type is right, the body is not
        assert http.get("/v1/models/small").json()["id"] == "small"
        document = http.get("/openapi.json").json()
        assert set(document["paths"]) >= {"/v1/chat/completions", "/v1/audio/transcriptions"}
        schema = document["components"]["schemas"]["ChatRequest"]
        assert "repetition_penalty" in schema["properties"]


# --- hostile -------------------------------------------------------------------------------------

# MUTATED_BODIES=10000 is the long run; -s shows what it held.
BODIES = int(os.environ.get("MUTATED_BODIES", "800"))
WORDS = [
    None,
    True,
    -1,
    0,
    1e400,
    2**70,
    "",
    "\0",
    "\ud800",
    "user",
    [],
    {},
    [[]],
    {"a": {}},
    "x" * 999,
]


def mutated(value, draw):
    """A JSON value with one change somewhere."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(sorted(value))
        changed = dict(value)
        how = draw.random()
        if how < 0.1:
            del changed[key]
        elif how < 0.2:
            changed[draw.choice(["\ud800", "", "role", key * 2])] = draw.choice(WORDS)
        else:
            changed[key] = mutated(value[key], draw)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        how = draw.random()
        if how < 0.2:
            return value[:place] + value[place + 1 :]
        if how < 0.3:
            return value + value[place:]
        return [*value[:place], mutated(value[place], draw), *value[place + 1 :]]
    return draw.choice(WORDS)


def held() -> tuple[int, int]:
    """Bytes of resident memory and open files of this process, which serves and asks."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))


def test_mutated_bodies_get_an_error_or_an_answer(served, band):
    draw = random.Random(24)
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    good = {
        "model": "small",
        "messages": [{"role": "system", "content": "s"}, user("What?", band[:300])],
        "max_tokens": 1,
        "response_format": form,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 1,
        "stop": ["a"],
    }
    constrained = ("response_format", "logprobs", "top_logprobs")
    plain = {name: value for name, value in good.items() if name not in constrained}
    spoken = plain | {"messages": [user("What?")]}
    statuses, before = Counter(), None
    with served.http() as http:
        for number in range(BODIES):
            if number == BODIES // 2:
                before = held()
            body = draw.choice([good, plain, spoken])
            for _ in range(draw.randrange(1, 4)):
                body = mutated(body, draw)
            data = json.dumps(body).encode()
            if draw.random() < 0.2:  # bytes, too
                place = draw.randrange(len(data))
                data = data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :]
            reply = http.post(
                "/v1/chat/completions", content=data, headers={"Content-Type": "application/json"}
            )
            statuses[reply.status_code] += 1
            if reply.status_code != 200:
                error = reply.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert error["type"] == "invalid_request_error", (error, data[:500])
        after = held()
    print(f"statuses {statuses}, resident bytes and files halfway {before}, at the end {after}")
    assert set(statuses) <= {200, 400, 404}
    assert after[0] < 1.1 * before[0]
    assert after[1] <= before[1]


def test_mutated_forms_get_an_error_or_an_answer(served, speech):
    draw = random.Random(7)
    good = httpx.Request(
        "POST",
        "http://x",
        files={"file": ("a.flac", speech[:2000])},
        data={"model": "small", "timestamp_granularities[]": "word", "stream": "true"},
    )
    kind = {"Content-Type": good.headers["content-type"]}
    with served.http() as http:
        for _ in range(BODIES // 8):
            data = bytearray(good.read())
            for _ in range(draw.randrange(1, 20)):
                place = draw.randrange(len(data))
                if draw.random() < 0.5:
                    data[place] = draw.randrange(256)
                else:
                    del data[place : place + draw.randrange(60)]
            reply = http.post("/v1/audio/transcriptions", content=bytes(data), headers=kind)
            assert reply.status_code in (200, 400, 404), reply.text
            if reply.status_code != 200:
                assert reply.json()["error"]["message"]


# --- clients and processes that go ---------------------------------------------------------------


def idle(served):
    stats = served.state.service.stats()
    return stats["running"] == stats["waiting"] == 0 and served.state._active == 0


def test_a_client_that_goes_away_frees_its_place(served, band):
    body = {
        "model": "small",
        "messages": [user(QUESTION, band)],
        "max_tokens": 256,
        "n": 8,
        "temperature": 2.0,
        "stream": True,
    }
    before = served.state.service.stats()["new_tokens"]
    with served.http() as http:
        with http.stream("POST", "/v1/chat/completions", json=body) as reply:
            next(reply.iter_lines())
        with pytest.raises(httpx.TimeoutException):
            http.post("/v1/chat/completions", json=body | {"stream": False}, timeout=0.05)
    until(lambda: idle(served), 10)
    assert 'moss_audio_answers_total{reason="cancelled"}' in served.http().get("/metrics").text
    assert served.state.service.stats()["new_tokens"] - before < 16 * 256


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/chat/completions", "application/json"),
        ("/v1/audio/transcriptions", "multipart/form-data; boundary=x"),
    ],
)
def test_a_client_that_hangs_up_while_it_sends_is_no_fault_of_the_server(served, path, kind):
    def count(status):
        lines = served.http().get("/metrics").text.splitlines()
        name = f'moss_audio_requests_total{{route="{path}",status="{status}"}} '
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    before, faults = count(499), count(500)
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\n"
        head += f"Authorization: Bearer {KEY}\r\nContent-Length: 100000\r\n\r\n"
        client.sendall(head.encode() + b"--x\r\n")
        time.sleep(0.1)
    until(lambda: count(499) == before + 1, 10)
    assert count(500) == faults


def test_a_killed_decoding_process_is_replaced(served, client, speech):
    text = transcribe(client, speech).text
    decoder = served.state.decoder
    process = decoder._idle.get()
    os.kill(process._process.pid, signal.SIGKILL)
    decoder._idle.put(process)
    assert transcribe(client, speech).text == text
    assert served.http().get("/ready").status_code == 200


def test_nothing_of_a_request_is_logged(served, band, caplog):
    caplog.set_level("DEBUG", "moss_audio_jax")
    secret = "the-word-nobody-may-read"
    chat(served.openai(), user(secret, band), max_tokens=2)
    with pytest.raises(openai.BadRequestError):
        chat(served.openai(), user(secret), temperature=9)
    with served.http() as http:
        http.get(f"/{secret}?q={secret}")
    lines = [record.getMessage() for record in caplog.records]
    assert any("POST /v1/chat/completions 200" in line for line in lines)
    assert not any(secret in line or KEY in line for line in lines)


def test_metrics(served, client, band):
    chat(client, user(QUESTION, band))
    with pytest.raises(openai.BadRequestError):
        chat(client, user(QUESTION), temperature=9)
    text = served.http().get("/metrics").text
    for name in (
        'moss_audio_requests_total{route="/v1/chat/completions",status="200"}',
        'moss_audio_rejected_total{reason="request"}',
        "moss_audio_first_token_seconds_count",
        "moss_audio_between_tokens_seconds_count",
        'moss_audio_prompt_tokens_total{model="small"}',
        'moss_audio_answers_total{reason="stop"}',
        "moss_audio_audio_seconds_total",
        'moss_audio_engine_alive{model="small"} 1.0',
    ):
        assert name in text
