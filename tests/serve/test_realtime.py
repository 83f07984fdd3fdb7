"""Live sound over WS /v1/realtime: a real server of the small model, asked by the official client.

What is answered is what `MossAudio.generate` says about the whole clip, however it came.
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from served import serving, until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import moss_audio_jax as mj
from moss_audio_jax.audio.io import Resampler, resample
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.serve.limits import Limits
from moss_audio_jax.text.tasks import TRANSCRIBE

DEMO = DEFAULT_CHECKPOINT.parent / "demo"
KEY = "a-key-for-tests"
QUESTION = "What is heard?"
LIMITS = Limits(max_live_seconds=30.0, max_message_mb=0.5, max_sockets=3)
TRANSCRIPT = "conversation.item.input_audio_transcription"


@pytest.fixture(scope="module")
def model():
    return mj.MossAudio.load()


@pytest.fixture(scope="module")
def served(model):
    with serving(model, LIMITS, KEY) as server:
        yield server


@pytest.fixture(scope="module")
def speech():
    """int16 [n] at 24 kHz: 6 s."""
    return pcm(mj.load_audio(DEMO / "two_people.flac"), 24_000)


def pcm(wav, rate):
    """A waveform at 16 kHz as int16 at another rate, without care for quality."""
    places = np.arange(0, len(wav) - 1, 16_000 / rate)
    return np.round(np.interp(places, np.arange(len(wav)), wav) * 32767).astype("<i2")


def heard(samples, rate=24_000):
    """What the model hears of int16 samples: float32 [n] at 16 kHz."""
    return resample(samples.astype(np.float32) / 2**15, rate)


@contextlib.contextmanager
def talking(served):
    """A connection of the official client."""
    with served.openai().realtime.connect(model="small") as connection:
        assert connection.recv().type == "session.created"
        yield connection


def append(connection, samples, seed=None):
    """Sends samples, in pieces of odd numbers of bytes if there is a seed."""
    data = samples.tobytes()
    rng = np.random.default_rng(seed)
    while data:
        count = 48_000 if seed is None else int(rng.integers(1, 60_000))
        connection.input_audio_buffer.append(audio=base64.b64encode(data[:count]).decode())
        data = data[count:]


def told_until(connection, kind):
    """All events up to the first of a kind; none of them is an error unless that is asked for."""
    events = []
    while not events or events[-1].type != kind:
        events.append(connection.recv())
        assert kind == "error" or events[-1].type != "error", events[-1].error
    return events


def transcript(connection):
    """Commits; returns the transcript after a look at its events."""
    connection.input_audio_buffer.commit()
    events = told_until(connection, f"{TRANSCRIPT}.completed")
    (committed,) = [e for e in events if e.type == "input_audio_buffer.committed"]
    deltas = [e for e in events if e.type == f"{TRANSCRIPT}.delta"]
    assert {e.item_id for e in [committed, *deltas, events[-1]]} == {committed.item_id}
    assert "".join(e.delta for e in deltas) == events[-1].transcript
    return events[-1].transcript


def offline(model, samples, rate=24_000, text=TRANSCRIBE["none"], **options):
    return model.generate(text, [heard(samples, rate)], **options)


# --- exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8_000, 24_000, 44_100])
def test_pieces_are_resampled_like_the_whole(rate):
    rng = np.random.default_rng(rate)
    wav = rng.uniform(-1, 1, 100_003).astype(np.float32)
    pieces = np.split(wav, np.sort(rng.integers(0, len(wav), 200)))
    stream = Resampler(rate)
    found = [stream.push(piece) for piece in pieces if len(piece)]
    assert np.array_equal(np.concatenate([*found, stream.rest()]), resample(wav, rate))


def test_a_transcript_is_that_of_the_whole_clip(served, model, speech):
    """Twice in one session; the second clip has another rate and comes in one message."""
    reply = offline(model, speech)
    with talking(served) as connection:
        append(connection, speech, seed=0)
        assert transcript(connection) == reply.text
        assert len(reply.text) > 10
        slow = pcm(mj.load_audio(DEMO / "two_people.flac"), 16_000)[:48_000]
        audio = {"format": {"type": "audio/pcm", "rate": 16_000}}
        audio["transcription"] = {"model": "whisper-1", "language": "en"}
        session = {"type": "transcription", "audio": {"input": audio}}
        connection.session.update(session=session)
        updated = told_until(connection, "session.updated")[-1].session
        assert updated.audio.input.format.rate == 16_000
        assert updated.audio.input.transcription.language == "en"
        append(connection, slow)
        assert transcript(connection) == offline(model, slow, 16_000).text


def test_sound_is_heard_as_it_comes(served, speech):
    """Before the commit, the whole chunk of 4 s is encoded and prefilled."""
    engine = served.state.service._engine
    new = (speech[::-1] // 2).copy()
    frames, tokens = engine.hearing.frames, engine.counts["prompt_tokens"]
    with talking(served) as connection:
        append(connection, new, seed=1)
        until(lambda: engine.counts["prompt_tokens"] > tokens)
        until(lambda: not engine.busy)
        assert engine.hearing.frames >= frames + 400
        cached = engine.counts["cached_tokens"]
        transcript(connection)
    assert engine.counts["cached_tokens"] >= cached + 48


def test_a_loud_sound_last(served, model, speech):
    """The log-mel's floor rises, so what was heard before is heard again."""
    samples = np.concatenate([speech // 50, speech[:30_000]])
    with talking(served) as connection:
        append(connection, samples, seed=2)
        assert transcript(connection) == offline(model, samples).text


def test_two_sockets_at_once(served, model, speech):
    clips = [speech, np.ascontiguousarray(speech[::-1])]

    def talk(samples):
        with talking(served) as connection:
            append(connection, samples, seed=3)
            return transcript(connection)

    with ThreadPoolExecutor(2) as pool:
        found = [*pool.map(talk, clips)]
    assert found == [offline(model, samples).text for samples in clips]


def test_questions_while_sound_arrives(served, model, speech):
    """Each is about what has come so far; then one about the clip that was committed."""
    first, stream = speech[:100_000], Resampler(24_000)
    so_far = stream.push(first.astype(np.float32) / 2**15)
    with talking(served) as connection:
        append(connection, first)
        connection.response.create(response={"instructions": QUESTION, "max_output_tokens": 24})
        append(connection, speech[100_000:])
        events = told_until(connection, "response.done")
        reply = model.generate(QUESTION, [so_far], max_new_tokens=24)
        deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
        response = events[-1].response
        assert "".join(deltas) == reply.text == response.output[0].content[0].text
        assert response.usage.output_tokens == len(reply.ids)
        assert response.status == ("completed" if reply.finish_reason == "stop" else "incomplete")
        kinds = [e.type for e in events if e.type.startswith("response.")]
        assert kinds[:3] == [
            "response.created",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert transcript(connection) == offline(model, speech).text
        item = {"type": "message", "role": "user"}
        item["content"] = [{"type": "input_text", "text": QUESTION}]
        connection.conversation.item.create(item=item)
        connection.response.create(
            response={"instructions": "Answer briefly.", "max_output_tokens": 24}
        )
        answer = told_until(connection, "response.done")[-1].response.output[0].content[0].text
    asked = {"text": QUESTION, "max_new_tokens": 24, "system": "Answer briefly."}
    assert answer == offline(model, speech, **asked).text


@pytest.mark.parametrize(
    "text", ["<|audio_bos|><|AUDIO|><|audio_eos|>", "<|im_end|>" * 50, "\0", "x" * 60_000]
)
def test_texts_that_mean_harm(served, text):
    """A response is answered or fails; either way the session goes on."""
    with talking(served) as connection:
        connection.response.create(response={"instructions": text, "max_output_tokens": 2})
        events = [connection.recv()]
        while events[-1].type != "response.done":
            events.append(connection.recv())
        failed = events[-1].response.status == "failed"
        assert failed == ("error" in [event.type for event in events])
        for event in events:
            assert event.type != "error" or event.error.type == "invalid_request_error"
        connection.input_audio_buffer.clear()
        told_until(connection, "input_audio_buffer.cleared")


def test_limits_of_tokens(served, speech):
    """A session's is kept until another is set; "inf" lifts it; a response may have its own."""
    with talking(served) as connection:
        append(connection, speech[:100_000])

        def update(**session):
            connection.session.update(session={"type": "realtime", **session})
            return told_until(connection, "session.updated")[-1].session.max_output_tokens

        def tokens(**response):
            asked = {"instructions": QUESTION, **response}
            connection.response.create(response=asked)
            return told_until(connection, "response.done")[-1].response.usage.output_tokens

        assert update() == "inf"
        long = tokens()
        assert long > 3
        assert update(max_output_tokens=2) == 2
        assert update(instructions="Be brief.") == 2
        assert tokens() == 2
        assert tokens(max_output_tokens=3) == 3
        assert tokens(max_output_tokens="inf") == long
        assert update(max_output_tokens="inf") == "inf"
        assert tokens() == long


def test_a_response_with_an_input_leaves_the_texts_that_wait(served, model):
    with talking(served) as connection:

        def answer(**response):
            connection.response.create(response={"max_output_tokens": 8, **response})
            return told_until(connection, "response.done")[-1].response.output[0].content[0].text

        item = {"type": "message", "role": "user"}
        item["content"] = [{"type": "input_text", "text": "First?"}]
        connection.conversation.item.create(item=item)
        # An empty input is an input: only the instructions are asked.
        assert answer(instructions="Second?", input=[]) == said(model, "Second?")
        assert answer() == said(model, "First?")
        connection.response.create(response={})
        assert "nothing is asked" in told_until(connection, "error")[-1].error.message


def said(model, text):
    return model.generate(text, max_new_tokens=8).text


# --- who leaves ----------------------------------------------------------------------------------


def test_a_socket_that_goes_away_frees_its_place(served, speech):
    service = served.state.service
    with talking(served) as connection:
        append(connection, speech)
        connection.response.create(response={"instructions": "Tell all of it, at length."})
        told_until(connection, "response.output_text.delta")
    until(lambda: service.stats()["running"] + service.stats()["waiting"] == 0)
    until(lambda: served.state.sockets == 0)
    assert served.state._active == 0


def test_a_response_is_cancelled(served, speech):
    with talking(served) as connection:
        append(connection, speech)
        connection.response.create(response={"instructions": "Tell all of it, at length."})
        connection.response.cancel()
        assert told_until(connection, "response.done")[-1].response.status == "cancelled"
        connection.response.cancel()
        assert told_until(connection, "error")[-1].error.code == "response_cancel_not_active"
        connection.input_audio_buffer.clear()
        told_until(connection, "input_audio_buffer.cleared")
        connection.input_audio_buffer.commit()
        (error,) = [e.error for e in told_until(connection, "error") if e.type == "error"]
        assert error.code == "input_audio_buffer_commit_empty"


# --- what is refused -----------------------------------------------------------------------------


def opened(served, key=KEY, path="/v1/realtime", **options):
    """A plain socket."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = served.url.replace("http", "ws") + path
    return connect(url, additional_headers=headers | options.pop("headers", {}), **options)


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        ({"key": None}, 401, "invalid_api_key"),
        ({"key": "another-key-here"}, 401, "invalid_api_key"),
        ({"path": "/v1/realtime?model=none"}, 404, "model_not_found"),
        ({"path": "/v1/other"}, 404, None),
        ({"subprotocols": ["realtime", "openai-insecure-api-key.wrong"]}, 401, "invalid_api_key"),
    ],
)
def test_sockets_that_are_refused(served, options, status, code):
    with pytest.raises(InvalidStatus) as refused:
        opened(served, **options)
    assert refused.value.response.status_code == status
    assert json.loads(refused.value.response.body)["error"]["code"] == code


def test_keys_of_browsers_and_the_number_of_sockets(served):
    protocols = ["realtime", f"openai-insecure-api-key.{KEY}"]
    with contextlib.ExitStack() as stack:
        for _ in range(LIMITS.max_sockets):
            socket = stack.enter_context(opened(served, None, subprotocols=protocols))
            assert socket.subprotocol == "realtime"
        with pytest.raises(InvalidStatus) as refused:
            opened(served)
        assert refused.value.response.status_code == 429
        assert int(refused.value.response.headers["retry-after"]) > 0
        with served.http() as client:
            assert f"moss_audio_sockets {LIMITS.max_sockets}.0" in client.get("/metrics").text
    until(lambda: served.state.sockets == 0)


def test_messages_that_are_refused(served, model, speech):
    """Each gets an error event with its id, and the session goes on."""
    audio = base64.b64encode(speech[:24_000].tobytes()).decode()
    session = {"type": "session.update", "session": {"audio": {"input": {}}}}
    vad = {"audio": {"input": {"turn_detection": {"type": "server_vad"}}}}
    rate = {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 8000}}}}
    bad = [
        ("no JSON", "invalid_json", None),
        ("[1]", "invalid_value", None),
        (b"bytes", "invalid_value", None),
        ("[" * 100_000, "invalid_json", None),
        ({"type": "nothing"}, "invalid_value", "type"),
        ({"type": ["x"]}, "invalid_value", "type"),
        ({"type": "input_audio_buffer.append"}, "missing_required_parameter", "audio"),
        ({"type": "input_audio_buffer.append", "audio": "%%%"}, "invalid_audio", "audio"),
        ({"type": "input_audio_buffer.append", "audio": "é"}, "invalid_audio", "audio"),
        ({"type": "input_audio_buffer.commit"}, "input_audio_buffer_commit_empty", None),
        (session | {"session": {"voice": "x"}}, "unknown_parameter", "session.voice"),
        (session | {"session": {"model": "x"}}, "model_not_found", "model"),
        (session | {"session": vad}, "unsupported_parameter", "session.audio.input.turn_detection"),
        (session | {"session": rate}, "invalid_value", "session.audio.input.format.rate"),
        ({"type": "response.create"}, "invalid_value", "response"),
        (
            {"type": "response.create", "response": {"instructions": "\ud800"}},
            "invalid_value",
            "response.instructions",
        ),
        (
            {"type": "response.create", "response": {"instructions": "x", "max_output_tokens": 0}},
            "invalid_value",
            "response.max_output_tokens",
        ),
    ]
    with opened(served) as socket:
        assert json.loads(socket.recv())["type"] == "session.created"
        for number, (message, code, param) in enumerate(bad):
            named = isinstance(message, dict)
            if named:
                message = json.dumps(message | {"event_id": f"mine-{number}"})
            socket.send(message)
            event = json.loads(socket.recv())
            assert event["type"] == "error"
            found = event["error"]
            assert (found["code"], found["param"]) == (code, param), message
            assert found["type"] == "invalid_request_error"
            assert found["event_id"] == (f"mine-{number}" if named else None)
        # A half sample is kept for the next message, but no clip ends with one.
        for piece in ("AAAA", audio):
            socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": piece}))
        socket.send(json.dumps({"type": "input_audio_buffer.commit"}))
        assert "within a sample" in json.loads(socket.recv())["error"]["message"]
        # More seconds than the limit: what was there before stays.
        piece = base64.b64encode(bytes(360_000)).decode()
        for _ in range(4):
            socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": piece}))
        event = json.loads(socket.recv())
        assert event["error"]["code"] == "audio_too_long"
        socket.send(json.dumps({"type": "input_audio_buffer.clear"}))
        assert json.loads(socket.recv())["type"] == "input_audio_buffer.cleared"
        # A message beyond the limit closes the socket, and nothing else.
        socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": "A" * 600_000}))
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=30)
        assert socket.close_code == 1009
    with talking(served) as connection:
        append(connection, speech[:24_000])
        assert transcript(connection) == offline(model, speech[:24_000]).text


def test_a_silent_socket_an_engine_that_stops_and_pages_of_others(model):
    """Of a server without keys, whose limit of silence is short."""
    with serving(model, Limits(socket_idle_seconds=0.3)) as server:
        with opened(server, None) as socket:
            socket.recv()
            event = json.loads(socket.recv(timeout=30))
            assert event["error"]["code"] == "idle_timeout"
            with pytest.raises(ConnectionClosed):
                socket.recv(timeout=30)
            assert socket.close_code == 1008
        with pytest.raises(InvalidStatus) as refused:
            opened(server, None, origin="https://elsewhere.example")
        assert refused.value.response.status_code == 403
        with opened(server, None, origin=server.url) as socket:
            server.state.draining = True
            piece = json.dumps({"type": "input_audio_buffer.append", "audio": "AAAA"})
            with contextlib.suppress(ConnectionClosed):  # one that never stops talking, too
                for _ in range(3000):
                    socket.send(piece)
                    time.sleep(0.01)
            assert socket.close_code == 1001
        with pytest.raises(InvalidStatus) as refused:
            opened(server, None)
        assert refused.value.response.status_code == 503
