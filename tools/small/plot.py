"""Draws the curves of the small model's training into docs/small_model/curves.png.

    python tools/small/plot.py --workdir small [--output FILE]        (needs matplotlib)

There is a panel for each kind of loss, with the stages one after the other. Curves are running
means over the logged steps, because each logged value is from one batch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STAGES = ("encoder", "adapter", "pretrain", "sft", "cold_start")
DOCS = Path(__file__).parents[2] / "docs" / "small_model"
PANELS = {  # title -> (key of metrics.jsonl, label)
    "helper losses": (
        ("helper/frames", "word piece per token"),
        ("helper/position", "position in the chunk"),
        ("helper/adapter", "piece in the adapter"),
        ("helper/clock", "position in the adapter"),
        ("helper/adapter_before", "previous piece in the adapter"),
    ),
    "CTC and tags (sums)": (
        ("helper/ctc", "CTC per chunk"),
        ("helper/tags", "tags per token"),
        ("helper/adapter_tags", "tags in the adapter"),
    ),
    "answers": (
        ("loss", "all"),
        ("loss/asr", "transcript"),
        ("loss/asr_words", "words with times"),
        ("loss/events", "event timeline"),
        ("loss/caption", "caption"),
    ),
    "short answers": (
        ("loss/time_what", "what at a time"),
        ("loss/time_when", "when"),
        ("loss/count", "count"),
        ("loss/choice_letter", "multiple choice"),
        ("loss/tempo", "tempo"),
    ),
}


def read(workdir: Path) -> tuple[list[dict], dict[str, int]]:
    """All logged rows, with steps counted over all stages, and the first step of each stage."""
    rows, starts, offset = [], {}, 0
    for stage in STAGES:
        file = workdir / stage / "metrics.jsonl"
        if not file.exists():
            continue
        starts[stage] = offset
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        rows += [{**line, "at": offset + line["step"]} for line in lines]
        offset += max(line["step"] for line in lines)
    return rows, starts


def smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    width = min(width, len(values))
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--workdir", type=Path, required=True, metavar="DIR")
    options.add_argument("--output", type=Path, default=DOCS / "curves.png", metavar="FILE")
    args = options.parse_args()
    rows, starts = read(args.workdir)
    figure, axes = plt.subplots(len(PANELS), 1, figsize=(9, 11), sharex=True)
    for axis, (title, curves) in zip(axes, PANELS.items(), strict=True):
        for key, label in curves:
            for start in starts.values():  # the running mean starts again with each stage
                ends = [begin for begin in starts.values() if begin > start]
                here = [
                    (r["at"], r[key])
                    for r in rows
                    if r.get(key) and r["at"] > start and (not ends or r["at"] <= ends[0])
                ]
                if here:
                    x, y = np.array(here).T
                    colour = f"C{[k for k, _ in curves].index(key)}"
                    first = label not in axis.get_legend_handles_labels()[1]
                    axis.plot(x, smooth(y), colour, label=label if first else None, lw=1.4)
        for number, (stage, start) in enumerate(starts.items()):
            axis.axvline(start, color="0.8", lw=0.8, zorder=0)
            if axis is axes[0]:  # names of short stages must not overlap
                place = axis.get_xaxis_transform()
                axis.text(start, (1.01, 1.07)[number % 2], f" {stage}", transform=place, size=8)
        axis.set_ylabel(f"{title}\nnats", size=9)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8, ncols=2, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step, over all stages")
    figure.tight_layout()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
