"""Slices come and go: a run under launch/supervise.py, and processes that fall silent."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from runs import ROOT, command, environment, log, rows_of_steps

SUPERVISE = str(ROOT / "launch" / "supervise.py")
MESH = ("mesh.fsdp=2", "data.batch=4", "data.streams=4")


def test_a_lost_slice_costs_time_alone(small_run, tmp_path):
    """Two slices of two processes; one is killed while a checkpoint is written. The run goes on
    with the other slice and later with both: losses and rows are those of one process."""
    launcher = [sys.executable, str(ROOT / "launch" / "local_processes.py"), "1", "--devices", "4"]
    whole = [*MESH, "mesh.data=2", "train.steps=10"]
    subprocess.run(
        [*launcher, "--", *command(small_run, tmp_path / "one", *whole)],
        env=environment(),
        check=True,
        capture_output=True,
    )
    there, asked, workdir = tmp_path / "slices", tmp_path / "asked", tmp_path / "run"
    there.write_text("2")
    ask = f"cat {there}; echo >> {asked}"
    options = ["--processes", "2", "--ask", ask, "--pause", "0.1"]
    train = command(small_run, workdir, *MESH, "mesh.data={slices}", "train.steps=10")
    supervised = subprocess.Popen(
        [sys.executable, SUPERVISE, *options, "--", *train],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    told: list[str] = []
    reader = threading.Thread(target=lambda: told.extend(supervised.stderr), daemon=True)
    reader.start()

    def until(ready, what: str) -> None:
        deadline = time.monotonic() + 240
        while not ready():
            assert supervised.poll() is None, (what, told[-20:])
            assert time.monotonic() < deadline, (what, told[-20:])
            time.sleep(0.001)

    steps = workdir / "checkpoints"
    until(lambda: steps.is_dir() and [*steps.glob("4.partial*")], "the save of step 4")
    there.write_text("1")
    for pid in _pids(told, "2 slice(s)")[2:]:  # slice 1
        os.kill(pid, signal.SIGKILL)
    until(lambda: any("1 slice(s), processes" in line for line in told), "a restart")
    until(lambda: log(workdir)[-1]["step"] >= 6, "steps on one slice")
    # Stopped, as it could be done before the supervisor looks again.
    for pid in _pids(told, "1 slice(s)"):
        os.kill(pid, signal.SIGSTOP)
    there.write_text("2")
    looks = asked.stat().st_size + 3  # the second look saw it, before the third it was acted upon
    until(lambda: asked.stat().st_size >= looks, "looks at the number of slices")
    for pid in _pids(told, "1 slice(s)"):
        os.kill(pid, signal.SIGCONT)
    assert supervised.wait(timeout=300) == 0
    reader.join()

    text = "".join(told)
    assert text.count("slice(s), processes") == 3
    assert "ended with -9; the others had ended" in text
    assert "restart 1 of 20" in text
    assert text.count("time lost since the checkpoint: ") == 2
    found, expected = log(workdir), log(tmp_path / "one")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    np.testing.assert_allclose(
        [row["loss"] for row in found], [row["loss"] for row in expected], rtol=1e-5
    )
    assert rows_of_steps(workdir) == rows_of_steps(tmp_path / "one")


def _pids(told: list[str], slices: str) -> list[int]:
    line = next(line for line in told if f"{slices}, processes" in line)
    return [int(word) for word in line.split("processes")[1].split()]


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["hangs", "is killed"])
@pytest.mark.parametrize("lost", [0, 1])
def test_processes_end_if_another_is_lost(lost, number, tmp_path):
    """Also without a supervisor, and whether or not it is the one that the others report to."""
    script = f"""
import os
from moss_audio_jax import command
command.join_processes()
import jax
from moss_audio_jax.runtime import from_all
assert from_all(jax.process_index()) == [0, 1]
if jax.process_index() == {lost}:
    os.kill(os.getpid(), {int(number)})
from_all("never")
"""
    sys.path.insert(0, str(ROOT / "launch"))
    from local_processes import environment as of_process
    from local_processes import free_port

    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=of_process(index, 2, 1, port) | {"MOSS_AUDIO_JAX_HEARTBEAT": "5"},
            stderr=subprocess.DEVNULL,
        )
        for index in range(2)
    ]
    try:
        assert running[1 - lost].wait(timeout=90) != 0
    finally:
        for process in running:
            process.kill()
            process.wait()
