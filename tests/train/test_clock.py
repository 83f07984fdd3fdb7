"""Where a run's time goes, and what a stall prints; test_resume.py looks at a run's own lines.

Not covered: devices that really stall.
"""

import threading
import time

import jax
import pytest

from moss_audio_jax.train import clock as clocks
from moss_audio_jax.train.clock import KINDS, Clock


class Time:
    """Seconds that pass when a test says so."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(clocks, "_now", lambda: self.now)
        monkeypatch.setattr(clocks.time, "time", lambda: 1e9 + self.now)


class Numbers:
    """What a step gives: its devices take `seconds` from when somebody waits for it."""

    def __init__(self, time, seconds):
        self.time, self.seconds = time, seconds

    def block_until_ready(self):
        self.time.now += self.seconds


@pytest.fixture
def passing(monkeypatch):
    return Time(monkeypatch)


def run(clock, passing, steps):
    """Takes (seconds waiting for data, seconds of compiling, seconds on the devices) of steps."""

    def step(compiling, seconds):
        passing.now += compiling
        return None, Numbers(passing, seconds)

    step = clock.steps(step)
    for waiting, compiling, seconds in steps:
        with clock.during("data"):
            passing.now += waiting
        step(compiling, seconds)
        clock._handed.join()


def test_every_second_counts_once(passing):
    clock = Clock()
    passing.now += 7  # weights are loaded
    with clock:
        run(clock, passing, [(2, 30, 5), (0, 0, 1), (3, 0, 1)])
        first = clock.line()
        with clock.during("save"):
            passing.now += 4
        passing.now += 0.5
        run(clock, passing, [(0, 0, 1.5)])
        second = clock.line()
    assert first["time/step_p50"] == 4  # of 5, 1 and 3 + 1 seconds
    assert first["time/step_max"] == 5
    assert (first["time/data_wait"], first["time/checkpoint_wait"]) == (5, 0)
    assert (second["time/data_wait"], second["time/checkpoint_wait"]) == (0, 4)
    assert second["time/step_max"] == second["time/step_p95"] == 2  # without the save
    assert second["time/goodput"] == pytest.approx(8.5 / 55)
    spent = {"start": 7, "data": 5, "compile": 30, "save": 4, "other": 0.5}
    for kind in KINDS:
        assert second[f"time/badput/{kind}"] == pytest.approx(spent.get(kind, 0) / 55), kind


def test_work_of_the_host_beside_a_step_costs_nothing(passing):
    clock, release = Clock(), threading.Event()

    class Busy:
        def block_until_ready(self):
            release.wait()
            passing.now += 10

    with clock:
        step = clock.steps(lambda: (None, Busy()))
        step()
        with clock.during("data"):  # the next batch comes while the devices work
            pass
        release.set()
        clock._handed.join()
        step()
        line = clock.line()
    assert line["time/goodput"] == 1
    assert line["time/data_wait"] == 0


def test_what_a_failure_costs_is_a_restart(passing):
    before, after = Clock(), Clock()
    with before:
        run(before, passing, [(0, 0, 10)])
        state = before.state()
        run(before, passing, [(0, 0, 10), (0, 0, 10)])  # lost: the process is killed here
    passing.now += 20  # nobody notices
    after.restore(state)
    passing.now += 5
    with after:
        run(after, passing, [(0, 0, 45)])
        line = after.line()
    assert line["time/goodput"] == pytest.approx(55 / 100)
    assert line["time/badput/restart"] == pytest.approx(45 / 100)


def test_a_stall_is_told_once_with_all_stacks(caplog):
    release = threading.Event()

    class Stuck:
        def block_until_ready(self):
            release.wait()

    def told():
        return [r.message for r in caplog.records if "stalled" in r.message]

    def until(count):
        end = time.monotonic() + 30
        while len(told()) < count and time.monotonic() < end:
            time.sleep(0.01)
        assert len(told()) == count

    with Clock(stall=0.05) as clock:
        with clock.during("data"):
            until(1)
            time.sleep(0.2)  # many looks later
        assert len(told()) == 1
        clock.steps(lambda: (None, Stuck()))()
        until(2)
        release.set()
        clock._handed.join()
    assert "waits for the next batch" in told()[0]
    assert "in test_a_stall_is_told_once_with_all_stacks" in told()[0]  # the main thread's stack
    assert "waits for the devices to end a step" in told()[1]
    assert "in block_until_ready" in told()[1]


def test_what_took_long_before_is_no_stall(passing, caplog):
    with Clock(stall=0.05) as clock:
        run(clock, passing, [(1, 0, 0)])
        with clock.during("data"):
            passing.now += 19
            time.sleep(0.2)
    assert not caplog.records


def test_a_step_that_fails_does_not_stop_the_clock(passing):
    class Failed:
        def block_until_ready(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: a chip is gone")

    with Clock() as clock:
        clock.steps(lambda: (None, Failed()))()
        run(clock, passing, [(0, 0, 1)])
        assert clock.line()["time/step_max"] == 1
