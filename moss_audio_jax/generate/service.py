"""An engine in a thread of its own: requests come from any thread, at any time."""

from __future__ import annotations

import collections
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator

from moss_audio_jax.data.batch import Example
from moss_audio_jax.errors import InputError
from moss_audio_jax.generate.decode_state import programs
from moss_audio_jax.generate.engine import Asked, Engine, Output, Progress
from moss_audio_jax.generate.hearing import Hearing
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.generate.together import Speaker, Turn, advance

# Of several processes, in seconds: between two turns if there is nothing to do, so that the others
# never wait long in a collective and process 0 notices that one of them has gone; and for a turn,
# which otherwise waits for a process that has gone.
BEAT, PATIENCE = 1.0, 60.0

Told = Callable[[Progress], None]


class Service:
    """Answers requests until it is closed; a context manager.

    Args:
      engine: made for a `Size`; from now on only this service steps it.
      compiling: called with (programs so far, of how many) while all programs are compiled, before
        this returns; None: each is compiled when a request needs it.
      speaker: tells the other processes of the engine's mesh; None if there are none.
      beside: a service whose engine has the same devices, and perhaps the same `Hearing`. The two
        step in turn: programs for several devices must reach all of them in one order.

    Attributes:
      dead: why the thread died; None while it lives. Then `submit` raises it, and every request
        that was running has been told so (`Progress.output.finish_reason` "error").
    """

    def __init__(
        self,
        engine: Engine,
        compiling: Callable[[int, int], None] | None = None,
        speaker: Speaker | None = None,
        beside: Service | None = None,
    ) -> None:
        self._turns = _Turns() if beside is None else beside._turns
        if compiling is not None:
            with self._turns.next():
                engine.compile(compiling)
        self.dead: BaseException | None = None
        self._engine, self._speaker, self._beside = engine, speaker, beside
        self._told: dict[int, Told] = {}
        self._inbox: list[Asked] = []
        self._cancelled: set[int] = set()
        self._wake = threading.Condition()
        self._closing = False
        self._deadline: float | None = None
        self._since: float | None = None  # when the turn began that is being taken
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
        self._enter(one, told)
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

        one = self._engine.asked(example, sampling)
        try:
            self._enter(one, told)
            output = ended.get()
        except BaseException:  # Ctrl-C: nobody waits for it any more
            self.cancel(one.number)
            raise
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

    @property
    def hearing(self) -> Hearing:
        """What its engine has heard."""
        return self._engine.hearing

    @property
    def stuck(self) -> bool:
        """Whether a turn takes so long that another process must have gone. A device that waits for
        one raises nothing."""
        since = self._since
        late = since is not None and time.monotonic() - since > PATIENCE
        return late and self._speaker is not None

    def stats(self) -> dict[str, float]:
        """Counts since the start, and how full it is now.

        What it shares with the service that it is beside is counted by that one.
        """
        engine = self._engine
        room, held = engine.held
        shared: dict[str, float] = {}
        if self._beside is None:
            shared["programs"] = programs()
        if self._beside is None or self._beside.hearing is not engine.hearing:
            shared["encoded_seconds"] = engine.hearing.frames / 100
        return engine.counts | {
            "waiting": len(self._inbox) + engine.waiting,
            "running": engine.running,
            "slots": engine.slots,
            "cache_tokens_taken": room,
            "cache_tokens_held": held,
            "cache_tokens_room": engine.room,
            **shared,
        }

    def close(self, drain: float = 0.0) -> None:
        """Ends the thread. What is running or in line may go on for `drain` seconds; the rest is
        cancelled. If the engine is `stuck`, it is left behind."""
        with self._wake:
            self._closing = True
            self._deadline = time.monotonic() + drain
            self._wake.notify()
        while self._thread.is_alive() and not self.stuck:
            self._thread.join(BEAT)

    def _enter(self, one: Asked, told: Told) -> None:
        with self._wake:
            if self.dead is not None:
                raise self.dead
            if self._closing:
                raise InputError("the engine is stopping; ask another one")
            self._told[one.number] = told
            self._inbox.append(one)
            self._wake.notify()

    def _live(self) -> None:
        try:
            while self._turn():
                pass
            if self._speaker is not None:
                self._speaker.end()
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
            self._wake.wait_for(self._news, None if self._speaker is None else BEAT)
            line, cancelled, self._cancelled = [*self._inbox], self._cancelled, set()
        self._since = time.monotonic()
        late = self._closing and self._since >= self._deadline
        if late:
            cancelled = {*self._told}
        turn = Turn(line, sorted(cancelled))
        if self._speaker is not None:
            turn = self._speaker.tell(line, cancelled)
        with self._wake:
            for one in turn.entered:
                self._engine.enter(one)
            del self._inbox[: len(turn.entered)]
            self._cancelled |= cancelled.difference(turn.cancelled)
        with self._turns.next():
            new = [*advance(self._engine, turn.cancelled)]
        for progress in new:
            self._tell(progress)
        self._since = None
        return not self._closing or (not late and bool(self._engine.busy or self._inbox))

    def _news(self) -> bool:
        return bool(self._engine.busy or self._inbox or self._cancelled or self._closing)

    def _tell(self, progress: Progress) -> None:
        told = self._told.get(progress.number)
        if told is None:
            return
        if progress.output is not None:
            del self._told[progress.number]
        told(progress)


class _Turns:
    """Lets threads act one at a time, in the order in which they asked. A lock is not fair."""

    def __init__(self) -> None:
        self._line: collections.deque[object] = collections.deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def next(self) -> Iterator[None]:
        """Waits for a turn, which lasts until the context is left."""
        me = object()
        with self._changed:
            self._line.append(me)
            self._changed.wait_for(lambda: self._line[0] is me)
        try:
            yield
        finally:
            with self._changed:
                self._line.popleft()
                self._changed.notify_all()
