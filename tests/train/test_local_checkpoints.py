"""Two tiers of checkpoints: what is on the hosts' own disks, and which of both is restored."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from runs import ROOT, environment, log, rows_of_steps

from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.train.local_checkpoints import LocalCheckpoints
from moss_audio_jax.train.loop import train

DATA = {"config": {"streams": 1}, "streams": {"0": {"next": 3}}}
SPECS = {"trained": {"a/kernel": P("fsdp"), "b": P()}, "opt": P(None, "fsdp"), "step": P()}


def state(step: int, **mesh: int) -> tuple[dict, dict]:
    """A state on a mesh (its numbers depend on the step alone), and its shardings."""
    keys = jax.random.split(jax.random.key(step), 3)
    values = {
        "trained": {
            "a/kernel": jax.random.normal(keys[0], (16, 3)),
            "b": -jnp.zeros(5, jnp.bfloat16),
        },
        "opt": jax.random.normal(keys[1], (3, 8)),
        "step": jnp.array(step),
    }
    placed = make_mesh(**mesh)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(placed, spec), SPECS, is_leaf=lambda x: isinstance(x, P)
    )
    frozen = {"frozen": {"c": jnp.ones(3)}}
    return jax.device_put(values, shardings) | frozen, shardings | {
        "frozen": {"c": NamedSharding(placed, P())}
    }


def opened(folder: Path, workdir: Path, **mesh: int) -> LocalCheckpoints:
    like, shardings = state(0, **(mesh or {"data": 2, "fsdp": 4}))
    return LocalCheckpoints(folder, workdir, jax.eval_shape(lambda: like), shardings)


def write(folder: Path, workdir: Path, *steps: int) -> None:
    checkpoints = opened(folder, workdir)
    for step in steps:
        checkpoints.save(step, state(step, data=2, fsdp=4)[0], {"totals": {"t": step}}, DATA)
    checkpoints.close()


@pytest.fixture
def places(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "disk", tmp_path / "run"


def steps_of(folder: Path) -> list[int]:
    return sorted(int(step.name) for step in folder.glob("*/*/*") if step.name.isdecimal())


def bits(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def test_the_newest_of_both_tiers(places):
    write(*places, 3, 5, 7)
    assert steps_of(places[0]) == [5, 7]
    checkpoints = opened(*places)
    assert checkpoints.newest(after=7) is None
    assert checkpoints.newest(after=6) == 7
    restored, run = checkpoints.restore(7)
    expected, shardings = state(7, data=2, fsdp=4)
    del expected["frozen"], shardings["frozen"]
    assert bits(restored) == bits(expected)
    assert jax.tree.map(lambda x: x.sharding, restored) == shardings
    assert run["totals"] == {"t": 7}
    assert run["data"]["streams"] == DATA["streams"]


def half_a_file(step: Path) -> None:
    file = step / "pieces.npz"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def a_flipped_bit(step: Path) -> None:
    content = bytearray((step / "pieces.npz").read_bytes())
    content[content.index(b"NUMPY") + 150] ^= 1
    (step / "pieces.npz").write_bytes(content)


def no_position(step: Path) -> None:
    (step / "run.json").write_text("{")


@pytest.mark.parametrize("harm", [half_a_file, a_flipped_bit, no_position])
def test_what_is_damaged_is_not_loaded(harm, places):
    write(*places, 5, 7)
    (newest,) = places[0].glob("*/*/7")
    harm(newest)
    checkpoints = opened(*places)
    assert checkpoints.newest(after=0) == 5
    assert bits(checkpoints.restore(5)[0]) == bits(
        {k: v for k, v in state(5, data=2, fsdp=4)[0].items() if k != "frozen"}
    )
    assert steps_of(places[0]) == [5]  # else 7 would be mixed with a new one


def test_what_was_being_written_is_removed(places):
    write(*places, 5)
    (whole,) = places[0].glob("*/*/5")
    shutil.copytree(whole, whole.with_name("7.partial"))
    checkpoints = opened(*places)
    assert checkpoints.newest(after=0) == 5
    assert not [*places[0].glob("*/*/*.partial")]


def test_steps_of_another_mesh_or_run_are_not_used(places, tmp_path):
    write(*places, 5)
    (tmp_path / "other").mkdir()
    assert opened(places[0], tmp_path / "other").newest(after=0) is None
    assert opened(*places, data=4, fsdp=2).newest(after=0) is None


def test_fewer_replicas_have_the_same_pieces(places):
    write(*places, 5)
    checkpoints = opened(*places, data=1, fsdp=4)
    assert checkpoints.newest(after=0) == 5
    expected = state(5, data=1, fsdp=4)[0]
    del expected["frozen"]
    assert bits(checkpoints.restore(5)[0]) == bits(expected)


def test_a_step_that_is_not_finite_is_not_kept(places):
    checkpoints = opened(*places)
    broken = state(5, data=2, fsdp=4)[0]
    checkpoints.save(5, broken | {"opt": broken["opt"] * jnp.nan}, {}, DATA)
    checkpoints.close()
    assert steps_of(places[0]) == []


def test_a_host_without_its_copy_gets_it_from_another(tmp_path):
    """Two processes, each with its own disk, hold two replicas; one disk is lost."""
    script = tmp_path / "host.py"
    script.write_text(
        f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(ROOT / "tests/support")!r}]
from moss_audio_jax import command
command.join_processes()
import jax
import test_local_checkpoints as t
root = Path({str(tmp_path)!r})
disk = root / f"disk-{{jax.process_index()}}"
mesh = {{"data": 2, "fsdp": 2}}
checkpoints = t.opened(disk, root / "run", **mesh)
expected = t.state(5, **mesh)[0]
if sys.argv[1] == "save":
    own = {{"config": {{"streams": 2}}, "streams": {{str(jax.process_index()): {{"next": 3}}}}}}
    checkpoints.save(5, expected, {{"totals": 1}}, own)
else:
    assert checkpoints.newest(after=0) == 5
    found, run = checkpoints.restore(5)
    assert run["totals"] == 1
    for key in found:
        for x, y in zip(jax.tree.leaves(found[key]), jax.tree.leaves(expected[key])):
            for a, b in zip(x.addressable_shards, y.addressable_shards):
                assert t.bits([a.data]) == t.bits([b.data])
checkpoints.close()
"""
    )
    (tmp_path / "run").mkdir()
    launcher = [sys.executable, str(ROOT / "launch" / "local_processes.py"), "2", "--devices", "2"]
    for what in ("save", "restore"):
        done = subprocess.run(
            [*launcher, "--", sys.executable, str(script), what],
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        if what == "save":
            assert steps_of(tmp_path / "disk-0") == steps_of(tmp_path / "disk-1") == [5]
            shutil.rmtree(tmp_path / "disk-1")


def test_a_run_goes_on_from_the_nearer_tier(run_config, tmp_path, caplog):
    """Killed between the tiers: the work folder has step 2, the disk step 3."""

    def run(name: str, steps: int) -> None:
        config = run_config(f"train.steps={steps}", "checkpoint.every=2", "data.log_rows=true")
        config.checkpoint.local.folder, config.checkpoint.local.every = str(tmp_path / "disk"), 1
        train(config, tmp_path / name)

    run("whole", 5)
    run("killed", 4)
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
    with caplog.at_level("INFO"):
        run("killed", 5)
    assert f"continues at step 3 of {tmp_path / 'killed'}, from {tmp_path / 'disk'}" in caplog.text
    losses = [[row["loss"] for row in log(tmp_path / name)] for name in ("killed", "whole")]
    assert losses[0] == losses[1]
    assert rows_of_steps(tmp_path / "killed") == rows_of_steps(tmp_path / "whole")
