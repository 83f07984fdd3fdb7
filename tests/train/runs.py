"""Runs as processes of their own, and their logs."""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def log(workdir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


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
