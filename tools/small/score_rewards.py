"""What answers to the rows of a folder would earn: mean rewards, by task.

    moss-audio-jax world --count 100 --split test --output test
    python tools/small/score_rewards.py --data test --tasks reason
    python tools/small/score_rewards.py --data test --tasks reason --samples 16

The rewards are those of `configs/dapo.py`. "content" is the mean of what judges the answer itself
(seconds may be off by 0.2), "exact" the share of answers that are letter by letter the expected
ones, "form" the reward of the thinking block and what follows it. --output keeps every answer.

Answers are greedy, or with --samples K of each question at temperature 1. Then "best" is the mean
over the questions of their best answer's content: what choosing among the model's answers, which is
all that rewards can teach it at first, would reach.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import sys
from pathlib import Path

import numpy as np

from moss_audio_jax import MossAudio, Request, Sampling, command
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.post_train.asked import Said
from moss_audio_jax.post_train.mixture import default_rewards, mixture

NEW_TOKENS = 320
FORM = ("format", "length", "repetition", "language")  # the rest judges what is said


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--data", type=Path, required=True, metavar="DIR", help="with rows.jsonl")
    options.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, metavar="DIR")
    options.add_argument("--tasks", default="", help="only tasks whose names begin so")
    options.add_argument("--samples", type=command.positive, metavar="K", help="default: greedy")
    options.add_argument("--output", type=Path, metavar="FILE", help="a JSON line for each answer")
    args = options.parse_args()
    command.keep_compiled()
    command.keep_memory()
    lines = (args.data / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["task"].startswith(args.tasks)]
    model = MossAudio.load(args.checkpoint, dtype="float32")
    ways = [Sampling(NEW_TOKENS)]
    if args.samples:
        ways = [Sampling(NEW_TOKENS, temperature=1.0, seed=seed) for seed in range(args.samples)]
    requests = []
    for row in rows:
        clip, question, _ = (turn["content"] for turn in row["conversation"])
        requests += [Request(question, [str(args.data / clip)], way) for way in ways]
    replies = iter(model.generate_batch(requests, 16, progress=sys.stderr.isatty()))

    reward = mixture(default_rewards(), {"length": {"longest": NEW_TOKENS, "margin": 64}})
    told, kept = collections.defaultdict(list), []
    for row in rows:
        expected = row["conversation"][-1]["content"]
        earned = []
        for reply in itertools.islice(replies, len(ways)):
            if reply.error:
                raise SystemExit(f"{row['id']}: {reply.error}")
            raw = model.tokenizer.decode(reply.ids)
            parts = reward(Said(raw, len(reply.ids), reply.finish_reason), row).parts
            own = [part.value for name, part in parts.items() if name not in FORM]
            content = sum(own) / max(len(own), 1)
            earned.append((content, _answer(raw) == _answer(expected), parts["format"].value))
            kept.append(
                {"task": row["task"], "answer": raw, "expected": expected, "content": content}
            )
        for task in (row["task"], "all"):
            told[task].append((*np.mean(earned, axis=0), max(earned)[0]))
    if args.output:
        args.output.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in kept))
    columns = ["content", "exact", "form", "best"][: 4 if args.samples else 3]
    print(f"| task | rows | {' | '.join(columns)} |\n|{'---|' * (2 + len(columns))}")
    for task, found in sorted(told.items()):
        means = [f"{mean:.3f}" for mean in np.mean(found, axis=0)[: len(columns)]]
        print(f"| {task} | {len(found)} | {' | '.join(means)} |")


def _answer(text: str) -> str:
    """What follows the thinking block."""
    return text.rpartition("</think>")[2].strip().lower()


if __name__ == "__main__":
    main()
