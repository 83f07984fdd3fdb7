"""A run with rewards: arithmetic on shapes, and the real TPU compiler on a small model."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moss_audio_jax import cli, libtpu
from moss_audio_jax.config import ProcessorConfig
from moss_audio_jax.devices import GIB
from moss_audio_jax.models import cache
from moss_audio_jax.plan import compile as compiling
from moss_audio_jax.plan import rewarded, rewarded_report, topologies
from moss_audio_jax.plan.compile import Compiled, held_bytes
from moss_audio_jax.plan.rewarded import Assumed
from moss_audio_jax.post_train.batches import lay_out
from moss_audio_jax.post_train.rollout import Sampler
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.train import setup
from moss_audio_jax.train.__main__ import load_config
from moss_audio_jax.train.start import read_start

CONFIG = f"{Path(__file__).parents[2] / 'configs' / 'dapo.py'}:small"
MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=2")
MOVED = "--config.policy.updates=2"


def built(*words):
    return rewarded.build(load_config(CONFIG, [*MESH, *words]), jax.devices()[:4])


@pytest.fixture(scope="module")
def run():
    return built(MOVED)


def assessed(run, **compiled):
    """A plan without the compiler: all programs were refused, or they are given."""
    programs = dict.fromkeys(("prefill", "decode", "scoring", "step"), Compiled(1.0, peak=GIB))
    if not run.scores:
        programs["scoring"] = None
    return rewarded.assess(run, topologies.parse("v5e:2x2"), Assumed(), **programs | compiled)


def test_the_step_takes_the_arrays_of_the_run(run):
    """`lay_out` is the run's own; that it holds what the loss reads, tests of the run show."""
    shape = dataclasses.replace(run.learning.shape, rows=4)
    model = run.learning.model
    arrays, _ = lay_out([], shape, 4, model.encoder, ProcessorConfig(), ("old_logprobs",))
    planned = run.learning.batch
    assert {name: (x.shape[1:], x.dtype) for name, x in arrays.items()} == {
        name: (x.shape[1:], x.dtype) for name, x in planned.items()
    }
    assert {len(x.shape) and x.shape[0] for x in planned.values()} == {24}
    assert {"branch_ids", "old_logprobs", "answers"} <= planned.keys()
    on_policy = built()
    assert on_policy.scores == ()
    assert "old_logprobs" not in on_policy.learning.batch
    assert rewarded.compile_scoring(on_policy) is None


def test_rollouts_have_the_sampler_s_mesh_and_cache(run):
    config = load_config(CONFIG, MESH)
    config.data.train = ("rows.jsonl",)
    mesh = make_mesh(**config.mesh, devices=jax.devices()[:4])
    policy = config.policy
    sizes = policy.answers, policy.prompt_tokens, policy.new_tokens, policy.slots
    sampler = Sampler(setup.build(config, read_start(config), mesh), *sizes)
    assert run.rollouts.size == sampler._size
    assert run.rollouts.mesh == sampler._mesh
    assert dict(run.rollouts.mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 2, "sequence": 1}
    # 16 slots in two groups: 8 answers to at most two questions, as 8 may start within one's 16.
    each = 8 * (1 + cache.pages_for(160 + 16)) + 2 * cache.pages_for(320)
    assert cache.pages_of(run.rollouts.state.cache) == each


def test_bytes_of_the_handoff_by_hand():
    mesh = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])

    def moved(before, after):
        where = [NamedSharding(mesh, P(*axes)) for axes in (before, after)]
        leaf = jax.ShapeDtypeStruct((8, 4), "bfloat16", sharding=where[0])
        return rewarded.moved_bytes([leaf], [where[1]])

    assert moved((), (None, "tensor")) == 0  # it has all
    assert moved(("data",), ()) == 2 * 16  # the other half
    assert moved(("tensor",), (None, "tensor")) == 2 * 8  # of a half it has a half
    assert moved(("data", "tensor"), ("data", "tensor")) == 0


def test_the_model_that_is_handed_over_is_a_bfloat16_copy():
    run = built("--config.train.dtype=bfloat16")
    handed = rewarded.training_layout(run.learning)
    trained = held_bytes(run.learning.state["trained"])
    assert held_bytes(handed) == pytest.approx(trained / 2, rel=0.01)
    assert {str(x.dtype) for x in jax.tree.leaves(handed)} == {"bfloat16"}


def test_what_a_phase_asks_for_by_hand():
    policy = load_config(CONFIG, []).policy
    policy.update(prompts=128, answers=16, new_tokens=2048, slots=1024, refills=8)
    asked = rewarded.asked_of(policy, Assumed())
    assert asked.passes == (128, 64, 32, 16, 8, 4, 2, 1)
    # 2 x 1,024 steps and 1,024 for the last answers; then as many answers as slots, or fewer.
    assert asked.steps == 3072 + 7 * 2048
    assert asked.answer == 1024
    policy.refills = 1
    assert rewarded.asked_of(policy, Assumed()).passes == (128, 64)
    policy.refills = 8
    assert rewarded.asked_of(policy, Assumed(no_spread=0.0)).passes == (128,)
    policy.dynamic = False
    assert rewarded.asked_of(policy, Assumed()).passes == (128,)
    policy.update(dynamic=True, updates=2)
    assert rewarded.asked_of(policy, Assumed()).passes[0] == 256


