"""Measures the effect of parts of the model and of the objective on the small model.

    python tools/small/ablate.py --workdir small                      needs train.py's results
    python tools/small/ablate.py --workdir small --only no_markers --seeds 0 --steps 100
    python tools/small/ablate.py --workdir small --only further further_gate further_times

DeepStack adds outputs of inner encoder layers after the decoder's first layers; time markers are
the seconds, written between audio tokens. `gate` is a learned gate on what DeepStack adds, `times`
the helper loss on digits of times.

Every variant gets the same budget and at least two seeds. `baseline`, `no_deepstack`, `no_markers`,
`gate` and `times` use the same trained, frozen encoder; adapter, mergers and decoder train from
scratch for --steps. `chunked`, `full` and `sliding` first train their own encoder for
--encoder-steps. `further` and its variants train a whole model, --model, on all tasks for --steps:
they need no encoder, only scenes/ and joined/. Each model then answers questions about --scenes
held-out scenes. Prints a table with mean and range over the seeds, and writes
WORKDIR/ablations/table.md. Finished parts are kept. --jobs is the number of concurrent trainings,
and --train-only leaves out the answers, for another machine.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moss_audio_jax.config import DEFAULT_CHECKPOINT

CONFIGS = Path(__file__).parents[2] / "configs" / "small"
# With full and sliding attention a clip is one chunk, long enough for joined clips of 32 s.
WHOLE_CLIPS = {
    "encoder": ("--config.data.frames=3200", "--config.data.chunks=2"),
    "adapter": ("--config.data.frames=1280", "--config.data.chunks=8"),
}
GATE = ("--config.model.inject_gate=True", "--config.checkpoint.export=native")
TIMES = ("--config.helpers.times=0.2",)


class Variant(NamedTuple):
    """What differs: config overrides; the encoder's attention, if the variant trains its own
    encoder; whether it trains a whole model further."""

    overrides: Sequence[str] = ()
    layout: str | None = None
    further: bool = False


VARIANTS: Mapping[str, Variant] = {
    "baseline": Variant(),
    "no_deepstack": Variant(("--config.model.inject_layers=0",)),
    "no_markers": Variant(("--config.data.time_markers=False",)),
    "gate": Variant(GATE),
    "times": Variant(TIMES),
    "chunked": Variant(layout="chunked"),
    "full": Variant(layout="full"),
    "sliding": Variant(layout="sliding"),
    "further": Variant(further=True),
    "further_gate": Variant(GATE, further=True),
    "further_times": Variant(TIMES, further=True),
}
TASKS = "asr,asr_words,events,time_when,tempo"
# AAS, the accumulated average shift, is the mean error of timestamps.
FIGURES = (  # (name, key of the score's "strict")
    ("speech: WER, %", "wer"),
    ("speech: AAS, ms per slot", "aas_slot_ms"),
    ("speech: coverage", "coverage"),
    ("sound: event F1", "event_f1"),
    ("music: tempo within 5%, %", "tempo_accuracy"),
    ("time questions, %", "time_accuracy"),
)


def train(workdir: Path, run: Path, config: str, seed: int, words: Sequence[str]) -> Path:
    """Runs or continues a stage, such as "encoder.py:gpu", in `run`; returns its export."""
    if not (run / "export" / "config.json").exists():
        command = [
            sys.executable,
            "-m",
            "moss_audio_jax.train",
            "--config",
            str(CONFIGS / config),
            "--workdir",
            str(run),
            f"--config.train.seed={seed}",
            *words,
        ]
        subprocess.run(command, check=True, cwd=workdir)
    return run / "export"


def scored(data: Path, export: Path, run: Path) -> dict[str, float]:
    """The strict figures of a model on the rows of `world` in `data`."""
    asked = ["--benchmark", "world", "--data", str(data), "--tasks", TASKS]
    answers, score = run / "answers.jsonl", run / "score.json"
    evaluate = [sys.executable, "-m", "moss_audio_jax.evaluate"]
    subprocess.run(
        [
            *evaluate,
            "infer",
            *asked,
            "--checkpoint",
            str(export),
            "--temperature",
            "0",
            "--max-new-tokens",
            "512",
            "--output",
            str(answers),
        ],
        check=True,
    )
    subprocess.run(
        [*evaluate, "score", *asked, "--predictions", str(answers), "--output", str(score)],
        check=True,
    )
    return json.loads(score.read_text(encoding="utf-8"))["strict"]


def trained(workdir: Path, name: str, seed: int, args: argparse.Namespace) -> Path:
    """Trains a variant, in a folder named after the seed; returns the model."""
    overrides, layout, further = VARIANTS[name]
    folder = workdir / "ablations" / f"{name}-{seed}"
    if (folder / "answers" / "export" / "config.json").exists():  # its encoder may be elsewhere
        return folder / "answers" / "export"
    if further:
        words = [
            f"--config.init_from={args.model.resolve()}",
            f"--config.train.steps={args.steps}",
            *overrides,
            *args.overrides,
        ]
        return train(workdir, folder / "answers", f"sft.py:{args.machine}", seed, words)
    encoder = workdir / "encoder" / "export"
    shape: dict[str, Sequence[str]] = dict.fromkeys(WHOLE_CLIPS, ())
    if layout:
        attention = f"--config.encoder_attention={layout}"
        shape = {
            stage: (attention, *(words if layout != "chunked" else ()))
            for stage, words in WHOLE_CLIPS.items()
        }
        words = [f"--config.train.steps={args.encoder_steps}", *shape["encoder"], *args.overrides]
        encoder = train(workdir, folder / "encoder", f"encoder.py:{args.machine}", seed, words)
    words = [
        f"--config.init_from=encoder={encoder}",
        "--config.tokenizer=tokenizer",
        f"--config.train.steps={args.steps}",
        "--config.optimizer.schedule=cosine",
        *overrides,
        *shape["adapter"],
        *args.overrides,
    ]
    return train(workdir, folder / "answers", f"adapter.py:{args.machine}", seed, words)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--workdir", type=Path, required=True, metavar="DIR")
    options.add_argument("--only", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS))
    options.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    options.add_argument("--machine", choices=("cpu", "gpu"), default="cpu")
    options.add_argument("--jobs", type=int, default=1)
    options.add_argument("--train-only", action="store_true")
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--encoder-steps", type=int, default=1200)
    options.add_argument("--scenes", type=int, default=100)
    options.add_argument(
        "--model", type=Path, default=DEFAULT_CHECKPOINT, help="of `further`; default the bundled"
    )
    args, args.overrides = options.parse_known_args()
    if unknown := [word for word in args.overrides if not word.startswith("--config.")]:
        options.error(f"unknown option {unknown[0]}; all stages take --config.KEY=VALUE")
    workdir = args.workdir.resolve()
    runs = list(itertools.product(args.only, args.seeds))
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        exports = list(pool.map(lambda run: trained(workdir, *run, args), runs))
    if args.train_only:
        return
    data = workdir / f"test-{args.scenes}"
    if not (data / "rows.jsonl").exists():
        subprocess.run(
            [
                sys.executable,
                "-m",
                "moss_audio_jax.world",
                "--count",
                str(args.scenes),
                "--output",
                str(data),
                "--split",
                "test",
            ],
            check=True,
        )
    found: dict[str, list] = {name: [] for name in args.only}
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        scores = pool.map(lambda export: scored(data, export, export.parents[1]), exports)
        for (name, _), score in zip(runs, scores, strict=True):
            found[name].append(score)
    lines = [f"| what | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    for what, key in FIGURES:
        cells = []
        for scores in found.values():
            values = [score[key] for score in scores if score.get(key) is not None]
            spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3g}{spread}" if values else "")
        lines.append(f"| {what} | {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    (workdir / "ablations" / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
