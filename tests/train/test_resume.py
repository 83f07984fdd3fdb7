"""After a kill or a stop a run continues exactly where it was."""

import signal
import subprocess
import time

import pytest
from runs import command, environment, log

from moss_audio_jax.train.clock import KINDS


def test_killed_at_any_moment_a_run_continues_bit_for_bit(small_run, tmp_path):
    env = environment()
    rows = ("data.batch=2", "data.streams=2")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(small_run, whole, *rows), env=env, check=True, capture_output=True)
    expected = log(whole)
    assert [row["step"] for row in expected] == list(range(1, 17))

    # Killed once so many steps are logged: right after a save began (even) and between saves.
    for steps in (3, 6, 9):
        again = command(small_run, killed, *rows)
        run = subprocess.Popen(again, env=env, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while run.poll() is None and time.monotonic() < deadline:
            done = killed / "metrics.jsonl"
            if done.exists() and f'"step": {steps},' in done.read_text():
                break
            time.sleep(0.005)
        assert run.poll() is None, "the run ended before it was killed"
        run.send_signal(signal.SIGKILL)
        run.wait()
    subprocess.run(again, env=env, check=True, capture_output=True)

    found = log(killed)
    for key in ("step", "loss", "grad_norm", "tokens", "tokens_seen"):
        assert [row[key] for row in found] == [row[key] for row in expected], key
    assert log(killed, "rows-0.jsonl") == log(whole, "rows-0.jsonl")
    for row in found:
        badput = {kind: row[f"time/badput/{kind}"] for kind in KINDS}
        assert row["time/goodput"] + sum(badput.values()) == pytest.approx(1)
        assert min(badput.values()) >= -1e-6
        assert 0 < row["time/step_p50"] <= row["time/step_p95"] <= row["time/step_max"]
        assert badput["start"] > 0
    assert [row["time/badput/restart"] > 0 for row in (*expected, found[0], found[-1])] == [
        *[False] * 17,
        True,
    ]


def test_sigterm_saves_and_the_next_start_continues(small_run, tmp_path):
    env = environment()
    rows = ("data.batch=2", "data.streams=2")
    options = (*rows, "checkpoint.every=1000", "train.steps=100000")
    run = subprocess.Popen(
        command(small_run, tmp_path / "run", *options), env=env, stderr=subprocess.PIPE, text=True
    )
    for line in run.stderr:
        if line.startswith("step 5/"):
            run.send_signal(signal.SIGTERM)
            break
    rest = run.stderr.read()
    assert run.wait() == 0
    assert "asked to stop: saved step" in rest
    saved = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    again = subprocess.run(
        command(small_run, tmp_path / "run", *rows, f"train.steps={saved + 1}"),
        env=env,
        check=True,
        capture_output=True,
        text=True,
    )
    assert f"continues at step {saved} " in again.stderr
    assert [row["step"] for row in log(tmp_path / "run")] == list(range(1, saved + 2))
