"""Answers of the engine, awaited: progress as it comes, an end if the engine dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from moss_audio_jax.errors import InputError, TooLong
from moss_audio_jax.generate.request import Prepared
from moss_audio_jax.generate.stop_strings import UntilStop
from moss_audio_jax.serve.errors import TOO_LONG, ApiError, invalid, too_late, unavailable
from moss_audio_jax.serve.metrics import Metrics
from moss_audio_jax.text.tokenizer import THINK, StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from moss_audio_jax.generate.engine import Progress

MEL_RATE = 100  # frames a second
_LOOK = 1.0  # seconds between looks at whether the engine is alive


class Answers:
    """The answers of one request. Iterating gives (number, progress) until all have ended.

    Leaving the context cancels those that have not, so that their places are free.

    Args:
      service: the engine (`generate.service`).
      metrics: of the server.
      seconds: in which all of them must end.
      each_token: tell of every token; otherwise the engine tells when it suits it.
      counted: by the metrics; beginnings of a growing clip are not.

    Raises:
      ApiError: on `begin`, a prompt does not fit; then and later, the engine has died, or the time
        is over.
    """

    def __init__(
        self,
        service: Any,
        metrics: Metrics,
        seconds: float,
        each_token: bool = False,
        counted: bool = True,
    ) -> None:
        self._service, self._metrics, self._seconds = service, metrics, seconds
        self._each_token, self._counted = each_token, counted
        self._until = time.monotonic() + seconds
        self._loop, self._told = asyncio.get_running_loop(), asyncio.Queue()
        self._open: dict[int, int] = {}  # number here -> the service's
        self._begun = 0

    def begin(self, prompt: Prepared) -> int:
        """Submits a prompt; answers are numbered from 0."""
        number = self._begun

        def told(progress: Progress) -> None:
            with contextlib.suppress(RuntimeError):  # the server's loop has ended
                self._loop.call_soon_threadsafe(self._told.put_nowait, (number, progress))

        try:
            self._open[number] = self._service.submit(
                prompt, prompt.sampling, told, self._each_token
            )
        except TooLong as error:
            raise invalid(str(error), "messages", TOO_LONG) from None
        except InputError as error:  # `prepare` has seen to the rest, so the engine is being closed
            raise unavailable(str(error)) from None
        except Exception as error:
            raise _dead(error) from error
        self._begun += 1
        if self._counted:
            self._metrics.audio.inc(sum(mel.shape[1] for mel in prompt.mels) / MEL_RATE)
        return number

    @property
    def open(self) -> int:
        """Answers that have not ended."""
        return len(self._open)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._open.values():
            self._service.cancel(number)
            self._count("cancelled")
        self._open.clear()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Progress]]:
        while self._open:
            try:
                left = self._until - time.monotonic()
                async with asyncio.timeout(min(_LOOK, max(left, 0))):
                    number, progress = await self._told.get()
            except TimeoutError:
                if self._service.dead is not None:
                    raise _dead(self._service.dead) from None
                if time.monotonic() > self._until:
                    raise too_late(self._seconds) from None
                continue
            if time.monotonic() > self._until:
                raise too_late(self._seconds)
            if progress.output is not None:
                del self._open[number]
                reason = progress.output.finish_reason
                self._count(reason)
                if reason == "cancelled":  # the engine was closed
                    raise unavailable("this server is stopping; the answer was ended")
                if reason == "error":
                    raise _dead(self._service.dead)
            yield number, progress

    def _count(self, reason: str) -> None:
        if self._counted:
            self._metrics.answers.labels(reason).inc()


def sse(value: dict[str, Any]) -> str:
    """A JSON value as a server-sent event."""
    return f"data: {json.dumps(value, allow_nan=False)}\n\n"


def _dead(error: BaseException | None) -> ApiError:
    return unavailable(f"the engine answers no more ({type(error).__name__})")


class Pieces:
    """Turns growing ids into new pieces of thinking and of text.

    Joined, the pieces are `Reply.thinking` and `Reply.text`; without stop strings, broken
    characters and tags. A thinking block counts where it begins the answer.

    Attributes:
      sure: tokens whose text nothing will change any more.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._raw: list[str] = []
        self._until = UntilStop(stops, self._raw.append)
        self._decoder = StreamDecoder(tokenizer)
        self._seen = self.sure = 0
        self._text = ""
        self._given = {"thinking": 0, "text": 0}

    def push(self, ids: list[int], last: bool) -> dict[str, str]:
        """The new pieces, of "thinking" and "text"; {} if nothing can be said yet.

        Args:
          ids: all of the answer's so far.
          last: they are complete.
        """
        for number, token in enumerate(ids[self._seen :], self._seen + 1):
            self._until.push(self._decoder.push(token))
            if not self._decoder.holds and not self._until.holds:
                self.sure = number
        self._seen = len(ids)
        if last:
            self._until.push(self._decoder.flush(), last=True)
            self.sure = len(ids)
        if not self._raw and not last:
            return {}
        self._text += "".join(self._raw)
        self._raw.clear()
        new = {}
        for kind, whole in self._split(last).items():
            if len(whole) > self._given[kind]:
                new[kind] = whole[self._given[kind] :]
                self._given[kind] = len(whole)
        return new

    def _split(self, last: bool) -> dict[str, str]:
        """What is sure so far of thinking and text, both without spaces around them."""
        opening, closing = THINK
        start = self._text.lstrip()
        if not start.startswith(opening):
            unsure = opening.startswith(start) and not last
            return {} if unsure else {"text": self._text.strip()}
        thinking, closed, text = start.removeprefix(opening).partition(closing)
        if not closed and not last:
            held = next(n for n in range(len(closing), -1, -1) if thinking.endswith(closing[:n]))
            thinking = thinking[: len(thinking) - held]
        return {"thinking": thinking.strip(), "text": text.strip()}
