"""Arithmetic of memory and time, the table, the JSON; no compiler needed."""

import dataclasses
import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax
import pytest

from moss_audio_jax import cli, libtpu
from moss_audio_jax.devices import GIB
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.plan import __main__ as plan_verb
from moss_audio_jax.plan import compile as compiling
from moss_audio_jax.plan import estimate, report, sweep, topologies
from moss_audio_jax.plan.compile import Compiled
from moss_audio_jax.plan.hlo import Collective
from moss_audio_jax.train.__main__ import load_config

CONFIG = str(Path(__file__).parents[2] / "configs" / "tiny.py")
SVG = "{http://www.w3.org/2000/svg}"
BIG = Collective("all-reduce", 2 * 10**9, 36, 256, False, "gradient")
HIDDEN = Collective("all-gather", 10**9, 36, 256, True, "weights")


@pytest.fixture(scope="module")
def run():
    """The tiny model on four CPU devices: only shapes and shardings."""
    config = load_config(CONFIG, ["--config.mesh.tensor=2"])
    return compiling.build(config, jax.devices()[:4])


def test_names_of_slices():
    slice_ = topologies.parse("v5p:4x4x8")
    assert (slice_.generation, slice_.chips, slice_.devices) == ("v5p", 128, 128)
    assert topologies.parse("tpu7x:2x2x1").devices == 8  # two devices a chip
    for wrong in ("v5e", "v5e:16", "v5e:4x4x4", "v5p:4x4", "v9:2x2", "v5e:0x4", "v5e:4x"):
        with pytest.raises(UsageError, match="topology"):
            topologies.parse(wrong)


def test_refusals_are_read():
    message = (
        "the total memory required for HLO temporaries (18.41G) exceeds available HBM (15.75G)."
    )
    needed, allowed = compiling.out_of_memory(message)
    assert (needed, allowed) == (int(18.41 * GIB), int(15.75 * GIB))
    needed, _ = compiling.out_of_memory("Ran out of memory. Used 900.5M of 15.75G hbm. Exceeded")
    assert needed == int(900.5 * 2**20)
    assert compiling.out_of_memory("INVALID_ARGUMENT: no such flag") is None


def test_refusals_name_the_largest_arrays():
    message = """Ran out of memory in memory space hbm. Used 15.80G of 15.75G hbm.

Program hbm requirement 15.32G:
    global           12.27M

  Largest program allocations in hbm:

  1. Size: 4.50G
     Operator: op_name="jit(train_step)/jvp()/broadcast_in_dim"
     Shape: bf16[36,2,8192,4096]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 4.50G
     XLA label: custom-call.53 = custom-call(), custom_call_target="AllocateBuffer"
     Allocation type: HLO temp
     ==========================

  2. Size: 226.18M
     XLA label: overlays
     ==========================
"""
    why, first, second = compiling.refusal(message).splitlines()
    assert why.startswith("Ran out of memory in memory space hbm. Used 15.80G")
    assert first == "    4.50G bf16[36,2,8192,4096] jit(train_step)/jvp()/broadcast_in_dim"
    assert second == "    226.18M"
    assert compiling.refusal("too large\nfor it") == "too large for it"


def test_planning_needs_no_tokenizer_and_no_rows(run):
    assert run.shape.rows == 8
    assert run.batch["tokens"].shape == (8, 512)
    assert run.batch["mels"].dtype == "bfloat16"
    # A quarter of the state, except for arrays that no axis divides.
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.state))
    assert total / 4 <= compiling.held_bytes(run.state) < total / 3


def test_batch_that_does_not_divide_is_named():
    config = load_config(CONFIG, ["--config.data.batch=6"])
    with pytest.raises(UsageError, match=r"data\.batch 6"):
        compiling.build(config, jax.devices()[:4])


