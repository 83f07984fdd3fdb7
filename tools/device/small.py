"""The next stage of the small model (tools/small/train.py), for as long as there is time."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.device.measure import TINY, Sizes
from tools.small import train

# For a rehearsal: one encoder stage of two steps on two dozen scenes.
_TINY = (
    "--config.train.steps=2",
    "--config.optimizer.warmup=1",
    "--config.data.batch=2",
    "--config.data.window=4",
)


def measure(setting: str, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Every step that is not done yet in the folder `setting`, until SIGTERM; each yields a line.

    At SIGTERM a stage of training saves its state and ends, and another run goes on from there.
    """
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    workdir, tiny = Path(setting), sizes is TINY
    workdir.mkdir(parents=True, exist_ok=True)
    machine, scenes, overrides = ("gpu", train.SCENES, ())
    vocabulary = train.VOCABULARY
    if tiny:
        machine, scenes, overrides, vocabulary = "cpu", 24, _TINY, 600
    for step in train.STEPS[:3] if tiny else train.STEPS[:-1]:
        if asked or train.done(workdir, step):
            continue
        begun = time.perf_counter()
        if step == "data":
            train.make_data(workdir, scenes, 0, os.cpu_count() or 1)
        elif step == "tokenizer":
            train.make_tokenizer(workdir, vocabulary)
        else:
            train.train_stage(workdir, step, machine, 0, overrides)
        finished = step == "data" or train.done(workdir, step)
        yield {
            "step": step,
            "finished": finished,
            "seconds": round(time.perf_counter() - begun, 1),
            "metrics": _last(workdir / step / "metrics.jsonl"),
        }


def _last(metrics: Path) -> dict[str, Any] | None:
    """What a stage of training has logged last."""
    return json.loads(metrics.read_text().splitlines()[-1]) if metrics.exists() else None
