"""The launchers give every shard its number; the command itself is a stand-in."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
SBATCH = LAUNCH / "annotate_slurm.sbatch"


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A PATH with stand-ins of `srun` and `moss-audio-jax` that only print how they were called."""
    for name, script in (("srun", 'exec "$@"'), ("moss-audio-jax", "printf '%s\\n' \"$@\"")):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def called(command, **env):
    result = subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, timeout=60, check=False
    )
    return result.returncode, result.stdout.splitlines()


def test_slurm(stand_ins):
    asked = ("--input", "a b", "--output", "o")
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "99", "SLURM_CPUS_PER_TASK": "4"}
    code, words = called(["bash", SBATCH, *asked], **array)
    assert code == 0
    assert words == ["annotate", "--workers", "4", *asked, "--shard", "3/100"]
    assert called(["bash", SBATCH, *asked])[1] == ["annotate", "--workers", "1", *asked]
    assert called(["bash", SBATCH])[0] == 2


def test_gke(stand_ins):
    job = yaml.safe_load((LAUNCH / "annotate_gke.yaml").read_text())
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    env = {item["name"]: item["value"] for item in container["env"]}
    assert (job["kind"], spec["completionMode"]) == ("Job", "Indexed")
    assert env["SHARDS"] == str(spec["completions"])
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    rules = {rule["action"]: rule for rule in spec["podFailurePolicy"]["rules"]}
    assert rules["FailJob"]["onExitCodes"]["values"] == [2]
    assert rules["FailIndex"]["onExitCodes"]["containerName"] == container["name"]
    code, words = called(
        [*container["command"], *container["args"]], **env, JOB_COMPLETION_INDEX="7"
    )
    assert code == 0
    assert words == ["annotate", *env["ANNOTATE"].split(), "--shard", "7/1000"]