def test_memory_adds_up(run):
    state = compiling.held_bytes(run.state)
    compiled = Compiled(1.0, peak=state + 50 * 2**20)
    memory = estimate.split_memory(run, compiled, topologies.parse("v5e:2x2"))
    assert sum(memory.parts().values()) == memory.peak == compiled.peak
    assert memory.margin == memory.usable - memory.peak > 0
    # Adam: two float32 moments a parameter, and the step and skip counters of run and optimizer.
    assert 0 < memory.optimizer - 2 * memory.parameters < 64
    assert memory.gradients == compiling.held_bytes(run.state["trained"])
    # 3 layers, 4 rows a device, 512 tokens, 96 wide, float32
    assert memory.activations == 3 * 4 * 512 * 96 * 4
    small = estimate.split_memory(run, Compiled(1.0, peak=state), topologies.parse("v5e:2x2"))
    assert small.gradients == small.activations == 0


def test_modelled_time():
    topology = topologies.parse("v5e:16x16")
    work = 256 * 197e12  # one second of the slice's peak
    found = estimate.estimate(3e9, 197e12, (BIG, HIDDEN), topology, work)
    assert found.compute == 2.0
    assert found.kernels == 1.0
    assert found.exposed == pytest.approx(2 * 36 * 2e9 * 255 / 256 / 200e9)
    assert found.mfu == pytest.approx(1 / found.seconds)
    wide = estimate.estimate(0, 918e12, (), topologies.parse("v6e:2x2"), 1.0)
    assert wide.kernels == 2.0  # a head of 128 fills half of a unit 256 wide


def _plan(run, **changes):
    compiled = Compiled(12.0, peak=2**30)
    plan = estimate.plan(run, compiled, topologies.parse("v5e:2x2"))
    return dataclasses.replace(plan, **changes)


def test_json_has_the_promised_keys(run):
    seconds = estimate.Estimate(2.0, 0.5, 0.25, 0.4)
    plan = _plan(run, fits=True, estimate=seconds, collectives=(BIG, HIDDEN))
    found = json.loads(json.dumps(report.as_json(plan)))
    assert list(found) == [
        "topology",
        "chips",
        "fits",
        "hbm_bytes",
        "peak_bytes",
        "tokens_per_step",
        "model_flops_per_step",
        "slices",
        "collectives",
        "between_slices",
        "compile_seconds",
        "estimate",
        "compiler_flags",
    ]
    assert found["tokens_per_step"] == 8 * 512
    assert found["estimate"]["step_seconds"] == 2.75
    assert set(found["estimate"]) == {"step_seconds", "mfu", "method"}
    reduce = found["collectives"]["all-reduce"]
    assert reduce["bytes"] == reduce["exposed_bytes"] == BIG.moved
    assert found["collectives"]["all-gather"]["exposed_bytes"] == 0
    assert "modelled step 2.75 s" in report.table(plan)


def test_picture_is_a_bar_as_long_as_the_peak(run):
    memory = dataclasses.replace(_plan(run).memory, peak=20 * GIB)
    svg = ElementTree.fromstring(report.picture(_plan(run, memory=memory, fits=False)))
    assert any("does not fit" in (text.text or "") for text in svg.iter(f"{SVG}text"))
    line = next(svg.iter(f"{SVG}line"))
    assert float(line.get("x1")) == pytest.approx(20 + 720 * 15.75 / 20, abs=0.1)


def test_sweep_stops_at_what_does_not_fit_and_picks_the_fastest(run):
    def evaluate(setting):
        mfu = 0.1 * setting.rows + 0.01 * (setting.remat == "projections")
        fits = setting.rows * (2 if setting.remat == "projections" else 1) <= 4
        seconds = estimate.Estimate(1.0, 0.0, 0.0, mfu) if fits else None
        return _plan(run, fits=fits, estimate=seconds)

    series = sweep.settings((4, 1, 2, 8), (512,), ("full", "projections"), (1, 3), 8, 2)
    found = sweep.search(series, evaluate)
    tried = [(s.remat, s.rows) for s, _ in found]
    assert tried == [
        ("full", 1),
        ("full", 2),
        ("full", 4),
        ("full", 8),
        ("projections", 1),
        ("projections", 2),
        ("projections", 4),
    ]
    assert sweep.best(found)[0] == sweep.Setting(4, 512, "full", 1)
    assert sweep.best([pair for pair in found if not pair[1].fits]) is None


