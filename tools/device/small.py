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
    processes = os.cpu_count() or 1
    steps = train.steps_of(workdir, "gpu", processes=processes)
    if tiny:
        steps = train.steps_of(
            workdir, "cpu", 0, _TINY, scenes=24, processes=processes, vocabulary=600
        )
    wanted = "data", "tokenizer", *train.PROCEDURAL
    for step in wanted[:3] if tiny else wanted:
        if asked or train.done(workdir, step):
            continue
        begun = time.perf_counter()
        steps[step]()
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
