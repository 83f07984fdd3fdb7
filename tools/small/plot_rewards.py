"""Draws what runs of `configs/small/dapo.py` earned, a line for each run.

    python tools/small/plot_rewards.py RUN ... --output FILE        (needs matplotlib)

Questions differ from step to step, so curves of sampled answers are running means over 41 steps.
Dots and squares are greedy answers to held-out rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WIDTH = 41
PANELS = {  # title -> (key of metrics.jsonl, label)
    "reward": (("reward", "all"), ("eval_reward", "held out")),
    "reward by task": (
        ("reward/text", "text: reasoning"),
        ("reward/number", "numbers"),
        ("reward/choice", "choice"),
        ("reward/asr", "transcripts"),
        ("reward/events", "events"),
    ),
    "form": (
        ("reward/text/format", "thinking block"),
        ("reward/text/repetition", "repetition"),
        ("answer/cut", "answers cut"),
        ("reward/groups_without_spread", "groups without spread"),
    ),
    "entropy, nats a token": (("policy/entropy_estimate", "of sampled tokens"),),
    "tokens an answer": (("answer/tokens", "mean"),),
    "clipped, share of tokens": (
        ("policy/clipped_low", "low"),
        ("policy/clipped_high", "high"),
        ("policy/capped", "importance capped"),
    ),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a workdir")
    options.add_argument("--output", type=Path, required=True, metavar="FILE")
    args = options.parse_args()
    figure, axes = plt.subplots(3, 2, figsize=(11, 9), sharex=True)
    for axis, (title, curves) in zip(axes.flat, PANELS.items(), strict=True):
        for number, (key, label) in enumerate(curves):
            for run, style in zip(args.runs, ("-", "--", ":", "-.") * len(args.runs), strict=False):
                lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                found = [(row["step"], row[key]) for row in map(json.loads, lines) if key in row]
                steps, values = np.array(found or np.empty((0, 2))).T
                name = label if run == args.runs[0] else None
                if key.startswith("eval_"):
                    shape = "os^D"[args.runs.index(run) % 4]
                    axis.plot(steps, values, f"C{number}{shape}", label=name, ms=5)
                elif len(values) >= WIDTH:
                    means = np.convolve(values, np.ones(WIDTH) / WIDTH, "valid")
                    middles = steps[WIDTH // 2 : -(WIDTH // 2)]
                    axis.plot(middles, means, f"C{number}{style}", label=name, lw=1.3)
        axis.set_title(title, size=10, loc="left")
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
