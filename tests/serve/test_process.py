"""The verb as a process: its options, SIGTERM under load, Ctrl-C."""

from __future__ import annotations

import base64
import contextlib
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from adapters import write_adapters
from served import user
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import moss_audio_jax as mj
from moss_audio_jax import command
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.serve import __main__ as verb
from moss_audio_jax.weights.opening import read_config

DEMO = DEFAULT_CHECKPOINT.parent / "demo"
LONG = {"temperature": 2.0, "seed": 1, "max_tokens": 60}


@contextlib.contextmanager
def process(*options: str):
    """(process, url) of a server; `process.said` grows by the lines that it prints later."""
    words = [sys.executable, "-m", "moss_audio_jax.serve", "--port", "0", "--compile", "demand"]
    with subprocess.Popen([*words, *options], stderr=subprocess.PIPE, text=True) as server:
        try:
            lines = []
            for line in server.stderr:
                lines.append(line)
                if found := re.search(r"at (http://[\d.:]+)/v1", line):
                    break
            else:
                raise AssertionError("".join(lines))
            server.said = []
            threading.Thread(target=server.said.extend, args=[server.stderr], daemon=True).start()
            yield server, found[1]
        finally:
            server.kill()


def test_sigterm_lets_answers_on_sockets_end():
    options = ("--slots", "4", "--max-new-tokens", "256", "--drain-seconds", "60")
    with process(*options) as (server, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with client.realtime.connect(model="small") as live, client.realtime.connect() as idle:
            sound = np.tile(mj.load_audio(DEMO / "two_people.flac"), 3)
            audio = {"input": {"format": {"type": "audio/pcm", "rate": 16_000}}}
            live.session.update(session={"type": "transcription", "audio": audio})
            data = base64.b64encode((sound * 32767).astype("<i2").tobytes()).decode()
            live.input_audio_buffer.append(audio=data)
            live.input_audio_buffer.commit()
            deltas = []
            for event in live:
                assert event.type != "error", event
                if event.type.endswith("transcription.delta"):
                    if not deltas:
                        server.send_signal(signal.SIGTERM)
                    deltas.append(event.delta)
                if event.type.endswith("transcription.completed"):
                    break
            assert len(deltas) > 2
            assert "".join(deltas) == event.transcript
            for connection in (live, idle):
                events = [*connection]  # to the end that the server puts to it
                assert events[-1].error.code == "unavailable"
        assert server.wait(30) == 0


def test_sigterm_lets_answers_end_and_ctrl_c_ends_at_once(tmp_path):
    """Those of the base and of an adapter, each of which has an engine."""
    lora = write_adapters(tmp_path / "lora", read_config(DEFAULT_CHECKPOINT))
    # The size of the engine in `served`, so that its programs are those of the other tests.
    options = ("--slots", "4", "--max-new-tokens", "256", "--drain-seconds", "60")
    with process(*options, "--lora", f"adapted={lora}") as (server, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def ask(number: int, begun: threading.Event) -> tuple[str, str | None]:
            text, why = "", None
            options = LONG | {"stream": True, "seed": number}
            options["model"] = ("small", "adapted")[number % 2]
            for chunk in client.chat.completions.create(
                messages=[user("Tell a long story.")], **options
            ):
                begun.set()
                text += chunk.choices[0].delta.content or ""
                why = chunk.choices[0].finish_reason or why
            return text, why

        begun = [threading.Event() for _ in range(6)]
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(ask, number, each) for number, each in enumerate(begun)]
            assert all(each.wait(120) for each in begun)
            server.send_signal(signal.SIGTERM)
            ended = [each.result(120) for each in asked]
        assert all(why in ("stop", "length") for _, why in ended)
        assert server.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
    with process() as (server, url):
        assert httpx.get(f"{url}/ready").status_code == 200
        with pytest.raises(InvalidStatus):
            connect(f"{url.replace('http', 'ws')}/v1/other")
        body = LONG | {"messages": [user("Tell a long story.")], "stream": True, "model": "small"}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
            next(reply.iter_lines())
            server.send_signal(signal.SIGINT)
            assert server.wait(20) == 130
    # A line for the socket that was refused, and no traceback of the stream.
    assert [line for line in server.said if "WS other 404" in line]
    assert not [line for line in server.said if "handshake" in line or "Traceback" in line]


def test_sigterm_while_a_model_is_loaded_ends_at_once():
    """The server says so itself: process 1 of a container has no default to rely on."""
    words = [sys.executable, "-m", "moss_audio_jax.serve", "--port", "0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as server:
        assert "small model" in server.stderr.readline()  # it is about to load
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("words", "code", "fault"),
    [
        (["--host", "0.0.0.0"], 2, "can be reached by others"),
        (["--host", "999.1.1.1"], 2, "can be reached"),
        (["--host", "no.such.name.invalid", "--no-api-key"], 2, "cannot listen on"),
        (["--port", "99999"], 2, "from 0 to 65535"),
        (["--api-key-file", "no-such-file"], 1, "no such file"),
        (["--max-body-mb", "0"], 2, "above 0"),
        (["--max-clips", "1.5"], 2, "whole number"),
        (["--lora", "folder"], 2, "expected NAME=DIR"),
        (["--lora", "=folder"], 2, "expected a name of at most 100 letters"),
        (["--lora", "a b=folder"], 2, "expected a name of at most 100 letters"),
        (["--lora", 'a"}=folder'], 2, "expected a name of at most 100 letters"),
        (["--lora", "/a=folder"], 2, "expected a name of at most 100 letters"),
        (["--lora", "small=folder"], 2, "the base is called small; choose another name"),
        (["--lora", "a=b", "--lora", "a=c"], 2, "other adapters are called a; choose another"),
        (["--lora", "a/b=folder"], 1, "folder: not a folder of LoRA adapters"),
    ],
)
def test_options_that_are_refused(words, code, fault, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(verb.KEY, raising=False)
    assert command.run(verb.main, words) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert fault in line


def test_a_port_is_taken_before_anything_listens_there():
    with verb._listening("127.0.0.1", 0) as first:
        host, port = first.getsockname()
        with (
            pytest.raises(mj.UsageError, match=f"cannot listen on {host}:{port}"),
            verb._listening(host, port),
        ):
            pass
    with verb._listening(host, port):  # it is free again
        pass


def test_keys_of_a_file_and_of_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-long-key\n\nsecond-long-key\n")
    monkeypatch.setenv(verb.KEY, "third-long-key")
    assert verb._keys(file) == ["third-long-key", "first-long-key", "second-long-key"]
    file.write_text("# none\n")
    assert command.run(lambda _: bool(verb._keys(file)), []) == 1
    monkeypatch.setenv(verb.KEY, "a b")
    assert command.run(lambda _: bool(verb._keys(None)), []) == 1
