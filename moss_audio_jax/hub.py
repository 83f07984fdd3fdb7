"""Models of the Hugging Face hub: an id in place of a checkpoint's folder.

`folder_of` downloads into the cache of huggingface_hub, which other programs share. The library
continues after a broken connection (before version 1 also after a killed process) and locks each
file. What it leaves out is here: it does not compare checksums, and does not know if all files of a
model are there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fnmatch
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moss_audio_jax.buckets import as_path
from moss_audio_jax.errors import InputError, extra
from moss_audio_jax.files import (
    brief,
    disk_is_full,
    megabytes,
    not_written,
    parse_json,
    quoted,
    reason,
    write_whole,
)
from moss_audio_jax.remote import redact

# Ids of the official checkpoints.
OFFICIAL = tuple(
    f"OpenMOSS-Team/MOSS-Audio-{size}-{kind}"
    for size in ("4B", "8B")
    for kind in ("Instruct", "Thinking")
)

_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@(\w[\w.-]*(?:/\w[\w.-]*)*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What is fetched; pickles never are, nor other copies of the weights beside model.safetensors.
_SMALL = ("*.json", "merges.txt", "*.model", "chat_template.*", "helpers/*.json")
_WEIGHTS = ("model.safetensors", "model-*.safetensors", "adapter_model.safetensors")
_WEIGHTS += ("helpers/*.safetensors",)
_OURS = "moss_audio_jax"  # a folder in the cache of each model: what was checked, and a lock
_WAITS = (1.0, 3.0, 10.0)  # seconds before each further attempt
_FILES_AT_ONCE = 4  # that are downloaded or checked
_SECONDS = 20.0  # for the answer about a model

_log = logging.getLogger(__name__)


def folder_of(name: str | Path, weights: bool = True) -> Any:
    """The folder that a user means: a path (see `as_path`), or a model's id, owner/name[@revision].

    An existing path is meant as a path. Otherwise the files of an id are downloaded and checked,
    except those that are there. A branch is looked up once in a process. Anything that is no id,
    and every name if huggingface_hub is not installed, is returned as it is.

    Args:
      weights: False leaves out the safetensors files.

    Raises:
      InputError: the hub does not have the model or does not give it away, it cannot be reached and
        there is no whole copy, a file stays damaged, or the disk is full.
    """
    text = os.fspath(name)
    match = _ID.fullmatch(text)
    if match is None or not _is_installed():
        return as_path(text)
    if os.path.lexists(text):
        if match[1] in OFFICIAL or _store(match[1]).exists():
            warnings.warn(
                f"{text}: there is a folder of this name here; it is used, not the hub's model",
                stacklevel=2,
            )
        return as_path(text)
    return _downloaded(text, match[1], match[2] or "main", weights)


def title(name: str | Path) -> str:
    """The name of a folder, or an id without its revision."""
    match = _ID.fullmatch(os.fspath(name))
    if match is not None and not os.path.lexists(name):
        return match[1]
    return as_path(name).resolve().name


def advice(folder: str | Path) -> str:
    """How to get a checkpoint, if the name of a missing folder looks like an id; else ""."""
    name = os.fspath(folder)
    for known in OFFICIAL:
        if name.lower() in (known.lower(), known.split("/")[1].lower()):
            name = known
    match = _ID.fullmatch(name)
    if match is None or (_is_installed() and match[1] not in OFFICIAL):
        return ""
    if _is_installed():
        return f"; the official model is {name} on the Hugging Face hub: give that id"
    revision = f" --revision {match[2]}" if match[2] else ""
    return (
        f"; if {match[1]} is a model on the Hugging Face hub, download it (hf download {match[1]} "
        f"--local-dir {match[1].split('/')[1]}{revision}) and give that folder, or install what "
        f"downloads it ({extra('hub')})"
    )


def _is_installed() -> bool:
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        return False
    return True


# --- a model's files -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """One commit of a model.

    Attributes:
      name: as the user gave it.
      repo, revision: the parts of `name`.
      sizes: bytes of every file of the commit; None where the hub does not say.
      why_not: why the hub was not asked; "" if files can be fetched.
    """

    name: str
    repo: str
    revision: str
    commit: str
    sizes: dict[str, int | None]
    why_not: str = ""

    @property
    def folder(self) -> Path:
        return _store(self.repo) / "snapshots" / self.commit


@functools.cache
def _downloaded(name: str, repo: str, revision: str, weights: bool) -> Path:
    snapshot = _look_up(name, repo, revision)
    folder = snapshot.folder
    jax = sys.modules.get("jax")  # never imported for this: without JAX there is one process
    count = jax.process_count() if jax and jax.distributed.is_initialized() else 1
    if revision != snapshot.commit and count > 1:
        raise InputError(
            f"{name}: each of {count} processes would look up {revision!r} by itself, and might "
            f"find another commit; name one, such as that found now: {repo}@{snapshot.commit}"
        )
    kinds = (*_SMALL, *_WEIGHTS) if weights else _SMALL
    names = [file for file in snapshot.sizes if _is_like(file, kinds)]
    if weights and not snapshot.why_not and not any(_is_like(file, _WEIGHTS) for file in names):
        raise InputError(
            f"{name}: revision {snapshot.commit} has no safetensors weights (nothing else is "
            "fetched from the hub); expected model.safetensors or model-*.safetensors"
        )
    if _unchecked(snapshot, names):
        with _locked(snapshot, names):
            try:
                _persist(name, functools.partial(_fetch, snapshot, names))
            except _Failure as failure:
                raise InputError(
                    f"{name}: {failure}; run this again, which continues the download"
                ) from None
    elif not snapshot.why_not:
        _log.info(f"{name}: revision {snapshot.commit}, downloaded before into {folder}")
    if not snapshot.why_not and snapshot.commit not in (revision, _ref(repo, revision)):
        with contextlib.suppress(InputError):  # a cache that is read-only
            write_whole(_store(repo) / "refs" / revision, snapshot.commit)
    return folder


@functools.cache
def _look_up(name: str, repo: str, revision: str) -> _Snapshot:
    """The commit that a revision means now, or at its last download if the hub is out of reach."""
    from huggingface_hub import HfApi, constants

    why_not = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    copy = _copy(name, repo, revision, why_not)
    if copy and copy.commit == revision and _note(copy)["sizes"]:
        return copy  # a commit does not change
    if not why_not:
        ask = functools.partial(HfApi().model_info, repo, revision=revision, files_metadata=True)
        try:
            info = _persist(name, functools.partial(ask, timeout=_SECONDS), _is_busy)
            return _snapshot(name, repo, revision, info)
        except _Failure as failure:
            why_not = str(failure)
    if copy is None:
        raise InputError(
            f"{name}: no such folder here, no copy of such a model in {_cache()}, and {why_not}; "
            "run this once with a connection to the hub, or set HF_HOME to where the copy is"
        )
    _log.warning(f"{name}: {why_not}; the copy of revision {copy.commit} is used")
    return dataclasses.replace(copy, why_not=why_not)


def _copy(name: str, repo: str, revision: str, why_not: str) -> _Snapshot | None:
    """What an earlier download left, of this project or of another program."""
    commit = revision if _COMMIT.fullmatch(revision) else _ref(repo, revision)
    copy = _Snapshot(name, repo, revision, commit, {}, why_not)
    if not _COMMIT.fullmatch(commit) or not copy.folder.is_dir():
        return None
    sizes = _note(copy)["sizes"]
    if not sizes:  # another program downloaded it
        files = (file for file in copy.folder.rglob("*") if file.is_file())
        sizes = dict.fromkeys(sorted(str(file.relative_to(copy.folder)) for file in files))
    return dataclasses.replace(copy, sizes=sizes)


def _ref(repo: str, revision: str) -> str:
    """The commit of a branch at its last download, or ""."""
    try:
        return (_store(repo) / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        return ""


def _snapshot(name: str, repo: str, revision: str, info: Any) -> _Snapshot:
    """The commit in the hub's answer."""
    if not _COMMIT.fullmatch(info.sha or ""):
        raise InputError(f"{name}: {_hub()} names no commit of it (sha is {quoted(info.sha)})")
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    return _Snapshot(name, repo, revision, info.sha, sizes)