def test_a_killed_sweep_goes_on_with_the_plans_it_has(run, tmp_path):
    output = tmp_path / "plan.json"
    seconds = estimate.Estimate(1.0, 0.5, 0.25, 0.4)
    plans = [
        _plan(run, estimate=seconds, collectives=(BIG, HIDDEN), warnings=("head",)),
        _plan(run, fits=False, refusal="too large"),
    ]
    kept = sweep.Kept(output)
    for rows, plan in enumerate(plans):
        assert kept.plan({"rows": rows}, lambda plan=plan: plan) == plan
    partial = tmp_path / "plan.json.partial.jsonl"
    with open(partial, "a") as file:
        file.write('{"question": "half')  # what a kill leaves

    again = sweep.Kept(output)
    for rows, plan in enumerate(plans):
        assert again.plan({"rows": rows}, lambda: pytest.fail("compiled again")) == plan
    assert again.plan({"rows": 0, "flags": "other"}, lambda: plans[1]) == plans[1]
    assert len(partial.read_text().splitlines()) == 3
    again.drop()
    assert not partial.exists()
    partial.write_text("{}\n")
    with pytest.raises(InputError, match="remove it"):
        sweep.Kept(output)


def test_setting_changes_the_config_it_is_given_only_by_copy():
    config = load_config(CONFIG, ["--config.train.accumulate=2"])
    new = sweep.Setting(2, 256, "full", 4).apply(config, 16)
    assert (new.data.batch, new.data.length, new.mesh.tensor) == (2 * 4 * 2, 256, 4)
    assert (config.data.batch, config.mesh.tensor) == (8, 1)


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(libtpu, "installed", lambda: False)
    code = cli.main(["plan", "--config", CONFIG, "--topology", "v5e:2x2"])
    assert code == 2
    assert capsys.readouterr().err == (
        "error: plan needs the TPU compiler: pip install -e '.[plan]'\n"
    )


def test_a_step_that_does_not_fit_has_an_exit_code_of_its_own(monkeypatch, capsys, tmp_path):
    """Compiling, which needs libtpu, is replaced; config, report and output are those of `plan`."""
    monkeypatch.setattr(compiling, "prepare_environment", lambda: None)
    monkeypatch.setattr(compiling, "slice_devices", lambda topology: jax.devices()[:4])
    refused = Compiled(1.0, peak=20 * GIB, limit=16 * GIB, refusal="too large")
    monkeypatch.setattr(compiling, "compile_step", lambda run: refused)
    output = tmp_path / "plan.json"
    words = ["plan", "--config", "tiny", "--topology", "v5e:2x2", "--output", str(output)]
    assert cli.main(words) == 3
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert json.loads(output.read_text())["fits"] is False
    assert "code 3: it does not fit" in plan_verb.__doc__


def test_without_a_tpu_libtpu_is_quiet_and_shared(monkeypatch):
    """Only tests when these variables are set; the compiler tests show their effect."""
    monkeypatch.setattr(os, "environ", {"TPU_WORKER_HOSTNAMES": "mine"})
    monkeypatch.setattr(libtpu, "installed", lambda: False)
    libtpu.quieten()
    assert os.environ == {"TPU_WORKER_HOSTNAMES": "mine"}
    monkeypatch.setattr(libtpu, "installed", lambda: True)
    monkeypatch.setattr(libtpu.glob, "glob", lambda pattern: [pattern])  # a machine with TPUs
    libtpu.quieten()
    assert os.environ == {"TPU_WORKER_HOSTNAMES": "mine"}
    monkeypatch.setattr(libtpu.glob, "glob", lambda pattern: [])
    libtpu.quieten()
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine"
    assert os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
