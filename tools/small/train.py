"""Makes the small model from scratch: scenes, tokenizer, training stages, the bundled folder.

    python tools/small/train.py --workdir small              everything, in order (hours on 2 cores)
    python tools/small/train.py --workdir small --machine gpu        the same on a GPU, in minutes
    python tools/small/train.py --workdir small --only data tokenizer encoder
    python tools/small/train.py --workdir small --only ship  puts the result into the package
    python tools/small/train.py --workdir small --recordings 12000 --voices 8000
                                                  with further stages, on recordings

Every step can be stopped and run again: complete shards are kept, a training stage continues from
its last checkpoint, and finished steps are skipped. Needs the extra `world`. Afterwards
`python tools/small/score.py --workdir small` scores it on held-out scenes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

from moss_audio_jax import files, world
from moss_audio_jax.audio import log_mel
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.data import shards
from moss_audio_jax.data.records import Row, encode_record
from moss_audio_jax.data.sources import Source
from moss_audio_jax.runtime import end_with_parent
from moss_audio_jax.text.phrases import stamped
from moss_audio_jax.weights.convert import convert
from moss_audio_jax.weights.helpers import load_helpers, save_helpers
from moss_audio_jax.world.recordings import scenes as recorded
from moss_audio_jax.world.recordings.source import sources

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.small.align import align, joined
from tools.small.extend import extend
from tools.small.tokenizer import texts_of, train_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs" / "small"
PROCEDURAL = ("encoder", "read", "adapter", "pretrain", "sft", "cold_start", "reason")
# On the world of recordings too, with more word pieces.
RECORDED = ("extend", "hear", "align", "tell")
MODELS = (*PROCEDURAL, *RECORDED)  # each from the one before
TRAINING = tuple(name for name in MODELS if name not in ("extend", "align"))
STEPS = ("data", "tokenizer", *MODELS, "ship")
SCENES, SHARD = 48_000, 800
DRAWS = 3  # of the questions about each scene, and about joined sounds
WORDS_ASKED = 6  # draws of the two questions about a word, for joined speech
# The most mel frames of scenes joined end to end (a chunk has 400).
JOINED = {"all": 3200, "speech": 3200, "timed": 1600, "sounds": 1600}
# Questions about joined sounds, whose labels do not include noise, rooms and loudness.
ASKED = re.compile(
    "events|caption_sound|time_|count$|count_kinds|order|overlap|absent|present|choice_"
)
TOKENIZER_SHARDS = 6  # enough to hold every word
VOCABULARY, NEW_PIECES = 2560, 1024


def make_data(workdir: Path, scenes: int, recordings: int, speech: int, processes: int) -> None:
    """Writes log-mels and rows (`world.record`) of scenes 0 .. scenes - 1 in shards, and joined.

    `recordings` scenes of the world of recordings lie beside them, in folders of their own, and
    `speech` more of that world, in which there is only speech. What they are depends on the
    packages that are here, so their settings name those.

    Joined scenes fill their chunks; otherwise two of five chunks would be padding, and answers
    would be short. There are four joined sets: `all`; `speech`, scenes with only speech; `timed`,
    also with only speech but shorter, with the times of words; `sounds`, scenes with neither speech
    nor music, with timelines.

    `written` holds rows without sound: `scenes` are questions about a scene's labels in writing
    (`world.written`), `drills` what is to be copied and looked up (`world.drill`).
    """
    common = {"split": "train", "seed": 0, "draws": DRAWS}
    settings = common | {"scenes": scenes, "world": world.VERSION}
    work = _shards(workdir / "scenes", workdir / "joined", settings, world.scene)
    written = workdir / "written"
    shards.prepare(str(written), settings)
    for name, count, content in (("recordings", recordings, None), ("voices", speech, "speech")):
        if count:
            here = sorted(source.name for source in sources() if source.available())
            settings = common | {"scenes": count, "world": recorded.VERSION, "sources": here}
            scene = functools.partial(recorded.scene, content=content)
            work += _shards(workdir / name, workdir / f"joined_{name}", settings, scene)
    parts = shards.plan(scenes, None, SHARD)
    context = multiprocessing.get_context("spawn")  # espeak's process must not be shared
    with concurrent.futures.ProcessPoolExecutor(processes, context, end_with_parent) as pool:
        made = [pool.submit(_make_shard, *each) for each in work]
        for kind in WRITTEN:
            for number, part in enumerate(parts):
                path = shards.shard_path(str(written), kind, number, len(parts))
                made.append(pool.submit(_make_written, path, kind, part))
        for each in tqdm(concurrent.futures.as_completed(made), total=len(made), unit="shard"):
            path, digest = each.result()
            manifest = path.parent / "manifest.json"
            known = files.read_json(manifest) if manifest.exists() else {}
            files.write_whole(manifest, json.dumps(known | {path.name: digest}, indent=2) + "\n")


def _shards(
    single: Path, joined: Path, settings: dict[str, Any], scene: Callable[..., world.Scene]
) -> list[tuple]:
    """What `_make_shard` takes, for each shard of a world."""
    shards.prepare(str(single), settings)
    joined.mkdir(exist_ok=True)
    parts = shards.plan(settings["scenes"], None, SHARD)
    paths = [shards.shard_path(str(single), "train", i, len(parts)) for i in range(len(parts))]
    return [(*each, joined, scene) for each in zip(paths, parts, strict=True)]


def _make_shard(
    path: str, part: range, joined: Path, scene: Callable[..., world.Scene]
) -> tuple[Path, str]:
    """Makes one shard of scenes and the shards made from it; existing files are kept.

    Returns the shard and its digest.
    """
    if not os.path.exists(path):
        shards.write_shard(path, (_record(scene(i, "train", seed=0)) for i in part))
    for kind in JOINED:
        _join_shard(path, joined / f"{kind}-{os.path.basename(path)[6:]}", kind)
    return Path(path), _digest(path)


def _make_written(path: str, kind: str, part: range) -> tuple[Path, str]:
    """Makes one shard of rows without sound, unless it exists."""
    if not os.path.exists(path):
        shards.write_shard(path, (encode_record(WRITTEN[kind](i), []) for i in part))
    return Path(path), _digest(path)


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _written(index: int) -> dict[str, Any]:
    return world.written(world.scene(index, "train", seed=0).labels)


WRITTEN = {"scenes": _written, "drills": world.drill}  # row of an index


def _record(scene: world.Scene) -> bytes:
    row = world.record(scene.labels, f"{scene.labels['id']}.wav", DRAWS)
    return encode_record(row, [log_mel(scene.wav).astype(ml_dtypes.bfloat16)])


def _join_shard(source: str, target: Path, kind: str) -> None:
    if target.exists():
        return
    scenes = Source(source)
    rows = (scenes[i] for i in range(len(scenes)))
    if kind == "sounds":
        rows = (row for row in rows if _events(row) and not row.words and not _music(row))
    elif kind != "all":
        rows = (row for row in rows if row.words and not _events(row) and not _music(row))
    join = _join_sounds if kind == "sounds" else functools.partial(_join, timed=kind == "timed")
    shards.write_shard(str(target), map(join, grouped(rows, JOINED[kind])))


def _music(row: Row) -> bool:
    return any(tag.text == "music" for tag in row.tags or ())


def _events(row: Row, start: float = 0.0) -> list[dict[str, Any]]:
    """The labels of a scene's sounds, from its tags; a sound's onsets follow it."""
    found: list[dict[str, Any]] = []
    for name, *span in row.tags or ():
        first, last = (start + edge for edge in span)
        if name.startswith("sound:"):
            kind = name.removeprefix("sound:")
            found.append({"kind": kind, "start": first, "end": last, "onsets": []})
        elif name == "strike":
            found[-1]["onsets"].append(first)
    return found


def grouped(rows: Iterable[Row], frames: int, ahead: int = 24) -> Iterator[list[Row]]:
    """Groups of scenes with up to `frames`; the longest fitting of the next `ahead` is added."""
    rows = iter(rows)
    waiting = list(itertools.islice(rows, ahead))
    while waiting:
        taken, room = [], frames
        while fitting := [i for i, row in enumerate(waiting) if _frames(row) <= room]:
            # A group starts with the first in order, so that every scene is used; then the longest.
            best = max(fitting, key=lambda i: _frames(waiting[i])) if taken else fitting[0]
            taken.append(waiting.pop(best))
            room -= _frames(taken[-1])
            waiting += itertools.islice(rows, 1)
        if taken:
            yield taken
        else:  # this scene alone is too long
            waiting.pop(0)
            waiting += itertools.islice(rows, 1)


def _frames(row: Row) -> int:
    return row.clips[0].shape[1]


def _join(rows: Sequence[Row], timed: bool) -> bytes:
    starts = list(itertools.accumulate((_frames(row) / 100 for row in rows), initial=0.0))
    found: dict[str, list] = {"words": [], "tags": []}
    for row, start in zip(rows, starts, strict=False):
        for key, name in (("words", "text"), ("tags", "name")):
            found[key] += [
                {name: span.text, "start": start + span.start, "end": start + span.end}
                for span in getattr(row, key) or ()
            ]
    # If there is no speech, the first scene's answer says so.
    speaking = [row for row in rows if row.words] or rows[:1]
    question, _ = _asked(speaking[0], "asr")
    said = [("asr", question, " ".join(_asked(row, "asr")[1] for row in speaking))]
    name = f"{rows[0].id}+{len(rows) - 1}"
    if timed:
        question, _ = _asked(speaking[0], "asr_words")
        said.append(("asr_words", question, stamped(found["words"])))
        said += world.word_questions(name, found["words"], WORDS_ASKED)
    record = {
        "conversation": [{"role": "user", "message_type": "audio", "content": f"{name}.wav"}],
        "branches": [
            {
                "messages": [
                    {"role": "user", "message_type": "text", "content": question},
                    {"role": "assistant", "message_type": "text", "content": answer},
                ],
                "task": task,
            }
            for task, question, answer in said
        ],
        **found,
    }
    return encode_record(record, [np.concatenate([row.clips[0] for row in rows], axis=1)])


def _join_sounds(rows: Sequence[Row]) -> bytes:
    starts = list(itertools.accumulate((_frames(row) / 100 for row in rows), initial=0.0))
    at = list(zip(rows, starts, strict=False))
    nothing = dict.fromkeys(("language", "music", "background", "room", "band"))
    labels = nothing | {
        "version": world.VERSION,
        "id": f"{rows[0].id}+{len(rows) - 1}",
        "duration": starts[-1],
        "events": [event for row, start in at for event in _events(row, start)],
        "sentences": [],
        "speakers": [],
        "silence": [],
        "loudness": {"peak_dbfs": None, "level": "normal"},
    }
    made = world.rows(labels, f"{labels['id']}.wav", DRAWS)
    asked = [row for row in made if ASKED.match(row["task"])]
    record = {
        "conversation": asked[0]["conversation"][:1],
        "branches": [{"messages": row["conversation"][1:], "task": row["task"]} for row in asked],
        "words": [],
        "tags": [
            {"name": name, "start": start + first, "end": start + last}
            for row, start in at
            for name, first, last in row.tags or ()
        ],
    }
    return encode_record(record, [np.concatenate([row.clips[0] for row in rows], axis=1)])


def _asked(row: Row, task: str) -> tuple[str, str]:
    """Question and answer of one of a scene's branches."""
    question, answer = next(b for b in row.branches if b.task == task).messages
    return question["content"], answer["content"]


