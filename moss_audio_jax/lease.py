"""A lock that is an object in a bucket."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any, ClassVar

from moss_audio_jax.buckets import create, delete_one, read, write
from moss_audio_jax.errors import InputError

_log = logging.getLogger(__name__)

_BEAT, _DEAD = 15.0, 60.0  # seconds: a lock's owner renews it; one not renewed is nobody's


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
