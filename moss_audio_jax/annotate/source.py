"""The files to annotate, from a folder or a manifest, and the decoded sound of one file.

Memory does not grow with a file's length: it is decoded block by block into an unnamed temporary
file of float32 samples, from which the branches read their segments.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import os
import re
import reprlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moss_audio_jax import buckets
from moss_audio_jax.audio.io import SUFFIXES, audio_blocks
from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.buckets import absolute, as_path, is_remote
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.files import brief, parse_json, read_bytes, reason, shown
from moss_audio_jax.remote import redact

_KEYS = ("audio", "path", "file", "wav", "audio_path", "audio_filepath", "filename")


@dataclasses.dataclass(frozen=True)
class Source:
    """An audio file: its absolute path, and a unique id that can be a file name.

    `problem` says why there is no file: the manifest's row is broken or names no local file.
    """

    path: str
    id: str
    problem: str = ""


def find(given: str | Path, out: str | Path | None = None) -> list[Source]:
    """Audio files in a fixed order.

    Args:
      given: a folder (searched recursively, sorted), a manifest (.txt: a path per line; .jsonl or
        .csv: its key or column "audio"; relative to the manifest), or one audio file. Manifests are
        UTF-8 or UTF-16, otherwise the bytes of file names or Latin-1. A row that is broken, or
        that does not name a file, becomes a source with a problem.
      out: the folder of the run's results; clips in it are no sources.

    Raises:
      InputError: `given` does not exist or names no audio, or a manifest's row has no known key.
    """
    given = as_path(given)
    broken: list[Source] = []
    if given.is_dir():
        paths, root = _in_folder(given), given
        if out is not None:
            results = os.path.join(os.path.realpath(out), "")
            paths = [each for each in paths if not os.path.realpath(each).startswith(results)]
        if not paths:
            raise InputError(
                f"{shown(given)}: no audio file in this folder ({', '.join(sorted(SUFFIXES))})"
            )
    elif not given.exists():
        raise InputError(f"{shown(given)}: no such file or folder")
    else:
        root = given.parent
        kinds = {".txt": functools.partial(_lines, root=root), ".jsonl": _jsonl, ".csv": _csv}
        read = kinds.get(given.suffix.lower())
        if read is None:
            paths = [str(given)]
        else:
            paths, parts = [], False
            for where, row in read(_text(given)):
                parts |= isinstance(row, dict) and bool(row.get("offset"))
                where = f"{given}, {where}"
                if isinstance(row, dict) and not any(row.get(key) for key in _KEYS):
                    raise InputError(
                        f"{shown(where)}: no audio file named; expected one of the keys "
                        f"{', '.join(_KEYS)}"
                    )
                try:
                    paths.append(_there(root, _named(row)))
                except InputError as error:
                    broken.append(Source(where, _id(where, ""), str(error)))
            if parts:
                warnings.warn(
                    f"{shown(given)}: rows name parts of files (offset, duration); every file is "
                    "annotated once, as a whole",
                    stacklevel=2,
                )
        if not paths:
            why = f"; {shown(broken[0].path)}: {broken[0].problem}" if broken else ""
            raise InputError(f"{shown(given)}: names no audio{why}")
    paths = list(dict.fromkeys(str(absolute(path)) for path in paths))
    return [Source(path, _id(path, str(absolute(root)))) for path in paths] + broken


def _in_folder(folder: Path) -> list[str]:
    """The files whose names end as those of sound do; a warning says how many others there are."""

    def unreadable(error: OSError) -> None:
        warnings.warn(f"{shown(error.filename)}: {reason(error)}; left out", stacklevel=2)

    if is_remote(folder):
        names = [f"{folder}/{name}" for name in buckets.sums(folder)]
    else:
        names = []
        for at, folders, here in os.walk(folder, onerror=unreadable):
            for link in filter(os.path.islink, (os.path.join(at, each) for each in folders)):
                warnings.warn(
                    f"{shown(link)}: is a link to a folder; left out (give that folder by itself)",
                    stacklevel=2,
                )
            names += [os.path.join(at, name) for name in here]
    found, others = [], []
    for name in sorted(names):
        base = os.path.basename(name)
        sound = os.path.splitext(base)[1].lower() in SUFFIXES
        if sound and not base.startswith("."):
            found.append(name)
        elif sound or not base.startswith("."):
            others.append(base)
    if others and found:
        few = ", ".join(map(shown, others[:3])) + (", ..." if len(others) > 3 else "")
        warnings.warn(
            f"{shown(folder)}: {len(others)} file(s) are not named like sound and are left out: "
            f"{few}; name them in a manifest if they are",
            stacklevel=2,
        )
    return found if is_remote(folder) else [name for name in found if not os.path.isdir(name)]


def sharded(sources: list[Source], shard: tuple[int, int]) -> list[Source]:
    """Every n-th source from the i-th on."""
    return sources[shard[0] :: shard[1]]


def read_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"; UsageError unless 0 <= i < n."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UsageError(f"--shard {text}: expected i/n with i from 0 to n - 1")
    return int(match[1]), int(match[2])


def _id(path: str, root: str) -> str:
    """A readable id with a hash, so that names that differ only in dropped characters differ."""
    name = os.path.relpath(path, root) if root else path
    plain = re.sub(r"[^\w.-]+", "_", os.path.splitext(name)[0]).strip("._")[-60:] or "audio"
    while len(plain.encode()) > 160:  # with a suffix, a file name may have 255 bytes
        plain = plain[1:]
    raw = name.encode("utf-8", "surrogatepass")
    return f"{plain}-{hashlib.blake2b(raw, digest_size=4).hexdigest()}"


# --- manifests -----------------------------------------------------------------------------------


def _text(path: Path) -> str:
    """A manifest's text; bytes that are not UTF-8 are kept as Python keeps them in file names."""
    raw = read_bytes(path, "a manifest")
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = raw.decode("utf-16", "replace")
    elif b"\0" in raw[:200] and len(raw) % 2 == 0:  # UTF-16 without a mark; a path has no zero byte
        text = raw.decode("utf-16-be" if raw[0] == 0 else "utf-16-le", "replace")
    else:
        text = raw.decode("utf-8-sig", "surrogateescape")
    return text.replace("\r\n", "\n")


