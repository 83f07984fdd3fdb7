"""What to annotate: files of a folder or a manifest, and the sound of one, kept on disk.

Memory does not grow with a file's length: it is decoded block by block into a nameless file of
float32 samples, from which the branches read their segments.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moss_audio_jax.audio.io import audio_blocks
from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.data.records import parse_json
from moss_audio_jax.errors import InputError, UsageError

SUFFIXES = (
    ".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".mp4", ".aac", ".webm", ".aif", ".aiff",
    ".wma", ".amr", ".mka",
)  # fmt: skip
_KEYS = ("audio", "path", "file", "wav", "audio_path", "filename")


@dataclasses.dataclass(frozen=True)
class Source:
    """An audio file: absolute path, and an id that is a file name and unlike any other's."""

    path: str
    id: str


def find(given: str | Path) -> list[Source]:
    """Audio files in a fixed order.

    Args:
      given: a folder (looked through recursively, sorted), a manifest (.txt: a path a line; .jsonl
        or .csv: its key or column "audio"; relative to the manifest), or one audio file.

    Raises:
      InputError: it does not exist, or names no audio.
    """
    given = Path(given)
    if given.is_dir():
        files = [f for f in sorted(given.rglob("*")) if f.suffix.lower() in SUFFIXES]
        paths = [str(f) for f in files if f.is_file() and not f.name.startswith(".")]
        if not paths:
            raise InputError(f"{given}: no audio file in this folder ({', '.join(SUFFIXES)})")
        root = given
    elif not given.exists():
        raise InputError(f"{given}: no such file or folder")
    else:
        root = given.parent
        manifest = {".txt": _lines, ".jsonl": _jsonl, ".csv": _csv}.get(given.suffix.lower())
        paths = [os.path.join(root, name) for name in manifest(given)] if manifest else [str(given)]
        if not paths:
            raise InputError(f"{given}: names no audio")
    paths = list(dict.fromkeys(os.path.abspath(path) for path in paths))
    return [Source(path, _id(path, os.path.abspath(root))) for path in paths]


def sharded(sources: list[Source], shard: tuple[int, int]) -> list[Source]:
    """Every n-th source from the i-th on."""
    return sources[shard[0] :: shard[1]]


def read_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"; UsageError unless 0 <= i < n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UsageError(f"--shard {text}: expected i/n with i from 0 to n - 1")
    return int(match[1]), int(match[2])


def _id(path: str, root: str) -> str:
    """Readable, and with a hash: two names that differ in what is left out stay apart."""
    name = os.path.relpath(path, root)
    plain = re.sub(r"[^\w.-]+", "_", os.path.splitext(name)[0]).strip("._")[-60:] or "audio"
    return f"{plain}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; expected the path of an audio file a line") from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _jsonl(path: Path) -> list[str]:
    names = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                names.append(_named(parse_json(line)))
            except InputError as error:
                raise InputError(f"{path}, line {number}: {error}") from None
    return names


def _csv(path: Path) -> list[str]:
    names = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                names.append(_named(row))
            except InputError as error:
                raise InputError(f"{path}, line {number}: {error}") from None
    return names


def _named(row: dict) -> str:
    name = next((row[key] for key in _KEYS if row.get(key)), None)
    if not isinstance(name, str):
        raise InputError(f"no audio file named; expected one of the keys {', '.join(_KEYS)}")
    return name


# --- sound ---------------------------------------------------------------------------------------


class Sound:
    """A file's samples on disk, written while its blocks pass by. A context.

    with Sound(path, folder) as sound:
        for block in sound.blocks(): ...      # once, to the end
        sound.read(1.5, 2.0)                  # float32 [8000]
    """

    def __init__(self, path: str, folder: Path):
        self.path = path
        self.samples = 0
        # It has no name: nothing is left of it, however this process ends.
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def __enter__(self) -> Sound:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def blocks(self) -> Iterator[np.ndarray]:
        """Decodes the file: float32 blocks at 16 kHz mono, as `load_audio` would make them.

        Raises:
          InputError: what `load_audio` raises.
        """
        for block in audio_blocks(self.path):
            self._file.write(block.tobytes())
            self.samples += len(block)
            yield block
        self._file.flush()

    def read(self, start: float, end: float) -> np.ndarray:
        """Samples between two times in seconds, float32."""
        first = min(round(start * SAMPLE_RATE), self.samples)
        last = min(round(end * SAMPLE_RATE), self.samples)
        self._file.seek(4 * first)
        return np.frombuffer(self._file.read(4 * (last - first)), np.float32)
