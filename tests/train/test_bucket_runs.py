"""A run whose work folder, data and start are in a bucket equals one on a disk, through faults.

Not covered: S3 (tools/check_buckets.py runs that, and more kills).
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import loopback
import numpy as np
import pytest
from runs import ROOT, command, environment, log
from test_checkpoints import DATA, state

from moss_audio_jax import buckets as door
from moss_audio_jax.errors import InputError
from moss_audio_jax.train.bucket_checkpoints import BucketCheckpoints


def rows_of(objects: dict[str, bytes], name: str) -> list[dict]:
    return [json.loads(line) for line in objects[name].decode().splitlines()]


def test_killed_a_run_in_a_bucket_continues_bit_for_bit(buckets, corpus, small_run, tmp_path):
    env = environment() | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    root = f"gs://{loopback.BUCKET}/run"
    loopback.fill(corpus, f"{root}/data")
    sizes = ("data.batch=2", "data.streams=2", "train.steps=6")
    start = f"init_from={corpus / 'start'}", f"init_from={root}/data/start"
    there = (*sizes, start[1], f"tokenizer={root}/data/start")
    there += (f"data.train=('{root}/data/rows.jsonl',)",)
    whole = tmp_path / "whole"
    run = subprocess.run(
        command(small_run, whole, *sizes, start[0]), env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr

    proxy = buckets["gs"]
    proxy.share = 0.02
    try:
        again = command(small_run, f"{root}/work", *there)
        run = subprocess.Popen(again, env=env, stderr=subprocess.PIPE, text=True)
        said = []
        for text in run.stderr:
            said.append(text)
            if text.startswith("step 5/"):
                time.sleep(random.uniform(0, 0.3))
                run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, "".join(said)
        run = subprocess.run(again, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "continues at step" in run.stderr
    finally:
        proxy.share = 0.0
    same(loopback.objects(f"{root}/work"), whole)


def same(objects: dict[str, bytes], whole: Path) -> None:
    """The logs of a work folder in a bucket are those of one on a disk; nobody owns it."""
    found, expected = rows_of(objects, "metrics.jsonl"), log(whole)
    for key in ("step", "loss", "grad_norm", "tokens", "tokens_seen"):
        assert [row[key] for row in found] == [row[key] for row in expected], key
    for file in whole.glob("rows-*.jsonl"):
        assert rows_of(objects, file.name) == log(whole, file.name)
    assert ".lock" not in objects


def test_two_processes_lose_one_twice(buckets, corpus, small_run, tmp_path):
    """First they go on from the bucket, then from the steps on the hosts' disks, which are newer;
    logs are those of two processes that nobody killed."""
    env = environment() | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    env["MOSS_AUDIO_JAX_HEARTBEAT"] = "5"
    root, disk = f"gs://{loopback.BUCKET}/processes", tmp_path / "disk"
    launcher = [sys.executable, str(ROOT / "launch" / "local_processes.py"), "2", "--"]
    sizes = ("mesh.fsdp=2", "data.batch=2", "data.streams=2", "train.steps=10")
    sizes += (f"init_from={corpus / 'start'}",)
    whole = [*launcher, *command(small_run, tmp_path / "whole", *sizes)]
    subprocess.run(whole, env=env, check=True, capture_output=True)

    def run(*more: str, at: int = 0, lost: int = 0) -> tuple[int, str]:
        """Its exit code and what it said. At step `at` the process `lost` is killed."""
        words = command(small_run, f"{root}/work", *sizes, *more)
        started = subprocess.Popen([*launcher, *words], env=env, stderr=subprocess.PIPE, text=True)
        said = []
        for text in started.stderr:
            said.append(text)
            if text.startswith(f"step {at}/"):
                task = Path(f"/proc/{started.pid}/task/{started.pid}/children")
                os.kill(int(task.read_text().split()[lost]), signal.SIGKILL)
        return started.wait(), "".join(said)

    local = ("checkpoint.every=1000", f"checkpoint.local.folder={disk}", "checkpoint.local.every=1")
    buckets["gs"].share = 0.02
    try:
        code, said = run("checkpoint.every=2", at=5, lost=1)
        assert code, said
        code, said = run(*local, at=8, lost=0)
        assert code, said
        assert re.search(rf"continues at step [24] of {root}/work\n", said)
        code, said = run(*local)
        assert code == 0, said
        assert re.search(rf"continues at step [678] of {root}/work, from {disk}\n", said)
    finally:
        buckets["gs"].share = 0.0
    same(loopback.objects(f"{root}/work"), tmp_path / "whole")


@pytest.fixture(params=["gs", "s3"])
def workdir(request, buckets):
    return door.as_path(f"{request.param}://{loopback.BUCKET}/{abs(hash(request.node.name))}")


def opened(workdir, **keep: int) -> BucketCheckpoints:
    import jax
    from ml_collections import ConfigDict

    config = ConfigDict({"keep_last": 2, "keep_every": 0, "keep_best": 0} | keep)
    return BucketCheckpoints(workdir, config, jax.eval_shape(lambda: state(0)))


def write(workdir, *steps: int) -> None:
    checkpoints = opened(workdir)
    checkpoints.newest()
    for step in steps:
        checkpoints.save(step, state(step), {"totals": {"tokens": step}}, DATA)
    checkpoints.close()


def test_steps_are_saved_kept_and_restored(workdir):
    import jax

    write(workdir, 1, 2, 3)
    names = {name.split("/")[0] for name in loopback.objects(workdir / "checkpoints")}
    assert names == {"2", "3"}
    checkpoints = opened(workdir)
    assert checkpoints.newest() == 3
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found, run = checkpoints.restore(3, jax.tree.map(lambda _: device, state(0)))
    checkpoints.close()
    assert run["totals"] == {"tokens": 3}
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves({**state(3), "frozen": {}}), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_step_that_was_cut_short_is_no_step(workdir):
    write(workdir, 1, 2)
    door.delete_one(workdir / "checkpoints" / "2" / "checksums.json")
    checkpoints = opened(workdir)
    assert checkpoints.newest() == 1
    checkpoints.close()
    assert {name.split("/")[0] for name in loopback.objects(workdir / "checkpoints")} == {"1"}


def test_a_damaged_step_is_set_aside(workdir):
    write(workdir, 1, 2)
    names = loopback.objects(workdir / "checkpoints" / "2")
    largest = max(names, key=lambda name: len(names[name]))
    door.write(workdir / "checkpoints" / "2" / largest, names[largest][:-1])
    checkpoints = opened(workdir)
    with pytest.warns(UserWarning, match=f"{largest} is not the file that was written; the run"):
        assert checkpoints.newest() == 1
    checkpoints.close()
    assert loopback.objects(workdir / "damaged_checkpoints" / "2").keys() == names.keys()
    door.delete_one(workdir / "checkpoints" / "1" / largest)
    for name in loopback.objects(workdir / "checkpoints" / "1"):
        if name != "checksums.json":
            door.delete_one(workdir / "checkpoints" / "1" / name)
    with pytest.raises(InputError, match="none of its checkpoints can be used"):
        opened(workdir).newest()
