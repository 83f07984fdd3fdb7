"""Whole runs: they learn, continue exactly, run on many processes, and leave what they should."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import moss_audio_jax as mj
from moss_audio_jax.errors import InputError
from moss_audio_jax.train.loop import train
from moss_audio_jax.weights.adapters import load_adapters
from moss_audio_jax.weights.checkpoint import flatten
from moss_audio_jax.weights.convert import convert

ROOT = Path(__file__).parents[2]


def log(workdir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def test_it_learns_by_heart_and_the_export_says_so(run_config, corpus, tmp_path):
    config = run_config("train.steps=60", "train.log_every=20", "checkpoint.every=60",
                        "optimizer.learning_rate=1e-2", "checkpoint.export=official",
                        'data.tasks=["pitch", "tone"]', "eval.every=60", "eval.samples=2",
                        "data.batch=4", "eval.max_new_tokens=16")  # fmt: skip
    config.data.eval = config.data.train
    assert train(config, tmp_path) == 0
    rows = log(tmp_path)
    last = next(row for row in reversed(rows) if "loss" in row)
    keys = {"step", "loss", "tokens", "audio_seconds", "grad_norm", "learning_rate", "padding",
            "loss/pitch", "loss/tone", "audio_hours_seen"}  # fmt: skip
    assert keys <= set().union(*rows)
    assert last["loss"] < 0.02
    assert next(row["eval_loss"] for row in rows if "eval_loss" in row) < 0.02
    samples = log(tmp_path, "samples.jsonl")
    assert [s["answer"] for s in samples] == [s["expected"] for s in samples]

    model = mj.MossAudio.load(tmp_path / "export", "float32")
    assert model.tokenizer is not None
    assert not model.random_weights
    for line in (corpus / "rows.jsonl").read_text().splitlines():
        audio, question, answer = (part["content"] for part in json.loads(line)["conversation"])
        reply = model.generate(question, [corpus / audio], max_new_tokens=16)
        assert (reply.text, reply.finish_reason) == (answer, "stop")


def command(config_file: Path, workdir: Path, *overrides: str) -> list[str]:
    options = [f"--config.{o}" for o in overrides]
    return [sys.executable, "-m", "moss_audio_jax.train", "--config", str(config_file),
            "--workdir", str(workdir), *options]  # fmt: skip


def environment(tmp_path: Path) -> dict[str, str]:
    """One device, and programs compiled once for all the starts of a test."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return os.environ | {
        "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture
def small_run(corpus, tmp_path) -> Path:
    """A config file of a run small enough to be started many times."""
    file = tmp_path / "small.py"
    file.write_text(
        f"""
import sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "configs")!r}]
import common, tiny, tiny_model

def get_config():
    c = tiny.get_config()
    c.model = common.sizes(tiny_model.tiny_config(512))
    c.tokenizer = {str(corpus / "start")!r}
    c.data.train = ({str(corpus / "rows.jsonl")!r},)
    c.data.length, c.data.chunks, c.data.batch, c.data.streams = 256, 4, 8, 8
    c.data.log_rows = True
    c.data.window = 3
    c.train.steps, c.train.log_every = 24, 1
    c.checkpoint.every, c.checkpoint.export = 2, "none"
    return c
"""
    )
    return file


