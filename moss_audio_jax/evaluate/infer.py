"""Asks a model the questions of a benchmark; one JSON line for each answer.

example:
  moss-audio-jax evaluate infer --benchmark mmau-mini --data mmau-test-mini.json \\
      --checkpoint DIR --output predictions.jsonl

Answers are written to FILE.partial.jsonl as they arrive; to continue, run the same command again.
At the end they are merged into FILE, in the order of the data. Several processes (launch/) share
the work; all of them must be able to write to the folder of --output. Answers do not depend on
--batch-size, --mesh or the number of processes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from moss_audio_jax import command
from moss_audio_jax.buckets import as_path
from moss_audio_jax.errors import InputError
from moss_audio_jax.evaluate import benchmarks
from moss_audio_jax.evaluate.benchmarks import Item
from moss_audio_jax.evaluate.clips import (
    file_seconds,
    missing_audio,
    part_seconds,
    prepared_ahead,
)
from moss_audio_jax.evaluate.predictions import (
    Prediction,
    check_same,
    failed,
    merge,
    partial_file,
    read_all,
)
from moss_audio_jax.evaluate.processes import Crew, barrier, crew_and_mesh
from moss_audio_jax.files import Lock, brief
from moss_audio_jax.generate.options import BATCHES_AT_ONCE
from moss_audio_jax.journal import Journal
from moss_audio_jax.runtime import code_version

if TYPE_CHECKING:
    from moss_audio_jax.api import MossAudio, Reply
    from moss_audio_jax.generate.options import Sampling
    from moss_audio_jax.generate.request import Prepared

_GROUP_SECONDS = 7200.0  # the most sound of one call of the engine
# Questions about one clip that stay together: the clip is loaded and prefilled once for them.
_TOGETHER = 16
_NAMED = 20  # failures that are printed; the file contains all


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings, besides the item, that determine an answer. Every prediction has them."""

    model: str
    lora: str | None
    dtype: str
    quantize: str
    encoder_attention: str
    random_weights: bool
    config_hash: str
    decoding: dict[str, Any]

    def meta(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "code_version": code_version()}


# --- one benchmark -------------------------------------------------------------------------------


def infer(
    model: MossAudio,
    items: Sequence[Item],
    output: Path,
    sampling: Sampling,
    settings: Settings,
    crew: Crew,
    batch_size: int = 16,
    progress: bool = False,
    limit: int | None = None,
) -> list[Prediction]:
    """Predictions of all items, in their order; `output` holds them when this returns.

    Predictions in `output` and its partial files are kept, except those of failed items, which are
    tried again. Every process of the crew calls this; the first one writes `output`.

    Args:
      sampling: for every answer; its seed is mixed with each item's id.
      limit: the number of items, if they are only the first ones of their data. Each prediction
        contains it, so that a score counts no other items.

    Raises:
      InputError: `output` has predictions with other settings or prompts, or cannot be written.
    """
    meta = settings.meta() | ({} if limit is None else {"limit": limit})
    done = read_all(output)
    check_same(done, items, meta, output)
    # All processes read before one writes, because processes that share a mesh must agree on the
    # items that are left.
    barrier("evaluate: read")
    files = {item.id: seconds for item, seconds in zip(items, file_seconds(items), strict=True)}
    costs = {item.id: part_seconds(item.cut, files[item.id]) for item in items}
    # Expensive items first, similar ones next to each other, and parts of one file together,
    # because a file is decoded for sixteen of them at once. The order is the same in every process
    # and run.
    order = sorted(
        items, key=lambda i: (-files[i.id], i.audio, i.cut[0] if i.cut else 0, len(i.prompt), i.id)
    )
    own = [item for run in _runs(order)[crew.index :: crew.count] for item in run]
    left = [item for item in own if failed(done.get(item.id))]
    with (
        Journal(partial_file(output, crew.index, crew.count) if crew.writes else None) as journal,
        _Bar(left, costs, progress and crew.writes and crew.index == 0) as bar,
    ):
        groups = _groups(_runs(left), costs, batch_size)
        for group, prompts in prepared_ahead(model, groups):
            answer_group(model, group, prompts, sampling, meta, batch_size, journal, bar)
            journal.sync()
    barrier("evaluate: answered")
    if crew.index == 0 and crew.writes:
        merge(output, items)
    barrier("evaluate: written")
    final = read_all(output)
    return [final[item.id] for item in items]


