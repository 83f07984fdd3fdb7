"""Files in buckets (gs://, s3://): the one door to them, for reading and for writing.

`as_path` makes the path of what a user names: a `pathlib.Path`, or for an address an
`etils.epath.Path`, which has the same methods. What epath does one file at a time is done here in
parallel and by ranges: TensorStore reads, fsspec (gcsfs, s3fs) writes and lists.

A bucket has neither renames nor appends, but an object is whole or absent. A folder is therefore
finished by an object that is written last, and removed by deleting that one first.

Busy servers (429, 5xx), resets, time-outs and bodies that end early are tried again, with a
back-off, here and in the libraries below.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import random
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, TypeVar

from moss_audio_jax.errors import InputError, UsageError, extra

if TYPE_CHECKING:
    from etils import epath

T = TypeVar("T")
AnyPath = "Path | epath.Path"

_log = logging.getLogger(__name__)

UNFINISHED = ".unfinished"

_ATTEMPTS = 6
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 20.0  # seconds, doubled in between
_THREADS = 16  # requests at a time; an answer takes tens of milliseconds to begin
_PIECE = 16 << 20  # bytes that one request reads
_FIRST_PIECE = 1 << 20  # bytes that the first one reads of a file
_SPARE = 2 << 30  # bytes of the disk that copies leave free
_RETRIES = {"max_retries": 16, "initial_delay": "200ms", "max_delay": "20s"}
_EXTRA = {"gs": "gcsfs", "s3": "s3fs"}
_BEAT, _DEAD = 15.0, 60.0  # seconds: a lock's owner renews it; one not renewed is nobody's


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
    _file_system(path)
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
        store, name = _store(path)
        try:
            found = store.read(name, byte_range=slice(start, stop)).result()
        except ValueError as error:  # OUT_OF_RANGE, and what is never worth another attempt
            if "Requested byte range" in str(error):
                raise InputError(f"{path}: ends before byte {stop}; write it again") from None
            raise
        if found.state == "missing":
            raise FileNotFoundError(path)
        if stop is not None and len(found.value) != stop - start:
            raise ConnectionError(f"{len(found.value)} bytes came of {stop - start}")
        return found.value

    try:
        return _tried(get)
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
    try:
        about = _tried(lambda: _file_system(path).info(path))
        if about["type"] != "file":
            raise InputError(f"{path}: is a folder; expected a file")
        return [about["size"], str(about.get("crc32c") or about.get("ETag"))]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: cannot be read ({told(error)})") from None


def sums(folder: str | os.PathLike[str]) -> dict[str, list[Any]]:
    """{name: [bytes, checksum]} of all objects below a folder, as the bucket itself lists them.

    The checksum is the bucket's: CRC-32C on gs://, the ETag on s3://.
    """
    root = _bare(folder) + "/"

    def look() -> dict[str, Any]:
        try:
            return _file_system(folder).find(root, detail=True)
        except FileNotFoundError:
            return {}

    found = _tried(look)
    return {
        name.removeprefix(root): [about["size"], str(about.get("crc32c") or about.get("ETag"))]
        for name, about in sorted(found.items())
        if name.startswith(root) and not name.endswith("/")
    }


# --- writing -------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes an object, in the place of an older one. Raises InputError if that fails."""
    try:
        _tried(lambda: _file_system(path).pipe_file(str(path), data))
    except Exception as error:
        raise InputError(f"{path}: not written: {told(error)}") from None


def create(path: str | os.PathLike[str], data: bytes) -> bool:
    """Writes an object unless there is one; whether it did. Of several, one succeeds."""
    fs = _file_system(path)

    def make() -> bool:
        if fs.exists(str(path)):
            return False
        try:
            fs.pipe_file(str(path), data, mode="create")
        except FileExistsError:
            return False
        return True

    try:
        return _tried(make)
    except Exception as error:
        raise InputError(f"{path}: not written: {told(error)}") from None


def put(source: Path, target: str | os.PathLike[str]) -> None:
    """Copies a local file into a bucket. Raises InputError if it cannot be written."""
    try:
        _tried(lambda: _file_system(target).put_file(str(source), str(target)))
    except Exception as error:
        raise InputError(f"{target}: not written: {told(error)}") from None


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
    fs = _file_system(folder)
    root = _bare(folder)

    def remove() -> None:
        while names := list(sums(folder)):
            names = [name for name in names if name in first] or names
            with contextlib.suppress(FileNotFoundError):  # an attempt whose answer was lost
                fs.rm([f"{root}/{name}" for name in names[:500]])

    try:
        _tried(remove)
    except Exception as error:
        raise InputError(f"{folder}: cannot be deleted ({told(error)})") from None