def _fetch(snapshot: _Snapshot, names: Sequence[str]) -> None:
    """Downloads what is missing and checks what was not checked.

    Raises:
      _Failure: another attempt may succeed.
    """
    from huggingface_hub import hf_hub_download

    folder = snapshot.folder
    missing = [file for file in names if not (folder / file).exists()]
    if missing and snapshot.why_not:
        raise InputError(
            f"{snapshot.name}: {len(missing)} of {len(names)} files are not in {folder} (such as "
            f"{missing[0]}), and {snapshot.why_not}; run this once with a connection to the hub, "
            "which fetches the rest"
        )
    if missing:
        _announce(snapshot, names, missing)
        _keep(snapshot, {})  # so that an interrupted download is known to be one
        _each(functools.partial(hf_hub_download, snapshot.repo, revision=snapshot.commit), missing)
    _check(snapshot, names)
    done = "downloaded and checked" if missing else "checked"
    _log.info(f"{snapshot.name}: {len(names)} files {done}, in {folder}")


def _each(function: Callable[[str], Any], names: Sequence[str]) -> list[Any]:
    """function(name) for each name, in threads. Ctrl-C does not wait for those that run."""
    pool, wait = ThreadPoolExecutor(_FILES_AT_ONCE), True
    try:
        return list(pool.map(function, names))
    except KeyboardInterrupt:
        wait = False
        raise
    finally:
        pool.shutdown(wait, cancel_futures=True)


