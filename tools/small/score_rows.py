"""Compares training on rows of `annotate` with training on exact labels, by held-out loss.

    python tools/small/score_rows.py --workdir DIR [--scenes 400] [--seeds 0 1] [--steps 200]

Makes scenes of `world` and annotates their sound with the defaults. Trains `configs/tiny.py` (with
the bundled tokenizer) from scratch on the transcripts, times and timelines of each for the same
number of steps, and compares the losses on exact rows of held-out scenes. Needs the extras `world`
and `annotate`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.py"
TASKS = ("asr", "asr_words", "asr_sentences", "events")


def run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True)


def rows(folder: Path) -> Path:
    """A file beside a folder's rows.jsonl with only its rows of TASKS."""
    kept = folder / "trained.jsonl"
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept.write_text("".join(x for x in lines if json.loads(x)["task"] in TASKS), encoding="utf-8")
    return kept


def loss(workdir: Path, trained: Path, held_out: Path, seed: int, steps: int) -> float:
    """The loss on held-out rows after `steps` steps."""
    run(
        "moss_audio_jax.train",
        "--config",
        CONFIG,
        "--workdir",
        workdir,
        f"--config.train.seed={seed}",
        f"--config.train.steps={steps}",
        f"--config.data.train=('{trained}',)",
        f"--config.data.eval=('{held_out}',)",
        f"--config.eval.every={steps}",
        "--config.data.batch=4",
        "--config.data.length=640",
        "--config.checkpoint.export=none",
    )
    log = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["eval_loss"] for row in map(json.loads, log) if "eval_loss" in row][-1]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--workdir", type=Path, required=True, metavar="DIR")
    options.add_argument("--scenes", type=int, default=400)
    options.add_argument("--held-out", type=int, default=60)
    options.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    options.add_argument("--steps", type=int, default=200)
    args = options.parse_args()
    workdir = args.workdir.resolve()
    scenes, held_out, annotated = (workdir / n for n in ("scenes", "held_out", "annotated"))
    for folder, count, split in ((scenes, args.scenes, "train"), (held_out, args.held_out, "test")):
        if not (folder / "rows.jsonl").exists():
            run("moss_audio_jax.world", "--count", count, "--output", folder, "--split", split)
    run("moss_audio_jax.annotate", "--input", scenes / "wav", "--output", annotated)
    found: dict[str, list[float]] = {}
    for name, folder in (("exact", scenes), ("annotated", annotated)):
        trained, tested = rows(folder), rows(held_out)
        found[name] = [
            loss(workdir / f"{name}-{seed}", trained, tested, seed, args.steps)
            for seed in args.seeds
        ]
        count = len(trained.read_text(encoding="utf-8").splitlines())
        print(f"{name}: {count} rows, held-out loss {[round(x, 3) for x in found[name]]}")
    exact, made = (np.mean(found[name]) for name in ("exact", "annotated"))
    print(f"{exact:.3f} on exact labels, {made:.3f} on annotated rows: {made / exact - 1:+.1%}")


if __name__ == "__main__":
    main()
