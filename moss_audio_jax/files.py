"""Reads files of unknown origin safely, and writes files whole or not at all.

Needs neither JAX nor NumPy, so that data workers and the command line can use it at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import reprlib
import shutil
import stat
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO

from moss_audio_jax import buckets
from moss_audio_jax.buckets import as_path, is_remote
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.lease import Lease


def open_regular(path: str | os.PathLike[str], what: str = "a file") -> BinaryIO:
    """Opens a regular file, or an object of a bucket, for reading.

    Pipes, devices and /proc are refused at once.

    A FIFO would block for ever, a device may never end, and files in /proc state a wrong size.

    Args:
      what: what was expected, for the message: "an audio file".

    Raises:
      InputError: no such file, a folder, not a regular file, or no permission to read it.
    """
    name = os.fspath(path)
    if is_remote(name):
        return buckets.opened(name)
    try:
        # O_NONBLOCK: opening a FIFO that nobody writes to would wait.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InputError(f"{shown(name)}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte, or a lone surrogate
        raise InputError(f"{shown(name)}: cannot be opened ({reason(error)})") from None
    try:
        status = os.fstat(number)
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{shown(name)}: is a directory; expected {what}")
        in_proc = status.st_dev == _device_of("/proc")
        if not stat.S_ISREG(status.st_mode) or in_proc:
            raise InputError(f"{shown(name)}: is not a regular file; expected {what}")
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def _device_of(folder: str) -> int | None:
    try:
        return os.stat(folder).st_dev
    except OSError:
        return None


def parse_json(
    text: str | bytes,
    where: str,
    pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """Parses a JSON text; `where` names it in messages.

    Args:
      pairs_hook: as json.loads' object_pairs_hook; it may raise InputError.

    Raises:
      InputError: it is not UTF-8 or not JSON, nests too deeply, or holds an integer of thousands of
        digits.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=pairs_hook)
    except InputError:  # from the hook
        raise
    except RecursionError:
        raise InputError(f"{where}: not usable JSON (it nests too deeply)") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not valid UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    except ValueError:  # Python's limit on digits
        raise InputError(f"{where}: not usable JSON (an integer of thousands of digits)") from None


def read_bytes(path: str | os.PathLike[str], what: str = "a file") -> bytes:
    """All bytes of a regular file. Raises InputError, naming the file, if it cannot be read."""
    if is_remote(path):
        return buckets.read(path)
    with open_regular(path, what) as file:
        try:
            return file.read()
        except OSError as error:
            raise InputError(f"{shown(path)}: cannot be read ({reason(error)})") from None