def answer_group(
    model: MossAudio,
    items: Sequence[Item],
    prompts: Sequence[Prepared | InputError],
    sampling: Sampling,
    meta: Mapping[str, Any],
    batch_size: int,
    journal: Journal,
    bar: _Bar,
) -> None:
    """Answers a group in one call of the engine; each prediction goes to the journal at once."""
    started = time.perf_counter()
    asked = []
    for item, prompt in zip(items, prompts, strict=True):
        if isinstance(prompt, InputError):
            journal.write(_prediction(item, None, None, None, 0.0, meta, str(prompt)))
            bar.update(item)
        else:
            own = dataclasses.replace(sampling, seed=item_seed(sampling.seed, item.id))
            asked.append((item, dataclasses.replace(prompt, sampling=own)))

    def on_reply(number: int, reply: Reply) -> None:
        item, prompt = asked[number]
        seconds = time.perf_counter() - started
        raw = model.tokenizer.decode(reply.ids)
        journal.write(_prediction(item, prompt, reply, raw, seconds, meta))
        bar.update(item)

    model.answer([prompt for _, prompt in asked], batch_size, on_reply=on_reply)


def item_seed(seed: int, name: str) -> int:
    """The seed of one item's answer; it does not depend on the item's position."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:4]) >> 1


def _prediction(
    item: Item,
    prompt: Prepared | None,
    reply: Reply | None,
    raw: str | None,
    seconds: float,
    meta: Mapping[str, Any],
    error: str | None = None,
) -> Prediction:
    """`seconds` is the wall time from the start of the item's group to the end of its answer."""
    from moss_audio_jax.evaluate.metrics import parse

    parsed, status = (None, "error") if raw is None else parse(item.kind, item.reference, raw)
    mels = prompt.mels if prompt else ()
    row = {
        "id": item.id,
        "prompt": item.prompt,
        "raw_output": raw,
        "thinking": reply.thinking if reply else None,
        "answer": reply.text if reply else None,
        "parsed": parsed,
        "parse_status": status,
        "finish_reason": reply.finish_reason if reply else None,
        "n_prompt_tokens": len(prompt.ids) if prompt else None,
        "n_output_tokens": len(reply.ids) if reply else None,
        "audio_seconds": round(sum(mel.shape[1] for mel in mels) / 100, 2) if prompt else None,
        "seconds": round(seconds, 3),
        "warnings": list(reply.warnings) if reply else [],
        "meta": dict(meta),
    }
    return row if error is None else row | {"error": error}


# --- order of the work ---------------------------------------------------------------------------


def _runs(items: Sequence[Item]) -> list[list[Item]]:
    """Neighbours that ask about the same clips, up to _TOGETHER of them."""
    runs: list[list[Item]] = []
    for item in items:
        if runs and runs[-1][0].audio == item.audio and len(runs[-1]) < _TOGETHER:
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs


def _groups(
    runs: Sequence[list[Item]], costs: Mapping[str, float], batch_size: int
) -> Iterator[list[list[Item]]]:
    group: list[list[Item]] = []
    count, seconds = 0, 0.0
    for run in runs:
        cost = costs[run[0].id]  # all items of a run have the same audio
        long = seconds + cost > _GROUP_SECONDS and count >= batch_size
        if group and (long or count + len(run) > BATCHES_AT_ONCE * batch_size):
            yield group
            group, count, seconds = [], 0, 0.0
        group.append(run)
        count, seconds = count + len(run), seconds + cost
    if group:
        yield group


class _Bar:
    """A progress bar in seconds of audio, which determine the time of the work."""

    def __init__(self, items: Sequence[Item], costs: Mapping[str, float], shown: bool) -> None:
        self._costs, self._items, self._done = costs, len(items), 0
        self._bar = tqdm(
            total=max(sum(costs[item.id] for item in items), 1e-9),
            disable=not shown,
            bar_format="{percentage:3.0f}%|{bar}| {postfix}[{elapsed}<{remaining}]",
        )

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, item: Item) -> None:
        self._done += 1
        self._bar.update(self._costs[item.id])
        if not self._bar.disable:
            rtfx = self._bar.n / max(self._bar.format_dict["elapsed"], 1e-9)
            self._bar.set_postfix_str(
                f"{self._done}/{self._items} answers, RTFx {rtfx:.1f} ", refresh=False
            )


# --- command line --------------------------------------------------------------------------------


