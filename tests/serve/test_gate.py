"""Who is let in, what happens when the engine is busy, slow or dead; pieces of an answer.

The engine is scripted; `test_routes` has the real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import Scripted

import moss_audio_jax as mj
from moss_audio_jax.errors import InputError, TooLong
from moss_audio_jax.generate.engine import Output
from moss_audio_jax.serve.answers import Pieces
from moss_audio_jax.serve.app import LOOPBACK, make_app
from moss_audio_jax.serve.limits import Limits
from moss_audio_jax.serve.state import State

BODY = {"model": "small", "messages": [{"role": "user", "content": "Hello"}]}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model():
    return mj.MossAudio.load()


@contextlib.asynccontextmanager
async def asking(model, service, limits=None, **gate):
    """A client of a server with this engine."""
    state = State(model, service, ["small"], limits)
    transport = httpx.ASGITransport(make_app(state, **gate), raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            client.serve = state
            yield client
    finally:
        state.close()


async def submitted(service, count=1):
    async with asyncio.timeout(20):
        while len(service.prompts) < count:
            await asyncio.sleep(0.01)


def test_busy(model):
    """One place, and one request may wait; a third is told when to come again."""

    async def run():
        service = Scripted()
        async with asking(model, service, Limits(max_waiting=1)) as client:
            first, second = (asyncio.ensure_future(client.post(CHAT, json=BODY)) for _ in "ab")
            await submitted(service, 2)
            third = await client.post(CHAT, json=BODY)
            assert third.status_code == 429
            assert int(third.headers["retry-after"]) >= 1
            assert third.json()["error"]["code"] == "rate_limit_exceeded"
            for number in (1, 2):
                service.tell(number, [400, 401], "stop")
            assert [(await each).status_code for each in (first, second)] == [200, 200]
            assert client.serve._active == 0

    asyncio.run(run())


def test_an_engine_that_dies(model):
    async def run():
        service = Scripted()
        async with asking(model, service) as client:
            waiting = asyncio.ensure_future(client.post(CHAT, json=BODY))
            streaming = asyncio.ensure_future(client.post(CHAT, json=BODY | {"stream": True}))
            await submitted(service, 1)
            service.dead = RuntimeError("the device is gone")
            assert (await waiting).status_code == 503
            stream = await streaming
            if stream.status_code == 200:  # it had begun
                assert json.loads(stream.text.split("data: ")[-2])["error"]["code"] == "unavailable"
            for path in ("/ready", CHAT):
                ask = client.post(path, json=BODY) if path == CHAT else client.get(path)
                reply = await ask
                assert reply.status_code == 503
                assert reply.json()["error"]["type"] == "server_error"
                assert "device" not in reply.text
            assert (await client.get("/health")).status_code == 200
            metrics = (await client.get("/metrics")).text
            assert 'moss_audio_engine_alive{model="small"} 0.0' in metrics

    asyncio.run(run())


def test_an_engine_that_waits_for_another_process(model):
    async def run():
        service = Scripted()
        async with asking(model, service) as client:
            assert (await client.get("/ready")).status_code == 200
            service.stuck = True
            for reply in (await client.get("/ready"), await client.post(CHAT, json=BODY)):
                assert reply.status_code == 503
                assert "waits for another process" in reply.json()["error"]["message"]
            metrics = (await client.get("/metrics")).text
            assert 'moss_audio_engine_alive{model="small"} 0.0' in metrics
            service.stuck = False  # it went on after all
            assert (await client.get("/ready")).status_code == 200

    asyncio.run(run())


def test_an_answer_that_takes_too_long_is_cancelled(model):
    async def run():
        service = Scripted()
        async with asking(model, service, Limits(request_seconds=0.2)) as client:
            reply = await client.post(CHAT, json=BODY)
            assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
            stream = await client.post(CHAT, json=BODY | {"stream": True})
            assert '"code": "timeout"' in stream.text
            assert len(service.cancelled) == 2

    asyncio.run(run())


def test_a_server_that_stops(model):
    async def run():
        service = Scripted()
        async with asking(model, service) as client:
            begun = asyncio.ensure_future(client.post(CHAT, json=BODY))
            await submitted(service)
            client.serve.draining = True
            late = await client.post(CHAT, json=BODY)
            assert (late.status_code, "stopping" in late.text) == (503, True)
            assert late.headers["retry-after"]
            assert (await client.get("/ready")).status_code == 503
            service.tell(1, [400], "stop")
            assert (await begun).status_code == 200
        for reason in ("cancelled", "error"):  # the deadline is over; the engine has died
            service = Scripted()
            async with asking(model, service) as client:
                begun = asyncio.ensure_future(client.post(CHAT, json=BODY))
                await submitted(service)
                service.tell(1, [400], reason)
                assert (await begun).status_code == 503

    asyncio.run(run())


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (TooLong("the prompt does not fit"), 400, "context_length_exceeded"),
        (InputError("the engine is stopping"), 503, "unavailable"),
    ],
)
def test_a_prompt_that_the_engine_refuses(model, refusal, status, code):
    async def run():
        service = Scripted()
        service.refusal = refusal
        async with asking(model, service) as client:
            reply = await client.post(CHAT, json=BODY)
            assert reply.status_code == status
            assert reply.json()["error"]["code"] == code

    asyncio.run(run())


def test_a_fault_of_the_server_says_nothing_of_the_request(model, caplog, monkeypatch):
    def broken(request):
        raise KeyError(request.messages)

    async def run():
        async with asking(model, Scripted()) as client:
            monkeypatch.setattr(client.serve.model, "prepare", broken)
            reply = await client.post(CHAT, json=BODY)
            assert reply.status_code == 500
            assert reply.json()["error"]["type"] == "server_error"
            assert "Hello" not in reply.text

    asyncio.run(run())
    assert "KeyError at " in caplog.text
    assert "Hello" not in caplog.text


def test_names_of_a_server_without_keys(model):
    """A page whose name resolves to this machine is refused."""

    async def run():
        async with asking(model, Scripted(), hosts=LOOPBACK) as client:
            for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:1"):
                reply = await client.get("/v1/models", headers={"Host": host})
                assert reply.status_code == 200, host
            for host in ("evil.example", "127.0.0.1.evil.example:8000", ""):
                reply = await client.get("/v1/models", headers={"Host": host})
                assert reply.status_code == 421, host
            reply = await client.get("/v1/models", headers={"Origin": "http://evil.example"})
            assert "access-control-allow-origin" not in reply.headers

    asyncio.run(run())


def test_several_keys(model):
    async def run():
        async with asking(model, Scripted(), keys=["first-key", "second-key"]) as client:
            for key, status in (("first-key", 200), ("second-key", 200), ("first-ke", 401)):
                headers = {"Authorization": f"Bearer {key}"}
                assert (await client.get("/v1/models", headers=headers)).status_code == status

    asyncio.run(run())


def test_a_thinking_answer(model):
    """Its block is apart from the text, in a whole reply and in a streamed one."""
    tokenizer = model.tokenizer
    opened, closed = tokenizer.think_ids
    ids = [
        opened,
        *tokenizer.encode("\nA bell, I think.\n"),
        closed,
        *tokenizer.encode("\n\nA bell."),
    ]

    async def run():
        service = Scripted()
        async with asking(model, service) as client:
            for stream in (False, True):
                body = BODY | {"stream": stream, "thinking_budget": 50}
                asked = asyncio.ensure_future(client.post(CHAT, json=body))
                await submitted(service)
                (number,) = service.prompts
                assert service.prompts[number][0].sampling.thinking_budget == 50
                for count in range(1, len(ids)):
                    service.tell(number, ids[:count])
                service.tell(number, ids, "stop")
                reply = await asked
                service.prompts.clear()
                service.cancelled.append(number)
                if stream:
                    chunks = [json.loads(e) for e in reply.text.split("data: ")[1:-1]]
                    deltas = [c["choices"][0]["delta"] for c in chunks]
                    thought = "".join(d.get("reasoning_content", "") for d in deltas)
                    said = "".join(d.get("content", "") for d in deltas)
                else:
                    message = reply.json()["choices"][0]["message"]
                    thought, said = message["reasoning_content"], message["content"]
                    details = reply.json()["usage"]["completion_tokens_details"]
                    assert details["reasoning_tokens"] == ids.index(closed) + 1
                assert (thought, said) == ("A bell, I think.", "A bell.")

    asyncio.run(run())


@given(st.data())
def test_pieces_join_to_the_reply(model, data):
    """Whatever the ids are, in whatever steps they come, with and without stop strings."""
    tokenizer = model.tokenizer
    words = st.sampled_from(["a bell", " ", "\n", "<think>", "</thi", "é", "鐘", "stop", "<"])
    tokens = st.one_of(
        st.sampled_from(tokenizer.think_ids).map(lambda i: [i]), words.map(tokenizer.encode)
    )
    ids = [i for each in data.draw(st.lists(tokens, max_size=12)) for i in each]
    stops = tuple(data.draw(st.lists(st.sampled_from(["stop", "bell", "é"]), max_size=2)))
    pieces, joined, at = Pieces(tokenizer, stops), {"thinking": "", "text": ""}, 0
    while at < len(ids):
        at = min(len(ids), at + data.draw(st.integers(1, 4)))
        for kind, piece in pieces.push(ids[:at], at == len(ids)).items():
            joined[kind] += piece
    if not ids:
        pieces.push([], True)
    request = mj.Request("x", sampling=mj.Sampling(stop=stops))
    reply = model.reply(Output(ids, "stop"), model.prepare(request))
    whole = tokenizer.decode(ids)
    if whole.lstrip().startswith("<think>") or "</think>" not in whole:
        assert joined == {"thinking": reply.thinking or "", "text": reply.text}
