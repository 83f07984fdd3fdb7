"""Where examples are made: in a thread here, or in worker processes that never start JAX.

The order of examples does not depend on it. Grain's worker processes (`mp_prefetch`) are not used,
for two reasons. They know no time limit for an element, and the run ends if one of them dies. Each
of them runs a whole pipeline, so their number would decide how rows are packed.

One row cannot hold up or end the run: a row that takes too long (storage that does not answer, a
decoder that does not return) and a row whose decoder ends its process become bad rows. A thread
that hangs is left behind, a process is killed.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import functools
import multiprocessing
import multiprocessing.util  # before `atexit` is used here: what is registered last runs first
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from moss_audio_jax.data.batch import TrainExample
from moss_audio_jax.data.examples import ExampleMaker, Job, rejected
from moss_audio_jax.data.records import Rejected
from moss_audio_jax.errors import InputError
from moss_audio_jax.runtime import deaf_workers, end_with_parent

Made = list[TrainExample | Rejected]
_GROUP = 8  # examples a worker is given at a time
_LOOK = 0.1  # seconds between looks at whether the work was called off
_GRACE = 2.0  # seconds that a thread has to end, when the work is called off
_HUNG = 8  # rows in a row that take too long: it is not the rows


class Workers:
    """`count` processes that run `make`. With 0 a thread runs it when the result is asked for."""

    def __init__(self, make: ExampleMaker, count: int, seconds: float):
        """`seconds`: the most that one example may take; see LoaderConfig.row_seconds."""
        self.make = make
        self._seconds = seconds
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._here = _Hand(functools.partial(_Thread, make), seconds, self._closed)
        self._threads = [
            threading.Thread(target=self._work, name="data worker", daemon=True)
            for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()
        if count:  # or the interpreter would wait at its exit for processes that ignore SIGTERM
            atexit.register(self.close)

    def submit(self, jobs: Sequence[Job]) -> Callable[[], Made]:
        """Starts making examples; the returned function waits for them, in the order of jobs.

        It raises InputError where the rows' own file cannot be read, where a process was killed
        from outside, and where row after row takes too long.
        """
        if not self._threads:
            return functools.partial(self._here.make_all, jobs)
        futures = []
        with self._lock:
            if self._closed.is_set():
                raise concurrent.futures.CancelledError
            for first in range(0, len(jobs), _GROUP):
                futures.append(concurrent.futures.Future())
                self._tasks.put((jobs[first : first + _GROUP], futures[-1]))
        return lambda: [made for future in futures for made in future.result()]

    def close(self) -> None:
        """Cancels the work: waiting callers get CancelledError. It does not wait for a row that
        hangs."""
        with self._lock:
            self._closed.set()
            for _ in self._threads:
                self._tasks.put(None)
        for thread in self._threads:
            thread.join(30)  # at once, unless it is just starting its process
        self._here.close()
        atexit.unregister(self.close)

    def _work(self) -> None:
        """Hands tasks to one process, until None comes."""
        hand = _Hand(functools.partial(_Process, self.make), self._seconds, self._closed)
        while (task := self._tasks.get()) is not None:
            jobs, future = task
            try:
                future.set_result(hand.make_all(jobs))
            except concurrent.futures.CancelledError:
                future.cancel()
            except BaseException as error:
                future.set_exception(error)
        hand.close()


class _Hand:
    """Uses one worker to make examples, and replaces it if it hangs or ends."""

    def __init__(self, start: Callable[[], Any], seconds: float, closed: threading.Event):
        self._start, self._seconds, self._closed = start, seconds, closed
        self._worker: _Thread | _Process | None = None
        self._late = 0  # rows, one after the other, that took too long
        self._busy = threading.Lock()

    def make_all(self, jobs: Sequence[Job]) -> Made:
        with self._busy:
            return self._make_all(jobs)

    def close(self) -> None:
        """Ends the worker; where `closed` is set, `make_all` will soon be out of the way."""
        with self._busy:
            self._let_go(_GRACE)

    def _make_all(self, jobs: Sequence[Job]) -> Made:
        made: Made = []
        while len(made) < len(jobs):
            if self._closed.is_set():
                raise concurrent.futures.CancelledError
            try:
                if self._worker is None:
                    self._worker = self._start()
                    self._next(None)  # that it has started, however long that takes
                self._worker.send(jobs[len(made) :])
                while len(made) < len(jobs):
                    made.append(self._next(self._seconds))
                    self._late = 0
            except _Lost as lost:
                self._let_go()
                made.append(rejected(jobs[len(made)], str(lost)))
            except BaseException:  # what it makes of the other jobs must not be taken for the next
                self._let_go(_GRACE)
                raise
        return made

    def _let_go(self, grace: float = 0.0) -> None:
        if self._worker is not None:
            self._worker.end(grace)
            self._worker = None

    def _next(self, seconds: float | None) -> Any:
        """The worker's next result. Raises it if it is an exception."""
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            if self._closed.is_set():
                raise concurrent.futures.CancelledError
            try:
                given = self._worker.receive(_LOOK)
                break
            except queue.Empty:
                if end is not None and time.monotonic() > end:
                    self._too_late()
        if isinstance(given, BaseException):
            raise given
        return given

    def _too_late(self) -> None:
        self._late += 1
        limit = f"longer than data.row_seconds, {self._seconds:g} s"
        if self._late < _HUNG:
            raise _Lost(f"it takes {limit}")
        raise InputError(
            f"{self._late} rows, one after the other, each took {limit}: see whether the storage "
            "that their clips lie on answers, or raise the limit"
        )


