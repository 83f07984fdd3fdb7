"""An engine in a thread of its own: requests come from any thread, at any time."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from moss_audio_jax.data.batch import Example
from moss_audio_jax.errors import InputError
from moss_audio_jax.generate.decode_state import programs
from moss_audio_jax.generate.engine import Asked, Engine, Output, Progress
from moss_audio_jax.generate.sampling import Sampling

Told = Callable[[Progress], None]


class Service:
    """Answers requests until it is closed; a context manager.

    Args:
      engine: made for a `Size`; from now on only this service steps it.
      compiling: called with (programs so far, of how many) while all programs are compiled, before
        this returns; None: each is compiled when a request needs it.

    Attributes:
      dead: why the thread died; None while it lives. Then `submit` raises it, and every request
        that was running has been told so (`Progress.output.finish_reason` "error").
    """

    def __init__(self, engine: Engine, compiling: Callable[[int, int], None] | None = None) -> None:
        if compiling is not None:
            engine.compile(compiling)
        self.dead: BaseException | None = None
        self._engine = engine
        self._told: dict[int, Told] = {}
        self._inbox: list[Asked] = []
        self._cancelled: set[int] = set()
        self._wake = threading.Condition()
        self._closing = False
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self, example: Example, sampling: Sampling, told: Told, each_token: bool = True
    ) -> int:
        """Puts a request in line; returns its number.

        Args:
          told: called in the engine's thread with what is new, at last with the `output`. It must
            be quick.
          each_token: tell of every token; otherwise whenever the device loop returns.

        Raises:
          InputError: the prompt does not fit the model or the cache, or the service is closing.
        """
        one = self._engine.asked(example, sampling, each_token)
        with self._wake:
            if self.dead is not None:
                raise self.dead
            if self._closing:
                raise InputError("the engine is stopping; ask another one")
            self._told[one.number] = told
            self._inbox.append(one)
            self._wake.notify()
        return one.number

    def answer(self, example: Example, sampling: Sampling) -> Output:
        """Answers one request and waits for it, as `Engine.answer` does.

        Raises:
          InputError: as `submit`; or the service was closed meanwhile.
        """
        ended: queue.SimpleQueue[Output] = queue.SimpleQueue()

        def told(progress: Progress) -> None:
            if progress.output is not None:
                ended.put(progress.output)

        self.submit(example, sampling, told, each_token=False)
        output = ended.get()
        if output.finish_reason == "error":
            raise self.dead
        if output.finish_reason == "cancelled":
            raise InputError("the engine was stopped; ask another one")
        return output

    def cancel(self, number: int) -> None:
        """Ends a request before the next turn; it is told `finish_reason` "cancelled"."""
        with self._wake:
            self._cancelled.add(number)
            self._wake.notify()

    def stats(self) -> dict[str, float]:
        """Counts since the start, and how full it is now."""
        engine = self._engine
        room, held = engine.held
        return engine.counts | {
            "waiting": len(self._inbox) + engine.waiting,
            "running": engine.running,
            "slots": engine.slots,
            "cache_tokens_taken": room,
            "cache_tokens_held": held,
            "cache_tokens_room": engine.room,
            "encoded_seconds": engine.hearing.frames / 100,
            "programs": programs(),
        }

    def close(self, drain: float = 0.0) -> None:
        """Ends the thread. What is running or in line may go on for `drain` seconds; the rest is
        cancelled."""
        with self._wake:
            self._closing = True
            self._deadline = time.monotonic() + drain
            self._wake.notify()
        self._thread.join()

    def _live(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:  # whatever it is, nobody may wait for ever
            with self._wake:
                self.dead = error
            raise
        finally:
            reason = "cancelled" if self.dead is None else "error"
            for number in [*self._told]:
                self._tell(Progress(number, [], Output([], reason)))

    def _turn(self) -> bool:
        """One step of the engine; False once it is to end."""
        with self._wake:
            while not (self._engine.busy or self._inbox or self._cancelled or self._closing):
                self._wake.wait()
            for one in self._inbox:
                self._engine.enter(one)
            cancelled, self._inbox, self._cancelled = self._cancelled, [], set()
        late = self._closing and time.monotonic() >= self._deadline
        if late:
            cancelled = {*self._told}
        for progress in map(self._engine.cancel, cancelled):
            if progress is not None:
                self._tell(progress)
        for progress in self._engine.step():
            self._tell(progress)
        return not self._closing or (self._engine.busy and not late)

    def _tell(self, progress: Progress) -> None:
        told = self._told.get(progress.number)
        if told is None:
            return
        if progress.output is not None:
            del self._told[progress.number]
        told(progress)
