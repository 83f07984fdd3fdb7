"""Writes scenes of the procedural world: sound with exact labels, and training rows about it.

example:
  moss-audio-jax world --count 100 --output clips --sheet

Writes DIR/wav/*.wav (16 kHz, 16 bit), DIR/rows.jsonl (the fine-tuning form), DIR/labels.jsonl (one
scene a line) and, with --sheet, DIR/sheet.html: players, spectrograms, labels, rows. Scene i of a
split and a seed is always the same. Speech needs the extra: pip install -e '.[world]'.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, so that Ctrl-C ends those too
    from moss_audio_jax import cli

    cli.run_verb("world")

import concurrent.futures
import functools
import io
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

from moss_audio_jax import command, files
from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.data import world
from moss_audio_jax.errors import InputError
from moss_audio_jax.runtime import deaf_workers

SHEET_SCENES = 24


def write(
    output: Path,
    indices: range,
    split: str = "train",
    seed: int = 0,
    content: str | None = None,
    max_seconds: float = world.MAX_SECONDS,
    processes: int = 1,
    progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """Writes scenes into a folder, and yields the labels of each once it is there.

    Labels carry one key more than a scene's, "audio": the wav's path within the folder.

    Raises:
      InputError: the folder holds rows already or cannot be written to, a full disk, speech
        without its extra.
      UsageError: see `world.scene`; another process writes there.
    """
    scene = functools.partial(
        world.scene, split=split, seed=seed, content=content, max_seconds=max_seconds
    )
    first = scene(indices[0])  # here: what is wrong shows before processes start
    need = int(len(indices) * max_seconds) * SAMPLE_RATE * 2
    make = functools.partial(_write_scene, scene, output, need)
    with (
        files.Lock(output, "world"),
        _Pool(processes) as pool,
        files.writing(output / "rows.jsonl", need=need) as rows,
        files.writing(output / "labels.jsonl", need=need) as labels,
    ):
        if (output / "rows.jsonl").exists():
            raise InputError(f"{output}: holds rows.jsonl already; name an empty folder")
        made = itertools.chain([_write_clip(first, output, need)], pool.map(make, indices[1:]))
        for one in tqdm(made, total=len(indices), unit="scene", disable=not progress):
            labels.write(json.dumps(one, ensure_ascii=False) + "\n")
            for row in world.rows(one, one["audio"]):
                rows.write(json.dumps(row, ensure_ascii=False) + "\n")
            yield one


def _write_scene(
    scene: Callable[[int], world.Scene], output: Path, need: int, index: int
) -> dict[str, Any]:
    return _write_clip(scene(index), output, need)


def _write_clip(made: world.Scene, output: Path, need: int) -> dict[str, Any]:
    audio = f"wav/{made.labels['id']}.wav"
    path = output / audio
    pcm = (made.wav * 32768).astype(np.int16)  # exact: scenes lie on this grid
    wav = io.BytesIO()  # libsndfile does not say why it could not write a file
    soundfile.write(wav, pcm, SAMPLE_RATE, subtype="PCM_16", format="WAV")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(wav.getbuffer())
    except OSError as error:
        raise files.not_written(path, error, need) from None
    return made.labels | {"audio": audio}


class _Pool:
    """`map` over so many processes, or here where it is one."""

    def __init__(self, processes: int):
        self._pool = None
        if processes > 1:
            # Not forked: the process that asks may hold threads and an espeak of its own.
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(processes, context)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._pool:  # who was interrupted does not wait for scenes in the making
            self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def map(self, function, items) -> Iterator:
        if not self._pool:
            return map(function, items)
        with deaf_workers():
            return self._pool.map(function, items, chunksize=4)


def main(argv: Sequence[str]) -> int:
    options = command.parser("world", __doc__)
    options.add_argument("--count", type=command.positive, required=True, metavar="N")
    options.add_argument("--output", type=Path, required=True, metavar="DIR")
    options.add_argument("--split", choices=tuple(world.SPLITS), default="train")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--start", type=int, default=0, metavar="I", help="index of the first scene"
    )
    options.add_argument("--content", choices=tuple(world.CONTENTS),
                         help="every scene has this; default a mixture")  # fmt: skip
    options.add_argument("--max-seconds", type=float, default=world.MAX_SECONDS, metavar="S",
                         help=f"longest scene; default {world.MAX_SECONDS:g}")  # fmt: skip
    options.add_argument("--sheet", action="store_true",
                         help=f"a page to listen to the first {SHEET_SCENES} scenes")  # fmt: skip
    options.add_argument("--processes", type=command.positive, default=os.cpu_count() or 1,
                         metavar="N", help="default: one a core")  # fmt: skip
    args = options.parse_args(argv)

    seconds, shown = 0.0, []
    for labels in write(
        args.output,
        range(args.start, args.start + args.count),
        args.split,
        args.seed,
        args.content,
        args.max_seconds,
        min(args.processes, args.count),
        progress=sys.stderr.isatty(),
    ):
        seconds += labels["duration"]
        if len(shown) < SHEET_SCENES:
            shown.append(labels)
    command.say(f"{args.count} scene(s), {seconds:.0f} s of sound -> {args.output}")
    if args.sheet:
        from moss_audio_jax.data.world.sheet import page

        clips = [(args.output / labels["audio"], labels) for labels in shown]
        target = args.output / "sheet.html"
        files.write_whole(target, page(clips))
        command.say(f"listen: {target}")
    return 0
