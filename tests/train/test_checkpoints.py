"""Steps on the disk: damaged ones are found and set aside, good ones are never deleted."""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from moss_audio_jax.errors import InputError
from moss_audio_jax.train.checkpoints import Checkpoints

DATA = {"config": {"streams": 1}, "streams": {"0": {"next": 3}}}


def state(step: int, values: float = 1.0, size: int = 50_000) -> dict:
    key = jax.random.key(step)
    weights = {"a/kernel": values * jax.random.normal(key, (size,)), "b/kernel": jnp.ones((3, 5))}
    return {
        "trained": weights,
        "frozen": {"c": jnp.ones(4)},
        "opt": {"mu": jax.tree.map(jnp.square, weights)},
        "step": jnp.array(step),
    }


def opened(workdir: Path, like: dict | None = None, **keep: int) -> Checkpoints:
    config = ConfigDict({"keep_last": 3, "keep_every": 0, "keep_best": 0} | keep)
    return Checkpoints(workdir, config, jax.eval_shape(lambda: like or state(0)))


def write(workdir: Path, *steps: int, **keep: int) -> None:
    checkpoints = opened(workdir, **keep)
    checkpoints.newest()
    for step in steps:
        checkpoints.save(step, state(step), {"totals": {"tokens": step}}, DATA)
    checkpoints.close()


