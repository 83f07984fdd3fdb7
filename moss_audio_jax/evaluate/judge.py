"""Asks a model behind an OpenAI-compatible endpoint to judge captions and open answers (1 to 5).

example:
  moss-audio-jax evaluate judge --benchmark caption --data captions.jsonl \\
      --predictions predictions.jsonl --output judgements.jsonl \\
      --url http://localhost:8000/v1 --model NAME

A caption is judged field by field. Each line of --output holds the judge, a hash of the question,
the judge's answer and the scores read from it. The same command again asks only for scores that
are missing or failed. --key-from names the environment variable with the endpoint's key.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import reprlib
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moss_audio_jax import command
from moss_audio_jax.buckets import as_path
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.evaluate import benchmarks
from moss_audio_jax.evaluate.benchmarks import Item
from moss_audio_jax.evaluate.predictions import read_predictions
from moss_audio_jax.files import parse_json, shown
from moss_audio_jax.journal import Journal, write_lines
from moss_audio_jax.remote import Chat, variable
from moss_audio_jax.text.prompt import split_thinking

Judgement = dict[str, Any]

LOWEST, HIGHEST = 1, 5
CAPTION = """\
You compare a description of speech with the truth, field by field.
Truth:
{reference}

Description:
{answer}

Give each field of the truth an integer from 1 (absent or wrong) to 5 (fully right; other words for
the same are right). Judge only what the description says. Answer with one JSON object that has
exactly the keys {fields} and an integer for each, and nothing else."""
OPEN = """\
You judge an answer to a question about a recording.
Question:
{question}

Right answer:
{reference}

Answer to judge:
{answer}

