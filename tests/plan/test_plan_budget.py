"""The budget: formulas against published values, by hand and by simulation; no compiler needed."""

import itertools
import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from moss_audio_jax import cli
from moss_audio_jax.config import ModelConfig
from moss_audio_jax.errors import UsageError
from moss_audio_jax.models import flops
from moss_audio_jax.plan import budget, goodput
from moss_audio_jax.plan import compile as compiling
from moss_audio_jax.plan.budget import Assumed, Mix
from moss_audio_jax.plan.goodput import Saving
from moss_audio_jax.train.__main__ import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = ["plan", "--budget", "--config", str(CONFIGS / "tiny.py"), "--topology", "v5e:2x2"]
MINUTE = 60.0


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """The budget never uses libtpu."""
    monkeypatch.setattr(compiling, "prepare_environment", lambda: pytest.fail("asked for libtpu"))


def ask(tmp_path, *more):
    """The JSON of a budget of the tiny config."""
    output = tmp_path / "budget.json"
    assert cli.main([*TINY, "--tokens", "1e15", "--output", str(output), *more]) == 0
    return json.loads(output.read_text())


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mtbf", "best"), [(1440, 117), (360, 57), (15, 9.1)])
def test_intervals_are_those_that_daly_printed(mtbf, best):
    # Figures 3 to 5 of doi 10.1016/j.future.2004.11.016: saves of 5 minutes.
    assert goodput.daly_interval(5, mtbf) == pytest.approx(best, rel=0.01)


@pytest.mark.parametrize(("block", "mtbf"), [(3.0, 6 * 3600), (300, 6 * 3600), (300, 3600)])
def test_daly_interval_is_the_best_of_all(block, mtbf):
    times = Saving(block, 0.0, 500.0)
    tried = np.geomspace(block / 10, 10 * mtbf, 3000)
    best = max(goodput.expected_goodput(t, times, mtbf) for t in tried)
    chosen = goodput.expected_goodput(goodput.daly_interval(block, mtbf), times, mtbf)
    assert best - 1e-3 < chosen <= best + 1e-6


@pytest.mark.parametrize(
    ("interval", "times", "mtbf"),
    [
        (1800, Saving(2.3, 4.3, 524), 50_000),  # as on 8,192 chips
        (600, Saving(60, 0, 300), 3600),  # Daly's own model
        (600, Saving(60, 500, 300), 3600),  # slow writes
        (600, Saving(60, 600, 1200), 1000),  # hardly anything gets done
    ],
)
def test_simulation_meets_the_expectation(interval, times, mtbf):
    rng = np.random.default_rng(0)
    work = 200 * mtbf  # many failures, so that the end of the run does not count
    wall = np.mean([goodput.simulate(work, interval, times, mtbf, rng) for _ in range(200)])
    expected = goodput.expected_goodput(interval, times, mtbf)
    assert work / wall == pytest.approx(expected, rel=0.01)
    assert expected < (interval / (interval + times.block)) - times.restart / mtbf / 10


def test_run_without_failures_takes_its_work_its_saves_and_the_last_write():
    wall = goodput.simulate(1000, 300, Saving(7, 20, 99), 1e15, np.random.default_rng(0))
    assert wall == pytest.approx(1000 + 4 * 7 + 20)
    # A whole number of intervals ends with one save, not two.
    wall = goodput.simulate(900, 300, Saving(7, 20, 99), 1e15, np.random.default_rng(0))
    assert wall == pytest.approx(900 + 3 * 7 + 20)


def test_failure_loses_what_was_not_yet_whole():
    class Lives:
        """Fails once, then never."""

        def __init__(self, first):
            self.left = [first, 1e12]

        def exponential(self, mean):
            return self.left.pop(0)

    times = Saving(10, 50, 200)  # cycles of 110: whole at 160, 270, ...
    clean = 1000 + 10 * 10 + 50
    just_before = goodput.simulate(1000, 100, times, 1.0, Lives(159.0))
    assert just_before == pytest.approx(159 + 200 + clean)
    just_after = goodput.simulate(1000, 100, times, 1.0, Lives(161.0))
    assert just_after == pytest.approx(161 + 200 + clean - 110)


# --- tokens, work, hosts -------------------------------------------------------------------------


def test_the_average_token_by_hand():
    # 10 s: 125 tokens, markers "2" "4" "6" "8" "10" (6 tokens), start, end; 3 chunks of 4 s.
    found = budget.mix(Assumed(text_share=0.3), ModelConfig().encoder)
    assert found.row_tokens == 125 + 6 + 2 + 180
    assert found.seconds == pytest.approx(0.7 * 10 / 313)
    assert found.audio_tokens == pytest.approx(0.7 * 125 / 313)
    assert found.chunks == pytest.approx(0.7 * 3 / 313)
    assert found.text_tokens == pytest.approx(0.3 + 0.7 * 180 / 313)
    assert budget.hours_to_tokens(1, found) == pytest.approx(3600 * 313 / 7)


