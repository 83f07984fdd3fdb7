"""The files of launch/: they parse, and work with stand-ins of the real commands."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from moss_audio_jax.train.__main__ import parse

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SHELL_FILES = ("tpu_vm.sh", "slurm.sbatch")
CHIPS = ("v4", "v5e", "v5p", "v6e", "tpu7x", "gpu")


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """stand_ins(name=script): bash scripts on PATH; $LOG collects their command lines."""
    folder, log = tmp_path / "bin", tmp_path / "log"
    folder.mkdir()
    log.touch()
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(log))
    monkeypatch.chdir(ROOT)

    def make(**scripts: str) -> Path:
        for name, script in scripts.items():
            file = folder / name.replace("_", "-")
            file.write_text(f'#!/bin/bash\necho "{file.name} $*" >> "$LOG"\n{script}\n')
            file.chmod(0o755)
        return log

    return make


def until(file: Path, text: str) -> None:
    """Waits for a line of a stand-in, at most a minute, because machines may be busy."""
    deadline = time.monotonic() + 60
    while not (file.exists() and text in file.read_text()):
        assert time.monotonic() < deadline, f"{text!r} never came"
        time.sleep(0.01)


# --- what every file must be ---------------------------------------------------------------------


@pytest.mark.parametrize("name", SHELL_FILES)
def test_shell_files_parse(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


@pytest.mark.parametrize("name", SHELL_FILES)
def test_shellcheck_agrees(name):
    if not (shellcheck := shutil.which("shellcheck")):
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, "-s", "bash", LAUNCH / name], check=True)


# --- xla_flags.py --------------------------------------------------------------------------------


def xla_flags(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, LAUNCH / "xla_flags.py", *argv], capture_output=True, text=True
    )


@pytest.mark.parametrize("chip", CHIPS)
def test_flags_of_a_chip_reach_the_shell_each_with_its_reason(chip):
    variable = "XLA_FLAGS" if chip == "gpu" else "LIBTPU_INIT_ARGS"
    script = f'eval "$("$@")"; printf %s "${variable}"'
    found = subprocess.run(
        ["bash", "-c", script, "-", sys.executable, LAUNCH / "xla_flags.py", chip],
        env={"PATH": os.environ["PATH"], variable: "--mine=1"},
        capture_output=True,
        text=True,
        check=True,
    )
    flags = found.stdout.split()
    assert flags.pop() == "--mine=1"  # the user's own come last: they win
    names = [flag.partition("=")[0] for flag in flags]
    assert len(set(names)) == len(names) > 1
    assert all(flag.startswith("--xla_") and "=" in flag for flag in flags)
    assert any("gpu" in name for name in names) == (chip == "gpu")
    lines = xla_flags(chip).stdout.splitlines()
    for flag in flags:
        assert any(line.startswith(f"# {flag}  ") and line[len(flag) + 4 :] for line in lines)


def test_flags_differ_where_chips_do():
    assert "scoped_vmem_limit_kib=98304" in xla_flags("v6e").stdout
    assert [c for c in CHIPS if "collective_fusion" in xla_flags(c).stdout] == ["v5e"]


@pytest.mark.parametrize("argv", [(), ("v9",), ("v4", "v5e")])
def test_an_unknown_chip_is_refused(argv):
    result = xla_flags(*argv)
    assert (result.returncode, result.stdout) == (2, "")
    assert "expected one of v4, v5e" in result.stderr


def test_this_jaxlib_knows_the_flags_for_gpus():
    """XLA ends a process at an unknown flag, with every backend."""
    export = xla_flags("gpu").stdout.splitlines()[-1]
    flags = export.partition('"')[2].partition(" $")[0]
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    subprocess.run(command, env=env, check=True, capture_output=True)
    unknown = subprocess.run(
        command, env=env | {"XLA_FLAGS": f"{flags} --xla_gpu_no_such=1"}, capture_output=True
    )
    assert unknown.returncode != 0


# --- tpu_vm.sh -----------------------------------------------------------------------------------

TPU_OPTIONS = (
    "--tpu",
    "pod",
    "--zone",
    "z",
    "--repo",
    "https://x/y.git",
    "--commit",
    "abc123",
    "--workdir",
    "/mnt/run dir",
    "--pause",
    "0",
)


def tpu_vm(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [LAUNCH / "tpu_vm.sh", *options], capture_output=True, text=True, timeout=60
    )


def test_a_tpu_slice_is_made_again_and_the_same_command_continues(stand_ins, tmp_path):
    """A preempted slice is deleted and made again; the second ssh ends well."""
    log = stand_ins(
        gcloud=f"""
        cd {tmp_path}
        case "$4" in
          describe) cat state 2>/dev/null ;;
          delete) rm state ;;
          create) echo READY > state ;;
          ssh) printf '%s\\n' "${{@: -1}}" > remote-$(ls remote-* 2>/dev/null | wc -l)
               if [ -e once ]; then exit 0; fi
               touch once; echo PREEMPTED > state; exit 255 ;;
        esac"""
    )
    train = ("--", "--config", "configs/sft.py", "--config.data.train=('a b.jsonl',)")
    result = tpu_vm(*TPU_OPTIONS, "--create", "v5litepod-16", "--spot", *train)
    assert result.returncode == 0, result.stderr
    calls = [line.split()[4] for line in log.read_text().splitlines() if line.startswith("gcloud")]
    assert calls == ["describe", "create", "ssh", "describe", "delete", "create", "ssh"]
    assert "--accelerator-type v5litepod-16" in log.read_text()
    assert "--spot" in log.read_text()
    remote = (tmp_path / "remote-0").read_text()
    assert (tmp_path / "remote-1").read_text() == remote
    subprocess.run(["bash", "-n"], input=remote, text=True, check=True)
    assert "git checkout --quiet --force abc123" in remote
    assert "export MOSS_AUDIO_JAX_DISTRIBUTED=1" in remote
    # The arguments arrive whole, spaces and quotes too.
    last = remote.strip().splitlines()[-1].removeprefix("exec ")
    echoed = subprocess.run(
        ["bash", "-c", f"moss-audio-jax() {{ printf '%s\\n' \"$@\"; }}; {last}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert echoed.stdout.splitlines() == ["train", "--workdir", "/mnt/run dir", *train[1:]]


def test_a_queued_slice_is_waited_for_and_asked_for_again(stand_ins, tmp_path):
    """A request waits, then is active; after a preemption it is deleted and made again."""
    log = stand_ins(
        gcloud=f"""
        cd {tmp_path}
        case "$3 $4" in
          "tpu-vm describe") cat state 2>/dev/null ;;
          "queued-resources describe")
             cat asked 2>/dev/null; if [ -e asked ]; then echo ACTIVE > asked; fi ;;
          "queued-resources create") echo WAITING_FOR_RESOURCES > asked; echo READY > state ;;
          "queued-resources delete") rm asked state ;;
          "tpu-vm ssh") if [ -e once ]; then exit 0; fi
               touch once; echo PREEMPTED > state; exit 255 ;;
        esac"""
    )
    options = ("--create", "v5litepod-16", "--spot", "--queue", "--", "--config", "configs/sft.py")
    result = tpu_vm(*TPU_OPTIONS, *options)
    assert result.returncode == 0, result.stderr
    lines = log.read_text().splitlines()
    calls = [line.split()[3:5] for line in lines if line.startswith("gcloud")]
    queue, machine = "queued-resources", "tpu-vm"
    asked = [[queue, "describe"], [queue, "create"], [queue, "describe"], [queue, "describe"]]
    again = [asked[0], [queue, "delete"], *asked[1:]]
    look, ssh = [machine, "describe"], [machine, "ssh"]
    assert calls == [look, *asked, ssh, look, *again, ssh]
    assert "--node-id pod" in log.read_text()


def test_a_request_that_is_refused_is_no_slice(stand_ins):
    log = stand_ins(gcloud='[ "$3 $4" != "queued-resources describe" ] || echo FAILED')
    result = tpu_vm(*TPU_OPTIONS, "--create", "v5litepod-16", "--queue", "--", "--config", "x")
    assert result.returncode == 1
    assert "the request for pod is 'FAILED'" in result.stderr
    assert " ssh " not in log.read_text()


def test_a_tpu_command_that_never_works_is_not_restarted_for_ever(stand_ins):
    log = stand_ins(gcloud='case "$4" in describe) echo READY ;; ssh) exit 2 ;; esac')
    result = tpu_vm(*TPU_OPTIONS, "--", "--config", "configs/sft.py")
    assert result.returncode == 1
    assert "three short attempts in a row failed" in result.stderr
    assert log.read_text().count(" ssh ") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*TPU_OPTIONS[2:], "--", "x"), "--tpu is missing"),
        (TPU_OPTIONS, "expected --"),
        (("--slice", "a"), "unknown option --slice"),
        (("--tpu",), "--tpu lacks its value"),
    ],
)
def test_tpu_vm_says_what_it_lacks(options, message, stand_ins):
    log = stand_ins(gcloud="exit 0")
    result = tpu_vm(*options)
    assert result.returncode == 2
    assert f"error: {message}" in result.stderr
    assert log.read_text() == ""


# --- gke_jobset.yaml -----------------------------------------------------------------------------

# What JobSet and GKE require of a TPU job: path -> type, or the value itself.
POD = "spec.replicatedJobs.0.template.spec.template.spec"
JOB = "spec.replicatedJobs.0.template.spec"
SCHEMA = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata.name": str,
    "spec.failurePolicy.maxRestarts": int,
    "spec.failurePolicy.rules.0.action": "FailJobSet",
    "spec.failurePolicy.rules.0.onJobFailureReasons": ["PodFailurePolicy"],
    "spec.replicatedJobs.0.name": str,
    "spec.replicatedJobs.0.replicas": int,
    f"{JOB}.parallelism": int,
    f"{JOB}.completions": int,
    f"{JOB}.completionMode": "Indexed",
    f"{JOB}.backoffLimit": 0,
    f"{JOB}.podFailurePolicy.rules.0.onExitCodes.values": [2],
    f"{JOB}.podFailurePolicy.rules.0.onExitCodes.containerName": "train",
    f"{POD}.restartPolicy": "Never",  # podFailurePolicy needs it
    f"{POD}.terminationGracePeriodSeconds": int,
    f"{POD}.containers.0.name": "train",
    f"{POD}.containers.0.image": str,
    f"{POD}.containers.0.command": ["bash", "-c"],
    f"{POD}.containers.0.args.0": str,
    f"{POD}.containers.0.resources.limits": dict,
    f"{POD}.serviceAccountName": str,
    f"{POD}.volumes.0.hostPath.path": str,
}


def check_train(text: str) -> None:
    """The words of a launcher's TRAIN are options of the trainer, and every path is in a bucket."""
    config, args = parse(text.split())
    paths = (args.workdir, config.init_from, *config.data.train)
    assert all(path.startswith("gs://") for path in paths)