def standing(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def all_files(folder: Path) -> list[Path]:
    """The largest first."""
    return sorted((f for f in folder.rglob("*") if f.is_file()), key=lambda f: -f.stat().st_size)


def half_of_the_largest(step: Path) -> None:
    file = all_files(step)[0]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped_within_the_largest(step: Path) -> None:
    file = all_files(step)[0]
    with file.open("r+b") as opened_file:
        opened_file.seek(file.stat().st_size // 2 - 2048)
        opened_file.write(b"\xff" * 4096)


def one_flipped_bit(step: Path) -> None:
    file = all_files(step)[0]
    old = file.read_bytes()
    file.write_bytes(old[:100] + bytes([old[100] ^ 1]) + old[101:])


def empty_run(step: Path) -> None:
    for file in all_files(step / "run"):
        file.write_bytes(b"")


def no_state(step: Path) -> None:
    shutil.rmtree(step / "state")


def cut_manifest(step: Path) -> None:
    file = step / "state" / "manifest.ocdbt"
    file.write_bytes(file.read_bytes()[:20])


def no_metadata(step: Path) -> None:
    (step / "state" / "_METADATA").unlink()
    (step / "_CHECKPOINT_METADATA").unlink()


def all_empty(step: Path) -> None:
    for file in all_files(step):
        file.write_bytes(b"")


def no_files(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def no_checksums(step: Path) -> None:
    (step / "checksums.json").unlink()


def cut_checksums(step: Path) -> None:
    file = step / "checksums.json"
    file.write_bytes(file.read_bytes()[:-3])


def other_checksums(step: Path) -> None:
    (step / "checksums.json").write_text('{"version": 1, "step": 6, "finite": true, "files": 5}')


DAMAGES = (
    half_of_the_largest,
    flipped_within_the_largest,
    one_flipped_bit,
    empty_run,
    no_state,
    cut_manifest,
    no_metadata,
    all_empty,
    no_files,
    no_checksums,
    cut_checksums,
    other_checksums,
)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    write(workdir, 2, 4, 6)
    return workdir


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_is_named_and_set_aside(damage, three, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(three, workdir)
    damage(workdir / "checkpoints" / "6")
    damaged = contents(workdir / "checkpoints" / "6")
    checkpoints = opened(workdir)
    with pytest.warns(UserWarning, match=r"checkpoints/6: .*goes on from step 4; set aside") as say:
        assert checkpoints.newest() == 4
    assert len(say) == 1
    assert "\n" not in str(say[0].message)
    on_one_device = jax.tree.map(
        lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), state(0)
    )
    restored, run = checkpoints.restore(4, on_one_device)
    expected = {key: value for key, value in state(4).items() if key != "frozen"}
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert run == {"totals": {"tokens": 4}, "data": DATA}
    checkpoints.close()
    # Just as if step 6 had not been written; nothing of it is lost.
    assert contents(workdir / "damaged_checkpoints" / "6") == damaged
    assert standing(workdir) == [2, 4]
    for step in ("2", "4"):
        old, new = (contents(root / "checkpoints" / step) for root in (three, workdir))
        assert old == new
    write(workdir, 6)
    assert standing(workdir) == [2, 4, 6]


def test_where_all_are_damaged_nothing_starts_and_nothing_moves(three, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(three, workdir)
    for step, harm in ((2, cut_manifest), (4, all_empty), (6, flipped_within_the_largest)):
        harm(workdir / "checkpoints" / str(step))
    before = contents(workdir)
    for _ in range(2):
        checkpoints = opened(workdir)
        with pytest.raises(InputError, match=r"step 6: .*differs.*step 4: .*step 2: ") as raised:
            checkpoints.newest()
        checkpoints.close()
        assert "\n" not in str(raised.value)
    assert contents(workdir) == before


def test_two_damaged_in_a_row_and_again(three, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(three, workdir)
    for _ in range(2):
        for step in ("4", "6"):
            cut_manifest(workdir / "checkpoints" / step)
        with pytest.warns(UserWarning, match="set aside"):
            write(workdir, 4, 6)
        assert standing(workdir) == [2, 4, 6]
    names = sorted(path.name for path in (workdir / "damaged_checkpoints").iterdir())
    assert names == ["4", "4-1", "6", "6-1"]


def test_what_is_kept(tmp_path):
    """The newest, every tenth, the best; a step that is not finite never replaces a good one."""
    checkpoints = opened(tmp_path, keep_last=2, keep_every=10, keep_best=1)
    assert checkpoints.newest() is None
    losses = {1: 3.0, 5: 1.0, 10: math.nan, 12: 2.0, 14: None}
    for step, loss in losses.items():
        checkpoints.save(step, state(step), {}, DATA, loss)
    checkpoints.wait()
    assert standing(tmp_path) == [5, 10, 12, 14]
    for step in (16, 18, 20):
        checkpoints.save(step, state(step, math.inf), {}, DATA)
    checkpoints.close()
    assert standing(tmp_path) == [5, 10, 12, 14, 20]
    with pytest.warns(UserWarning, match="20: its weights or moments are not finite"):
        write(tmp_path, 16, 18, keep_last=2, keep_every=10, keep_best=1)
    assert standing(tmp_path) == [5, 10, 16, 18]  # after a restart the same rules


def test_a_step_that_was_not_finished_is_removed(three, tmp_path, caplog):
    caplog.set_level("INFO")
    shutil.copytree(three, tmp_path / "run")
    left = tmp_path / "run" / "checkpoints" / "8.partial.orbax-checkpoint-tmp" / "state"
    left.mkdir(parents=True)
    (left.parents[1] / "8.partial.checksums-1").write_text("{}")
    other = left.parents[1] / "notes.partial"
    other.write_text("not ours")
    checkpoints = opened(tmp_path / "run")
    assert checkpoints.newest() == 6
    checkpoints.close()
    assert caplog.text.count("not written to its end; removed") == 2
    assert not left.parent.exists()
    assert other.exists()


def test_a_state_of_another_run_is_refused_in_one_line(three):
    wider = jax.tree.map(lambda x: jnp.ones((*x.shape, 2)), state(0))
    for like in (wider, {**state(0), "ema": state(0)["trained"]}, state(0, size=49_000)):
        checkpoints = opened(three, like)
        assert checkpoints.newest() == 6
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        with pytest.raises(InputError, match="checkpoints/6: is of another model") as raised:
            checkpoints.restore(6, jax.tree.map(lambda _, s=sharding: s, like))
        checkpoints.close()
        assert "\n" not in str(raised.value)


def test_a_full_disk_is_one_line_and_the_last_good_step_stays(small_disk, capsys):
    with pytest.warns(UserWarning, match=r"takes up to 3.2 MB, .* free: saving may fail"):
        opened(small_disk, state(0, size=400_000)).close()
    checkpoints = opened(small_disk)
    checkpoints.newest()
    checkpoints.save(1, state(1), {}, DATA)
    checkpoints.save(2, state(2, size=300_000), {}, DATA)
    with pytest.raises(InputError, match=r"2: not written: the disk is full \(.* MB needed\)") as e:
        checkpoints.close()
    assert "\n" not in str(e.value)
    assert "Traceback" not in capsys.readouterr().err
    assert standing(small_disk) == [1]
    checkpoints = opened(small_disk)
    assert checkpoints.newest() == 1
    checkpoints.close()


def test_checksums_cover_every_file(three):
    step = three / "checkpoints" / "6"
    told = json.loads((step / "checksums.json").read_text())["files"]
    assert sorted(told) == sorted(set(contents(step)) - {"checksums.json"})
    assert all(told[name][0] == (step / name).stat().st_size for name in told)
