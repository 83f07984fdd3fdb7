"""The small model from nothing: scenes, tokenizer, five stages of training, the shipped checkpoint.

    python tools/train_small.py --workdir small              everything, in order (hours on 2 cores)
    python tools/train_small.py --workdir small --only data tokenizer encoder
    python tools/train_small.py --workdir small --only ship  puts the result into the package

Every step can be stopped and run again: whole shards are kept, a stage of training goes on from its
last checkpoint, and what is finished is skipped. Needs the extra `world`. Afterwards
`python tools/score_small.py --workdir small` scores it on held-out scenes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
from tqdm import tqdm
from train_tokenizer import texts_of, train_tokenizer

from moss_audio_jax.audio import log_mel
from moss_audio_jax.command import DEFAULT_CHECKPOINT
from moss_audio_jax.data import shards, world
from moss_audio_jax.data.records import encode_record
from moss_audio_jax.weights.convert import convert

CONFIGS = Path(__file__).parents[1] / "configs" / "small"
TRAINING = ("encoder", "adapter", "pretrain", "sft", "cold_start")  # each from the one before
STEPS = ("data", "tokenizer", *TRAINING, "ship")
SCENES, SHARD = 48_000, 800
TOKENIZER_SHARDS = 6  # enough to hold every word
VOCABULARY = 2560


def make_data(folder: Path, split: str, scenes: int, processes: int, seed: int = 0) -> None:
    """Log-mels and rows (`world.record`) of scenes 0 .. scenes - 1, in shards."""
    settings = {"split": split, "scenes": scenes, "seed": seed, "world": world.VERSION}
    shards.prepare(str(folder), settings)
    parts = shards.plan(scenes, None, SHARD)
    paths = [shards.shard_path(str(folder), split, i, len(parts)) for i in range(len(parts))]
    missing = [(path, part) for path, part in zip(paths, parts, strict=True)
               if not os.path.exists(path)]  # fmt: skip
    context = multiprocessing.get_context("spawn")  # espeak's process must not be shared
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        made = [pool.submit(_make_shard, path, part, split, seed) for path, part in missing]
        for each in tqdm(concurrent.futures.as_completed(made), total=len(made), unit="shard"):
            each.result()


def _make_shard(path: str, part: range, split: str, seed: int) -> None:
    shards.write_shard(path, (_record(world.scene(i, split, seed)) for i in part))


def _record(scene: world.Scene) -> bytes:
    row = world.record(scene.labels, f"{scene.labels['id']}.wav")
    return encode_record(row, [log_mel(scene.wav).astype(ml_dtypes.bfloat16)])


def make_tokenizer(workdir: Path) -> None:
    paths = sorted((workdir / "scenes").glob("train-*.array_record"))[:TOKENIZER_SHARDS]
    train_tokenizer(texts_of(map(str, paths)), VOCABULARY, workdir / "tokenizer")


def train_stage(workdir: Path, stage: str, seed: int, overrides: Sequence[str]) -> None:
    """Runs a stage as its own process, as a user would; appends its time to times.jsonl."""
    before = dict(itertools.pairwise(TRAINING[::-1])).get(stage)
    start = (
        f"--config.init_from={workdir / before / 'export'}"
        if before
        else f"--config.tokenizer={workdir / 'tokenizer'}"
    )
    command = [
        sys.executable, "-m", "moss_audio_jax.train",
        "--config", str(CONFIGS / f"{stage}.py"), "--workdir", str(workdir / stage),
        f"--config.data.train=('{workdir}/scenes/train-*.array_record',)",
        f"--config.train.seed={seed}", start, *overrides,
    ]  # fmt: skip
    print(" ".join(command), flush=True)
    clock, processor = time.perf_counter(), os.times()
    subprocess.run(command, check=True)
    used = os.times()
    entry = {
        "stage": stage,
        "seconds": round(time.perf_counter() - clock),
        "processor_seconds": round(
            used.children_user + used.children_system
            - processor.children_user - processor.children_system
        ),
    }  # fmt: skip
    with open(workdir / "times.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def ship(workdir: Path, stage: str, target: Path = DEFAULT_CHECKPOINT) -> None:
    """A stage's export in bfloat16, where `--checkpoint` is by default."""
    export = workdir / stage / "export"
    convert(export, target, "official", dtype=ml_dtypes.bfloat16, overwrite=True, progress=False)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--workdir", type=Path, required=True, metavar="DIR")
    options.add_argument("--only", nargs="+", choices=STEPS, default=STEPS)
    options.add_argument("--scenes", type=int, default=SCENES)
    options.add_argument("--ship", choices=TRAINING, default=TRAINING[-1], metavar="STAGE",
                         help="whose result is shipped; default the last")  # fmt: skip
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args, overrides = options.parse_known_args()
    if unknown := [word for word in overrides if not word.startswith("--config.")]:
        options.error(f"unknown option {unknown[0]}; stages take --config.KEY=VALUE")
    workdir = args.workdir.resolve()
    steps = {
        "data": functools.partial(
            make_data, workdir / "scenes", "train", args.scenes, args.processes
        ),
        "tokenizer": functools.partial(make_tokenizer, workdir),
        **{
            stage: functools.partial(train_stage, workdir, stage, args.seed, overrides)
            for stage in TRAINING
        },
        "ship": functools.partial(ship, workdir, args.ship),
    }
    for name in STEPS:
        done = workdir / name / "export" if name in TRAINING else workdir / name / "tokenizer.model"
        if name in args.only and not (name != "ship" and done.exists()):
            print(f"--- {name}", flush=True)
            steps[name]()


if __name__ == "__main__":
    main()
