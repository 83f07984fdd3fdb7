"""Starts runs as separate processes, and reads their logs."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import soundfile
from tiny_model import write_checkpoint

ROOT = Path(__file__).parents[2]
TONES = (250, 400, 650, 1000, 1600, 2500)


def log(workdir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def rows_of_steps(workdir: Path) -> list[list]:
    """The rows of each step's global batch, from the logs of all processes in order."""
    steps: dict[int, list] = {}
    for file in sorted(workdir.glob("rows-*.jsonl")):
        for row in log(workdir, file.name):
            steps.setdefault(row["step"], []).extend(row["rows"])
    return [steps[step] for step in sorted(steps)]


def command(config_file: Path, workdir: Path, *overrides: str) -> list[str]:
    options = [f"--config.{o}" for o in overrides]
    return [
        sys.executable,
        "-m",
        "moss_audio_jax.train",
        "--config",
        str(config_file),
        "--workdir",
        str(workdir),
        *options,
    ]


def environment() -> dict[str, str]:
    """One device."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}


def write_corpus(folder: Path) -> None:
    """rows.jsonl: six clips of one tone each, with its pitch and length as the answer; start."""
    rng = np.random.default_rng(0)
    rows = []
    for i, pitch in enumerate(TONES):
        n = 8000 + 3200 * i
        wav = 0.3 * np.sin(2 * np.pi * pitch * np.arange(n) / 16000) + 0.01 * rng.normal(size=n)
        soundfile.write(folder / f"{pitch}.wav", wav, 16000)
        answer = f"{pitch} Hz"
        rows.append(
            {
                "task": ("pitch", "tone")[i % 2],
                "conversation": [
                    {"role": "user", "message_type": "audio", "content": f"{pitch}.wav"},
                    {"role": "user", "message_type": "text", "content": "Which?"},
                    {"role": "assistant", "message_type": "text", "content": answer},
                ],
            }
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_checkpoint(folder / "start", max_positions=512)


def write_config(file: Path, corpus: Path) -> None:
    """A config file of a run small enough to be started many times."""
    file.write_text(
        f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests/support")!r}, {str(ROOT / "configs")!r}]
import common, tiny, tiny_model

def get_config():
    c = tiny.get_config()
    c.model = common.sizes(tiny_model.tiny_config(512))
    c.tokenizer = {str(corpus / "start")!r}
    c.data.train = ({str(corpus / "rows.jsonl")!r},)
    c.data.length, c.data.chunks, c.data.batch, c.data.streams = 128, 2, 8, 8
    c.data.log_rows = True
    c.data.window = 3
    c.train.steps, c.train.log_every = 16, 1
    c.checkpoint.every, c.checkpoint.export = 2, "none"
    return c
"""
    )
