"""Neither batch nor bucket nor mesh changes what a prompt computes."""

from pathlib import Path

import numpy as np
import pytest

import moss_audio_jax as mj
from moss_audio_jax.errors import UsageError
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.sharding import AXES, as_mesh, lay_out, make_mesh

OWN = Path(__file__).parents[1] / "golden" / "tiny"
MESHES = [(8, 1, 1, 1), (2, 2, 2, 1), (1, 4, 2, 1), (2, 1, 2, 2)]


@pytest.fixture(scope="module")
def prompts():
    golden = np.load(OWN / "a" / "golden.npz")
    made = []
    for i in range(7):
        clips = np.cumsum(golden[f"s{i}_clips"])[:-1]
        made.append((golden[f"s{i}_ids"], np.split(golden[f"s{i}_mel"], clips, axis=1)))
    return [*made, (golden["text_ids"], [])]


@pytest.fixture(scope="module")
def alone(prompts):
    """Logits and greedy tokens of each prompt by itself on one device."""
    model = mj.MossAudio.load(OWN / "a", "float32")
    logits = [model.logits(ids, mels) for ids, mels in prompts]
    return logits, [model.generate_ids(ids, mels, max_new_tokens=16) for ids, mels in prompts]


def check(model, prompts, alone, slots=8):
    logits, tokens = alone
    for found, expected in zip(model.logits_batch(prompts), logits, strict=True):
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    examples = [model._example(ids, mels) for ids, mels in prompts]
    sampling = Sampling(max_new_tokens=16, loop_guard=False)
    with model._engine(slots) as engine:
        outputs = engine.run([(example, sampling) for example in examples])
    assert [output.ids for output in outputs] == tokens


def test_batches_change_nothing(prompts, alone):
    model = mj.MossAudio.load(OWN / "a", "float32")
    check(model, prompts, alone, slots=3)  # refilled as answers end, in other buckets
    order = [5, 0, 7, 3, 6, 1, 4, 2]
    shuffled = tuple([part[i] for i in order] for part in alone)
    check(model, [prompts[i] for i in order], shuffled)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_meshes_change_nothing(mesh, prompts, alone):
    model = mj.MossAudio.load(OWN / "a", "float32", mesh=mesh)
    assert len(model.params["lm_head"]["kernel"].sharding.device_set) == 8
    check(model, prompts, alone)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ((16, 1, 1, 1), "does not fit"),
        ((3, -1, 1, 1), "does not fit"),
        ((-1, -1, 1, 1), "at most one"),
        ({"model": 2}, "'model'"),
    ],
)
def test_impossible_meshes_are_named(mesh, message):
    with pytest.raises(UsageError, match=message):
        as_mesh(mesh)


def test_one_axis_may_take_the_rest():
    assert dict(make_mesh(tensor=2, fsdp=-1).shape)["fsdp"] == 4


class _Device:
    """The attributes of a device that determine its place in a mesh."""

    platform = device_kind = "cpu"

    def __init__(self, number: int, a_slice: int):
        self.id, self.slice_index, self.process_index = number, a_slice, a_slice


@pytest.mark.parametrize(
    ("sizes", "slices", "inside"),
    [
        ((2, 4, 1, 1), 2, ("fsdp", "tensor", "sequence")),  # gradients alone cross
        ((4, 2, 1, 1), 2, ("fsdp", "tensor", "sequence")),
        ((1, 8, 1, 1), 2, ("tensor", "sequence")),  # no data axis: fsdp reaches across
        ((2, 2, 2, 1), 4, ("tensor", "sequence")),
    ],
)
def test_slow_networks_are_crossed_by_the_first_axes(sizes, slices, inside):
    each = 8 // slices
    shuffled = np.random.default_rng(0).permutation(8)
    devices = [_Device(int(number), int(number) // each) for number in shuffled]
    mesh = lay_out(dict(zip(AXES, sizes, strict=True)), devices)
    assert mesh.shape == sizes
    assert sorted(device.id for device in mesh.flat) == list(range(8))
    for axis, name in enumerate(AXES):
        crossed = any(
            len({device.slice_index for device in line}) > 1
            for line in np.moveaxis(mesh, axis, -1).reshape(-1, sizes[axis])
        )
        assert not (crossed and name in inside), name


def test_slices_that_no_axis_can_be_cut_at():
    devices = [_Device(number, number // 4) for number in range(8)]
    for sizes, given, named in (
        ((1, 1, 2, 4), devices, r"2 slices of \[4, 4\] devices: mesh.data \* mesh.fsdp"),
        ((8, 1, 1, 1), [*devices[:7], _Device(7, 0)], r"2 slices of \[3, 5\] devices"),
    ):
        with pytest.raises(UsageError, match=named):
            lay_out(dict(zip(AXES, sizes, strict=True)), given)