def make_tokenizer(workdir: Path, vocabulary: int = VOCABULARY) -> None:
    paths = sorted((workdir / "scenes").glob("train-*.array_record"))[:TOKENIZER_SHARDS]
    train_tokenizer(texts_of(map(str, paths)), vocabulary, workdir / "tokenizer")


def extend_pieces(workdir: Path) -> None:
    extend(_export(workdir, PROCEDURAL[-1]), _export(workdir, "extend"), NEW_PIECES)


def align_adapter(workdir: Path) -> None:
    before, now = _export(workdir, "extend"), _export(workdir, "hear")
    align(before, now, _export(workdir, "align"), joined(workdir, ["joined"]))


def _export(workdir: Path, name: str) -> Path:
    return workdir / name / "export"


def train_stage(
    workdir: Path, stage: str, machine: str, seed: int, overrides: Sequence[str]
) -> None:
    """Runs a stage in a separate process, as a user would; appends its time to times.jsonl."""
    before = dict(itertools.pairwise(MODELS[::-1])).get(stage)
    command = [
        sys.executable,
        "-m",
        "moss_audio_jax.train",
        "--config",
        f"{CONFIGS / stage}.py:{machine}",
        "--workdir",
        stage,
        f"--config.train.seed={seed}",
        *([f"--config.init_from={before}/export"] if before else []),
        *overrides,
    ]
    print(" ".join(command), flush=True)
    clock, processor = time.perf_counter(), os.times()
    subprocess.run(command, check=True, cwd=workdir)  # paths in the configs are relative to it
    used = os.times()
    entry = {
        "stage": stage,
        "seconds": round(time.perf_counter() - clock),
        "processor_seconds": round(
            used.children_user
            + used.children_system
            - processor.children_user
            - processor.children_system
        ),
    }
    with open(workdir / "times.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def compile_stage(
    workdir: Path, stage: str, machine: str, seed: int, overrides: Sequence[str]
) -> None:
    """Compiles a stage's step into the cache, so that the stage starts without compiling.

    Run it in a separate process during the stage before.
    """
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = (
        "false"  # the running stage uses most of the memory
    )
    os.chdir(workdir)
    import jax

    from moss_audio_jax import command
    from moss_audio_jax.plan.compile import build, compile_step
    from moss_audio_jax.train.__main__ import load_config

    command.keep_compiled()
    words = [f"--config.train.seed={seed}", *overrides]
    config = load_config(f"{CONFIGS / stage}.py:{machine}", words)
    compile_step(build(config, jax.devices()))


