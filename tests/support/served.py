"""A server of the small model on a loopback port, in a thread of this process."""

from __future__ import annotations

import base64
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

import moss_audio_jax as mj
from moss_audio_jax.serve import adapters
from moss_audio_jax.serve.app import make_app
from moss_audio_jax.serve.limits import Limits
from moss_audio_jax.serve.realtime import socket_options
from moss_audio_jax.serve.state import State

NAMES = ("small", "whisper-1")


class Served:
    """A running server.

    Attributes:
      url: "http://127.0.0.1:PORT".
      state: what its requests share.
    """

    def __init__(self, url: str, state: State, key: str | None) -> None:
        self.url, self.state, self.key = url, state, key

    @property
    def model(self) -> mj.MossAudio:
        return self.state.model

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**self._options(options))

    def async_openai(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._options(options))

    def http(self, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120, **options)

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        default = {"base_url": f"{self.url}/v1", "api_key": self.key or "none", "max_retries": 0}
        return default | options


@contextlib.contextmanager
def serving(
    model: mj.MossAudio,
    limits: Limits | None = None,
    key: str | None = None,
    slots: int = 4,
    lora: Sequence[tuple[str, Path]] = (),
    **options: Any,
) -> Iterator[Served]:
    """A server with a living engine, and one for each adapter; `options` are those of `State`."""
    size = {"slots": slots, "max_new_tokens": 256}
    with contextlib.ExitStack() as engines:
        service = engines.enter_context(model.service(**size))
        others = adapters.start(model, service, lora, size, engines)
        state = State(model, service, NAMES, limits, adapters=others, **options)
        with listening(state, key) as served:
            yield served


@contextlib.contextmanager
def listening(state: State, key: str | None = None) -> Iterator[Served]:
    """A server of what its requests share, which is closed at the end."""
    app = make_app(state, [key] if key else [])
    config = uvicorn.Config(
        app,
        port=0,
        http="h11",
        lifespan="off",
        log_config=None,
        **socket_options(state.limits),
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Served(f"http://127.0.0.1:{port}", state, key)
    finally:
        server.should_exit = True
        thread.join(30)
        state.close()


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits until it is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not become true in time"
        time.sleep(0.01)


def user(text: str, *clips: bytes, kind: str = "input_audio") -> dict[str, Any]:
    """A user's message of a text and clips."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    for clip in clips:
        data = base64.b64encode(clip).decode()
        if kind == "audio_url":
            held = {"url": f"data:audio/wav;base64,{data}"}
        else:
            held = {"data": data, "format": "wav"}
        parts.append({"type": kind, kind: held})
    return {"role": "user", "content": parts}
