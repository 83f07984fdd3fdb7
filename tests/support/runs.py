"""Starts runs as separate processes, and reads their logs."""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def log(workdir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


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
