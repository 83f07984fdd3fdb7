"""Seconds that `evaluate score` takes for many predictions: multiple choice, transcripts, times.

    python tools/bench/score.py [--rows 100000]

Makes items and answers of the lengths that benchmarks have (a third of them wrong in one way or
another), and scores them as a user would, start of the process included. One JSON line. Needs the
extra `evaluate`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

TEXT = """the a river was cold and dark when we came home from market with five apples for mother
while dogs were barking at birds in trees near station before trains left again on monday morning"""
WORDS = TEXT.split()
CHOICES = ("a dog barking", "a man speaking", "rain on a roof", "a train passing")


def rows(kind: str, count: int) -> Iterator[tuple[dict, str]]:
    """(an item of the benchmark's file, what a model answers)."""
    rng = np.random.default_rng(0)
    for number in range(count):
        wrong = rng.random() < 1 / 3
        said = [WORDS[i] for i in rng.integers(len(WORDS), size=rng.integers(5, 20))]
        if kind == "mmau":
            answer = int(rng.integers(4))
            shown = (answer + wrong) % 4
            form = (CHOICES[shown], "ABCD"[shown], f"({'ABCD'[shown]}) {CHOICES[shown]}")
            item = {
                "id": str(number),
                "audio_id": f"{number}.wav",
                "question": "What is heard?",
                "choices": list(CHOICES),
                "answer": CHOICES[answer],
                "task": "sound",
                "difficulty": "easy",
                "category": "x",
                "sub-category": "y",
            }
            yield item, form[int(rng.integers(3))]
            continue
        heard = [w for w in said if not (wrong and rng.random() < 0.1)] or said[:1]
        item = {"id": str(number), "audio": f"{number}.wav", "text": " ".join(said)}
        if kind == "asr":
            yield item | {"language": "en", "dimension": str(number % 12)}, " ".join(heard)
            continue
        edges = np.cumsum(rng.uniform(0.1, 0.5, len(said) + 1))
        spans = [
            {"text": w, "start": a, "end": b}
            for w, (a, b) in zip(said, itertools.pairwise(edges.round(2).tolist()), strict=True)
        ]
        answer = "".join(f"[{s['start']:.2f}]{s['text']}[{s['end'] + 0.03:.2f}]" for s in spans)
        yield item | {"words": spans}, answer


def measure(kind: str, count: int, folder: Path) -> dict[str, float]:
    data, predictions = folder / f"{kind}.jsonl", folder / f"{kind}-predictions.jsonl"
    made = list(rows(kind, count))
    if kind == "mmau":
        data.write_text(json.dumps([item for item, _ in made]))
    else:
        data.write_text("".join(json.dumps(item) + "\n" for item, _ in made))
    predictions.write_text(
        "".join(json.dumps({"id": i["id"], "raw_output": a, "answer": a}) + "\n" for i, a in made)
    )
    level = ["--level", "word"] if kind == "timestamps" else []
    start, used = time.perf_counter(), os.times()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "moss_audio_jax.evaluate",
            "score",
            "--benchmark",
            kind,
            "--data",
            data,
            *level,
            "--predictions",
            predictions,
            "--output",
            folder / f"{kind}.json",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds, after = time.perf_counter() - start, os.times()
    processor = after.children_user + after.children_system
    processor -= used.children_user + used.children_system
    return {"seconds": round(seconds, 1), "processor_seconds": round(processor, 1)}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rows", type=int, default=100_000)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {k: measure(k, args.rows, Path(folder)) for k in ("mmau", "asr", "timestamps")}
    print(json.dumps({"bench": "score", "rows": args.rows, **found}))


if __name__ == "__main__":
    main()