Give an integer from 1 (wrong or missing) to 5 (fully right; other words for the same are right).
Answer with one JSON object that has exactly the keys {fields} and an integer for each, and nothing
else."""
_ANSWER = "answer"  # the one field of an open question


class Judge(Chat):
    """A model behind an OpenAI-compatible endpoint, used as a judge; see `remote.Chat`."""

    role = "judge"


def question(item: Item, answer: str) -> tuple[str, tuple[str, ...]]:
    """The judge's question about an answer, and the fields that it must score.

    Raises:
      UsageError: items of this kind need no judge.
    """
    if item.kind == "caption" and "sources" not in item.reference:
        fields = tuple(item.reference)
        truth = json.dumps(item.reference, ensure_ascii=False, indent=1)
        form, asked = CAPTION, ""
    elif item.kind == "open":
        right = item.reference["answer"]
        truth = "\n".join(right) if isinstance(right, list) else str(right)
        fields, form, asked = (_ANSWER,), OPEN, item.prompt
    else:
        raise UsageError(f"{item.id}: a judge is for captions and open answers, not {item.kind}")
    keys = ", ".join(json.dumps(field) for field in fields)
    return form.format(reference=truth, answer=answer, fields=keys, question=asked), fields


def read_scores(raw: str, fields: Sequence[str]) -> dict[str, int]:
    """The scores in a judge's answer: one JSON object, with or without a code fence or thinking.

    Raises:
      InputError: there is no such object, or a field is missing or is no integer from 1 to 5.
    """
    said = split_thinking(raw)[1]
    try:
        scores = parse_json(said[said.find("{") : said.rfind("}") + 1], "it")
    except InputError:
        scores = None
    if not isinstance(scores, dict):
        raise InputError(f"no JSON object in {raw[:60]!r}")
    for field in fields:
        if not _is_score(scores.get(field)):
            said = reprlib.repr(scores.get(field))
            raise InputError(f"{field} has {said}; expected an integer from 1 to 5")
    return {field: int(scores[field]) for field in fields}


def _is_score(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and value in range(LOWEST, HIGHEST + 1)


def judge(
    by: Judge,
    items: Iterable[Item],
    answers: Mapping[str, str],
    output: Path,
    workers: int = 8,
    progress: bool = False,
) -> list[Judgement]:
    """Judges all items that need a judge, in their order, and writes the judgements to `output`.

    An empty or missing answer gets the lowest score without asking. Judgements in `output` by this
    judge for the same question are kept.

    Args:
      answers: by item id, without thinking.

    Returns:
      {"id", "judge", "prompt_hash", "raw_judgement", "scores": {field: 1-5}} for each item; if
      there are no scores, "scores" is None and "error" says why.
    """
    kept: dict[tuple[str, str], Judgement] = {}
    for row in read_predictions(output)[0] if output.exists() else ():
        scores, digest = row.get("scores"), row.get("prompt_hash")
        whole = isinstance(digest, str) and isinstance(scores, dict) and scores
        if whole and row.get("judge") == by.identity and all(map(_is_score, scores.values())):
            kept[row["id"], digest] = row
    items = [item for item in items if _judged(item)]
    lock = threading.Lock()

    def one(item: Item) -> Judgement:
        answer = answers.get(item.id, "").strip()
        prompt, fields = question(item, answer)
        digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        if (item.id, digest) in kept:
            return kept[item.id, digest]
        row = {"id": item.id, "judge": by.identity, "prompt_hash": digest, "raw_judgement": None}
        try:
            row["raw_judgement"] = by.ask(prompt) if answer else None
            scores = read_scores(row["raw_judgement"], fields) if answer else {}
            row["scores"] = scores or dict.fromkeys(fields, LOWEST)
        except InputError as error:
            row |= {"scores": None, "error": str(error)}
        with lock:
            journal.write(row)
        return row

    with Journal(output) as journal, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            made = pool.map(one, items)
            judgements = list(tqdm(made, total=len(items), unit="answer", disable=not progress))
        except BaseException:  # Ctrl-C or a full disk: do not wait for running requests
            by.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    write_lines(output, judgements)
    return judgements


def summary(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """{"n", "failed", "mean", "fields": {field: mean}}: 1 to 5, over the items that were judged.

    `mean` is the mean of the fields' means, as in the official table; None if nothing was judged.
    """
    scored = [row["scores"] for row in judgements if row["scores"] is not None]
    names = dict.fromkeys(field for scores in scored for field in scores)
    fields = {}
    for name in names:
        values = [scores[name] for scores in scored if name in scores]
        fields[name] = sum(values) / len(values)
    mean = sum(fields.values()) / len(fields) if fields else None
    failed = len(judgements) - len(scored)
    return {"n": len(judgements), "failed": failed, "mean": mean, "fields": fields}


def _judged(item: Item) -> bool:
    return item.kind == "open" or (item.kind == "caption" and "sources" not in item.reference)


def main(argv: Sequence[str]) -> int:
    options = command.parser("evaluate judge", __doc__)
    benchmarks.add_options(options)
    options.add_argument("--predictions", type=as_path, required=True, metavar="FILE")
    options.add_argument("--output", type=as_path, required=True, metavar="FILE")
    options.add_argument("--url", required=True, help="the part before /chat/completions")
    options.add_argument("--model", required=True, metavar="NAME")
    options.add_argument(
        "--key-from",
        default="OPENAI_API_KEY",
        metavar="VARIABLE",
        help="environment variable; default OPENAI_API_KEY, which may be unset",
    )
    options.add_argument(
        "--workers",
        type=command.positive,
        default=8,
        metavar="N",
        help="concurrent requests; default 8",
    )
    args = options.parse_args(argv)
    command.distinct(args.output, args.data, args.predictions)
    by = Judge(args.url, args.model, os.environ.get(variable(args.key_from)))
    benchmark = benchmarks.from_args(args)
    if not any(map(_judged, benchmark.items)):
        raise UsageError(f"{args.benchmark} needs no judge; use evaluate score alone")
    rows, problems = read_predictions(args.predictions)
    for problem in problems:
        command.say(f"warning: {problem}")
    answers = {row["id"]: row["answer"] for row in rows if isinstance(row.get("answer"), str)}
    asked = [item.id for item in benchmark.items if _judged(item)]
    there = {row["id"] for row in rows}
    missing = [name for name in asked if name not in there]
    if len(missing) == len(asked):
        raise InputError(
            f"{args.predictions}: no predictions at all for the {len(asked)} items of "
            f"{args.benchmark} that need a judge"
        )
    if missing:
        command.say(
            f"error: {args.predictions}: no prediction for {len(missing)} of {len(asked)} items, "
            f"such as {shown(missing[0])}; each counts as the lowest score"
        )
    progress = sys.stderr.isatty()
    judgements = judge(by, benchmark.items, answers, args.output, args.workers, progress)
    for row in judgements:
        if "error" in row:
            command.say(f"error: {row['id']}: {row['error']}")
    print(json.dumps({"benchmark": args.benchmark, "judge": by.identity, **summary(judgements)}))
    return 1 if missing or any("error" in row for row in judgements) else 0


if __name__ == "__main__":
    sys.exit(command.run(main))
