"""Scores the small model on held-out scenes; prints a table and writes WORKDIR/scores.

    python tools/small/score.py --workdir small [--checkpoint DIR] [--scenes 300]
    python tools/small/score.py --workdir small --splits train      scenes from its training

Makes the scenes of each split (`moss-audio-jax world`), asks the model (`evaluate infer`) and
scores its answers (`evaluate score --benchmark world`). A run that was stopped continues. Needs the
extras `world` and `evaluate`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from moss_audio_jax import world
from moss_audio_jax.annotate.ears import Ears
from moss_audio_jax.audio import load_audio
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.evaluate.metrics.error_rate import errors

# split -> its tasks
SPLITS = {
    "test": "asr,asr_words,events,time_what,time_when,choice_letter,choice_text,tempo,count",
    "test_random_order": "asr",
    "test_voices": "asr,asr_words",
    "test_combinations": "events",
    "train": "asr,events,choice_letter,choice_text,tempo",
}
HELD_OUT = tuple(split for split in SPLITS if split != "train")
# AAS, the accumulated average shift, is the mean error of timestamps.
FIGURES = (  # (name, split, key of the score's "strict", goal)
    ("WER, held-out sentences, %", "test", "wer", "<= 3"),
    ("WER, random order, %", "test_random_order", "wer", "<= 10"),
    ("WER, held-out voices, %", "test_voices", "wer", "<= 10"),
    ("AAS of words, ms per slot", "test", "aas_slot_ms", "<= 40"),
    ("coverage of those times", "test", "coverage", ">= 0.95"),
    ("event timeline F1, 0.2 s", "test", "event_f1", ">= 0.90"),
    ("event timeline F1, held-out pairs", "test_combinations", "event_f1", ""),
    ("time questions, %", "test", "time_accuracy", ">= 90"),
    ("multiple choice, %", "test", "choice_accuracy", ">= 90"),
    ("tempo within 5%, %", "test", "tempo_accuracy", ">= 85"),
    ("other short answers, %", "test", "open_accuracy", ""),
    ("WER, training scenes, %", "train", "wer", ""),
    ("event timeline F1, training scenes", "train", "event_f1", ""),
    ("multiple choice, training scenes, %", "train", "choice_accuracy", ""),
    ("tempo within 5%, training scenes, %", "train", "tempo_accuracy", ""),
)


def run(*words: object) -> int:
    return subprocess.run([sys.executable, "-m", *map(str, words)]).returncode


def misheard(ears: Ears, clips: Sequence[tuple[Path, str]]) -> float:
    """Percent of wrong characters, without spaces, in what the CTC head hears (greedy)."""
    found = []
    for path, text in clips:
        (heard,) = ears.hear([load_audio(path)])
        likeliest = heard.log_probs.argmax(axis=-1)
        nothing = heard.log_probs.shape[-1] - 1
        pieces = [piece for piece, _ in itertools.groupby(likeliest) if piece != nothing]
        said = ears.tokenizer.decode(pieces).replace(" ", "")
        found.append(errors(text.replace(" ", ""), said))
    return 100 * sum(each.total for each in found) / sum(each.reference for each in found)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--workdir", type=Path, required=True, metavar="DIR")
    options.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, metavar="DIR")
    options.add_argument("--scenes", type=int, default=300)
    options.add_argument("--splits", nargs="+", choices=tuple(SPLITS), default=HELD_OUT)
    options.add_argument("--output", type=Path, help="default WORKDIR/scores")
    args = options.parse_args()
    output = args.output or args.workdir / "scores"
    output.mkdir(parents=True, exist_ok=True)
    scores = {}
    for split in args.splits:
        assert split in world.SPLITS
        data = args.workdir / f"{split}-{args.scenes}"
        if not (data / "rows.jsonl").exists():
            run("moss_audio_jax.world", "--count", args.scenes, "--output", data, "--split", split)
        asked = ["--benchmark", "world", "--data", data, "--tasks", SPLITS[split]]
        answers, score = output / f"{split}.jsonl", output / f"{split}.json"
        run(
            "moss_audio_jax.evaluate",
            "infer",
            *asked,
            "--checkpoint",
            args.checkpoint,
            "--max-new-tokens",
            768,
            "--temperature",
            0,
            "--output",
            answers,
        )
        run("moss_audio_jax.evaluate", "score", *asked, "--predictions", answers, "--output", score)
        scores[split] = json.loads(score.read_text(encoding="utf-8"))
    print("| metric | result | 95% | goal |\n|---|---|---|---|")
    for what, split, key, asked_for in FIGURES:
        if split in scores and scores[split]["strict"].get(key) is not None:
            value = scores[split]["strict"][key]
            low, high = scores[split]["confidence"]["strict"][key]
            print(f"| {what} | {value:.3g} | {low:.3g} - {high:.3g} | {asked_for} |")
    ears = Ears.load(args.checkpoint)
    for split in args.splits if "pieces" in ears.has else ():
        data = args.workdir / f"{split}-{args.scenes}"
        rows = map(json.loads, (data / "rows.jsonl").read_text(encoding="utf-8").splitlines())
        said = [row["conversation"] for row in rows if row["task"] == "asr"]
        if said:
            wrong = misheard(
                ears, [(data / turns[0]["content"], turns[-1]["content"]) for turns in said]
            )
            print(f"| characters wrong, CTC head, {split}, % | {wrong:.3g} | | |")


if __name__ == "__main__":
    main()
