"""The real TPU compiler on a small step; needs libtpu (extra `plan`)."""

from pathlib import Path

import pytest

from moss_audio_jax import libtpu
from moss_audio_jax.plan import compile as compiling
from moss_audio_jax.plan import estimate, report, topologies
from moss_audio_jax.train.__main__ import load_config

pytestmark = pytest.mark.skipif(
    not libtpu.installed(),
    reason="libtpu is not installed: pip install -e '.[plan]'",
)
CONFIG = str(Path(__file__).parents[2] / "configs" / "tiny.py")
SMALL = (
    "--config.train.dtype=bfloat16",
    "--config.train.remat=full",
    "--config.data.length=128",
    "--config.data.batch=4",
    "--config.model.encoder.layers=1",
    "--config.model.inject_layers=1",
    "--config.model.encoder.tap_layers=(0,)",
    "--config.model.decoder.hidden_size=128",
    "--config.model.decoder.head_dim=32",
    "--config.model.decoder.ffn_dim=256",
)


@pytest.fixture(scope="module")
def planned():
    compiling.prepare_environment()
    topology = topologies.parse("v5e:2x2")
    run = compiling.build(load_config(CONFIG, SMALL), compiling.slice_devices(topology))
    compiled = compiling.compile_step(run)
    return run, compiled, estimate.plan(run, compiled, topology)


def test_the_step_is_compiled_for_the_slice(planned):
    run, compiled, plan = planned
    assert plan.fits, compiled.refusal
    assert compiled.module.devices == run.mesh.size == 4
    # More than the state, less than the unsharded state with everything that a step computes.
    assert compiling.held_bytes(run.state) < plan.memory.peak < plan.memory.usable / 100
    assert 0 < plan.estimate.mfu < 1
    assert "fits" in report.table(plan)


def test_two_slices_exchange_only_sums():
    """No row and no parameter crosses the slow network."""
    compiling.prepare_environment()
    topology = topologies.parse("v5e:2x2", slices=2)
    config = load_config(CONFIG, [*SMALL, "--config.mesh.data=2", "--config.data.batch=8"])
    run = compiling.build(config, compiling.slice_devices(topology))
    plan = estimate.plan(run, compiling.compile_step(run), topology)
    assert plan.fits
    assert {crossing.kind for crossing in plan.across} == {"all-reduce"}
    assert "between slices" in report.table(plan)


def test_layers_stay_a_loop_and_weights_arrive_beside_compute(planned):
    run, compiled, _ = planned
    layers = run.model.decoder.layers
    assert list(compiled.module.trip_counts().values()).count(layers) >= 2  # forward, backward
    gathers = [c for c in compiled.module.collectives() if c.kind == "all-gather"]
    per_layer = [c for c in gathers if c.times == layers and "_proj" in c.source]
    assert len(per_layer) >= 7
    assert any(c.overlapped for c in per_layer)


def test_neither_embedding_nor_logits_nor_optimizer_are_gathered(planned):
    run, compiled, plan = planned
    decoder, shape = run.model.decoder, run.shape
    assert not compiled.module.holds(shape.rows, shape.tokens, decoder.vocab_size)
    assert not any("optimizer" in flag or "logits" in flag for flag in plan.warnings)