def _there(root: Path, name: str) -> str:
    """The path of a name; if no such file exists, its bytes are also tried as Latin-1."""
    if name.startswith(("gs://", "s3://")):
        return name
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name):
        raise InputError(f"{brief(redact(name))}: is a URL; download it and give the file's path")
    if is_remote(root):
        return f"{root}/{name}"
    path = os.path.join(root, name)
    if os.path.lexists(path) or not any(0xDC80 <= ord(c) < 0xDD00 for c in name):
        return path
    with contextlib.suppress(UnicodeEncodeError):  # a surrogate from JSON
        letters = name.encode("utf-8", "surrogateescape").decode("latin-1")
        if os.path.lexists(os.path.join(root, letters)):
            return os.path.join(root, letters)
    return path


def _lines(text: str, root: Path) -> Iterator[tuple[str, Any]]:
    """A path per line. Spaces around it and lines that begin with # only count if they name a
    file."""
    # Not splitlines(), which also splits at characters that file names may contain.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        whole = not is_remote(root) and os.path.lexists(os.path.join(root, line))
        if whole or not line.startswith("#"):
            yield f"line {number}", {"audio": line if whole else line.strip()}


def _jsonl(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"line {number}"
            try:
                yield where, parse_json(line, "the row")
            except InputError as error:
                yield where, error


def _csv(text: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    rows = csv.DictReader(io.StringIO(text, newline=""))
    while True:
        try:
            row: Any = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            row = InputError(f"not CSV ({error})")
        yield f"line {rows.line_num}", row


def _named(row: Any) -> str:
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, dict):
        raise InputError(f"the row is a {type(row).__name__}; expected an object")
    name = next(row[key] for key in _KEYS if row.get(key))
    if not isinstance(name, str) or "\0" in name or len(name) > 4096:
        raise InputError(f"{brief(reprlib.repr(name))} is not a path")
    return name


# --- sound ---------------------------------------------------------------------------------------


class Sound:
    """A file's decoded samples, kept on disk. A context manager.

    with Sound(path, folder) as sound:
        for block in sound.blocks(): ...      # once, to the end
        sound.read(1.5, 2.0)                  # float32 [8000]
    """

    def __init__(self, path: str, folder: Path):
        self.path = path
        self.samples = 0
        # Without a name, so that nothing is left of it, however this process ends.
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def __enter__(self) -> Sound:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def blocks(self) -> Iterator[np.ndarray]:
        """Decodes the file as `load_audio` does: yields float32 blocks, 16 kHz mono.

        Raises:
          InputError: as `load_audio`.
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