def _announce(snapshot: _Snapshot, names: Sequence[str], missing: Sequence[str]) -> None:
    """Says what will be downloaded. Raises OSError or InputError if the disk has no room for it."""
    store = _store(snapshot.repo)
    sizes = [snapshot.sizes[file] for file in missing]
    size = "of unknown size" if None in sizes else megabytes(sum(sizes))
    _log.warning(
        f"{snapshot.name}: downloads {len(missing)} of {len(names)} files ({size}"
        f") of revision {snapshot.commit} from {_hub()} into {snapshot.folder}"
    )
    begun = [f for f in store.glob("blobs/*.incomplete") if re.fullmatch("[0-9a-f]+", f.stem)]
    need = sum(filter(None, sizes)) - sum(file.stat().st_size for file in begun)
    store.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(store).free < need:
        raise not_written(snapshot.folder, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), need)


@contextlib.contextmanager
def _locked(snapshot: _Snapshot, names: Sequence[str]) -> Iterator[None]:
    """One process of a machine downloads and checks a model; others wait for it.

    The kernel drops the lock when its process ends. A cache that is read-only needs no lock.
    """
    import filelock

    lock = filelock.FileLock(_store(snapshot.repo) / _OURS / "lock")
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0.5)
        except filelock.Timeout:
            _log.warning(f"{snapshot.name}: another process downloads or checks it; waits for it")
            lock.acquire()
    except NotImplementedError:
        pass  # a file system without locks; the library's temporary names or locks must do
    except OSError as error:
        if any(not (snapshot.folder / file).exists() for file in names):
            raise not_written(lock.lock_file, error) from None
    try:
        yield
    finally:
        lock.release()


# --- checksums -----------------------------------------------------------------------------------


def _check(snapshot: _Snapshot, names: Sequence[str]) -> None:
    """Compares sizes and checksums of files that were not checked before, and notes them.

    Raises:
      InputError: a file is damaged and the hub is out of reach.
      _Failure: a file is damaged, and was removed to be downloaded again.
    """
    todo = _unchecked(snapshot, names)
    faults = dict(zip(todo, _each(functools.partial(_fault, snapshot), todo), strict=True))
    right = [file for file in todo if not faults[file]]
    _keep(snapshot, {file: _state(snapshot.folder / file) for file in right})
    damaged = {snapshot.folder / file: fault for file, fault in faults.items() if fault}
    for path, fault in damaged.items():
        if snapshot.why_not:
            raise InputError(
                f"{path}: {fault}, and {snapshot.why_not}; remove it, and run this once with a "
                "connection to the hub"
            )
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    for path, fault in damaged.items():
        raise _Failure(f"{path.name} {fault}")


def _fault(snapshot: _Snapshot, file: str) -> str:
    """What is wrong with a file, or "".

    The cache names a file's contents by the hub's ETag: the SHA-256 of a large file, Git's SHA-1 of
    others.
    """
    path = (snapshot.folder / file).resolve()
    size, expected = path.stat().st_size, snapshot.sizes.get(file)
    if expected not in (None, size):
        return f"has {size:,} bytes, the hub's file {expected:,}"
    if re.fullmatch(r"[0-9a-f]{64}", path.name):
        digest = hashlib.sha256()
    elif _COMMIT.fullmatch(path.name):
        digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    else:
        warnings.warn(f"{file}: the hub gave no checksum; only its size is checked", stacklevel=2)
        return ""
    with open(path, "rb") as opened:
        found = hashlib.file_digest(opened, lambda: digest).hexdigest()
    return "" if found == path.name else f"is damaged (its checksum is {found}, not {path.name})"