@pytest.fixture(scope="module")
def jobset() -> dict:
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def at(value, path: str):
    for key in path.split("."):
        value = value[int(key) if isinstance(value, list) else key]
    return value


def test_the_jobset_has_what_jobset_and_gke_ask_for(jobset):
    for path, expected in SCHEMA.items():
        found = at(jobset, path)
        if isinstance(expected, type):
            assert type(found) is expected, path
        else:
            assert found == expected, path
    pod, job = at(jobset, POD), at(jobset, JOB)
    container = pod["containers"][0]
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    hosts, chips = job["parallelism"], container["resources"]["limits"]["google.com/tpu"]
    assert hosts == job["completions"]
    assert hosts * chips == x * y
    assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]
    env = {item["name"]: item["value"] for item in container["env"]}
    assert all(isinstance(value, str) for value in env.values())
    local = f"--config.checkpoint.local.folder={container['volumeMounts'][0]['mountPath']}"
    assert local in env["TRAIN"].split()
    assert pod["tolerations"][0]["key"] in pod["nodeSelector"]
    check_train(env["TRAIN"])
    slices = at(jobset, "spec.replicatedJobs.0.replicas")
    assert f"--config.mesh.data={slices}" in env["TRAIN"].split()
    assert env["CHIP"] in CHIPS