def test_full_rows_need_the_flops_of_a_train_step():
    model, rows, length, chunks, frames = ModelConfig(), 4, 8192, 128, 400
    full = Mix(0, chunks * frames // 8 / length, chunks / length, 0, 0)
    parts = budget.flops_per_token(model, length, frames, full)
    step = flops.train_step(model, rows, length, chunks, frames)
    assert sum(parts.values()) == pytest.approx(step / rows / length)
    # 6 FLOPs per weight and token are most of it.
    weights = 36 * (4096 * 128 * (32 + 32 + 8 + 8) + 3 * 4096 * 12288) + 4096 * 151936
    assert 1 < parts["decoder"] / (6 * weights) < 1.2


def test_rows_are_full_of_tokens_or_of_chunks():
    few = Mix(0, 0, 0.01, 0, 0)
    assert budget.tokens_in_use(8192, 128, 0.99, few) == pytest.approx(0.99 * 8192)
    assert budget.tokens_in_use(8192, 41, 0.99, few) == pytest.approx(4100)
    assert budget.tokens_in_use(8192, 0, 0.99, Mix(0, 0, 0, 1, 0)) == pytest.approx(0.99 * 8192)


def test_what_hosts_need_by_hand():
    # 100 s of audio per second on 2 hosts, at 36 s per core and second.
    average = Mix(seconds=0.1, audio_tokens=1, chunks=1, text_tokens=0.5, row_tokens=1)
    found = budget.host_needs(1000, average, 8, Assumed(audio_hours_per_core_second=0.01))
    assert (found["hosts"], found["cores"]) == (2, pytest.approx(100 / 36))
    assert found["cores_per_host"] == pytest.approx(50 / 36)
    assert found["read_bytes_per_second"]["flac"] == pytest.approx(100 * 135e3 / 8 + 500 * 4)
    assert found["read_bytes_per_second"]["mel"] == pytest.approx(100 * 100 * 128 * 2 + 500 * 4)


def test_checkpoint_times_are_a_hosts_share_or_the_stores():
    few = budget.saving(int(100e9), 40, Assumed())  # 10 hosts: 10 GB each at 1 GB/s
    assert (few.block, few.write) == (pytest.approx(2 + 2), pytest.approx(10))
    many = budget.saving(int(100e9), 4000, Assumed())
    assert many.write == pytest.approx(4)  # 25 GB/s
    assert many.restart == pytest.approx(100 + 300 + 120 + 4)


# --- the command ---------------------------------------------------------------------------------


def test_the_papers_pretraining(tmp_path, capsys):
    output = tmp_path / "budget.json"
    config = f"{CONFIGS / 'pretrain_full.py'}:8b"
    asked = ["--tokens", "1.2e12", "--mfu", "0.45", "--output", str(output)]
    assert cli.main([*TINY[:3], config, "--topology", "v5e:16x16", *asked]) == 0
    found = json.loads(output.read_text())
    assert found["assumed"]["text_share"]["value"] == pytest.approx(0.3)  # 30 / 40 / 30
    # Weights and two moments, float32, and a few counters.
    assert 0 < found["checkpoint_bytes"] - 12 * 9_052_463_488 < 64
    useful = found["flops_per_token"]
    assert useful["encoder"] + useful["adapter"] < 0.1 * useful["decoder"]
    # 6 N D at 45% of 256 chips, attention and padding come on top.
    least = 6 * 8.4e9 * 1.2e12 / (0.45 * 256 * 197e12) / 86400
    assert least < found["sizes"][0]["days"] < 1.5 * least
    # A failure every 6 hours, from 419 in 54 days on twice as many chips.
    assert found["sizes"][-1]["mtbf_seconds"] == pytest.approx(2 * 54 * 86400 / 419)
    capsys.readouterr()


def test_share_of_text_where_the_recipe_has_none():
    assert budget.text_share(load_config(f"{CONFIGS / 'pretrain_adapter.py'}:8b")) == 0
    parts = {"a": {"weight": "sqrt"}, "text": {"weight": "sqrt"}}
    data = ml_collections.ConfigDict({"data": {"train": (), "mixture": parts}})
    with pytest.raises(UsageError, match="text_share="):
        budget.text_share(data)


def test_plan_and_its_mfu_give_one_budget(tmp_path, capsys):
    by_mfu = ask(tmp_path, "--mfu", "0.25")
    assert by_mfu["step"]["source"] == "MFU assumed"
    per_token = by_mfu["step_flops_per_place"]
    slice_rate = 0.25 * 4 * 197e12  # v5e:2x2
    places = by_mfu["step"]["rows_per_chip"] * 4 * 512
    assert by_mfu["step"]["seconds"] == pytest.approx(places * per_token / slice_rate)

    # As `plan --output` writes it for a slice of another size.
    plan = tmp_path / "plan.json"
    seconds = by_mfu["step"]["seconds"]
    raw = {
        "topology": "v5e:4x4",
        "chips": 16,
        "tokens_per_step": 4 * places,
        "model_flops_per_step": 4 * places * per_token,
        "estimate": {"step_seconds": seconds, "mfu": 0.25, "method": ""},
    }
    plan.write_text(json.dumps(raw))
    by_plan = ask(tmp_path, "--plan", str(plan))
    for one, two in zip(by_mfu["sizes"], by_plan["sizes"], strict=True):
        for key in ("step_tokens", "days", "goodput", "audio_days"):
            assert one[key] == pytest.approx(two[key]), key

    for change, says in (
        ({"estimate": None}, "does not fit"),
        ({"model_flops_per_step": 1.0}, "FLOPs a token"),
        ({"topology": "v5p:2x2x4"}, "v5p:2x2x4"),
    ):
        plan.write_text(json.dumps(raw | change))
        assert cli.main([*TINY, "--plan", str(plan)]) == (1 if "estimate" in change else 2)
        assert says in capsys.readouterr().err
    del raw["estimate"]
    plan.write_text(json.dumps(raw))
    assert cli.main([*TINY, "--plan", str(plan)]) == 1
    assert "estimate is missing" in capsys.readouterr().err


def test_budget_of_the_tiny_model(tmp_path, capsys):
    picture = tmp_path / "goodput.svg"
    assumed = "clip_seconds=20,chip_mtbf_hours=2000"
    found = ask(tmp_path, "--picture", str(picture), "--assume", assumed)
    table = capsys.readouterr().out
    assert "no --plan or --mfu given" in table  # an assumption says that it is one
    assert found["mix"]["chunks"] * 20 == pytest.approx(5 * found["mix"]["seconds"])
    assert found["assumed"]["clip_seconds"]["value"] == 20

    sizes = found["sizes"]
    assert [row["chips"] for row in sizes] == list(budget.CHIPS)
    for small, large in itertools.pairwise(sizes):
        assert large["tokens_per_second"] == pytest.approx(2 * small["tokens_per_second"])
        assert large["mtbf_seconds"] == pytest.approx(small["mtbf_seconds"] / 2)
        assert large["goodput_expected"] < small["goodput_expected"]
    for row in sizes:
        assert row["days"] * 86400 == pytest.approx(
            1e15 / row["tokens_per_second"] / row["goodput"]
        )
        low, high = row["goodput_5_95"]
        assert low <= row["goodput"] <= high <= 1
        assert row["goodput_as_configured"] <= row["goodput_expected"] * 1.01
        assert f"{row['goodput']:.2%}" in table
    tokens = found["audio_hours_tokens"]
    speed = sizes[0]["tokens_per_second"]  # no text rows: the same mix, as tiny has none
    days = tokens / speed / 86400 / sizes[0]["goodput"]
    assert sizes[0]["audio_days"] == pytest.approx(days)

    svg = ElementTree.fromstring(picture.read_text())
    dots = list(svg.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(dots) == len(sizes)
    heights = [float(dot.get("cy")) for dot in dots]
    assert heights == sorted(heights)  # goodput falls: lower on the page
    assert all(60 <= y <= 280 for y in heights)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--mfu", "1.5"], "--mfu 1.5"),
        (["--tokens", "-3"], "--tokens -3"),
        (["--audio-hours", "nan"], "--audio-hours"),
        (["--mfu", "0.4", "--plan", "x.json"], "use one"),
        (["--sweep"], "--sweep"),
        (["--assume", "fil=1"], "'fil=1'"),
        (["--assume", "fill=1.2"], "number of share"),
        (["--assume", "chips_per_host=0"], "number of chips"),
        (["--assume", "flac=inf"], "number of kbit/s"),
        (["--assume", "clip_seconds=3000"], "data.length is"),
        (["--assume", "chip_mtbf_hours=1"], "no time to train"),
    ],
)
def test_bad_use_is_one_line(options, says, capsys):
    assert cli.main([*TINY, *options]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert says in line


def test_options_of_the_budget_without_it(capsys):
    assert cli.main([*[word for word in TINY if word != "--budget"], "--tokens", "1e9"]) == 2
    assert "add --budget" in capsys.readouterr().err
    assert math.isclose(budget.assume("fill=0.5,start=0", Assumed()).fill, 0.5)
