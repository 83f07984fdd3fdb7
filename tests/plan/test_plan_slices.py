"""What crosses slices in a compiled step: two fake slices of four CPU devices each."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moss_audio_jax.plan import compile as compiling
from moss_audio_jax.plan import estimate, report, topologies
from moss_audio_jax.plan.hlo import Module
from moss_audio_jax.plan.slices import crossings, groups
from moss_audio_jax.sharding import make_mesh, slices
from moss_audio_jax.train.__main__ import load_config

CONFIG = str(Path(__file__).parents[2] / "configs" / "tiny.py")
STEP = ("--config.data.length=128", "--config.data.batch=8", "--config.train.dtype=float32")
FOUR_AND_FOUR = [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.fixture
def two_slices(monkeypatch):
    monkeypatch.setenv("MOSS_AUDIO_JAX_SLICES", "2")


def planned(*mesh: str) -> tuple[compiling.Run, estimate.Plan]:
    overrides = [f"--config.mesh.{size}" for size in mesh]
    run = compiling.build(load_config(CONFIG, [*STEP, *overrides]), jax.devices())
    topology = topologies.parse("v5e:2x2", slices=2)
    return run, estimate.plan(run, compiling.compile_step(run), topology)


def test_gradients_alone_cross(two_slices):
    run, plan = planned("data=2", "fsdp=4")
    assert slices(run.mesh.devices.ravel()) == FOUR_AND_FOUR
    assert {crossing.kind for crossing in plan.across} == {"all-reduce"}
    # An all-reduce between two slices sends each byte once. What fsdp does not split is summed
    # within slices first, so that each device sends a quarter of it. Losses, counts and some
    # small gradients, whole, cross too.
    ways = {
        path: x.size // int(np.prod(x.sharding.shard_shape(x.shape)))
        for path, x in run.state["trained"].items()
    }
    assert set(ways.values()) == {1, 4}
    gradients = sum(4 * x.size / 4 for x in run.state["trained"].values())
    found = estimate.between_slices(plan)
    assert gradients <= found["bytes_per_device"] < 1.01 * gradients
    assert found["bytes_per_slice"] == 4 * found["bytes_per_device"]
    assert found["seconds"] == found["bytes_per_device"] / 3.125e9
    assert report.as_json(plan, 1e9)["between_slices"]["seconds"] == found["bytes_per_device"] / 1e9
    assert "between slices: " in report.table(plan)


def test_parameters_cross_if_fsdp_reaches_across(two_slices):
    _, plan = planned("data=1", "fsdp=8")
    assert "all-gather" in {crossing.kind for crossing in plan.across}


@pytest.mark.parametrize("axes", ["data", "fsdp", ("data", "tensor"), ("fsdp", "tensor")], ids=str)
def test_groups_are_those_of_the_mesh(axes):
    """However the compiler writes them: the numbers that a sum adds say who takes part."""
    mesh = make_mesh(2, 2, 2)
    summed = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, axes),
            mesh=mesh,
            in_specs=P(mesh.axis_names),
            out_specs=P(),
            check_vma=False,
        )
    )
    bits = 2 ** np.arange(8)
    compiled = summed.lower(bits).compile()
    (line,) = [i for i in compiled.as_text().splitlines() if " all-reduce(" in i]
    first = next(group for group in groups(line, 8) if 0 in group)
    assert sum(2**d for d in first) == summed(bits)[0]
    assert sorted(d for group in groups(line, 8) for d in group) == list(range(8))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,4},{1,5}}, x", [[0, 4], [1, 5]]),
        ("replica_groups={}, x", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, x",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
        ),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, x", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_every_form_of_groups_is_read(text, expected):
    assert groups(text, 8) == expected


def test_an_unknown_form_is_no_silence():
    with pytest.raises(ValueError, match="unknown form"):
        groups("replica_groups=@other", 8)


def test_sends_between_tpu_slices_count():
    """The form of the TPU compiler."""
    module = Module(
        """
ENTRY %main (a: f32[8]) -> f32[8] {
  %send.1 = (f32[2,128]{1,0:T(8,128)}, u32[], token[]) send(%a, %t), channel_id=2, \
frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.7_0",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.2 = (bf16[64]{0}, u32[], token[]) send(%b, %t), channel_id=3, \
frontend_attributes={_xla_host_transfer_rendezvous="all-gather.8_0",\
_xla_megascale_transfer_type="ALL_GATHER"}
}
""",
        8,
    )
    found = [(c.kind, c.bytes, c.source) for c in crossings(module, FOUR_AND_FOUR)]
    assert found == [("all-reduce", 1024, "all-reduce.7_0"), ("all-gather", 128, "all-gather.8_0")]
    assert crossings(module, [0] * 8) == []