@pytest.mark.parametrize(("how", "code"), [("done", 0), ("bad use", 2), ("stopped", 75)])
def test_a_pod_that_was_asked_to_stop_does_not_count_as_done(jobset, stand_ins, how, code):
    """The trainer ends with 0 once it has saved after SIGTERM: the JobSet must restart then."""
    end = {"done": "exit 0", "bad use": "exit 2", "stopped": ""}[how]
    log = stand_ins(
        moss_audio_jax=f"""{end}
        trap 'echo asked >> "$LOG"; sleep 0.2; exit 0' TERM
        echo ready >> "$LOG"
        while true; do sleep 0.05; done"""
    )
    container = at(jobset, POD)["containers"][0]
    env = os.environ | {item["name"]: item["value"] for item in container["env"]}
    pod = subprocess.Popen([*container["command"], *container["args"]], env=env)
    if how == "stopped":
        until(log, "ready")
        pod.send_signal(signal.SIGTERM)
    assert pod.wait(timeout=60) == code
    assert ("asked" in log.read_text()) == (how == "stopped")
    assert "moss-audio-jax train --config configs/sft.py:8b --workdir gs://" in log.read_text()


# --- skypilot.yaml --------------------------------------------------------------------------------


def test_the_task_of_skypilot_runs_the_trainer(stand_ins):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) == {"name", "workdir", "resources", "envs", "setup", "run"}
    assert task["resources"]["accelerators"].startswith(f"tpu-{task['envs']['CHIP']}-")
    assert task["resources"]["use_spot"]
    assert task["resources"]["job_recovery"]["max_restarts_on_errors"] > 0
    check_train(task["envs"]["TRAIN"])
    subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=True)
    log = stand_ins(moss_audio_jax='echo "$LIBTPU_INIT_ARGS $MOSS_AUDIO_JAX_DISTRIBUTED" >> "$LOG"')
    run = task["run"].replace(". .venv/bin/activate", "")
    subprocess.run(["bash", "-c", run], env=os.environ | task["envs"], check=True)
    told = log.read_text()
    assert f"moss-audio-jax train {' '.join(task['envs']['TRAIN'].split())}" in told
    assert told.strip().endswith(" 1")
    assert "--xla" in told


