"""Checks that an evaluation does not depend on how it was run: asks the same items in four ways.

    python tools/check_infer.py --workdir check [--scenes 500] [--per-scene 2] [--checkpoint DIR]

Items of held-out scenes are asked by one process, by one process with 8 devices (which share the
batches), by 2 processes with 4 devices each, and by one process that is killed 5 times and started
again. Predictions must be equal except for time fields. Differences are printed, and one JSON line
at the end. Exit code 1: something differs. Needs the extras `world` and `evaluate`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from moss_audio_jax.config import DEFAULT_CHECKPOINT

ROOT = Path(__file__).parents[1]
KILLS = 5
EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--workdir", type=Path, required=True, metavar="DIR")
    options.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, metavar="DIR")
    options.add_argument("--scenes", type=int, default=500)
    options.add_argument("--per-scene", type=int, default=2)
    args = options.parse_args()
    work = args.workdir.resolve()
    data = work / f"test-{args.scenes}"
    if not (data / "rows.jsonl").exists():
        world = ["world", "--count", args.scenes, "--output", data, "--split", "test"]
        subprocess.run(verb(*world), check=True)

    def infer(name: str, *more: object) -> list[str]:
        return verb(
            "evaluate",
            "infer",
            "--benchmark",
            "world",
            "--data",
            data,
            "--per-scene",
            args.per_scene,
            "--max-new-tokens",
            256,
            "--checkpoint",
            args.checkpoint,
            "--output",
            work / f"{name}.jsonl",
            *more,
        )

    two = [sys.executable, ROOT / "launch/local_processes.py", "2", "--devices", "4", "--"]
    runs = {
        "one": lambda: run(infer("one")),
        "devices": lambda: run(infer("devices", "--mesh", "data=8"), EIGHT),
        "processes": lambda: run([*two, *infer("processes", "--mesh", "data=8")]),
        "killed": lambda: run_killed(infer("killed"), work / "killed.jsonl"),
    }
    found, seconds = {}, {}
    for name, start in runs.items():
        began = time.time()
        start()
        seconds[name] = round(time.time() - began, 1)
        found[name] = timeless(work / f"{name}.jsonl")
    expected = found.pop("one")
    differing = {}
    for name, rows in found.items():
        if [row["id"] for row in rows] != [row["id"] for row in expected]:
            raise SystemExit(f"{name}.jsonl: not the ids of one.jsonl in their order")
        pairs = [(a, b) for a, b in zip(expected, rows, strict=True) if a != b]
        differing[name] = len(pairs)
        for a, b in pairs[:5]:
            print(f"{name}, {a['id']}:\n  {a['raw_output']!r}\n  {b['raw_output']!r}")
    print(
        json.dumps(
            {
                "check": "infer",
                "items": len(expected),
                "scenes": args.scenes,
                "kills": KILLS,
                "differing": differing,
                "seconds": seconds,
            }
        )
    )
    return int(any(differing.values()))


def verb(*words: object) -> list[str]:
    return [sys.executable, "-m", "moss_audio_jax.cli", *map(str, words)]


def run(words: list, env: dict[str, str] | None = None) -> None:
    subprocess.run([str(word) for word in words], env=os.environ | (env or {}), check=True)


def run_killed(words: list[str], output: Path) -> None:
    """Kills the run each time another sixth of its answers is written; the last run finishes."""
    whole = len((output.parent / "one.jsonl").read_text(encoding="utf-8").splitlines())
    partial = output.with_name(output.name + ".partial.jsonl")
    for kill in range(1, KILLS + 1):
        process = subprocess.Popen(words)
        while written(partial) < whole * kill / (KILLS + 1):
            if process.poll() is not None:
                raise SystemExit(f"ended with {process.returncode} before kill {kill}")
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"kill {kill}: {written(partial)} of {whole} answers were written", flush=True)
    run(words)


def written(partial: Path) -> int:
    return partial.read_bytes().count(b"\n") if partial.exists() else 0


def timeless(file: Path) -> list[dict]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


if __name__ == "__main__":
    sys.exit(main())