def read_text(
    path: str | os.PathLike[str], what: str = "a text file", errors: str = "strict"
) -> str:
    """The text of a regular file: UTF-8, or UTF-16 if it begins with a byte order mark.

    Line ends become "\\n".

    Args:
      errors: as of `bytes.decode`; "surrogateescape" keeps file names that are not UTF-8.

    Raises:
      InputError: it cannot be read, or is in another encoding; the line is named.
    """
    raw = read_bytes(path, what)
    codec = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = raw.decode(codec, errors)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        name = "UTF-16" if codec == "utf-16" else "UTF-8"
        raise InputError(
            f"{shown(path)}: not {name} text (line {line}: {error.reason}); convert it, such as by "
            "iconv -f latin1 -t utf-8"
        ) from None
    return text.replace("\r\n", "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parses a JSON file. Raises InputError, naming the file, if it is missing or broken."""
    return parse_json(read_bytes(path, "a JSON file"), shown(path))


# --- writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(
    path: str | os.PathLike[str], mode: str = "w", need: int | None = None
) -> Iterator[IO[Any]]:
    """Writes a file that appears under its name only when all of it is on disk, or in its bucket.

    Until then an older file of that name stays unchanged. Missing parent folders are made. A link
    stays one: its target is written. What goes to a bucket is first written to this machine's disk,
    and what goes to a device or a pipe is written at once.

    Args:
      mode: "w" (UTF-8 text) or "wb".
      need: total bytes to be written, for the message if the disk is full.

    Raises:
      InputError: it cannot be written; the message says if the disk is full.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            with writing(Path(folder, "file"), mode, need) as file:
                yield file
            buckets.put(Path(folder, "file"), path)
        return
    encoding = None if "b" in mode else "utf-8"
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        try:
            with open(path, mode, encoding=encoding) as file:
                yield file
        except OSError as error:
            raise not_written(path, error) from error
        return
    real = Path(os.path.realpath(path)) if path.is_symlink() else path
    aside = real.with_name(f".{_cut(real.name)}.{os.getpid()}.partial")
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        file = open(aside, mode, encoding=encoding)  # noqa: SIM115  closed below
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
        finally:
            # If the block fails, its own error counts, not the failure to write the rest.
            with contextlib.suppress(OSError):
                file.close()
        os.replace(aside, real)
    except OSError as error:
        raise not_written(path, error, need) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def _cut(name: str) -> str:
    """A name to which 20 bytes more can be added: a file's may have 255."""
    raw = os.fsencode(name)
    return name if len(raw) <= 220 else f"{os.fsdecode(raw[:200])}-{zlib.crc32(raw):08x}"


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file in one piece, as `writing` does."""
    if isinstance(content, str):
        # A lone surrogate, from a file name or a model's answer, must not lose the whole file.
        content = content.encode("utf-8", "backslashreplace")
    if is_remote(path):
        buckets.write(path, content)
        return
    with writing(path, "wb") as file:
        file.write(content)


def check_folder(folder: Path) -> None:
    """For verbs that work for minutes before they write; the folder need not exist.

    Raises:
      InputError: no file can be made in it, or in the nearest folder above it that exists.
    """
    # A link to nowhere is there, too, and makes no folder.
    there = next(f for f in (folder, *folder.absolute().parents) if os.path.lexists(f))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"{shown(there)}: not a writable folder: {reason(error)}") from error


def check_target(file: Path) -> None:
    """`check_folder` for a file in a folder that must exist."""
    if file.is_dir() or not file.parent.is_dir():
        raise InputError(f"{shown(file)}: expected a file in a folder that exists")
    check_folder(file.parent)


def append(path: str | os.PathLike[str], text: str) -> None:
    """Appends to a log; in a bucket that means to write it anew. Raises InputError if it cannot."""
    if is_remote(path):
        before = buckets.read(path) if as_path(path).exists() else b""
        buckets.write(path, before + text.encode("utf-8", "backslashreplace"))
        return
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        raise not_written(path, error) from error


def not_written(
    path: str | os.PathLike[str], error: BaseException, need: int | None = None
) -> InputError:
    """A one-line error for a file that could not be written. For a full disk it says how much is
    free.

    Args:
      error: from the system, or from a library that only quotes the system's error in its text.
      need: total bytes to be written, for the message.
    """
    if disk_is_full(error):
        with contextlib.suppress(OSError):
            folder = next(f for f in Path(path).absolute().parents if f.exists())
            free = shutil.disk_usage(folder).free
            needed = "" if need is None else f", up to {megabytes(need)} needed"
            return InputError(
                f"{shown(path)}: not written: the disk is full ({megabytes(free)} free in "
                f"{folder}{needed}); make room or use another folder"
            )
    return InputError(f"{shown(path)}: not written: {reason(error)}")


def disk_is_full(error: BaseException) -> bool:
    """Whether the error means that the disk, or the user's share of it, is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    words = ("No space left", "ENOSPC", "quota exceeded", "EDQUOT")
    return any(word in str(error) for word in words)


# --- checksums -----------------------------------------------------------------------------------

Share = tuple[int, int]  # (k, n): the k-th of n processes; each file belongs to one of them


def checksums(folder: Path, share: Share = (0, 1), names: Iterable[str] | None = None) -> dict:
    """{name: [bytes, CRC-32]} of the files below a folder; it also flushes them to the disk.

    Args:
      names: only these files; default all.

    Raises:
      InputError, OSError: a file cannot be read.
    """
    if names is None:
        names = [str(f.relative_to(folder)) for f in sorted(folder.rglob("*")) if f.is_file()]
    mine = [name for name in names if _is_in(share, name)]
    with ThreadPoolExecutor(_threads()) as pool:
        found = pool.map(lambda name: _checksum(folder / name, keep=True), mine)
        return dict(zip(mine, found, strict=True))


def damage(folder: Path, expected: Mapping[str, list[int]], share: Share = (0, 1)) -> str | None:
    """The first difference between the files below a folder and their `checksums`, or None."""

    def look(name: str) -> str | None:
        try:
            size, crc = _checksum(folder / name)
        except InputError:
            there = (folder / name).exists()
            return f"{shown(name)} " + ("is not a readable file" if there else "is missing")
        except OSError as error:
            return f"{name} cannot be read ({reason(error)})"
        if size != expected[name][0]:
            return f"{name} has {size} bytes of {expected[name][0]}"
        return None if crc == expected[name][1] else f"{name} is damaged (its checksum differs)"

    with ThreadPoolExecutor(_threads()) as pool:
        faults = pool.map(look, [name for name in expected if _is_in(share, name)])
        return next(filter(None, faults), None)


def _is_in(share: Share, name: str) -> bool:
    return zlib.crc32(name.encode("utf-8", "surrogatepass")) % share[1] == share[0]


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