# --- supervise.py --------------------------------------------------------------------------------


def supervise(*options: str, timeout: float = 120) -> subprocess.CompletedProcess:
    words = [sys.executable, LAUNCH / "supervise.py", "--pause", "0.01", *options]
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout)


def test_the_supervision_has_a_bound_and_a_growing_pause():
    result = supervise("--restarts", "2", "--", "bash", "-c", "exit 3")
    assert result.returncode == 3
    assert "restart 1 of 2 in 0.01 s" in result.stderr
    assert "restart 2 of 2 in 0.02 s" in result.stderr
    assert "3 failures: no further restart" in result.stderr


def test_wrong_use_and_success_are_not_restarted():
    for code in (0, 2):
        result = supervise("--", "bash", "-c", f"exit {code}")
        assert result.returncode == code
        assert "restart" not in result.stderr


def test_a_process_that_will_not_end_is_killed():
    script = f"""{WHO}
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if me == 1: sys.exit(7)
print("waits", flush=True); time.sleep(600)
"""
    options = ("--processes", "2", "--grace", "0.5", "--restarts", "0")
    result = supervise(*options, "--", sys.executable, "-c", script)
    assert result.returncode == 7
    assert "process 1 ended with 7; the others had ended" in result.stderr


def test_a_run_grows_when_there_are_more_slices(tmp_path):
    """Asked to save, it ends with 0, and starts again with the new number in its command."""
    there, seen = tmp_path / "slices", tmp_path / "seen"
    there.write_text("1")
    script = f"""
import signal, sys, time
open({str(seen)!r}, "a").write(sys.argv[1] + " ")
if sys.argv[1] == "3": sys.exit(0)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
open({str(there)!r}, "w").write("3"); time.sleep(600)
"""
    result = supervise("--ask", f"cat {there}", "--", sys.executable, "-c", script, "{slices}")
    assert result.returncode == 0
    assert seen.read_text() == "1 3 "
    assert "there are more slices than 1" in result.stderr