def test_killed_at_any_moment_a_run_continues_bit_for_bit(small_run, tmp_path):
    env = environment(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(small_run, whole), env=env, check=True, capture_output=True)
    expected = log(whole)
    assert [row["step"] for row in expected] == list(range(1, 25))

    # Killed once so many steps are logged: right after a save began (even) and between saves.
    for steps in (3, 6, 10, 15, 19):
        run = subprocess.Popen(command(small_run, killed), env=env, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while run.poll() is None and time.monotonic() < deadline:
            done = killed / "metrics.jsonl"
            if done.exists() and f'"step": {steps},' in done.read_text():
                break
            time.sleep(0.005)
        assert run.poll() is None, "the run ended before it was killed"
        run.send_signal(signal.SIGKILL)
        run.wait()
    subprocess.run(command(small_run, killed), env=env, check=True, capture_output=True)

    found = log(killed)
    for key in ("step", "loss", "grad_norm", "tokens", "tokens_seen"):
        assert [row[key] for row in found] == [row[key] for row in expected], key
    assert log(killed, "rows-0.jsonl") == log(whole, "rows-0.jsonl")


def test_sigterm_saves_and_the_next_start_continues(small_run, tmp_path):
    env = environment(tmp_path)
    options = ("checkpoint.every=1000", "train.steps=100000")
    run = subprocess.Popen(
        command(small_run, tmp_path / "run", *options), env=env, stderr=subprocess.PIPE, text=True
    )
    for line in run.stderr:
        if line.startswith("step 5/"):
            run.send_signal(signal.SIGTERM)
            break
    rest = run.stderr.read()
    assert run.wait() == 0
    assert "asked to stop: saved step" in rest
    saved = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    steps = f"train.steps={saved + 1}"
    again = subprocess.run(
        command(small_run, tmp_path / "run", steps), env=env, check=True, capture_output=True,
        text=True,
    )  # fmt: skip
    assert f"continues at step {saved} " in again.stderr
    assert [row["step"] for row in log(tmp_path / "run")] == list(range(1, saved + 2))


def test_many_processes_are_one(small_run, tmp_path):
    env = environment(tmp_path)
    mesh = ("mesh.data=2", "mesh.fsdp=4", "train.steps=4", "checkpoint.every=4")

    def run(processes: int, workdir: str, *more: str) -> None:
        launcher = [sys.executable, str(ROOT / "launch" / "local_processes.py"), str(processes),
                    "--devices", str(8 // processes), "--"]  # fmt: skip
        subprocess.run(
            [*launcher, *command(small_run, tmp_path / workdir, *mesh, *more)],
            env=env, check=True, capture_output=True,
        )  # fmt: skip

    run(1, "one", "train.steps=8")
    expected = log(tmp_path / "one")

    def seen(workdir: str) -> list[list]:
        """The rows of each step's global batch, from the logs of all processes in order."""
        logs = [log(tmp_path / workdir, f.name)
                for f in sorted((tmp_path / workdir).glob("rows-*.jsonl"))]  # fmt: skip
        steps: dict[int, list] = {}
        for row in (row for part in logs for row in part):
            steps.setdefault(row["step"], []).extend(row["rows"])
        return [steps[step] for step in sorted(steps)]

    run(2, "two")
    for process_count in (1, 4):  # what two processes saved
        workdir = f"two-{process_count}"
        subprocess.run(["cp", "-r", str(tmp_path / "two"), str(tmp_path / workdir)], check=True)
        for file in (tmp_path / workdir).glob("rows-*.jsonl"):
            file.unlink()
        run(process_count, workdir, "train.steps=8")
        found = log(tmp_path / workdir)
        np.testing.assert_allclose(
            [row["loss"] for row in found], [row["loss"] for row in expected], rtol=1e-5
        )
        assert seen(workdir) == seen("one")[4:]
    assert seen("two") == seen("one")[:4]


def test_lora_is_saved_alone_and_merged_in_the_export(run_config, corpus, tmp_path):
    config = run_config("lora.rank=2", "lora.alpha=4", "train.steps=3", "optimizer.warmup=1",
                        "optimizer.learning_rate=1e-2", "checkpoint.export=official")  # fmt: skip
    config.init_from = str(corpus / "start")
    assert train(config, tmp_path) == 0
    base = mj.MossAudio.load(corpus / "start", "float32")
    merged = mj.MossAudio.load(tmp_path / "export", "float32")
    adapters, alpha = load_adapters(tmp_path / "lora", base.config)
    assert len(adapters) == 14
    before, after = flatten(base.params), flatten(merged.params)
    for path, leaf in before.items():
        module = path.removesuffix("/kernel")
        if f"{module}/lora_a" in adapters:
            a, b = adapters[f"{module}/lora_a"], adapters[f"{module}/lora_b"]
            expected = leaf + np.einsum("lir,lro->lio", a, b) * (alpha / 2)
            assert np.abs(after[path] - leaf).max() > 0
            np.testing.assert_allclose(after[path], expected, atol=1e-6)
        else:
            assert (after[path] == leaf).all()
    convert(
        corpus / "start", tmp_path / "again", "official", merge_lora=tmp_path / "lora",
        progress=False,
    )  # fmt: skip
    again = flatten(mj.MossAudio.load(tmp_path / "again", "float32").params)
    assert all(np.abs(again[path] - after[path]).max() < 1e-6 for path in after)
    saved = tmp_path / "checkpoints" / "3" / "state"
    size = sum(f.stat().st_size for f in saved.rglob("*") if f.is_file())
    assert size < sum(leaf.nbytes for leaf in before.values())  # the base is not in it


def test_a_run_that_diverges_stops_with_a_saved_state(run_config, tmp_path):
    config = run_config("optimizer.learning_rate=1e30", "optimizer.warmup=0", "train.steps=50",
                        "train.max_skipped=3", "train.clip_norm=0")  # fmt: skip
    with pytest.raises(InputError, match=r"3 updates in a row .* saved in"):
        train(config, tmp_path)
    assert (tmp_path / "checkpoints").is_dir()
    assert log(tmp_path)[-1]["skipped"] == 3


def test_a_run_continues_on_another_mesh(run_config, tmp_path):
    options = ("checkpoint.every=2", "optimizer.schedule=constant")
    train(run_config(*options, "train.steps=4"), tmp_path / "whole")
    train(run_config(*options, "train.steps=2"), tmp_path / "moved")
    config = run_config(
        *options, "train.steps=4", "mesh.data=2", "mesh.tensor=2", "mesh.sequence=2"
    )
    train(config, tmp_path / "moved")
    found, expected = ([row["loss"] for row in log(tmp_path / name)] for name in ("moved", "whole"))
    assert len(found) == 4
    np.testing.assert_allclose(found, expected, rtol=1e-5)