def _unchecked(snapshot: _Snapshot, names: Sequence[str]) -> list[str]:
    checked = _note(snapshot)["checked"]
    states = {file: _state(snapshot.folder / file) for file in names}
    return [file for file in names if not states[file] or checked.get(file) != states[file]]


def _state(file: Path) -> list[int] | None:
    """Size and time, which change if the contents do; None if there is no such file."""
    try:
        found = file.stat()
        return [found.st_size, found.st_mtime_ns]
    except OSError:
        return None


def _note(snapshot: _Snapshot) -> dict[str, dict[str, Any]]:
    """`sizes`: all files of the commit, as the hub said; `checked`: the state of the right ones."""
    try:
        note = parse_json(_note_file(snapshot).read_bytes(), "")
        return {key: dict(note[key]) for key in ("sizes", "checked")}
    except (OSError, InputError, KeyError, TypeError, ValueError):
        return {"sizes": {}, "checked": {}}


def _keep(snapshot: _Snapshot, checked: dict[str, Any]) -> None:
    """Adds to the note of a snapshot."""
    note = _note(snapshot)
    note["checked"] |= checked
    if not snapshot.why_not:
        note["sizes"] = snapshot.sizes
    with contextlib.suppress(InputError):  # in a read-only cache every start checks again
        write_whole(_note_file(snapshot), json.dumps(note))


def _note_file(snapshot: _Snapshot) -> Path:
    return _store(snapshot.repo) / _OURS / f"{snapshot.commit}.json"


# --- the library's places and errors -------------------------------------------------------------


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _store(repo: str) -> Path:
    return _cache() / f"models--{repo.replace('/', '--')}"


def _hub() -> str:
    from huggingface_hub import constants

    return redact(constants.ENDPOINT)


def _is_like(file: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits; `*` does not reach into folders."""
    return any(
        fnmatch.fnmatchcase(file, pattern) and file.count("/") == pattern.count("/")
        for pattern in patterns
    )


class _Failure(Exception):
    """What was tried failed for a reason that may go away."""


def _persist(name: str, attempt: Callable[[], Any], again=lambda error: True) -> Any:
    """attempt(), repeated after failures that another attempt may not have.

    Raises:
      InputError: the hub refuses, or the disk is full.
      _Failure: the last attempt failed, or `again(error)` is False.
    """
    for wait in (*_WAITS, None):
        try:
            return attempt()
        except InputError:
            raise
        except Exception as error:  # of requests or httpx, by the library's version
            problem = _told(name, error)
            if wait is None or not again(error):
                raise _Failure(problem) from None
        _log.warning(f"{name}: {problem}; tries again in {wait:g} s")
        time.sleep(wait)


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_busy(error: Exception) -> bool:
    status = _status(error)
    return status is not None and (status in (408, 429) or status >= 500)


def _told(name: str, error: Exception) -> str:
    """The problem as text if it may go away.

    Raises:
      InputError: it will not.
    """
    from huggingface_hub import errors, get_token

    if isinstance(error, _Failure):
        return str(error)
    if disk_is_full(error):
        raise not_written(_cache(), error) from None
    page = f"{_hub()}/{name.partition('@')[0]}"
    if isinstance(error, errors.GatedRepoError):
        raise InputError(
            f"{name}: its owners decide who gets it; ask for it at {page}, then set HF_TOKEN or "
            "run: hf auth login"
        ) from None
    if isinstance(error, errors.RevisionNotFoundError):
        raise InputError(f"{name}: the model has no such revision; see {page}/tree/main") from None
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        raise InputError(
            f"{name}: no such folder here, and no such model at {_hub()}; correct the name, or, if "
            "the model is private, set HF_TOKEN"
        ) from None
    status = _status(error)
    while status is None and (inner := error.__cause__ or error.__context__):
        error = inner  # the system's reason, below the client's
    said = brief(redact(reason(error), [get_token() or ""]))
    if status in (401, 403):
        raise InputError(f"{name}: {_hub()} refuses ({said}); check HF_TOKEN") from None
    if status is not None:
        return f"{_hub()} answers with HTTP {status}"
    return f"the connection to {_hub()} failed ({said})"
