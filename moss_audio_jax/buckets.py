"""Files in buckets (gs://, s3://): the one door to them, for reading and for writing.

`as_path` makes the path of what a user names: a `pathlib.Path`, or for an address an
`etils.epath.Path`, which has the same methods. What epath does one file at a time is done here in
parallel and by ranges: TensorStore reads, fsspec (gcsfs, s3fs) writes and lists.

A bucket has neither renames nor appends, but an object is whole or absent. A folder is therefore
finished by an object that is written last, and removed by deleting that one first.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from moss_audio_jax.bucket_clients import bare, file_system, store, told, tried
from moss_audio_jax.errors import InputError

if TYPE_CHECKING:
    from etils import epath

T = TypeVar("T")
AnyPath = "Path | epath.Path"

_log = logging.getLogger(__name__)

UNFINISHED = ".unfinished"

_THREADS = 16  # requests at a time; an answer takes tens of milliseconds to begin
_PIECE = 16 << 20  # bytes that one request reads
_FIRST_PIECE = 1 << 20  # bytes that the first one reads of a file
_SPARE = 2 << 30  # bytes of the disk that copies leave free


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address, such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def as_path(path: str | os.PathLike[str]) -> Path | epath.Path:
    """The path that a user names. `Path("gs://bucket")` would be a local file of an odd name.

    Raises:
      InputError: the address is of another kind, or its package is not installed.
    """
    if not is_remote(path):
        return Path(path)
    file_system(path)
    from etils import epath

    return epath.Path(path)


def absolute(path: str | os.PathLike[str]) -> Path | epath.Path:
    """The path, from the root on."""
    return as_path(path) if is_remote(path) else Path(os.path.abspath(path))


def files_below(folder: Path | epath.Path) -> list[Path | epath.Path]:
    """All files below a folder, sorted; below a local one folders too."""
    if is_remote(folder):
        return [folder / name for name in sums(folder)]
    return sorted(folder.rglob("*"))


# --- reading -------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str], start: int = 0, stop: int | None = None) -> bytes:
    """The bytes of an object, or those from `start` to `stop`, in one request.

    Raises:
      InputError: there is no such object, it ends before `stop`, or it cannot be read.
    """

    def get() -> bytes:
        place, name = store(path)
        try:
            found = place.read(name, byte_range=slice(start, stop)).result()
        except ValueError as error:  # OUT_OF_RANGE, and what is never worth another attempt
            if "Requested byte range" in str(error):
                raise InputError(f"{path}: ends before byte {stop}; write it again") from None
            raise
        if found.state == "missing":
            raise FileNotFoundError(path)
        value = found.value  # a copy, each time that it is asked for
        if stop is not None and len(value) != stop - start:
            raise ConnectionError(f"{len(value)} bytes came of {stop - start}")
        return value

    with _reading(path):
        return tried(get)


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Makes every error an InputError that names the object."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: cannot be read ({told(error)})") from None


def read_into(path: str | os.PathLike[str], memory: memoryview, start: int) -> None:
    """Fills `memory` with an object's bytes from `start` on, by several requests at a time.

    Raises: as `read`.
    """

    def take(at: int) -> None:
        piece = memory[at : at + _PIECE]
        piece[:] = read(path, start + at, start + at + len(piece))

    _in_parallel(take, range(0, len(memory), _PIECE))


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """An object as a file that can seek. Raises InputError if there is none.

    What is read in order is fetched ahead, in ever larger pieces.
    """
    return io.BufferedReader(_Ranges(path))


class _Ranges(io.RawIOBase):
    """Reads an object by ranges; the last one is kept."""

    def __init__(self, path: str | os.PathLike[str]):
        self.name = os.fspath(path)
        self._size = size(path)
        self._at, self._start, self._held, self._span = 0, 0, b"", _FIRST_PIECE

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if at < 0:
            raise ValueError(f"negative position {at}")
        self._at = at
        return at

    def readinto(self, buffer: memoryview) -> int:
        end = self._start + len(self._held)
        if not self._start <= self._at < end:
            if self._at >= self._size:
                return 0
            in_order = self._held and self._at == end
            self._span = min(2 * self._span, _PIECE) if in_order else _FIRST_PIECE
            stop = min(self._at + max(self._span, len(buffer)), self._size)
            self._start, self._held = self._at, read(self.name, self._at, stop)
        start = self._at - self._start
        piece = self._held[start : start + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def download(source: str | os.PathLike[str], target: Path, names: Sequence[str]) -> None:
    """Copies some objects below a folder to a local one, in parallel. Raises as `read`."""

    def take(name: str) -> None:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(read(f"{source}/{name}"))

    _in_parallel(take, names)


def local_copy(path: str | os.PathLike[str]) -> str:
    """The path of a copy on this machine's disk, made unless there is one; a local path as it is.

    Copies are in ~/.cache/moss_audio_jax/buckets ($XDG_CACHE_HOME). Where the disk is nearly full,
    those used longest ago are deleted first.

    Raises:
      InputError: there is no such object, or it cannot be read or stored.
    """
    if not is_remote(path):
        return os.fspath(path)
    address = os.fspath(path)
    folder, name = address.rpartition("/")[::2]
    about = _listed(address)
    key = hashlib.sha256(f"{folder} {about}".encode()).hexdigest()[:24]
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    copy = Path(caches, "moss_audio_jax", "buckets", key, name)
    if copy.exists() and copy.stat().st_size == about[0]:
        with contextlib.suppress(OSError):
            os.utime(copy)
        return str(copy)
    partial = copy.with_name(f".{name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        _make_room(copy.parent.parent, about[0])
        with open(partial, "wb") as file:

            def take(at: int) -> None:
                data = read(path, at, min(at + _PIECE, about[0]))
                os.pwrite(file.fileno(), data, at)

            _in_parallel(take, range(0, about[0], _PIECE))
        os.replace(partial, copy)
    except OSError as error:
        raise InputError(f"{copy}: not written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return str(copy)


def _make_room(folder: Path, need: int) -> None:
    copies = sorted(folder.glob("*/*"), key=lambda file: file.stat().st_mtime)
    while copies and shutil.disk_usage(folder).free < need + _SPARE:
        with contextlib.suppress(OSError):  # one that is read stays until it is closed
            copies.pop(0).unlink()


def size(path: str | os.PathLike[str]) -> int:
    """The bytes of an object. Raises InputError if there is none."""
    return _listed(os.fspath(path))[0]


def _listed(path: str) -> list[Any]:
    """[bytes, checksum] of an object, as the bucket lists it."""
    with _reading(path):
        about = tried(lambda: file_system(path).info(path))
        if about["type"] != "file":
            raise InputError(f"{path}: is a folder; expected a file")
    return _summed(about)


def sums(folder: str | os.PathLike[str]) -> dict[str, list[Any]]:
    """{name: [bytes, checksum]} of all objects below a folder, as the bucket itself lists them.

    The checksum is the bucket's: CRC-32C on gs://, the ETag on s3://.
    """
    root = bare(folder) + "/"

    def look() -> dict[str, Any]:
        try:
            return file_system(folder).find(root, detail=True)
        except FileNotFoundError:
            return {}

    found = tried(look)
    return {
        name.removeprefix(root): _summed(about)
        for name, about in sorted(found.items())
        if name.startswith(root) and not name.endswith("/")
    }


def _summed(about: dict[str, Any]) -> list[Any]:
    return [about["size"], str(about.get("crc32c") or about.get("ETag"))]


# --- writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Makes every error an InputError that names the object."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{path}: not written: {told(error)}") from None


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes an object, in the place of an older one. Raises InputError if that fails."""
    with _writing(path):
        tried(lambda: file_system(path).pipe_file(str(path), data))


