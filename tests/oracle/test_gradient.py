"""One step's loss and gradients against torch autograd of the reference, parameter by parameter."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moss_audio_jax.config import Compute  # noqa: E402
from moss_audio_jax.data.batch import (  # noqa: E402
    IGNORE,
    Shape,
    TrainExample,
    make_train_batch,
    size_of,
)
from moss_audio_jax.train.step import Recipe, gradients  # noqa: E402
from moss_audio_jax.tree import flatten  # noqa: E402
from moss_audio_jax.weights.convert import load_params, read_config  # noqa: E402
from moss_audio_jax.weights.official import table  # noqa: E402
from oracle.reference import Reference, to_numpy  # noqa: E402

pytestmark = pytest.mark.oracle

TOLERANCE = 1e-4  # of each tensor's largest value
CASES = ("one_clip", "several_clips", "packed")


def rows_of(case: str, prompts: list[TrainExample], text: TrainExample) -> list[list[TrainExample]]:
    """Two rows in every case, so that one program serves all of a checkpoint's."""
    return {
        "one_clip": [[prompts[1]], [prompts[4]]],
        "several_clips": [[prompts[5]], [prompts[6]]],
        "packed": [[prompts[6], prompts[0], text, prompts[3]], [prompts[2], prompts[5]]],
    }[case]


@pytest.fixture(scope="module", params=["a", "b", "shared"])
def checkpoint(request):
    """Reference, its parameters as ours, a jitted step, golden prompts."""
    if request.param == "shared":
        tiny = request.getfixturevalue("shared") / "golden" / "tiny"
        folder, golden = tiny / "checkpoint", np.load(tiny / "golden.npz")
    else:
        folder = request.config.rootpath / "tests" / "golden" / "tiny" / request.param
        golden = np.load(folder / "golden.npz")
    config = read_config(folder)
    placeholder = int(golden["audio_token_id"])

    def example(key: str, weight: float) -> TrainExample:
        ids = golden[f"{key}_ids"].astype(np.int32)
        mels = ()
        if key != "text":
            ends = np.cumsum(golden[f"{key}_clips"])
            mels = tuple(np.split(golden[f"{key}_mel"], ends[:-1], axis=1))
        # What stands behind the sound is the answer; of a text, its second half.
        sound = np.flatnonzero(ids == placeholder)
        first = sound[-1] + 2 if len(sound) else len(ids) // 2
        labels = np.where(np.arange(len(ids)) >= first, ids, IGNORE)
        return TrainExample(
            ids, mels, labels=labels, weights=weight, tasks=0, row_id=key, index=0, seconds=0.0
        )

    prompts = [example(f"s{i}", 1 + i / 4) for i in range(7)]
    text = example("text", 2.0)
    cases = {case: rows_of(case, prompts, text) for case in CASES}
    rows = [row for rows in cases.values() for row in rows]
    shape = Shape(
        rows=2,
        tokens=max(sum(len(e.ids) for e in row) for row in rows) + 3,
        chunks=max(sum(len(size_of(e.mels, config.encoder)) for e in row) for row in rows) + 1,
        frames=config.encoder.chunk_frames,
    )
    step = functools.partial(gradients, recipe=Recipe(config, Compute(dtype="float32")))
    return (
        Reference.load(folder),
        functools.partial(jax.jit(step), flatten(load_params(folder, config, "float32")), {}),
        lambda case: make_train_batch(cases[case], shape, config.encoder, placeholder),
        cases,
        table(config),
    )


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_torch(checkpoint, case):
    reference, step, batch_of, cases, entries = checkpoint
    grads, sums = step(batch=batch_of(case))

    reference.zero_grad(set_to_none=True)
    examples = [example for row in cases[case] for example in row]
    counts = [example.weights * int((example.labels != IGNORE).sum()) for example in examples]
    expected_total = sum(
        count * reference.loss(example.ids, example.labels, example.mels)
        for count, example in zip(counts, examples, strict=True)
    )
    (expected_total / sum(counts)).backward()

    assert float(sums["weight"]) == pytest.approx(sum(counts))
    assert float(sums["loss"]) == pytest.approx(expected_total.item(), rel=1e-5)

    expected = {name: to_numpy(p.grad) for name, p in reference.named_parameters()}
    assert set(expected) == {name for entry in entries for name in entry.names}
    assert set(grads) == {entry.path for entry in entries}
    for entry in entries:
        layers = grads[entry.path] if entry.stack is not None else [grads[entry.path]]
        for name, layer in zip(entry.names, layers, strict=True):
            ours, theirs = entry.to_official(np.asarray(layer)), expected[name]
            largest = np.abs(theirs).max()
            assert largest > 0, name
            assert np.abs(ours - theirs).max() <= TOLERANCE * largest, name
