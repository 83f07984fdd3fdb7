"""What every part of tools/device/bench.py measures with."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

GIB = 2**30
# Of the budget, where all parts are asked for.
SHARES = {"attention": 0.15, "train": 0.5, "decode": 0.25, "prefill": 0.1}


class Clock:
    """What is printed, and whether there is time left for more."""

    def __init__(self, budget: float, parts: list[str]) -> None:
        self._start, self._budget = time.perf_counter(), budget
        total = sum(SHARES[part] for part in parts)
        self._until, share = {}, 0.0
        for part in parts:
            share += SHARES[part] / total
            self._until[part] = share * budget

    def emit(self, part: str, **fields: Any) -> None:
        line = {"part": part} | fields | {"at": round(time.perf_counter() - self._start, 1)}
        print(json.dumps(line, default=str), flush=True)

    def settings(self, part: str, wanted: list) -> Iterator[Any]:
        """Those of `wanted` that there is time to begin; the first if there is any time at all."""
        for number, setting in enumerate(wanted):
            spent = time.perf_counter() - self._start
            if spent > (self._until[part] if number else self._budget):
                self.emit(part, left_out=wanted[number:])
                return
            yield setting

    def guarded(self, part: str, what: Any, measure: Callable[[], dict[str, Any] | None]) -> None:
        try:
            if found := measure():
                self.emit(part, **found)
        except Exception as error:  # whatever it is, the others go on
            self.emit(part, setting=what, **failure(error))
        gc.collect()


def failure(error: Exception) -> dict[str, str]:
    return {"error": f"{type(error).__name__}: {str(error)[:600]}"}


def seconds(call: Callable[[], Any], repeats: int, together: int = 1) -> float:
    """Median of `repeats` times of `call`, after one that does not count; `together` in a row."""
    jax.block_until_ready(call())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(together):
            out = call()
        jax.block_until_ready(out)
        found.append((time.perf_counter() - start) / together)
    return statistics.median(found)


def compiled(
    lowered: jax.stages.Lowered, options: dict[str, Any] | None = None
) -> tuple[jax.stages.Compiled, float]:
    """The program, and the seconds it took to compile."""
    start = time.perf_counter()
    program = lowered.compile(compiler_options=options or None)
    return program, round(time.perf_counter() - start, 1)


def memory(program: jax.stages.Compiled) -> dict[str, float]:
    found = program.memory_analysis()
    if found is None:
        return {}
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "program_gib": round((held + found.temp_size_in_bytes) / GIB, 2),
        "peak_gib": round(stats.get("peak_bytes_in_use", 0) / GIB, 2),
    }


def kernel() -> str:
    return {"gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend(), "xla")


def share(value: float, most: float | None) -> float | None:
    return most and round(value / most, 4)


def partition(rng: np.random.Generator, total: int, most: int) -> list[int]:
    """Sizes of 1 to `most` that make up `total`."""
    sizes: list[int] = []
    while total:
        sizes.append(min(total, int(rng.integers(1, most + 1))))
        total -= sizes[-1]
    return sizes
