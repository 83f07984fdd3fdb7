"""WS /v1/realtime: live sound in the form of OpenAI's realtime API, answered in text.

A client appends sound to a buffer. Each chunk of 4 s is encoded and prefilled as soon as it is
whole (`generate.listen`), by the engine that answers all requests. A commit ends the clip, and its
transcript is what `MossAudio.generate` says about the whole of it. A question may be asked at any
time: it is about the sound that lies in the buffer, or else about the clip that was committed last.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import math
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from moss_audio_jax.audio.io import Resampler
from moss_audio_jax.audio.lengths import HOP, SAMPLE_RATE
from moss_audio_jax.generate.listen import Ear, tokens_for
from moss_audio_jax.generate.options import Sampling
from moss_audio_jax.generate.request import Prepared, Request
from moss_audio_jax.serve import realtime_events as events
from moss_audio_jax.serve.answers import Answers, Pieces
from moss_audio_jax.serve.errors import ApiError, invalid, unavailable
from moss_audio_jax.serve.limits import Limits
from moss_audio_jax.serve.state import State
from moss_audio_jax.text.tasks import TRANSCRIBE
from moss_audio_jax.transcribe import Window, joined

PROTOCOL = "realtime"  # the subprotocol of clients in browsers
_LOOK = 1.0  # seconds between looks at whether the server still answers
_TOKENS_PER_SECOND = 8  # room for a transcript's tokens: fast speech has half as many
_BYTES = 2  # of a sample
_POLICY, _LEAVING, _FAILED = 1008, 1001, 1011  # why a socket is closed


def socket_options(limits: Limits) -> dict[str, Any]:
    """What uvicorn must be told about sockets."""
    return {
        "ws": "websockets-sansio",
        "ws_max_size": int(limits.max_message_mb * 1e6),
        "ws_per_message_deflate": False,  # sound in base64 hardly shrinks
        "ws_ping_interval": 20.0,  # a peer that is gone is noticed
        "ws_ping_timeout": 20.0,
    }


async def realtime(socket: WebSocket) -> None:
    """The route. A socket that is refused gets an HTTP reply with the error."""
    state: State = socket.app.state.serve
    try:
        with state.socket():
            name = socket.query_params.get("model", state.names[0])
            state.named(name)
            offered = PROTOCOL if PROTOCOL in socket.scope.get("subprotocols", ()) else None
            await socket.accept(offered)
            with contextlib.suppress(WebSocketDisconnect, OSError):  # the client went away
                await _Session(state, socket, name).run()
    except ApiError as error:
        if socket.application_state is not WebSocketState.CONNECTING:
            raise
        await socket.send_denial_response(error.response())


class _Buffer:
    """Sound on its way in: PCM16 at some rate, of which an ear hears 16 kHz."""

    def __init__(self, state: State, rate: int) -> None:
        self.ear = Ear(state.model, state.service, math.inf)  # the session knows the limit
        self.rate, self._bytes, self._half = rate, 0, b""
        self._resampler = Resampler(rate)

    @property
    def seconds(self) -> float:
        return self._bytes / _BYTES / self.rate

    @property
    def whole(self) -> bool:
        """Whether it ends with a whole sample."""
        return not self._half

    def append(self, pcm: bytes) -> None:
        """Adds little-endian int16 samples; a message may end within one."""
        self._bytes += len(pcm)
        pcm = self._half + pcm
        end = len(pcm) - len(pcm) % _BYTES
        self._half = pcm[end:]
        samples = np.frombuffer(pcm[:end], "<i2").astype(np.float32) / 2**15
        if len(samples):
            self.ear.take(self._resampler.push(samples))

    def finish(self) -> None:
        """Adds what the resampler held back. Nothing may be appended any more."""
        self.ear.take(self._resampler.rest())


class _Session:
    """One open socket."""

    def __init__(self, state: State, socket: WebSocket, model: str) -> None:
        self._state, self._socket = state, socket
        self._model = model  # which answers responses; transcripts may be those of another
        self._id, self._kind = _new("sess"), "transcription"
        self._transcription: dict[str, Any] = {"model": model}
        self._instructions, self._most_tokens = "", "inf"
        self._rate = events.Format().rate
        self._buffer = _Buffer(state, self._rate)
        self._more = asyncio.Event()  # has sound come that was not heard?
        self._clip: Ear | None = None  # that was committed last
        self._last_item: str | None = None
        self._questions: list[str] = []  # texts that no response has answered
        self._answers: dict[str, asyncio.Task] = {}  # by the id of their item or response
        self._hearing: asyncio.Task | None = None
        self._broken: Exception | None = None
        self._handlers: dict[str, Callable[[Any], Awaitable[None]]] = {
            "session.update": self._update,
            "input_audio_buffer.append": self._append,
            "input_audio_buffer.commit": self._commit,
            "input_audio_buffer.clear": self._clear,
            "conversation.item.create": self._item,
            "response.create": self._respond,
            "response.cancel": self._cancel,
        }

    async def run(self) -> None:
        """Until the client closes the socket, is silent for too long, or the server stops.

        Raises:
          WebSocketDisconnect, OSError: the client went away while it was told something.
        """
        await self._send("session.created", session=self._shown())
        self._hear_anew()
        try:
            while (message := await self._receive()) is not None:
                try:
                    event = events.read_event(message.get("text"))
                except ApiError as error:
                    await self._fault(error, error.event_id)
                    continue
                try:
                    await self._handlers[event.type](event)
                except ApiError as error:
                    await self._fault(error, event.event_id)
        except _Closed as closed:
            await self._fault(closed.error, None)
            await self._socket.close(closed.code)
        finally:
            tasks = [*self._answers.values(), self._hearing]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- messages ------------------------------------------------------------------------------

    async def _receive(self) -> dict[str, Any] | None:
        """The next message; None once the client has closed. Raises _Closed if it is time to."""
        silent_since = time.monotonic()
        seconds = self._state.limits.socket_idle_seconds
        while True:
            if self._broken is not None:
                raise self._broken
            if self._answers:
                silent_since = time.monotonic()
            elif self._state.fault is not None:
                code = _LEAVING if self._state.draining else _FAILED
                raise _Closed(unavailable(self._state.fault), code)
            if time.monotonic() - silent_since >= seconds:
                error = ApiError(408, f"no message came in {seconds:g} s", "idle_timeout")
                raise _Closed(error, _POLICY)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_LOOK, seconds)):
                    message = await self._socket.receive()
                return None if message["type"] == "websocket.disconnect" else message

    async def _send(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "event_id": _new("event")} | fields
        await self._socket.send_text(json.dumps(event))

    async def _fault(self, error: ApiError, event_id: str | None) -> None:
        await self._send("error", error=error.body["error"] | {"event_id": event_id})

    # --- what a client may do ------------------------------------------------------------------

    async def _update(self, event: events.SessionUpdate) -> None:
        fields = event.session
        fields.refuse()
        heard = (fields.audio and fields.audio.input) or events.Input()
        for name in (fields.model, heard.transcription and heard.transcription.model):
            if name is not None:
                self._state.named(name)
        most = events.most_tokens(
            fields.max_output_tokens,
            "session.max_output_tokens",
            self._state.limits.max_new_tokens,
        )
        rate = heard.format.rate if heard.format else self._rate
        if rate != self._rate and self._buffer.seconds:
            where = "session.audio.input.format"
            raise invalid(f"{where}: the buffer holds sound; clear or commit it first", where)
        self._most_tokens = self._most_tokens if most is None else most
        self._kind = fields.type or self._kind
        self._model = fields.model or self._model
        if fields.instructions is not None:
            self._instructions = fields.instructions
        if heard.transcription is not None:
            self._transcription |= heard.transcription.model_dump(exclude_none=True)
        if rate != self._rate:
            self._rate = rate
            self._renew()
        await self._send("session.updated", session=self._shown())

    async def _append(self, event: events.Append) -> None:
        await self._state.in_thread(self._decode, event)
        self._more.set()

    def _decode(self, event: events.Append) -> None:
        try:
            pcm = base64.b64decode(event.audio, validate=True)
        except (binascii.Error, ValueError):
            raise invalid("audio: expected base64", "audio", "invalid_audio") from None
        seconds = self._buffer.seconds + len(pcm) / _BYTES / self._rate
        most = self._state.limits.max_live_seconds
        if seconds > most:
            raise invalid(
                f"audio: the buffer would hold more than {most:g} s, the limit of this server; "
                "commit it first. Nothing of this message was added",
                "audio",
                "audio_too_long",
            )
        room = self._state.model.config.decoder.max_positions
        service = self._state.named(self._transcription["model"])
        room = min(room, service.stats().get("cache_tokens_room", room))
        if tokens_for(seconds, self._transcript_tokens(seconds)) > room:
            raise invalid(
                f"audio: {seconds:.0f} s and their transcript do not fit the {room:.0f} tokens of "
                "this model; commit the buffer first. Nothing of this message was added",
                "audio",
                "audio_too_long",
            )
        self._buffer.append(pcm)

    async def _commit(self, _: events.Plain) -> None:
        buffer = self._buffer
        if buffer.seconds * SAMPLE_RATE < HOP:
            raise invalid(
                f"the buffer holds {1000 * buffer.seconds:.1f} ms of sound; expected at least 10",
                code="input_audio_buffer_commit_empty",
            )
        if not buffer.whole:
            raise invalid("the buffer ends within a sample of 16 bits", code="invalid_audio")
        buffer.finish()
        self._clip = buffer.ear
        self._renew()
        item, before = _new("item"), self._last_item
        await self._send("input_audio_buffer.committed", item_id=item, previous_item_id=before)
        await self._added(item, {"type": "input_audio", "transcript": None})
        model = self._transcription["model"]
        await self._begin(item, self._transcribe(item, buffer.ear, model))

    async def _clear(self, _: events.Plain) -> None:
        self._renew()
        await self._send("input_audio_buffer.cleared")

    async def _item(self, event: events.ItemCreate) -> None:
        held = sum(map(len, self._questions)) + len(event.item.text)
        if held > self._state.limits.max_characters:
            raise invalid(
                f"the texts have {held} characters; expected at most "
                f"{self._state.limits.max_characters}",
                "item",
            )
        self._questions.append(event.item.text)
        content = [part.model_dump() for part in event.item.content]
        await self._added(event.item.id or _new("item"), *content)

    async def _respond(self, event: events.ResponseCreate) -> None:
        fields = event.response or events.ResponseFields()
        fields.refuse()
        asked = self._questions
        if fields.input is not None:
            asked = [item.text for item in fields.input]
        system = self._instructions if fields.instructions is None else fields.instructions
        text, system = ("\n".join(asked), system or None) if asked else (system, None)
        if not text:
            raise invalid("nothing is asked: send instructions, or a text item before", "response")
        limit = self._state.limits.max_new_tokens
        most = events.most_tokens(fields.max_output_tokens, "response.max_output_tokens", limit)
        most = self._most_tokens if most is None else most
        if most == "inf":
            most = min(Sampling.max_new_tokens, limit)
        if fields.input is None:
            self._questions = []
        # About what is heard now, whatever comes while it is answered.
        ear = self._buffer.ear if len(self._buffer.ear.wav) >= HOP else self._clip
        sampling = Sampling(max_new_tokens=most)
        request = (
            Request(text, (), sampling, system)
            if ear is None
            else ear.request(text, sampling, system)
        )
        response = {
            "id": _new("resp"),
            "object": "realtime.response",
            "status": "in_progress",
            "status_details": None,
            "output": [],
            "output_modalities": ["text"],
            "metadata": fields.metadata,
            "usage": None,
        }
        await self._send("response.created", response=response)
        await self._begin(response["id"], self._answer(response, request, self._model))

    async def _cancel(self, event: events.ResponseCancel) -> None:
        running = [name for name, task in self._answers.items() if not task.cancelling()]
        running = [each for each in running if each.startswith("resp_")]
        if event.response_id is not None:
            running = [each for each in running if each == event.response_id]
        if not running:
            raise invalid(
                "no such response is running", "response_id", "response_cancel_not_active"
            )
        for each in running:
            self._answers[each].cancel()

    # --- hearing -------------------------------------------------------------------------------

    def _renew(self) -> None:
        """An empty buffer. What is being heard of the old one ends; what was heard stays known."""
        self._buffer = _Buffer(self._state, self._rate)
        self._hear_anew()

    def _hear_anew(self) -> None:
        if self._hearing is not None:
            self._hearing.cancel()
        self._more.clear()
        self._hearing = asyncio.create_task(self._guarded(self._hear(self._buffer.ear)))

    async def _hear(self, ear: Ear) -> None:
        """Has the engine prefill each whole chunk of the buffer."""
        while True:
            await self._more.wait()
            self._more.clear()
            begun = await self._state.in_thread(ear.begun)
            if begun is not None:
                limit = self._state.limits.request_seconds
                service = self._state.named(self._transcription["model"])
                with Answers(service, self._state.metrics, limit, counted=False) as answers:
                    answers.begin(begun)
                    async for _ in answers:
                        pass

    # --- answering -----------------------------------------------------------------------------

    async def _begin(self, name: str, work: Awaitable[None]) -> None:
        task = asyncio.create_task(self._guarded(work))
        self._answers[name] = task
        task.add_done_callback(lambda _: self._answers.pop(name, None))
        await asyncio.sleep(0)  # it begins, so that it can say that it was cancelled

    async def _guarded(self, work: Awaitable[None]) -> None:
        """A task's work: what goes wrong is said, and an error of this program ends the session."""
        try:
            await work
        except (WebSocketDisconnect, OSError):
            pass  # `_receive` sees it, too
        except ApiError as error:
            with contextlib.suppress(WebSocketDisconnect, OSError):
                await self._fault(error, None)
        except Exception as error:
            self._broken = error

    async def _transcribe(self, item: str, ear: Ear, model: str) -> None:
        place = {"item_id": item, "content_index": 0}
        kind = "conversation.item.input_audio_transcription"

        async def tell(piece: str) -> None:
            await self._send(f"{kind}.delta", **place, delta=piece)

        seconds = len(ear.wav) / SAMPLE_RATE
        sampling = Sampling(max_new_tokens=self._transcript_tokens(seconds))
        try:
            request = ear.request(TRANSCRIBE["none"], sampling)
            prompt, output = await self._run(model, request, tell)
        except ApiError as error:
            await self._send(f"{kind}.failed", **place, error=error.body["error"])
            return
        reply = self._state.model.reply(output, prompt)
        answered = [(Window(0.0, seconds, prompt), reply)]
        transcript = await self._state.in_thread(joined, answered, "none")
        told: dict[str, Any] = {}
        if transcript.problems:
            told["warnings"] = transcript.problems
        if transcript.stopped_at is not None:
            told["stopped_at"] = round(transcript.stopped_at, 3)
            self._state.metrics.stopped_early.inc()
        usage = {"type": "tokens"} | self._usage(prompt, output)
        done = place | {"transcript": transcript.text, "usage": usage} | told
        await self._send(f"{kind}.completed", **done)

    async def _answer(self, response: dict[str, Any], request: Request, model: str) -> None:
        """The events of a response, from its item to `response.done`, whatever happens."""
        item = {
            "id": _new("item"),
            "object": "realtime.item",
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        output_place = {"response_id": response["id"], "output_index": 0}
        place = output_place | {"item_id": item["id"], "content_index": 0}
        part = {"type": "output_text", "text": ""}

        async def tell(piece: str) -> None:
            part["text"] += piece
            await self._send("response.output_text.delta", **place, delta=piece)

        status, details, usage, warnings = "completed", None, None, ()
        try:
            await self._send("response.output_item.added", **output_place, item=item)
            empty = {"type": "text", "text": ""}
            await self._send("response.content_part.added", **place, part=empty)
            prompt, output = await self._run(model, request, tell)
            reply = self._state.model.reply(output, prompt)
            part["text"], warnings = reply.text, reply.warnings
            usage = self._usage(prompt, output)
            usage["input_token_details"]["cached_tokens"] = output.cached_tokens
            if output.finish_reason != "stop":
                status = "incomplete"
                details = {"type": status, "reason": "max_output_tokens"}
        except asyncio.CancelledError:
            if self._socket.client_state is not WebSocketState.CONNECTED:
                raise
            status = "cancelled"
            details = {"type": status, "reason": "client_cancelled"}
        except ApiError as error:
            fault = error.body["error"]
            status = "failed"
            details = {"type": status, "error": {"type": fault["type"], "code": fault["code"]}}
            await self._fault(error, None)
        text = part["text"]
        await self._send("response.output_text.done", **place, text=text)
        await self._send("response.content_part.done", **place, part={"type": "text", "text": text})
        item |= {"status": "completed" if status == "completed" else "incomplete"}
        item |= {"content": [part]}
        await self._send("response.output_item.done", **output_place, item=item)
        done = response | {"status": status, "status_details": details}
        done |= {"output": [item], "usage": usage}
        done |= {"warnings": list(warnings)} if warnings else {}
        await self._send("response.done", response=done)

    async def _run(
        self, model: str, request: Request, tell: Callable[[str], Awaitable[None]]
    ) -> tuple[Prepared, Any]:
        """A request's prompt and output; new text is told as it comes. Raises ApiError."""
        state, output, started = self._state, None, time.monotonic()
        service = state.named(model)
        with state.place():
            prompt = await state.prepare(request, None)
            limit = state.limits.request_seconds
            with Answers(service, state.metrics, limit, each_token=True) as answers:
                answers.begin(prompt)
                pieces = Pieces(state.model.tokenizer, prompt.sampling.stop)
                async for _, progress in answers:
                    if output is None and started is not None:
                        state.metrics.first.observe(time.monotonic() - started)
                        started = None
                    output = progress.output
                    text = pieces.push(progress.ids, output is not None).get("text")
                    if text:
                        await tell(text)
        return prompt, output

    # --- words ---------------------------------------------------------------------------------

    async def _added(self, item: str, *content: dict[str, Any]) -> None:
        """Tells of a new item of the user."""
        shown = {
            "id": item,
            "object": "realtime.item",
            "type": "message",
            "status": "completed",
            "role": "user",
            "content": list(content),
        }
        before, self._last_item = self._last_item, item
        for kind in ("added", "done"):
            await self._send(f"conversation.item.{kind}", item=shown, previous_item_id=before)

    def _transcript_tokens(self, seconds: float) -> int:
        """The most tokens of a transcript."""
        room = max(Sampling.max_new_tokens, math.ceil(_TOKENS_PER_SECOND * seconds))
        return min(room, self._state.limits.max_new_tokens)

    def _usage(self, prompt: Prepared, output: Any) -> dict[str, Any]:
        audio = int((prompt.ids == self._state.model.processor.audio_token_id).sum())
        read, made = len(prompt.ids), len(output.ids)
        return {
            "input_tokens": read,
            "output_tokens": made,
            "total_tokens": read + made,
            "input_token_details": {"text_tokens": read - audio, "audio_tokens": audio},
        }

    def _shown(self) -> dict[str, Any]:
        """The session as a client sees it."""
        heard = {
            "format": {"type": "audio/pcm", "rate": self._rate},
            "transcription": self._transcription,
            "noise_reduction": None,
            "turn_detection": None,
        }
        shown = {
            "id": self._id,
            "object": f"realtime.{self._kind}_session",
            "type": self._kind,
            "audio": {"input": heard},
            "include": None,
        }
        if self._kind == "realtime":
            shown["object"] = "realtime.session"
            shown |= {"model": self._model, "instructions": self._instructions}
            shown |= {"output_modalities": ["text"]}
            shown |= {"max_output_tokens": self._most_tokens}
        return shown


class _Closed(Exception):
    """The server closes the socket."""

    def __init__(self, error: ApiError, code: int) -> None:
        super().__init__(str(error))
        self.error, self.code = error, code


def _new(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:24]}"
