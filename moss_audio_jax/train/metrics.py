"""What a run reports: metrics.jsonl, a line on the console, TensorBoard files with tensorboardX."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from moss_audio_jax import devices, files
from moss_audio_jax.buckets import is_remote
from moss_audio_jax.errors import InputError
from moss_audio_jax.journal import Log

_log = logging.getLogger(__name__)


class Metrics:
    """Writes one JSON object for each logged step. Only the first process writes.

    Args:
      start: steps beyond it in an existing file are cut off: they will be done again.
    """

    def __init__(self, workdir: Path, start: int, steps: int, flops: float):
        self.log = Log(workdir / "metrics.jsonl")
        self._writes = jax.process_index() == 0
        self._steps = steps
        self._flops = flops
        self._peak = _peak_flops()
        self._clock = time.perf_counter()
        self._step = start
        self._tensorboard = _tensorboard(workdir, start) if self._writes else None
        if self._writes:
            cut_back(self.log.path, start)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds `step`, rates and ETA to `values`, then writes and prints them."""
        now = time.perf_counter()
        steps, seconds = step - self._step, max(now - self._clock, 1e-9)
        self._clock, self._step = now, step
        rate = steps / seconds
        row: dict[str, Any] = {"step": step, **values, "seconds_per_step": seconds / max(steps, 1)}
        if self._peak:
            row["mfu"] = self._flops * rate / self._peak
        if not self._writes:
            return
        self.log.append(json.dumps(_finite(row)) + "\n")
        if self._tensorboard:
            for key, value in row.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self._tensorboard.add_scalar(key, value, step)
        parts = [f"step {step}/{self._steps}"]
        parts += [f"loss {row['loss']:.4f}"] if row.get("loss") else []
        parts += [f"{key[7:]} {row[key]:.3f}" for key in row if key.startswith("helper/")]
        parts += [f"reward {row['reward']:.3f}"] if "reward" in row else []
        parts += [f"eval_loss {row['eval_loss']:.4f}"] if "eval_loss" in row else []
        if "tokens" in row:
            parts.append(f"{row['tokens'] * rate:,.0f} tok/s")
            parts.append(f"{row['audio_hours_seen']:.2f} h audio")
            parts.append(f"{row['padding']:.1%} padding")
        if "mfu" in row:
            parts.append(f"MFU {row['mfu']:.1%}")
        if "time/goodput" in row:
            parts.append(f"goodput {row['time/goodput']:.1%}")
        parts.append(f"ETA {_clock((self._steps - step) / rate)}" if rate else "")
        _log.info("  ".join(filter(None, parts)))

    def close(self) -> None:
        self.log.flush()
        if self._tensorboard:
            self._tensorboard.close()


def cut_back(file: Path, step: int) -> None:
    """Drops the lines of a JSONL log beyond `step`, and those that are damaged or half-written."""
    if not file.exists():
        return
    old = files.read_bytes(file, "a log")
    new = b"".join(line + b"\n" for line in old.split(b"\n") if line and _step(line, file) <= step)
    if new != old:
        files.write_whole(file, new)


def _step(line: bytes, file: Path) -> float:
    try:
        row = files.parse_json(line, str(file))
    except InputError:
        return math.inf
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int | float) else math.inf


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: a value that is not finite is written as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _peak_flops() -> float | None:
    one = devices.of(jax.devices()[0].device_kind)
    return one.peak * jax.device_count() if one else None


def _tensorboard(workdir: Path, start: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:  # the extra `tensorboard`
        return None
    if is_remote(workdir):
        _log.info(f"{workdir}: in a bucket: no TensorBoard files, only metrics.jsonl")
        return None
    return SummaryWriter(
        str(workdir / "tensorboard"), purge_step=start + 1, filename_suffix=f".{start}"
    )