def create(path: str | os.PathLike[str], data: bytes) -> bool:
    """Writes an object unless there is one; whether it did. Of several, one succeeds."""
    fs = file_system(path)

    def make() -> bool:
        if fs.exists(str(path)):
            return False
        try:
            fs.pipe_file(str(path), data, mode="create")
        except FileExistsError:
            return False
        return True

    with _writing(path):
        return tried(make)


def put(source: Path, target: str | os.PathLike[str]) -> None:
    """Copies a local file into a bucket. Raises InputError if it cannot be written."""
    with _writing(target):
        tried(lambda: file_system(target).put_file(str(source), str(target)))


def upload(source: Path, target: str | os.PathLike[str], last: Sequence[str] = ()) -> None:
    """Copies the files below a local folder into a bucket, in parallel.

    Until the copy is whole an object UNFINISHED lies there, which tells one that was cut short.

    Args:
      last: names of files in the folder that are written after all others: with them the copy is
        whole.

    Raises:
      InputError: a file could not be written.
    """
    names = [str(file.relative_to(source)) for file in sorted(source.rglob("*")) if file.is_file()]
    write(f"{target}/{UNFINISHED}", b"")
    for some in ([n for n in names if n not in last], [n for n in names if n in last]):
        _in_parallel(lambda name: put(source / name, f"{target}/{name}"), some)
    delete_one(f"{target}/{UNFINISHED}")


def delete(folder: str | os.PathLike[str], first: Sequence[str] = ()) -> None:
    """Deletes all objects below a folder, those named `first` before the others.

    Raises InputError if that fails.
    """
    fs = file_system(folder)
    root = bare(folder)

    def remove() -> None:
        while names := list(sums(folder)):
            names = [name for name in names if name in first] or names
            with contextlib.suppress(FileNotFoundError):  # an attempt whose answer was lost
                fs.rm([f"{root}/{name}" for name in names[:500]])

    try:
        tried(remove)
    except Exception as error:
        raise InputError(f"{folder}: cannot be deleted ({told(error)})") from None


def move(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copies all objects below a folder to another, within the bucket, then deletes them."""
    fs = file_system(source)
    try:
        _in_parallel(
            lambda name: tried(lambda: fs.cp_file(f"{source}/{name}", f"{target}/{name}")),
            list(sums(source)),
        )
    except Exception as error:
        raise InputError(f"{source}: cannot be moved to {target} ({told(error)})") from None
    delete(source)


def delete_one(path: str | os.PathLike[str]) -> None:
    """Deletes an object, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        tried(lambda: file_system(path).rm_file(bare(path)))


def _in_parallel(action: Callable[[Any], None], items: Sequence[Any]) -> None:
    if len(items) < 2:
        for item in items:
            action(item)
        return
    with ThreadPoolExecutor(min(_THREADS, len(items))) as pool:
        try:
            for done in [pool.submit(action, item) for item in items]:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)
