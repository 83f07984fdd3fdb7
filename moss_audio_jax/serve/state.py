"""What all requests of a server share: model, engine, decoding processes, places."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from moss_audio_jax.errors import InputError, TooLong, UsageError
from moss_audio_jax.generate.request import Prepared, Request
from moss_audio_jax.serve.audio_input import Decoded, Decoder
from moss_audio_jax.serve.errors import TOO_LONG, ApiError, busy, invalid, unavailable
from moss_audio_jax.serve.guides import Guides
from moss_audio_jax.serve.limits import Limits
from moss_audio_jax.serve.metrics import Metrics
from moss_audio_jax.transcribe import WINDOW_SECONDS

if TYPE_CHECKING:
    from moss_audio_jax.api import MossAudio

T = TypeVar("T")


class State:
    """Args:
    model: the base; those with adapters have its tokenizer and sizes.
    service: its living engine.
    names: under which clients ask for it; the first is listed first.
    adapters: the engines of others, by their names.
    limits: of each request.
    audio_hosts: from which sound may be fetched.
    window_seconds: longer sound is transcribed in windows of at most this length.
    """

    def __init__(
        self,
        model: MossAudio,
        service: Any,
        names: Sequence[str],
        limits: Limits | None = None,
        audio_hosts: Sequence[str] = (),
        window_seconds: float = WINDOW_SECONDS,
        adapters: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.service, self.names = model, service, tuple(names)
        self.adapters = dict(adapters or {})
        self.served = dict.fromkeys(self.names, service) | self.adapters
        self.limits = limits or Limits()
        self.audio_hosts = frozenset(host.lower() for host in audio_hosts)
        self.window_seconds = window_seconds
        self.metrics = Metrics(self.services)
        self.decoder = Decoder(seconds=self.limits.decode_seconds)
        stop_ids = tuple(model.tokenizer.stop_ids)
        self.guides = Guides(model.tokenizer, model.config.decoder.vocab_size, stop_ids)
        self.draining = False
        self._threads = ThreadPoolExecutor(4, "requests")
        self._active = 0
        self.sockets = 0  # that are open

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.decoder.close()

    @property
    def services(self) -> dict[str, Any]:
        """The engines, each by the first name of its model."""
        return {self.names[0]: self.service} | self.adapters

    @property
    def fault(self) -> str | None:
        """Why this server answers nothing; None if it does."""
        for service in self.services.values():
            if service.dead is not None:
                return f"the engine answers no more ({type(service.dead).__name__})"
            if service.stuck:
                return "the engine waits for another process"
        if self.decoder.dead is not None:
            return "no decoding process can be started"
        return "this server is stopping" if self.draining else None

    def named(self, name: str) -> Any:
        """The engine of the model of this name. Raises ApiError if there is none."""
        if name not in self.served:
            raise ApiError(
                404,
                f"The model {name!r} does not exist here; expected {' or '.join(self.served)}",
                "model_not_found",
                "model",
            )
        return self.served[name]

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place for one request. Raises ApiError if too many wait or nothing is answered."""
        if self.fault:
            raise unavailable(self.fault)
        slots = sum(int(each.stats().get("slots", 1)) for each in self.services.values())
        if self._active >= slots + self.limits.max_waiting:
            seconds = 1 + self.limits.max_waiting // max(slots, 1)
            raise busy(f"{self._active} requests are being answered or wait; try later", seconds)
        self._active += 1
        self.metrics.active.set(self._active)
        try:
            yield
        finally:
            self._active -= 1
            self.metrics.active.set(self._active)

    @contextlib.contextmanager
    def socket(self) -> Iterator[None]:
        """A place for one socket. Raises ApiError as `place` does."""
        if self.fault:
            raise unavailable(self.fault)
        if self.sockets >= self.limits.max_sockets:
            raise busy(f"{self.sockets} sockets are open; try later", 30)
        self.sockets += 1
        self.metrics.sockets.set(self.sockets)
        try:
            yield
        finally:
            self.sockets -= 1
            self.metrics.sockets.set(self.sockets)

    async def in_thread(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    async def decode(self, data: Any, max_seconds: float, where: str, param: str) -> Decoded:
        """One file's sound. Raises ApiError, which names it by `where`, if it cannot be used."""
        loop = asyncio.get_running_loop()
        with self.metrics.decoding.time():
            try:
                return await loop.run_in_executor(
                    self.decoder.threads, self.decoder.decode, data, max_seconds
                )
            except InputError as error:
                raise invalid(f"{where} {error}", param, "invalid_audio") from None

    async def prepare(self, request: Request, param: str | None = "messages") -> Prepared:
        """The request as model input, which is the same for all models.

        Raises:
          ApiError: it cannot be used; names `param`.
        """
        try:
            return await self.in_thread(self.model.prepare, request)
        except TooLong as error:
            raise invalid(str(error), param, TOO_LONG) from None
        except (InputError, UsageError) as error:
            raise invalid(str(error), param) from None