class _Lost(Exception):
    """Why a worker gave no example for a row."""


class _Thread:
    """A worker in this process."""

    def __init__(self, make: Callable):
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._made: queue.SimpleQueue = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make,), name="rows", daemon=True)
        self._thread.start()

    def _run(self, make: Callable) -> None:
        self._made.put(None)
        while (jobs := self._jobs.get()) is not None:
            for job in jobs:
                if self._ended.is_set():
                    return
                self._made.put(_made(make, job))

    def send(self, jobs: Sequence[Job]) -> None:
        self._jobs.put(jobs)

    def receive(self, seconds: float) -> Any:
        return self._made.get(timeout=seconds)

    def end(self, grace: float) -> None:
        self._ended.set()
        self._jobs.put(None)
        self._thread.join(grace)


class _Process:
    """A worker process."""

    def __init__(self, make: Callable):
        # Not forked: a copy of a process that runs JAX's threads may hang.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        with deaf_workers():
            self._process.start()
        theirs.close()
        self._started = False

    def send(self, jobs: Sequence[Job]) -> None:
        with contextlib.suppress(OSError):  # it has ended; `receive` says so
            self._pipe.send(jobs)

    def receive(self, seconds: float) -> Any:
        try:
            if not self._pipe.poll(seconds):
                raise queue.Empty
            given = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(_GRACE)
            raise self._why() from None
        self._started = True
        return given

    def _why(self) -> Exception:
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            return InputError(
                "a data worker process was killed (out of memory? then lower data.workers or "
                "data.window)"
            )
        how = signal.strsignal(-code) if code and code < 0 else f"exit code {code}"
        if not self._started:
            return RuntimeError(f"a data worker process ended while it started ({how})")
        return _Lost(f"it ended the worker process that read it ({how})")

    def end(self, grace: float) -> None:
        self._process.kill()
        self._process.join(grace + 1)
        self._pipe.close()


def _made(make: Callable, job: Job) -> Any:
    try:
        return make(job)
    except Exception as error:  # of the rows' file, not of this row: the run learns it
        return error


# --- in a worker process -------------------------------------------------------------------------


def _serve(pipe: multiprocessing.connection.Connection, make: Callable) -> None:
    # A signal to the whole group means the run: it may still want the batch in hand.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    pipe.send(None)
    with contextlib.suppress(EOFError):
        while True:
            for job in pipe.recv():
                pipe.send(_made(make, job))