def ship(workdir: Path, stage: str, target: Path = DEFAULT_CHECKPOINT) -> None:
    """Writes a stage in bfloat16 to the bundled checkpoint, with heads for `annotate`."""
    export = _export(workdir, stage)
    convert(export, target, "official", dtype=ml_dtypes.bfloat16, overwrite=True, progress=False)
    heads, tags = load_helpers(export)
    kept = {
        path: leaf.astype(ml_dtypes.bfloat16)
        for path, leaf in heads.items()
        if path.startswith(("helpers/pieces/", "helpers/tags/"))
    }
    save_helpers(target, kept, tags)


def steps_of(
    workdir: Path,
    machine: str,
    seed: int = 0,
    overrides: Sequence[str] = (),
    *,
    scenes: int = SCENES,
    recordings: int = 0,
    voices: int = 0,
    processes: int = 1,
    vocabulary: int = VOCABULARY,
) -> dict[str, Callable[[], None]]:
    """What makes each of `STEPS`, but "ship", in the folder `workdir`."""
    stage = functools.partial(train_stage, workdir, machine=machine, seed=seed, overrides=overrides)
    return {
        "data": functools.partial(make_data, workdir, scenes, recordings, voices, processes),
        "tokenizer": functools.partial(make_tokenizer, workdir, vocabulary),
        "extend": functools.partial(_apart, extend_pieces, workdir),
        "align": functools.partial(_apart, align_adapter, workdir),
        **{name: functools.partial(stage, stage=name) for name in TRAINING},
    }


