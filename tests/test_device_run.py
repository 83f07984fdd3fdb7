"""tools/device/run.py: a tiny part, and what becomes of parts that fail, take too long or come too
late. It does not cover an accelerator; what is measured there is in the notes of docs/findings."""

import json
import os
import signal
import subprocess
import sys

import pytest
from runs import ROOT
from world_helpers import needs_espeak

from tools.device import run as device
from tools.device import small
from tools.device.measure import TINY
from tools.small import train


@pytest.fixture
def lines(tmp_path):
    """lines(parts, budget): what a run of these parts writes to its file."""

    def run(parts, budget=600):
        out = tmp_path / "folder" / "run.jsonl"
        device.run(parts, budget, device.Printer(out), tiny=True)
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run


def test_a_tiny_part_prints_its_numbers(tmp_path):
    out = tmp_path / "run.jsonl"
    command = [sys.executable, ROOT / "tools/device/run.py", "--tiny", "--parts", "attention"]
    done = subprocess.run([*command, "--out", out], capture_output=True, text=True, check=True)
    assert done.stdout == out.read_text()
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["most_segments"] for line in found] == [0, 16]
    for line in found:
        assert line["part"] == "attention"
        assert line["device"] == "cpu"
        assert line["copy_gb_per_second"] > 0
        assert line["finite"]
        assert set(line["error"]) == {"out", "d_query", "d_key", "d_value"}
        assert 0 < max(line["error"].values()) < 0.02  # bfloat16 beside float32
        assert 0 < line["forward_ms"] < line["both_ms"]
        assert line["at"] > 0
    assert found[1]["agrees"]


def test_parts_that_fail_or_take_too_long_end_alone(lines):
    found = lines([device.Part("nothing", "", 60), device.Part("parity", "golden", 0.2)])
    assert "KeyError: 'nothing'" in found[0]["error"]
    assert found[1]["error"].startswith("took more than 0 s")


def test_a_part_without_time_is_named(lines):
    option = device.Part("train", "audio:mask", 60, ("--xla_flag=1", "why"))
    assert lines([option], 10) == [
        {
            "part": "train",
            "setting": "audio:mask",
            "xla": "--xla_flag=1",
            "why": "why",
            "left_out": "10 s are left; it is given 60",
            "at": 0.0,
        }
    ]


def test_the_compiler_knows_every_option():
    """XLA ends the process at the first option that it does not know."""
    options = " ".join(part.xla[0] for part in device.PLAN if part.xla)
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    subprocess.run(command, check=True, env=os.environ | {"XLA_FLAGS": options})


@needs_espeak
def test_the_small_model_goes_on_where_it_is(tmp_path):
    (tmp_path / "encoder" / "export").mkdir(parents=True)  # made before
    before = signal.getsignal(signal.SIGTERM)
    try:
        found = list(small.measure(str(tmp_path), TINY))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [(line["step"], line["finished"]) for line in found] == [
        ("data", True),
        ("tokenizer", True),
    ]
    assert set(train.steps_of(tmp_path, "gpu")) == set(train.STEPS) - {"ship"}
