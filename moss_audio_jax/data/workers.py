"""Where examples are made: here, or in worker processes that never start JAX.

The order of examples does not depend on it. Grain's own worker processes take indices in an order
that is fixed beforehand; here the next window that is needed depends on what the windows before it
packed into, so windows are asked for as streams run dry.
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool

from moss_audio_jax.data.batch import TrainExample
from moss_audio_jax.data.examples import ExampleMaker, Job
from moss_audio_jax.data.records import Rejected

Made = list[TrainExample | Rejected]
_GROUP = 8  # examples a worker makes at a time


class Workers:
    """`count` processes that run `make`; with 0 it runs when the result is asked for."""

    def __init__(self, make: ExampleMaker, count: int):
        self.make = make
        self._pool = None
        if count:
            # Not forked: a copy of a process that runs JAX's threads may hang.
            self._pool = concurrent.futures.ProcessPoolExecutor(
                count, multiprocessing.get_context("spawn"), _start, (make,)
            )

    def submit(self, jobs: Sequence[Job]) -> Callable[[], Made]:
        """Starts making examples; the returned function waits for them, in the order of jobs."""
        if self._pool is None:
            return functools.partial(_make_all, self.make, jobs)
        futures = [
            self._pool.submit(_run, jobs[first : first + _GROUP])
            for first in range(0, len(jobs), _GROUP)
        ]

        def wait() -> Made:
            try:
                return [made for future in futures for made in future.result()]
            except BrokenProcessPool:
                raise RuntimeError(
                    "a data worker process was killed (out of memory? then lower data.workers or "
                    "data.window)"
                ) from None

        return wait

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _make_all(make: ExampleMaker, jobs: Sequence[Job]) -> Made:
    return [make(job) for job in jobs]


# --- in a worker ---------------------------------------------------------------------------------

_maker: ExampleMaker | None = None


def _start(make: ExampleMaker) -> None:
    global _maker
    _maker = make
    # A signal to the whole group means the run: it may still want the batch in hand.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A run that is killed outright cannot tell its workers to stop."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _run(jobs: Sequence[Job]) -> Made:
    return _make_all(_maker, jobs)
