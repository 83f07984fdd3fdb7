"""Two processes of one mesh serve together: every kind of request, SIGTERM, the loss of a process.

On CPUs collectives fail at once if a process is gone. Where they wait instead, as on TPUs,
`Service.stuck` (tests/generate/test_together.py) and JAX's heartbeats end the wait.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import jax
import numpy as np
import openai
import pytest
from adapters import write_adapters
from served import until, user
from tiny_model import tone, write_checkpoint

import moss_audio_jax as mj
from launch.local_processes import environment, free_port
from moss_audio_jax import runtime, sharding
from moss_audio_jax.errors import UsageError
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.serve import __main__ as verb
from moss_audio_jax.serve.guides import Guides
from moss_audio_jax.text.tasks import TRANSCRIBE
from moss_audio_jax.weights.opening import read_config

# New tokens: each takes several collectives, of many milliseconds on CPUs.
FEW, MOST = 5, 16
SCHEMA = {"type": "object", "properties": {"loud": {"type": "boolean"}}, "required": ["loud"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("mesh") / "tiny", 2048)


def started(folder, *more):
    """Two processes that serve one mesh, from the command to their errors."""
    words = [sys.executable, "-m", "moss_audio_jax.serve", "--checkpoint", str(folder)]
    words += ["--mesh", "tensor=2", "--port", "0", "--slots", "4", "--drain-seconds", "60"]
    words += ["--compile", "demand"]
    words += ["--cache-tokens", "4096", "--max-new-tokens", str(MOST), *more]
    port = free_port()
    return [
        subprocess.Popen(
            words, env=environment(index, 2, 1, port), stderr=subprocess.PIPE, text=True
        )
        for index in range(2)
    ]


@contextlib.contextmanager
def serving(folder):
    """([process 0, process 1], url, lines that they print)."""
    running, lines = started(folder), []
    for process in running:
        threading.Thread(target=lambda p=process: lines.extend(p.stderr), daemon=True).start()

    def found():
        return re.search(r"at (http://[\d.:]+)/v1", "".join(lines))

    try:
        until(lambda: found() or any(process.poll() is not None for process in running))
        assert found(), "".join(lines)
        yield running, found()[1], lines
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_adapters_by_name_need_one_process(folder, tmp_path):
    adapters = write_adapters(tmp_path / "own", read_config(folder))
    running = started(folder, "--lora", f"own={adapters}")
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [2, 2], errors
    assert all("needs a server of one process" in error for error in errors)


def asked(text):
    """A conversation with a short system text: short prompts have few programs."""
    return [{"role": "system", "content": "."}, user(text)]


def ask(client, text, **options):
    """The tokens of an answer, each as its bytes, and why it ended."""
    options = {"max_tokens": FEW, "logprobs": True} | options
    answer = client.chat.completions.create(model="tiny", messages=asked(text), **options)
    chunks = [chunk for chunk in answer if chunk.choices] if "stream" in options else [answer]
    tokens = [t.bytes for c in chunks if (held := c.choices[0].logprobs) for t in held.content]
    return tokens, chunks[-1].choices[0].finish_reason


def test_answers_are_those_of_one_process(folder):
    wav = tone(4.5) * np.linspace(0, 1, 72_000, dtype=np.float32)
    samples = np.round(wav * 32767).astype("<i2")
    wav = samples.astype(np.float32) / 2**15
    heat = {"temperature": 0.9, "seed": 5}
    model = mj.MossAudio.load(folder, "float32")  # on one device of this process
    prompts = [
        model.prepare(mj.Request(messages=asked("Hello"), sampling=Sampling(FEW))),
        model.prepare(mj.Request(messages=asked("Hello"), sampling=Sampling(FEW, **heat))),
        model.prepare(mj.Request(messages=asked("Is it?"), sampling=Sampling(MOST))),
        model.prepare(mj.Request(TRANSCRIBE["none"], [wav], Sampling(MOST))),
    ]
    guides = Guides(model.tokenizer, model.config.decoder.vocab_size, model.tokenizer.stop_ids)
    prompts[2] = dataclasses.replace(prompts[2], guide=guides.of(SCHEMA))
    replies = model.answer(prompts)
    expected = [
        (
            [[*model.tokenizer.token_bytes(i, skip_special=False)] for i in reply.ids],
            "stop" if reply.finish_reason == "stop" else "length",
        )
        for reply in replies[:3]
    ]
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    with serving(folder) as (running, url, lines):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def gone():
            options = {"model": "tiny", "max_tokens": MOST, "stream": True}
            with client.chat.completions.create(messages=asked("Hello"), **options) as stream:
                next(iter(stream))

        with ThreadPoolExecutor(4) as pool:
            left = pool.submit(gone)
            sent = [
                pool.submit(ask, client, "Hello"),
                pool.submit(ask, client, "Hello", stream=True, **heat),
                pool.submit(ask, client, "Is it?", response_format=form, max_tokens=MOST),
            ]
            found = [each.result(120) for each in sent]
            left.result(120)
        assert found == expected
        with client.realtime.connect(model="tiny") as live:
            audio = {"input": {"format": {"type": "audio/pcm", "rate": 16_000}}}
            live.session.update(session={"type": "transcription", "audio": audio})
            for piece in (samples[:70_000], samples[70_000:]):
                live.input_audio_buffer.append(audio=base64.b64encode(piece.tobytes()).decode())
            live.input_audio_buffer.commit()
            for event in live:
                assert event.type != "error", event
                if event.type.endswith("transcription.completed"):
                    break
        assert event.transcript == replies[3].text
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(ask, client, "Hello")
            running_one = 'moss_audio_running{model="tiny"} 1.0'
            until(lambda: running_one in httpx.get(f"{url}/metrics").text)
            for process in running[::-1]:  # a launcher sends it to all
                process.send_signal(signal.SIGTERM)
            assert last.result(60) == expected[0]
        assert [process.wait(60) for process in running] == [0, 0], "".join(lines)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_lost_ends_the_other(folder, lost):
    with serving(folder) as (running, url, _):
        assert httpx.get(f"{url}/ready").status_code == 200
        running[lost].kill()
        assert running[1 - lost].wait(60) not in (0, None)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/ready")


def test_processes_that_do_not_fit_each_other_are_refused(monkeypatch):
    """Here as one of them finds it."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(UsageError, match="--mesh has devices of 1 of the 2 processes"):
        verb._mesh(None, [])
    mesh = SimpleNamespace(
        devices=np.array([SimpleNamespace(process_index=index) for index in range(2)])
    )
    monkeypatch.setattr(sharding, "as_mesh", lambda _: mesh)
    for others, fault in (("--slots=3", "start all of them with the same"), ("--slots=4", None)):
        monkeypatch.setattr(runtime, "from_all", lambda said, o=others: [said, [said[0], o]])
        with pytest.raises(UsageError, match=fault) if fault else contextlib.nullcontext():
            assert verb._mesh({}, ["--slots=4"]) is mesh