def settings_of(model: MossAudio, args: argparse.Namespace, sampling: Sampling) -> Settings:
    """The settings of a model and its sampling, as predictions contain them."""
    described = json.dumps(
        [dataclasses.asdict(model.config), dataclasses.asdict(model.processor)], sort_keys=True
    )
    name = str(args.checkpoint)
    if model.folder != args.checkpoint:  # downloaded; its folder has the name of the commit
        name = f"{name.partition('@')[0]}@{model.folder.name}"
    return Settings(
        model=name,
        lora=None if args.lora is None else str(args.lora),
        config_hash=hashlib.sha256(described.encode()).hexdigest()[:16],
        dtype=model.compute.dtype,
        quantize=model.compute.quantize,
        encoder_attention=model.config.encoder.attention,
        random_weights=model.random_weights,
        decoding=json.loads(json.dumps(dataclasses.asdict(sampling))),  # tuples as JSON has them
    )


def main(argv: Sequence[str]) -> int:
    from moss_audio_jax.generate.__main__ import sampling_from, sampling_options

    options = command.parser("evaluate infer", __doc__)
    benchmarks.add_options(options)
    options.add_argument(
        "--prompt",
        default="official",
        metavar="official|TEXT",
        help="default: the official one; for multiple choice, the text before the question",
    )
    options.add_argument(
        "--output",
        type=as_path,
        required=True,
        metavar="FILE|DIR",
        help="a .jsonl file, or a folder, which gets NAME.jsonl",
    )
    command.add_model_options(options)
    options.add_argument("--batch-size", type=command.positive, default=16, metavar="N")
    sampling_options(options)
    args = options.parse_args(argv)
    sampling = sampling_from(args)
    prompt = None if args.prompt == "official" else args.prompt
    benchmark = benchmarks.from_args(args, prompt)
    output = args.output
    if output.suffix != ".jsonl":
        output = output / f"{args.benchmark}.jsonl"
    command.distinct(output, args.data)

    command.join_processes()
    crew, mesh = crew_and_mesh(args.mesh)
    speaks = crew.index == 0 and crew.writes
    with Lock(output.parent, "evaluate infer", output.name) if speaks else contextlib.nullcontext():
        problems: list[str] = []
        done = read_all(output, problems)
        left = [item for item in benchmark.items if failed(done.get(item.id))]
        missing = missing_audio(left, args.audio_root or args.data)
        if speaks:
            _announce(benchmark)
            _some("warning", [f"{problem}; asked again" for problem in problems], 3, output)
            _some("error", [f"{path}: no such file; see --audio-root" for path in missing], 3, None)
        model = command.load_model(args, mesh)
        settings = settings_of(model, args, sampling)
        started = time.perf_counter()
        predictions = infer(
            model,
            benchmark.items,
            output,
            sampling,
            settings,
            crew,
            args.batch_size,
            progress=sys.stderr.isatty(),
            limit=args.limit,
        )
    without = [row for row in predictions if failed(row)]
    if speaks:
        unnamed = {item.id for item in left if missing.keys().isdisjoint(item.audio)}
        failures = [f"{row['id']}: {row.get('error')}" for row in without if row["id"] in unnamed]
        _some("error", failures, _NAMED, output)
        warned = [row for row in predictions if row.get("warnings")]
        told = [f"{row['id']}: {'; '.join(map(str, row['warnings']))}" for row in warned]
        _some("warning", told, 3, output)
        seconds = time.perf_counter() - started
        audio = sum(row.get("audio_seconds") or 0 for row in predictions)
        command.say(
            f"{len(predictions) - len(without)} answer(s), {len(warned)} with a warning, "
            f"{len(without)} failed, {audio:.0f} s of audio, {seconds:.1f} s -> {output}"
        )
    return 1 if without else 0


def _some(kind: str, problems: Sequence[str], most: int, file: Path | None) -> None:
    """Prints the first problems, one on each line, and the number of the others."""
    for problem in problems[:most]:
        command.say(f"{kind}: {brief(problem, 500)}")
    if (more := len(problems) - most) > 0:
        command.say(f"{kind}: {more:,} more like this" + (f"; see {file}" if file else ""))


def _announce(benchmark: benchmarks.Benchmark) -> None:
    for problem in benchmark.problems:
        command.say(f"warning: {problem}")
    first = benchmark.items[0]
    command.say(f"{benchmark.name}: {len(benchmark.items)} items; the first one ({first.id}) asks:")
    command.say("\n".join(f"  {line}" for line in first.prompt.splitlines()))


if __name__ == "__main__":
    sys.exit(command.run(main))