def test_memory_at_each_moment(run):
    plan = assessed(run)
    state, learning = held_bytes(run.learning.state), run.learning
    weights, kept = held_bytes(run.rollouts.params), held_bytes(run.rollouts.state)
    assert plan.peaks["step"] == GIB
    # The scoring's program has the weights, but not the optimizer's state and the counters.
    beside = {name: learning.state[name] for name in ("opt", "step", "skipped")}
    assert plan.peaks["scoring"] == GIB + held_bytes(beside)
    # Beside its own peak: the prefill's program has all weights, that of decoding not the encoder.
    assert plan.peaks["rollouts"] > state + GIB + kept
    assert plan.peaks["handoff"] > state + weights + kept
    assert not plan.fits
    assert plan.seconds is None
    assert set(plan.refusals) == {"prefill", "decode", "scoring", "step"}
    written = json.loads(json.dumps(rewarded_report.as_json(plan)))
    assert written["rewards"]["step_seconds"] is None
    assert "DOES NOT FIT" in rewarded_report.table(plan)
    assert "scoring" not in assessed(built()).peaks


def test_a_decode_step_reads_the_mean_reach_of_every_slot(run):
    plan = assessed(run)
    reach = cache.pages_for(160 + 40) * cache.PAGE  # half of the prompt, a quarter of the answer
    decoder = run.learning.model.decoder
    token = 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * 4  # float32
    assert plan.rollouts.cache_read == pytest.approx(16 * reach * token / 4, abs=4)


def test_assumptions_are_options_of_such_a_run(capsys, monkeypatch):
    monkeypatch.setattr(compiling, "prepare_environment", lambda: None)
    monkeypatch.setattr(compiling, "slice_devices", lambda topology: jax.devices()[:4])
    words = ["plan", "--config", CONFIG, "--topology", "v5e:2x2", *MESH, "--assume"]
    assert cli.main([*words, "fill=0.5"]) == 2
    assert "answer_share" in capsys.readouterr().err
    words[2] = str(Path(__file__).parents[2] / "configs" / "tiny.py")
    assert cli.main([*words, "answer_share=1"]) == 2
    assert "--assume is an option of --budget and of a run with rewards" in capsys.readouterr().err


# --- the price -----------------------------------------------------------------------------------

SECONDS = {"handoff": 0.5, "prefill": 1.5, "decode": 20.0, "step": 8.0}


@pytest.fixture
def plan_file(tmp_path):
    written = rewarded_report.as_json(assessed(built()))
    written["fits"] = True
    written["rewards"] |= {"seconds": SECONDS, "step_seconds": sum(SECONDS.values())}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(written))
    return path


def price(*more):
    topology = [] if "--topology" in more else ["--topology", "v5e:2x2"]
    words = ["plan", "--budget", "--config", CONFIG, *topology]
    return cli.main([*words, *map(str, more)])


def test_a_run_is_priced_by_the_steps_of_its_plan(plan_file, tmp_path, capsys):
    output = tmp_path / "price.json"
    rare = "--assume=chip_mtbf_hours=1e9,save_sync=0"
    assert price("--plan", plan_file, "--output", output, rare) == 0
    found = json.loads(output.read_text())
    assert found["steps"] == 400
    assert found["days_without_failures"] == pytest.approx(400 * 30 / 86400)
    assert found["days"] == pytest.approx(400 * 30 / 86400, rel=0.01)
    assert found["chip_days"] == pytest.approx(4 * found["days"])
    asked = (8 + 4 + 2 + 1) * 16
    assert found["answers"] == 400 * asked
    assert found["new_tokens"] == 400 * asked * 80
    assert "decode 67%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "priced by its plan"),
        (["--plan", "FILE", "--tokens", "1e9"], "--tokens is of a run over rows"),
        (["--plan", "FILE", "--config.policy.answers=8"], "policy.answers is 16, in the config 8"),
        (["--plan", "FILE", "--topology", "v5e:4x4"], "is for v5e:2x2"),
        (["--plan", "OTHER"], "rewards is missing"),
        (["--plan", "TOO LARGE"], "does not fit"),
    ],
)
def test_what_cannot_be_priced_is_named(plan_file, capsys, more, words):
    written = json.loads(plan_file.read_text())
    files = {"FILE": plan_file}
    for name, content in (("OTHER", {}), ("TOO LARGE", written | {"fits": False})):
        files[name] = plan_file.with_name(f"{name}.json")
        files[name].write_text(json.dumps(content))
    assert price(*(files.get(word, word) for word in more)) != 0
    assert words in capsys.readouterr().err


# --- with the compiler ---------------------------------------------------------------------------


@pytest.mark.skipif(
    not libtpu.installed(), reason="libtpu is not installed: pip install -e '.[plan]'"
)
def test_all_programs_are_compiled_for_the_slice():
    compiling.prepare_environment()
    topology = topologies.parse("v5e:2x2")
    words = [*MESH, MOVED, "--config.init_from=", "--config.train.dtype=bfloat16"]
    words += ["--config.train.remat=full", "--config.data.batch=4", "--config.data.length=256"]
    words += ["--config.policy.prompts=1", "--config.policy.answers=4"]
    words += ["--config.policy.prompt_tokens=96", "--config.policy.new_tokens=32"]
    tiny = load_config(str(Path(CONFIG).with_name("tiny.py")), []).model
    config = load_config(CONFIG, words)
    config.model = tiny
    config.model.decoder.update(hidden_size=256, head_dim=128, heads=4, layers=2)
    config.model.encoder.update(layers=2)
    run = rewarded.build(config, compiling.slice_devices(topology))
    plan = rewarded.plan(run, topology, Assumed())
    assert plan.fits, plan.refusals
    assert list(plan.seconds) == ["handoff", "prefill", "decode", "scoring", "step"]
    assert all(seconds > 0 for seconds in plan.seconds.values())
    # Scoring is a part of the step.
    assert plan.scoring.seconds < plan.step.estimate.seconds
    assert held_bytes(run.learning.state) < min(plan.peaks.values())
    table = rewarded_report.table(plan)
    assert "a step with its rollouts: fits" in table
    assert "1 + 1" not in table  # a phase of two steps
