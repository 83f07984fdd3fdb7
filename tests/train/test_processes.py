"""One run on 1, 2 and 4 processes of the same 4 devices."""

import json
import subprocess
import sys

import numpy as np
from runs import ROOT, command, environment, log, rows_of_steps
from test_checkpoints import contents, flipped_within_the_largest


def test_many_processes_are_one(small_run, tmp_path):
    env = environment()
    mesh = ("mesh.data=2", "mesh.fsdp=2", "data.batch=4", "data.streams=4")
    short = ("train.steps=4", "checkpoint.every=4")

    def run(processes: int, workdir: str, *more: str) -> None:
        launcher = [
            sys.executable,
            str(ROOT / "launch" / "local_processes.py"),
            str(processes),
            "--devices",
            str(4 // processes),
            "--",
        ]
        subprocess.run(
            [*launcher, *command(small_run, tmp_path / workdir, *mesh, *short, *more)],
            env=env,
            check=True,
            capture_output=True,
        )

    run(1, "one", "train.steps=6")
    expected = log(tmp_path / "one")

    # By the clock both save at once: here, at every step.
    run(2, "two", "checkpoint.minutes=1e-9", "checkpoint.keep_last=3", "checkpoint.every=1000")
    kept = sorted(int(path.name) for path in (tmp_path / "two" / "checkpoints").iterdir())
    assert kept == [2, 3, 4]
    steps = tmp_path / "two" / "checkpoints"
    told = json.loads((steps / "4" / "checksums.json").read_text())["files"]
    assert sorted(told) == sorted(set(contents(steps / "4")) - {"checksums.json"})
    for process_count, done in ((1, 4), (4, 3)):  # what two processes saved
        workdir = f"two-{process_count}"
        subprocess.run(["cp", "-r", str(tmp_path / "two"), str(tmp_path / workdir)], check=True)
        for file in (tmp_path / workdir).glob("rows-*.jsonl"):
            file.unlink()
        if done < 4:  # each file is looked at by one process, and all hear of it
            flipped_within_the_largest(tmp_path / workdir / "checkpoints" / "4")
        run(process_count, workdir, "train.steps=6")
        assert (tmp_path / workdir / "damaged_checkpoints" / "4").exists() == (done < 4)
        found = log(tmp_path / workdir)
        np.testing.assert_allclose(
            [row["loss"] for row in found], [row["loss"] for row in expected], rtol=1e-5
        )
        assert rows_of_steps(tmp_path / workdir) == rows_of_steps(tmp_path / "one")[done:]
        last = found[-1]
        if process_count > 1:
            assert {last["time/slowest_host"], last["time/latest_host"]} <= set(range(4))
            assert last["time/slowest_step"] > 0
        else:
            assert "time/slowest_host" not in last
    assert rows_of_steps(tmp_path / "two") == rows_of_steps(tmp_path / "one")[:4]