def _checksum(path: Path, keep: bool = False) -> list[int]:
    size = crc = 0
    with open_regular(path) as file:
        while piece := file.read(1 << 22):
            size += len(piece)
            crc = zlib.crc32(piece, crc)
        if keep:
            sync(file.fileno())
    return [size, crc]


def sync(file: int | Path) -> None:
    """Flushes a file, or a folder's list of names, so that it survives a loss of power."""
    number = os.open(file, os.O_RDONLY) if isinstance(file, Path) else file
    try:
        os.fsync(number)
    except OSError as error:  # the file system does not support it
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        if isinstance(file, Path):
            os.close(number)


# --- one owner -----------------------------------------------------------------------------------


class Lock:
    """A lock with which one process owns a folder, or with `file` one file in it.

    It is a context manager. The kernel holds the lock (`flock` on a file in the folder) and drops
    it when the process ends for any reason, so neither a crash nor a reboot leaves a folder locked.
    In a bucket it is a `lease.Lease`.

    Args:
      file: the file's name in the folder.
      shared: other processes may share the lock, but none may own it.

    Raises:
      UsageError: on entry, if another process, which is named, owns the folder (exit code 2).
      InputError: on entry, if the folder cannot be written to.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        verb: str,
        file: str | None = None,
        shared: bool = False,
    ):
        self._owned = as_path(folder) / (file or "")
        self._path = as_path(folder) / (".lock" if file is None else f".{file}.lock")
        self._verb = verb
        self._kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._lease: Lease | None = None

    def __enter__(self) -> Lock:
        if is_remote(self._path):
            self._lease = Lease(str(self._path), self._me(), self._kind == fcntl.LOCK_SH)
            if owner := self._lease.acquire():
                raise self._in_use(brief(owner))
            return self
        while True:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._path, "a+", encoding="utf-8", errors="replace")
            except (FileExistsError, NotADirectoryError):
                raise InputError(f"{shown(self._path.parent)}: is not a folder") from None
            except OSError as error:
                raise not_written(self._path, error) from None
            try:
                fcntl.flock(self._file, self._kind | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.seek(0)
                owner = brief(self._file.read(200)) or "another process"
                self._file.close()
                raise self._in_use(owner) from None
            except OSError as error:  # Lustre mounted without `flock`, some FUSE file systems
                warnings.warn(
                    f"{shown(self._owned)}: cannot be locked here ({reason(error)}); make "
                    f"sure that no other {self._verb} writes there",
                    stacklevel=3,
                )
                break
            # An owner that ended between the two steps removed the opened file.
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path)):
                    break
            self._file.close()
        self._file.truncate(0)
        self._file.write(self._me())
        self._file.flush()
        return self

    def check(self) -> None:
        """Raises InputError if the lock was lost, which can only be in a bucket."""
        if self._lease:
            self._lease.check()

    def _me(self) -> str:
        return f"{self._verb} (process {os.getpid()} on {os.uname().nodename})"

    def _in_use(self, owner: str) -> UsageError:
        another = "folder" if self._owned == self._path.parent else "file"
        return UsageError(
            f"{shown(self._owned)}: in use by {owner}; wait for it, stop it, or use another "
            f"{another}"
        )

    def __exit__(self, *_: object) -> None:
        if self._lease:
            self._lease.release()
            return
        if self._kind == fcntl.LOCK_EX:  # a shared lock's file stays for the others
            with contextlib.suppress(OSError):
                self._path.unlink()
        self._file.close()


# --- parts of messages ---------------------------------------------------------------------------


def shown(path: object) -> str:
    """A path for a message, on one line, even if it contains line ends or broken bytes."""
    text = os.fspath(path) if isinstance(path, os.PathLike) else str(path)
    if not text:
        return "''"
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reason(error: BaseException) -> str:
    """The system's reason for an error, such as "Permission denied"."""
    return getattr(error, "strerror", None) or brief(error)


def megabytes(count: int) -> str:
    """A number of bytes as text: "0.3 MB", "52,310.0 MB"."""
    return f"{count / 1e6:,.1f} MB"


def quoted(value: object) -> str:
    """A value from a foreign file for a message: a short repr on one line."""
    return brief(_short.repr(value))


_short = reprlib.Repr()
_short.maxstring, _short.maxother, _short.maxlong = 60, 60, 40


def brief(text: object, most: int = 200) -> str:
    """A text on one line, shortened to `most` characters."""
    text = str(text)
    line = " ".join(shown(text[: 8 * most]).split())  # a text may have megabytes
    return line if max(len(line), len(text) / 8) <= most else f"{line[: most - 4]} ..."
