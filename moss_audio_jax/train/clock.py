"""Where a run's time goes: how long steps take, what they wait for, and a watchdog for stalls.

The loop hands steps to the devices and goes on before they are done, so a thread waits for the
numbers of each step and notes when it ended. Between the end of a step and the next one the devices
have nothing to do. That time counts for what the loop did meanwhile, its kind:

    start     of the first process, up to its first step
    restart   since the last checkpoint, up to the first step of the process that continues: steps
              that are done again, the time that nothing ran, loading
    compile   tracing and compiling the step
    data      waiting for a batch, which `train.source` may have to make
    save      the time that a save stops training ("block" in plan/goodput.py)
    eval      held-out rows
    other     the rest: logs, moving a batch to the devices

    time/step_p50, _p95, _max   seconds of the steps since the last line, each from the end of the
                                one before, without compile, save and eval
    time/data_wait, time/checkpoint_wait    seconds of kinds data and save since the last line
    time/goodput                seconds of steps / all seconds since the run began
    time/badput/KIND            seconds of a kind / all seconds
    time/slowest_step, time/slowest_host    of several processes the longest mean step, whose it is
    time/longest_wait, time/latest_host     the longest wait for data, other; whose it is

All processes end a step together, so one whose step is late for its own reasons is found by the
last two. Goodput and badput are those of the first process, and sum to 1.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import logging
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from moss_audio_jax.runtime import from_all

_log = logging.getLogger(__name__)

_STEP = "step"
KINDS = ("start", "restart", "compile", "data", "save", "eval", "other")
_STALL = 300.0  # seconds that are no stall, however short steps usually are
_TIMES = 20  # the median of its kind is no stall
_LOOK = 1.0  # seconds between looks of the watchdog
_WATCHED = {"data": "waits for the next batch", _STEP: "waits for the devices to end a step"}


class _Interval(NamedTuple):
    kind: str
    begin: float
    end: float


class Clock:
    """Times one process's part of a run; its threads live in its context.

    Args:
      stall: seconds; see _STALL.
    """

    def __init__(self, stall: float = _STALL) -> None:
        self._stall = stall
        self._seconds = dict.fromkeys((_STEP, *KINDS), 0.0)
        self._ended = _now()  # of the last step
        self._gap = "start"  # what the time before the next step counts for, if for no other kind
        self._compiled = False
        self._intervals: list[_Interval] = []  # of the loop, since it handed over a step
        self._steps: list[float] = []  # since the last line, as is `_since`
        self._since = dict(self._seconds)
        # What is going on, and since when; what it took before.
        self._current: dict[str, float] = {}
        self._before = {kind: collections.deque(maxlen=256) for kind in _WATCHED}
        self._handed: queue.Queue = queue.Queue()
        self._closed = threading.Event()

    def __enter__(self) -> Clock:
        for work in (self._follow, self._watch):
            threading.Thread(target=work, name=f"clock{work.__name__}", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closed.set()
        self._handed.put(None)

    def steps(self, step_fn: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
        """The jitted step (...) -> (state, numbers), timed."""

        def timed(*args: Any) -> tuple[Any, Any]:
            begin = _now()
            state, numbers = step_fn(*args)
            if not self._compiled:  # the first call returns once it is
                self._compiled = True
                self._intervals.append(_Interval("compile", begin, begin := _now()))
            intervals, self._intervals = self._intervals, []
            self._handed.put((begin, intervals, numbers))
            return state, numbers

        return timed

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """What the loop does in this context is of a kind."""
        begin = self._current[kind] = _now()
        try:
            yield
        finally:
            del self._current[kind]
            self._intervals.append(_Interval(kind, begin, _now()))
            if kind in self._before:
                self._before[kind].append(_now() - begin)

    def line(self) -> dict[str, float]:
        """What metrics.jsonl says of the time. All processes must call it."""
        self._handed.join()
        steps, self._steps = self._steps or [0.0], []
        since = {kind: all_ - self._since[kind] for kind, all_ in self._seconds.items()}
        self._since = dict(self._seconds)
        whole = sum(self._seconds.values()) or 1.0
        p50, p95 = np.quantile(steps, (0.5, 0.95))
        return {
            "time/step_p50": float(p50),
            "time/step_p95": float(p95),
            "time/step_max": max(steps),
            "time/data_wait": since["data"],
            "time/checkpoint_wait": since["save"],
            "time/goodput": self._seconds[_STEP] / whole,
            **{f"time/badput/{kind}": self._seconds[kind] / whole for kind in KINDS},
            **_hosts(statistics.fmean(steps), since["data"] + since["other"]),
        }

    def state(self) -> dict[str, Any]:
        """The first process's seconds of each kind, and when they were counted: JSON.

        All processes must call it.
        """
        self._handed.join()
        at = time.time() - (_now() - self._ended)
        return from_all({"seconds": dict(self._seconds), "at": at})[0]

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Before the first step: goes on from a checkpoint's `state`; None if it has none."""
        if state is None:
            return
        self._seconds |= state["seconds"]
        self._since = dict(self._seconds)
        self._gap = "restart"
        self._ended = _now() - max(0.0, time.time() - state["at"])

    # --- in threads -------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Waits for one step after the other."""
        while (handed := self._handed.get()) is not None:
            begin, intervals, numbers = handed
            self._current[_STEP] = begin = max(begin, self._ended)
            with contextlib.suppress(Exception):  # the loop meets it when it reads the numbers
                jax.block_until_ready(numbers)
            del self._current[_STEP]
            self._count(begin, intervals, _now())
            self._handed.task_done()

    def _count(self, begin: float, intervals: list[_Interval], end: float) -> None:
        """Adds a step, and the time since the one before."""
        spent = dict.fromkeys(KINDS, 0.0)
        for kind, first, last in intervals:
            spent[kind] += max(0.0, min(last, begin) - max(first, self._ended))
        spent[self._gap] += begin - self._ended - sum(spent.values())
        if self._gap == "restart" and not jax.process_index():
            _log.info(f"time lost since the checkpoint: {begin - self._ended:.1f} s")
        for kind, seconds in spent.items():
            self._seconds[kind] += seconds
        self._seconds[_STEP] += end - begin
        self._before[_STEP].append(end - begin)
        waited = spent["data"] + spent["other"] if self._gap == "other" else 0.0
        self._steps.append(end - begin + waited)
        self._ended, self._gap = end, "other"

    def _watch(self) -> None:
        """Tells of each stall once, with what every thread does. It ends nothing."""
        told: set[tuple[str, float]] = set()
        while not self._closed.wait(min(_LOOK, self._stall / 4)):
            for kind, begin in list(self._current.items()):
                if kind not in _WATCHED or (kind, begin) in told:
                    continue
                before = list(self._before[kind])
                usual = statistics.median(before or [0.0])
                as_ever = f"usually {usual:.2f} s" if before else "it is the first"
                seconds = _now() - begin
                if seconds > max(self._stall, _TIMES * usual):
                    told.add((kind, begin))
                    _log.warning(
                        f"stalled: process {jax.process_index()} {_WATCHED[kind]} since "
                        f"{seconds:.0f} s ({as_ever}); it goes on waiting. What its "
                        f"threads do:\n{_stacks()}"
                    )


def _hosts(step: float, wait: float) -> dict[str, float]:
    if jax.process_count() == 1:
        return {}
    steps, waits = zip(*from_all([step, wait]), strict=True)
    return {
        "time/slowest_step": max(steps),
        "time/slowest_host": steps.index(max(steps)),
        "time/longest_wait": max(waits),
        "time/latest_host": waits.index(max(waits)),
    }


def _stacks() -> str:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode(errors="replace")


def _now() -> float:
    return time.monotonic()
