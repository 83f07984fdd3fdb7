"""The audio of a benchmark's items: missing files, durations, and the prompts."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.buckets import as_path
from moss_audio_jax.errors import InputError
from moss_audio_jax.evaluate.benchmarks import Item
from moss_audio_jax.evaluate.manifests import Cut
from moss_audio_jax.files import open_regular, shown

if TYPE_CHECKING:
    import numpy as np

    from moss_audio_jax.api import MossAudio
    from moss_audio_jax.generate.request import Prepared

_UNREAD_BYTES_PER_SECOND = 16_000  # if soundfile cannot read a file's header; only used for sorting
_OVERSHOOT = 0.5  # seconds that a part may end after its file, as in Kaldi's extract-segments


def missing_audio(items: Sequence[Item], root: Path) -> dict[str, None]:
    """Paths of the items' missing clips, in order.

    Args:
      root: the folder where they were searched, for the message.

    Raises:
      InputError: all clips are missing.
    """
    paths = dict.fromkeys(path for item in items for path in item.audio)
    missing = dict.fromkeys(path for path in paths if not as_path(path).exists())
    if missing and len(missing) == len(paths):
        raise InputError(
            f"none of the {len(paths):,} audio file(s) under {shown(root)} exists, such as "
            f"{shown(next(iter(missing)))}; see --audio-root"
        )
    return missing


def file_seconds(items: Sequence[Item]) -> list[float]:
    """Seconds of sound of each item, from the headers of its files; 0 for a missing file."""
    known: dict[str, float] = {}
    for path in {path for item in items for path in item.audio}:
        known[path] = _header_seconds(path)
    return [sum(known[path] for path in item.audio) for item in items]


def _header_seconds(path: str) -> float:
    import soundfile

    with contextlib.suppress(InputError, OSError), open_regular(path) as file:
        try:
            return soundfile.info(file).duration
        except (soundfile.SoundFileError, ValueError, ArithmeticError):
            return file.seek(0, os.SEEK_END) / _UNREAD_BYTES_PER_SECOND
    return 0.0


def part_seconds(cut: Cut | None, whole: float) -> float:
    """Seconds of the part of a file that the item asks about."""
    if cut is None:
        return whole
    return max((whole if cut[1] is None else cut[1]) - cut[0], 0.0)


def prepared_ahead(
    model: MossAudio, groups: Iterator[list[list[Item]]]
) -> Iterator[tuple[list[Item], list[Prepared | InputError]]]:
    """Yields each group with its prompts; threads prepare them while the last group is answered."""
    pool = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def ready(group: list[tuple[list[Item], concurrent.futures.Future]]) -> tuple[list, list]:
        items = [item for run, _ in group for item in run]
        return items, [prompt for _, future in group for prompt in future.result()]

    try:
        ahead: list[list[tuple[list[Item], concurrent.futures.Future]]] = []
        for group in groups:
            ahead.append([(run, pool.submit(_prepare, model, run)) for run in group])
            if len(ahead) == 2:
                yield ready(ahead.pop(0))
        for group in ahead:
            yield ready(group)
    finally:
        # A thread that still decodes when the interpreter ends may crash it.
        pool.shutdown(wait=True, cancel_futures=True)


def _prepare(model: MossAudio, run: Sequence[Item]) -> list[Prepared | InputError]:
    """The prompts of items with the same files; items with the same part share its clip."""
    from moss_audio_jax.api import Clip, Request

    prompts: list[Prepared | InputError] = []
    files = [Clip(path) for path in run[0].audio]
    clips: dict[Cut | None, list[Clip]] = {None: files}
    for item in run:
        try:
            if item.cut not in clips:
                path = item.audio[0]
                clips[item.cut] = [Clip(part(files[0].wav, item.cut, path), path)]
            prompts.append(model.prepare(Request(item.prompt, clips[item.cut])))
        except InputError as error:
            prompts.append(error)
    return prompts


def part(wav: np.ndarray, cut: Cut, path: str) -> np.ndarray:
    """The samples of a part of a file; `wav` are the samples of the file.

    Raises:
      InputError: the file ends before the part begins, or more than half a second before it ends.
    """
    start, end = cut
    seconds = len(wav) / SAMPLE_RATE
    if start >= seconds or (end is not None and end > seconds + _OVERSHOOT):
        until = "the end" if end is None else f"{end:g} s"
        raise InputError(
            f"{shown(path)}: holds {seconds:.2f} s; the part from {start:g} s to {until} is not "
            "in it"
        )
    return wav[round(start * SAMPLE_RATE) : None if end is None else round(end * SAMPLE_RATE)]
