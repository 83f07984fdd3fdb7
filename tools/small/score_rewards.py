"""What greedy answers to the rows of a folder would earn: mean rewards, by task.

    moss-audio-jax world --count 100 --split test --output test
    python tools/small/score_rewards.py --data test --tasks reason

The rewards are those of `configs/dapo.py`. "content" is the mean of what judges the answer itself
(seconds may be off by 0.2), "exact" the share of answers that are letter by letter the expected
ones, "form" the reward of the thinking block and what follows it. --output keeps every answer.
"""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path

from moss_audio_jax import MossAudio, Request, Sampling, command
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.post_train.asked import Said
from moss_audio_jax.post_train.mixture import default_rewards, mixture

NEW_TOKENS = 256
FORM = ("format", "length", "repetition", "language")  # the rest judges what is said


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--data", type=Path, required=True, metavar="DIR", help="with rows.jsonl")
    options.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, metavar="DIR")
    options.add_argument("--tasks", default="", help="only tasks whose names begin so")
    options.add_argument("--output", type=Path, metavar="FILE", help="a JSON line for each answer")
    args = options.parse_args()
    command.keep_compiled()
    command.keep_memory()
    lines = (args.data / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["task"].startswith(args.tasks)]
    model = MossAudio.load(args.checkpoint, dtype="float32")
    requests = []
    for row in rows:
        clip, question, _ = (turn["content"] for turn in row["conversation"])
        requests.append(Request(question, [str(args.data / clip)], Sampling(NEW_TOKENS)))
    replies = model.generate_batch(requests, 16)

    reward = mixture(default_rewards(), {"length": {"longest": NEW_TOKENS, "margin": 64}})
    told, kept = collections.defaultdict(list), []
    for row, reply in zip(rows, replies, strict=True):
        raw = model.tokenizer.decode(reply.ids)
        parts = reward(Said(raw, len(reply.ids), reply.finish_reason), row).parts
        own = [part.value for name, part in parts.items() if name not in FORM]
        content, form = sum(own) / max(len(own), 1), parts["format"].value
        expected = row["conversation"][-1]["content"]
        exact = _answer(raw) == _answer(expected)
        for task in (row["task"], "all"):
            told[task].append((content, exact, form))
        kept.append({"task": row["task"], "answer": raw, "expected": expected, "content": content})
    if args.output:
        args.output.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in kept))
    print("| task | rows | content | exact | form |\n|---|---|---|---|---|")
    for task, found in sorted(told.items()):
        means = [f"{sum(values) / len(found):.3f}" for values in zip(*found, strict=True)]
        print(f"| {task} | {len(found)} | {' | '.join(means)} |")


def _answer(text: str) -> str:
    """What follows the thinking block."""
    return text.rpartition("</think>")[2].strip().lower()


if __name__ == "__main__":
    main()