# --- slurm.sbatch --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "asked", "code", "requeued"),
    [
        ("exit 0", False, 0, False),
        ("exit 3", False, 3, False),
        ("exit 134", False, 134, True),  # jax.distributed ends a process whose partner is lost
        ("", True, 0, True),
    ],
)
def test_slurm_saves_ahead_of_the_limit_and_requeues(stand_ins, ends, asked, code, requeued):
    log = stand_ins(
        srun=f"""{ends}
        trap 'exit 0' USR2
        echo "$$" > "$LOG.pid"; echo ready >> "$LOG"
        while true; do sleep 0.05; done""",
        scancel='kill -USR2 "$(cat "$LOG.pid")"',
        scontrol="",
    )
    job = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch", "--config", "configs/sft.py"],
        env=os.environ | {"SLURM_JOB_ID": "77"},
    )
    if asked:
        until(log, "ready")
        job.send_signal(signal.SIGUSR1)  # what `--signal=B:USR1@600` asks SLURM for
    assert job.wait(timeout=60) == code
    text = log.read_text()
    assert "moss-audio-jax train --config configs/sft.py" in text
    assert ("scancel --signal=TERM 77.0" in text) == asked
    assert ("scontrol requeue 77" in text) == requeued
    assert "#SBATCH --signal=B:USR1@" in (LAUNCH / "slurm.sbatch").read_text()


# --- local_processes.py --------------------------------------------------------------------------

WHO = "import os; me = int(os.environ['MOSS_AUDIO_JAX_PROCESS'])"


def local_processes(script: str) -> subprocess.Popen:
    command = [
        sys.executable,
        LAUNCH / "local_processes.py",
        "2",
        "--devices",
        "3",
        "--",
        sys.executable,
        "-c",
        f"{WHO}\n{script}",
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_know_their_place_and_their_output_is_relayed():
    names = ("PROCESSES", "COORDINATOR")
    script = f"""
for name in {names}: print(name, os.environ["MOSS_AUDIO_JAX_" + name])
print("device_count=3" in os.environ["XLA_FLAGS"], "process", me)
"""
    run = local_processes(script)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0
    mine, theirs = out.splitlines(), err.splitlines()
    assert mine[0] == "PROCESSES 2"
    assert mine[1].startswith("COORDINATOR 127.0.0.1:")
    assert theirs[:2] == [f"[1] {line}" for line in mine[:2]]
    assert (mine[2], theirs[2]) == ("True process 0", "[1] True process 1")


STOPPABLE = """
import signal, sys, time
def leave(*_): print("asked", me, flush=True); sys.exit(0)
signal.signal(signal.SIGTERM, leave)
"""


def test_one_process_that_fails_stops_the_other(tmp_path):
    script = f"""{STOPPABLE}
from pathlib import Path
ready = Path({str(tmp_path / "ready")!r})
if me == 0:
    ready.touch()
    time.sleep(600)
while not ready.exists(): time.sleep(0.01)
sys.exit(3)
"""
    run = local_processes(script)
    out, _ = run.communicate(timeout=60)
    assert (run.returncode, out) == (3, "asked 0\n")


def test_sigterm_reaches_every_process(tmp_path):
    script = f"""{STOPPABLE}
from pathlib import Path
with open({str(tmp_path / "ready")!r}, "a") as file: file.write(f"[{{me}}]")
time.sleep(600)
"""
    run = local_processes(script)
    for me in (0, 1):
        until(tmp_path / "ready", f"[{me}]")
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out, err) == (0, "asked 0\n", "[1] asked 1\n")
