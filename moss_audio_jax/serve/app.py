"""The routes, and the gate before them: keys, limits, errors in OpenAI's shape, what is logged."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Collection, Sequence
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from moss_audio_jax.errors import InputError
from moss_audio_jax.files import parse_json
from moss_audio_jax.serve.chat import read_chat
from moss_audio_jax.serve.errors import ApiError, invalid, unavailable
from moss_audio_jax.serve.openapi import document
from moss_audio_jax.serve.pages import FILES, page
from moss_audio_jax.serve.realtime import realtime
from moss_audio_jax.serve.state import State
from moss_audio_jax.serve.transcriptions import read_transcription

log = logging.getLogger(__name__)
T = TypeVar("T")

REALTIME = "/v1/realtime"
OPEN = ("/health", "/ready")  # without a key, and not logged
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
_INTERNAL = ApiError(500, "internal error; the server's log has its place", "internal")
_EVENTS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_KEY_PROTOCOL = "openai-insecure-api-key."
_FIELD_BYTES = 1 << 20  # of a form's text


def make_app(state: State, keys: Sequence[str] = (), hosts: Collection[str] = ()) -> ASGIApp:
    """The server as an ASGI application.

    Args:
      keys: a client must send one of them; without any, all are let in.
      hosts: names that a request may call this server by; empty for any. It keeps a web page whose
        name resolves to this machine from talking to a server without keys.
    """
    routes = {
        "/v1/chat/completions": (_chat, "POST"),
        "/v1/audio/transcriptions": (_transcribe, "POST"),
        "/v1/models": (_models, "GET"),
        "/v1/models/{name:path}": (_model, "GET"),
        "/health": (_health, "GET"),
        "/ready": (_ready, "GET"),
        "/metrics": (_metrics, "GET"),
        "/openapi.json": (_openapi, "GET"),
    }
    routes |= dict.fromkeys(FILES, (page, "GET"))
    app = Starlette(
        routes=[
            *(Route(path, handle, methods=[how]) for path, (handle, how) in routes.items()),
            WebSocketRoute(REALTIME, realtime),
        ],
        exception_handlers={
            ApiError: lambda _, error: error.response(),
            HTTPException: _http_error,
            Exception: lambda *_: _INTERNAL.response(),
        },
    )
    app.state.serve = state
    return Gate(app, state, keys, hosts, tuple(routes))


class Gate:
    """Lets a request in or refuses it, limits its body, and notes how it ended.

    A line is logged for each request: its method, route, status and duration, and no more.
    """

    def __init__(
        self,
        app: ASGIApp,
        state: State,
        keys: Sequence[str],
        hosts: Collection[str],
        routes: Sequence[str],
    ) -> None:
        self._app, self._state, self._hosts, self._routes = app, state, hosts, routes
        self._keys = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._socket(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        fault: ApiError | None = None
        try:
            with contextlib.ExitStack() as stack:  # of places and answers
                scope["stack"] = stack
                self._check(scope)
                await self._app(scope, _Body(receive, self._state.limits.body_bytes), note)
        except (_Gone, ClientDisconnect):
            status = 499  # nobody reads a reply
        except ApiError as error:
            fault = error
        except asyncio.CancelledError:
            if not self._state.draining:
                raise
            fault = unavailable("this server is stopping; the request was ended")
        except Exception as error:
            _log(error)
            fault = _INTERNAL
        if fault is not None and not status:
            await fault.response()(scope, receive, note)
        path = scope["path"]
        named = [each for each in self._routes if "{" in each]
        path = next((each for each in named if path.startswith(each.partition("{")[0])), path)
        path = path if path in self._routes else "other"
        seconds = time.monotonic() - started
        self._state.metrics.requests.labels(path, str(status)).inc()
        self._state.metrics.request.labels(path).observe(seconds)
        if status >= 400:
            self._state.metrics.rejected.labels(_reason(status)).inc()
        if path not in OPEN:
            log.info("%s %s %d %.3f s", scope["method"], path, status, seconds)

    async def _socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A socket: what is refused gets an HTTP reply, what fails later a code of closing."""
        started, status, closed = time.monotonic(), 0, False

        async def note(message: Message) -> None:
            nonlocal status, closed
            if message["type"] == "websocket.accept":
                status = 101
            elif message["type"] == "websocket.http.response.start":
                status = message["status"]
            closed = closed or message["type"] == "websocket.close"
            await send(message)

        fault: ApiError | None = None
        try:
            self._check(scope)
            if scope["path"] != REALTIME:
                raise ApiError(404, f"no such route; sockets are served at {REALTIME}")
            await self._app(scope, receive, note)
        except asyncio.CancelledError:
            if not self._state.draining:
                raise
        except ApiError as error:
            fault = error
        except Exception as error:
            _log(error)
            fault = _INTERNAL
        with contextlib.suppress(WebSocketDisconnect, OSError):  # the client went away
            if fault is not None and not status:
                await fault.response()(scope, receive, note)
            elif fault is not None and not closed:
                await send({"type": "websocket.close", "code": 1011, "reason": "internal error"})
        path = REALTIME if scope["path"] == REALTIME else "other"
        self._state.metrics.requests.labels(path, str(status)).inc()
        if status >= 400:
            self._state.metrics.rejected.labels(_reason(status)).inc()
        log.info("WS %s %d %.3f s", path, status, time.monotonic() - started)

    def _check(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._hosts and name not in self._hosts:
            raise ApiError(421, f"this server is not called {name!r}; see --allow-host")
        if scope["path"] in OPEN or scope["path"] in FILES:
            return
        if not self._keys:
            # Browsers let any page open a socket to this machine, and say which page it is.
            origin = headers.get(b"origin")
            if scope["type"] == "websocket" and origin not in (None, *_origins(host)):
                raise ApiError(403, "a page of another origin may not open a socket here")
            return
        scheme, _, key = headers.get(b"authorization", "").partition(" ")
        for offered in scope.get("subprotocols", ()):  # where browsers can send a key
            if offered.startswith(_KEY_PROTOCOL):
                scheme, key = "bearer", offered.removeprefix(_KEY_PROTOCOL)
        given = _digest(key.strip())
        # Every key is compared, each in constant time.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "no valid API key; send it as 'Authorization: Bearer KEY'",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


class _Body:
    """`receive` with a limit on the bytes of a body, which are counted as they come."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._most, self._had = receive, most, 0

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._had += len(message.get("body", b""))
            if self._had > self._most:
                await self._drop()
                raise ApiError(
                    413,
                    f"the body has more than {self._most / 1e6:g} MB, the limit of this server",
                    "body_too_large",
                )
        return message

    async def _drop(self) -> None:
        """Drops some of the rest: a client that is still sending would not read the reply."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                while (await self._receive()).get("more_body"):
                    pass


class _Gone(Exception):
    """The client has closed its connection."""


async def _chat(request: Request) -> Response:
    state = _state(request)
    if _media_type(request) != "application/json":
        raise ApiError(415, "the body must be JSON; send Content-Type: application/json")
    stack = request.scope["stack"]
    stack.enter_context(state.place())  # before the body, which takes memory
    values = await _json(request, state)

    async def begin() -> Any:
        chat = await read_chat(state, values)
        return chat, chat.begin(stack)

    chat, answers = await _while_there(request, begin())
    if chat.stream:
        return StreamingResponse(chat.events(answers), 200, _EVENTS, "text/event-stream")
    return JSONResponse(await _while_there(request, chat.whole(answers)))


async def _transcribe(request: Request) -> Response:
    state = _state(request)
    if _media_type(request) != "multipart/form-data":
        raise ApiError(415, "the body must be a form; send Content-Type: multipart/form-data")
    stack = request.scope["stack"]
    limits = {"max_files": 1, "max_fields": 64, "max_part_size": _FIELD_BYTES}
    stack.enter_context(state.place())
    form = await _in_time(request.form(**limits), state)

    async def begin() -> Any:
        transcription = await read_transcription(state, form)
        await form.close()
        return transcription, await transcription.begin(stack)

    transcription, work = await _while_there(request, begin())
    if transcription.asked.stream:
        events = transcription.events(work)
        return StreamingResponse(events, 200, _EVENTS, "text/event-stream")
    written, headers = await _while_there(request, transcription.whole(work))
    if isinstance(written, dict):
        return JSONResponse(written)
    kind = {"vtt": "text/vtt", "srt": "application/x-subrip"}
    media = kind.get(transcription.asked.response_format, "text/plain")
    return Response(written.encode("utf-8", "replace"), 200, headers, f"{media}; charset=utf-8")


async def _models(request: Request) -> Response:
    state = _state(request)
    return JSONResponse({"object": "list", "data": [_shown(state, name) for name in state.served]})


async def _model(request: Request) -> Response:
    name = request.path_params["name"]
    return JSONResponse(_shown(_state(request), name))


def _shown(state: State, name: str) -> dict[str, Any]:
    """A model as clients see it; adapters have a `parent`. Raises ApiError if there is none."""
    state.named(name)
    parent = state.names[0] if name in state.adapters else None
    shown = {"id": name, "object": "model", "created": 0, "owned_by": "moss_audio_jax"}
    return shown | {"root": parent or name, "parent": parent}


async def _health(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _ready(request: Request) -> Response:
    if fault := _state(request).fault:
        raise unavailable(fault)
    return JSONResponse({"status": "ready"})


async def _metrics(request: Request) -> Response:
    return Response(_state(request).metrics.text(), media_type="text/plain; version=0.0.4")


async def _openapi(_: Request) -> Response:
    return JSONResponse(document())


def _state(request: Request) -> State:
    return request.app.state.serve


async def _json(request: Request, state: State) -> dict[str, Any]:
    """The body's JSON object. Its bytes are not kept."""

    async def read() -> bytes:
        return b"".join([piece async for piece in request.stream()])

    try:
        values = await state.in_thread(parse_json, await _in_time(read(), state), "the body")
    except InputError as error:
        raise invalid(str(error), code="invalid_json") from None
    if not isinstance(values, dict):
        raise invalid("the body must be a JSON object")
    return values


async def _in_time(reading: Awaitable[T], state: State) -> T:
    """A body, once all of it has come."""
    seconds = state.limits.body_seconds
    try:
        async with asyncio.timeout(seconds):
            return await reading
    except TimeoutError:
        raise ApiError(408, f"the body took longer than {seconds:g} s", "timeout") from None


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _while_there(request: Request, work: Any) -> Any:
    """The result of `work`, which is cancelled if the client closes its connection."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0] not in done:
            raise _Gone
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _http_error(_: Request, error: HTTPException) -> Response:
    """What Starlette refuses: no such route, a method, a broken form."""
    said = {404: "no such route; see /openapi.json", 405: "this route has another method"}
    return ApiError(
        error.status_code, said.get(error.status_code, error.detail), headers=error.headers
    ).response()


def _origins(host: str) -> tuple[str, str]:
    return f"http://{host}", f"https://{host}"


def _log(error: Exception) -> None:
    """Notes an internal error. Its message may quote a body, so it is not logged."""
    where = error.__traceback__
    while where.tb_next is not None:
        where = where.tb_next
    place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}"
    log.error("internal error: %s at %s", type(error).__name__, place)


def _reason(status: int) -> str:
    known = {401: "key", 404: "unknown", 408: "slow", 413: "size", 421: "host", 429: "busy"}
    known |= {499: "gone", 503: "unavailable", 504: "time"}
    return known.get(status, "request" if status < 500 else "internal")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
