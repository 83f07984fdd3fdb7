"""The share of a run's time that remains after failures and saves: simulated, and expected by
Daly's model.

    goodput            useful seconds / all seconds, simulated; beside it the expectation
                       T / (M e^((R+W)/M) (e^((T+C)/M) - 1))

where, in seconds, T is the training between saves, C the time that a save stops training, W the
time until a save is complete, R the time from a failure to the next step, and M the mean time
between failures. For W = 0 this is Daly's model of independent failures, which may also happen
during a restart (doi 10.1016/j.future.2004.11.016). A save is written while training continues; a
failure within W loses it, which lengthens R by W.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from moss_audio_jax.errors import UsageError

RUNS = 400  # simulated runs


@dataclasses.dataclass(frozen=True)
class Saving:
    """The times C, W and R of a save, in seconds; see the module's docstring."""

    block: float
    write: float
    restart: float


def daly_interval(block: float, mtbf: float) -> float:
    """Seconds T of training between saves for the best goodput, by Daly.

    This is Young's sqrt(2 C M) (doi 10.1145/361147.361115) with two more terms, minus C.
    """
    if block >= 2 * mtbf:
        return mtbf
    x = math.sqrt(block / (2 * mtbf))
    return math.sqrt(2 * block * mtbf) * (1 + x / 3 + x * x / 9) - block


def expected_goodput(interval: float, times: Saving, mtbf: float) -> float:
    """The expectation in this module's docstring. All arguments are seconds; interval >= write."""
    lost = (times.restart + times.write) / mtbf
    cycle = (interval + times.block) / mtbf
    if lost + cycle > 700:  # exp would overflow
        return 0.0
    return interval / (mtbf * math.exp(lost) * math.expm1(cycle))


def simulate(
    work: float, interval: float, times: Saving, mtbf: float, rng: np.random.Generator
) -> float:
    """Simulates one run: the seconds that `work` seconds of training take.

    The times between failures have an exponential distribution. After a failure the run restarts
    from the last complete save. The run ends when its last save is complete.
    """
    clock = 0.0
    begin = 0.0
    while True:
        life = rng.exponential(mtbf)
        saves = math.ceil(work / interval - 1e-9)
        need = begin + work + saves * times.block + times.write
        if life >= need:
            return clock + need
        clock += life
        running = life - begin - times.write
        whole = max(0, math.floor(running / (interval + times.block)))
        work -= min(whole, saves - 1) * interval
        begin = times.restart


def goodput(work: float, every: float, times: Saving, mtbf: float, seed: Any) -> dict[str, Any]:
    """Simulated and expected goodput of a run of `work` seconds.

    Args:
      every: seconds between saves, as configured.

    Raises:
      UsageError: failures leave no time to train.
    """
    interval = min(max(daly_interval(times.block, mtbf), times.write), max(work, times.write))
    expected = expected_goodput(interval, times, mtbf)
    if expected < 0.05:
        raise UsageError(
            f"a failure every {mtbf:.0f} s and restarts of {times.restart:.0f} s leave no time to "
            "train; see --assume chip_mtbf_hours=, detect=, replace=, start="
        )
    rng = np.random.default_rng(seed)
    walls = [simulate(work, interval, times, mtbf, rng) for _ in range(RUNS)]
    low, high = work / np.quantile(walls, (0.95, 0.05))
    return {
        "mtbf_seconds": mtbf,
        **{f"{name}_seconds": value for name, value in dataclasses.asdict(times).items()},
        "interval_seconds": interval,
        "goodput": float(work / np.mean(walls)),
        "goodput_5_95": [float(low), float(high)],
        "goodput_expected": expected,
        "goodput_as_configured": expected_goodput(max(every, times.write), times, mtbf),
    }
