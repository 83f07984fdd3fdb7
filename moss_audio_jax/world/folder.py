"""Scenes as files: clips, training rows, labels."""

from __future__ import annotations

import concurrent.futures
import functools
import io
import itertools
import json
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

from moss_audio_jax import files
from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.errors import InputError
from moss_audio_jax.runtime import deaf_workers, end_with_parent
from moss_audio_jax.world.scenes import MAX_SECONDS, Scene
from moss_audio_jax.world.scenes import scene as make_scene
from moss_audio_jax.world.tasks import rows as make_rows


def write(
    output: Path,
    indices: range,
    split: str = "train",
    seed: int = 0,
    content: str | None = None,
    max_seconds: float = MAX_SECONDS,
    processes: int = 1,
    progress: bool = False,
    make_scene: Callable[..., Scene] = make_scene,
) -> Iterator[dict[str, Any]]:
    """Writes scenes into a folder, and yields the labels of each scene once it is written.

    The labels have one key more than those of `scene`, "audio": the wav's path in the folder.

    Args:
      make_scene: `world.scene`, or another function of its arguments that a process can import.

    Raises:
      InputError: the folder already holds rows or cannot be written to, the disk is full, or
        speech is asked for without the extra `world`.
      UsageError: see `world.scene`; another process writes there.
    """
    scene = functools.partial(
        make_scene, split=split, seed=seed, content=content, max_seconds=max_seconds
    )
    _check_empty(output)
    first = scene(indices[0])  # in this process, so that errors show before others start
    need = int(len(indices) * max_seconds) * SAMPLE_RATE * 2
    make = functools.partial(_write_scene, scene, output, need)
    names: set[str] = set()
    with files.Lock(output, "world"):
        _check_empty(output)
        # What a run that was killed was writing; only the owner of the folder may remove it.
        for left in (*output.glob(".*.partial"), *(output / "wav").glob(".*.partial")):
            left.unlink(missing_ok=True)
        with (
            _Pool(processes) as pool,
            files.writing(output / "rows.jsonl", need=need) as rows,
            files.writing(output / "labels.jsonl", need=need) as labels,
        ):
            made = itertools.chain([_write_clip(first, output, need)], pool.map(make, indices[1:]))
            for one in tqdm(made, total=len(indices), unit="scene", disable=not progress):
                labels.write(json.dumps(one, ensure_ascii=False) + "\n")
                for row in make_rows(one, one["audio"]):
                    rows.write(json.dumps(row, ensure_ascii=False) + "\n")
                names.add(Path(one["audio"]).name)
                yield one
    if earlier := sum(path.name not in names for path in (output / "wav").iterdir()):
        warnings.warn(
            f"{files.shown(output / 'wav')}: {earlier} clip(s) of an earlier run, which did not "
            "end, are in no row",
            stacklevel=2,
        )


def _check_empty(output: Path) -> None:
    if (output / "rows.jsonl").exists():
        raise InputError(f"{files.shown(output)}: holds rows.jsonl already; name an empty folder")


def _write_scene(
    scene: Callable[[int], Scene], output: Path, need: int, index: int
) -> dict[str, Any]:
    return _write_clip(scene(index), output, need)


def _write_clip(made: Scene, output: Path, need: int) -> dict[str, Any]:
    audio = f"wav/{made.labels['id']}.wav"
    path = output / audio
    pcm = (made.wav * 32768).astype(np.int16)  # exact: scenes are rounded to 16 bits
    wav = io.BytesIO()  # libsndfile's own errors do not say why a file cannot be written
    soundfile.write(wav, pcm, SAMPLE_RATE, subtype="PCM_16", format="WAV")
    with files.writing(path, "wb", need) as file:
        file.write(wav.getbuffer())
    return made.labels | {"audio": audio}


class _Pool:
    """`map` over `processes`; with one, in this process."""

    def __init__(self, processes: int):
        self._pool = None
        if processes > 1:
            # Not forked, because this process may have threads and a running espeak.
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(processes, context, end_with_parent)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._pool:  # an interrupt does not wait for unfinished scenes
            self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def map(self, function, items) -> Iterator:
        if not self._pool:
            return map(function, items)
        with deaf_workers():
            return self._pool.map(function, items, chunksize=4)