def _apart(change: Callable[..., None], *args: Any) -> None:
    """Calls a function in a process of its own, so that this one holds no accelerator."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, end_with_parent) as pool:
        pool.submit(change, *args).result()


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--workdir", type=Path, required=True, metavar="DIR")
    options.add_argument("--only", nargs="+", choices=STEPS)
    options.add_argument("--scenes", type=int, default=SCENES)
    options.add_argument(
        "--recordings", type=int, default=0, help="scenes of the world of recordings, too"
    )
    options.add_argument(
        "--voices", type=int, default=0, help="scenes with only speech of that world, too"
    )
    options.add_argument(
        "--ship",
        choices=TRAINING,
        metavar="STAGE",
        help="stage whose result is bundled; default the last",
    )
    options.add_argument("--machine", choices=("cpu", "gpu"), default="cpu")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args, overrides = options.parse_known_args()
    if unknown := [word for word in overrides if not word.startswith("--config.")]:
        options.error(f"unknown option {unknown[0]}; stages take --config.KEY=VALUE")
    workdir = args.workdir.resolve()
    steps = steps_of(
        workdir,
        args.machine,
        args.seed,
        overrides,
        scenes=args.scenes,
        recordings=args.recordings,
        voices=args.voices,
        processes=args.processes,
    )
    asked = args.only or STEPS
    if args.only is None and not (args.recordings and args.voices):
        asked = [name for name in STEPS if name not in RECORDED]
    made = [name for name in TRAINING if name in asked or done(workdir, name)]
    steps["ship"] = functools.partial(ship, workdir, args.ship or (made or TRAINING)[-1])
    todo = [name for name in STEPS if name in asked and not done(workdir, name)]
    for name, after in itertools.zip_longest(todo, todo[1:]):
        print(f"--- {name}", flush=True)
        ahead = None
        if args.machine == "gpu" and after in TRAINING:
            context = multiprocessing.get_context("spawn")
            ahead = context.Process(
                target=compile_stage, args=(workdir, after, args.machine, args.seed, overrides)
            )
            ahead.start()
        steps[name]()
        if ahead:
            ahead.join()


def done(workdir: Path, name: str) -> bool:
    if name in MODELS:
        return _export(workdir, name).exists()
    return name == "tokenizer" and (workdir / name / "tokenizer.model").exists()


if __name__ == "__main__":
    main()