def move(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copies all objects below a folder to another, within the bucket, then deletes them."""
    fs = _file_system(source)
    try:
        _in_parallel(
            lambda name: _tried(lambda: fs.cp_file(f"{source}/{name}", f"{target}/{name}")),
            list(sums(source)),
        )
    except Exception as error:
        raise InputError(f"{source}: cannot be moved to {target} ({told(error)})") from None
    delete(source)


# --- one owner -----------------------------------------------------------------------------------


class Lease:
    """A lock that is an object in a bucket; `files.Lock` says what a lock is.

    A bucket does not notice that an owner died. The owner therefore renews its object, and one that
    nobody has renewed for a minute is nobody's. On the owner's own machine its process is looked
    for, so that a run which was killed starts again at once.
    """

    held: ClassVar[set[str]] = set()  # the tokens of this process

    def __init__(self, path: str, owner: str, shared: bool = False):
        """`shared`: each owner has an object of its own, and nobody is refused."""
        self._token = uuid.uuid4().hex
        self._path, self._owner = f"{path}-{self._token}" if shared else path, owner
        self._beats = 0
        self._end = threading.Event()
        self._lost: str | None = None
        self.held.add(self._token)

    def acquire(self) -> str | None:
        """Takes the lock; returns its owner if another has it. It may wait for a minute."""
        seen, until = None, 0.0
        while not create(self._path, self._text()):
            try:
                raw = read(self._path)
                held = json.loads(raw)
            except InputError:  # just released
                continue
            except ValueError:
                raw, held = b"", {}
            if held.get("token") == self._token:  # an attempt whose answer was lost
                break
            gone = _is_over(held)
            if raw != seen:
                if seen is not None and not gone:
                    return str(held.get("owner") or "another process")
                seen, until = raw, time.monotonic() + _DEAD
                if not gone:
                    _log.info(f"{self._path}: held by {held.get('owner')}; waiting for its sign")
            if gone or time.monotonic() > until:
                delete_one(self._path)
                continue
            time.sleep(min(1.0, _BEAT / 4))
        threading.Thread(target=self._renew, name="lease", daemon=True).start()
        return None

    def check(self) -> None:
        """Raises InputError if another process has taken the lock meanwhile."""
        if self._lost:
            raise InputError(
                f"{self._path}: lost to {self._lost}, because this process did not reach the "
                "bucket in time; nothing more is written there"
            )

    def release(self) -> None:
        self._end.set()
        self.held.discard(self._token)
        if not self._lost:
            with contextlib.suppress(Exception):
                delete_one(self._path)

    def _renew(self) -> None:
        while not self._end.wait(_BEAT):
            try:
                held = json.loads(read(self._path))
                if held.get("token") != self._token:
                    self._lost = str(held.get("owner"))
                    return
                self._beats += 1
                if not self._end.is_set():
                    write(self._path, self._text())
            except (InputError, ValueError) as error:
                _log.warning(f"{self._path}: not renewed ({error})")

    def _text(self) -> bytes:
        about = {"owner": self._owner, "token": self._token, "beats": self._beats}
        return json.dumps({**about, "process": os.getpid(), "machine": _machine()}).encode()


def delete_one(path: str | os.PathLike[str]) -> None:
    """Deletes an object, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        _tried(lambda: _file_system(path).rm_file(_bare(path)))


@functools.cache
def _machine() -> str | None:
    """Names this boot of this machine, and the list of processes that is seen from here."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _is_over(held: dict[str, Any]) -> bool:
    """Whether the owner's process is known to have ended."""
    if not held.get("machine") or held["machine"] != _machine():
        return False
    try:
        os.kill(int(held["process"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, ValueError):
        return False
    mine = held["process"] == os.getpid()
    return mine and held.get("token") not in Lease.held  # a container began anew


# --- parts ---------------------------------------------------------------------------------------


def told(error: BaseException) -> str:
    """What a bucket's error means, on one line; says so if credentials are missing."""
    text = " ".join(f"{error}".split()) or type(error).__name__
    name = type(error).__name__
    low = text.lower()
    refused = any(word in low for word in ("anonymous caller", "forbidden", "401", "403", "access"))
    lacking = any(
        word in low for word in ("credentials", "anonymous", "could not refresh", "oauth", "imds")
    )
    if lacking or name in ("NoCredentialsError", "DefaultCredentialsError"):
        return (
            "no credentials: for gs:// set GOOGLE_APPLICATION_CREDENTIALS or run gcloud auth "
            "application-default login; for s3:// set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            f"or AWS_PROFILE ({text[:120]})"
        )
    if isinstance(error, PermissionError) or (refused and "denied" in low):
        return f"these credentials may not: {text[:200]}"
    return text if len(text) <= 300 else f"{text[:296]} ..."


def is_ours(error: BaseException) -> bool:
    """Whether an error comes from a client of buckets."""
    rooms = ("gcsfs", "s3fs", "botocore", "aiobotocore", "aiohttp", "google.auth", "fsspec")
    return type(error).__module__.startswith(rooms)


def _tried(action: Callable[[], T]) -> T:
    """The result of `action`, which is tried again where that can help."""
    wait = _FIRST_WAIT
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:
            if attempt == _ATTEMPTS or not _may_pass(error):
                raise
            time.sleep(wait * (0.5 + random.random()))
            wait = min(2 * wait, _LONGEST_WAIT)
    raise AssertionError


def _may_pass(error: Exception) -> bool:
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    text, name = str(error), type(error).__name__
    status = getattr(error, "code", None) or getattr(error, "errno", None)
    if str(status) in ("408", "429", "500", "502", "503", "504", "5", "16"):  # 5: EIO, 16: EBUSY
        return True
    words = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "RESOURCE_EXHAUSTED", "SlowDown")
    return name.startswith("Client") or any(word in text for word in words)


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


def _bare(path: str | os.PathLike[str]) -> str:
    """bucket/name, as fsspec lists it."""
    return os.fspath(path).partition("://")[2].rstrip("/")


def _file_system(path: str | os.PathLike[str]) -> Any:
    scheme = os.fspath(path).partition("://")[0]
    if scheme not in _EXTRA:
        raise InputError(
            f"{path}: nothing here reads such addresses; expected a local path, gs:// or s3://"
        )
    return _file_system_of(scheme)


@functools.cache
def _file_system_of(scheme: str) -> Any:
    """fsspec's file system; epath makes one with the same settings."""
    # Asking what kind of bucket it is takes rights that a run does not need otherwise.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    if endpoint := os.environ.get("STORAGE_EMULATOR_HOST"):  # ArrayRecord's own reader
        os.environ.setdefault("CLOUD_STORAGE_EMULATOR_ENDPOINT", endpoint)
    try:
        import fsspec
        import fsspec.config

        # TensorStore and other processes write too, so a list of names would be out of date.
        for protocol in ("gcs", "s3"):
            fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
        logging.getLogger("gcsfs").addFilter(_not_repeated)
        return fsspec.filesystem({"gs": "gcs"}.get(scheme, scheme))
    except ImportError:
        raise UsageError(
            f"{scheme}:// needs {_EXTRA[scheme]}; install the extra `buckets` ({extra('buckets')})"
        ) from None


def _not_repeated(record: logging.LogRecord) -> bool:
    """gcsfs prints the traceback of what it also raises."""
    return record.levelno < logging.WARNING or not record.exc_info


def kvstore(path: str | os.PathLike[str]) -> dict[str, Any]:
    """TensorStore's description of a place in a bucket."""
    scheme, _, rest = os.fspath(path).partition("://")
    bucket, _, name = rest.partition("/")
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": name, "gcs_request_retries": _RETRIES}
    spec = {"driver": "s3", "bucket": bucket, "path": name, "s3_request_retries": _RETRIES}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        spec |= {"aws_region": region}
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # or it complains of profiles that are not there
        spec |= {"aws_credentials": {"type": "environment"}}
    return spec


@functools.cache
def teach_orbax() -> None:
    """Lets Orbax, which knows gs:// alone, store arrays in s3:// through TensorStore's driver."""
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    gcs, normal = gcs_utils.get_kvstore_for_gcs, tensorstore_utils._normalize_path
    is_gcs = tensorstore_utils._use_gcs_driver

    def spec(path: str) -> dict[str, Any]:
        return kvstore(path) if str(path).startswith("s3://") else gcs(path)

    gcs_utils.get_kvstore_for_gcs = spec
    tensorstore_utils._normalize_path = lambda path: re.sub("^s3:/+", "s3://", normal(path))
    tensorstore_utils._use_gcs_driver = lambda path: is_gcs(path) or path.startswith("s3://")


@functools.lru_cache(64)
def _opened(bucket: str) -> Any:
    import tensorstore as ts

    return ts.KvStore.open({**kvstore(bucket), "path": ""}).result()


def _store(path: str | os.PathLike[str]) -> tuple[Any, str]:
    _file_system(path)  # whose errors are clearer
    scheme, _, rest = os.fspath(path).partition("://")
    bucket, _, name = rest.partition("/")
    return _opened(f"{scheme}://{bucket}"), name
