"""Decodes what clients send, in processes that can be killed.

A file of unknown origin goes through FFmpeg. A decoder that crashes, hangs or takes too much memory
therefore ends one process, which is replaced, and one request, which is told so.
"""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.connection
import queue
import resource
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from moss_audio_jax.audio import load_audio
from moss_audio_jax.errors import InputError
from moss_audio_jax.runtime import deaf_workers, end_with_parent

_MEMORY = 6 << 30  # bytes of address space of a decoding process
_START_SECONDS = 60.0
_UNNAMED = "audio file object: "  # how `load_audio` names what has no name


class Decoded(NamedTuple):
    """A clip's samples, float32 [n] at 16 kHz, and what its listener should know."""

    wav: np.ndarray
    warnings: tuple[str, ...]


class Decoder:
    """Some decoding processes, started when they are first needed.

    Args:
      processes: as many clips are decoded at a time; more wait.
      seconds: in which a clip must be decoded.
    """

    def __init__(self, processes: int = 2, seconds: float = 60.0) -> None:
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(processes, "decoding")
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self.dead: BaseException | None = None  # why no process can be started

    @property
    def threads(self) -> ThreadPoolExecutor:
        """The threads in which `decode` may be called, one for each process."""
        return self._threads

    def decode(self, data: bytes | memoryview, max_seconds: float) -> Decoded:
        """Decodes one file.

        Raises:
          InputError: it cannot be decoded, takes too long, or holds more than `max_seconds`.
        """
        for attempt in (1, 2):
            process = self._take()
            try:
                decoded = process.decode(data, max_seconds, self._seconds)
                self._idle.put(process)
                return decoded
            except InputError:
                self._idle.put(process)
                raise
            except _Ended as ended:
                process.end()
                # SIGKILL is from outside, such as for want of memory; a crash is of this file.
                if attempt == 2 or not ended.from_outside:
                    raise InputError(str(ended)) from None
        raise AssertionError

    def close(self) -> None:
        """Ends all processes; what is being decoded fails."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().end()

    def _take(self) -> _Process:
        try:
            while True:
                process = self._idle.get_nowait()
                if process.alive:
                    return process
                process.end()
        except queue.Empty:
            pass
        try:
            process = _Process()
            self.dead = None
            return process
        except (_Ended, OSError) as error:
            self.dead = error
            raise InputError(f"no decoding process could be started ({error})") from None


class _Ended(Exception):
    """A process gave no answer."""

    def __init__(self, why: str, from_outside: bool = False) -> None:
        super().__init__(why)
        self.from_outside = from_outside


class _Process:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of JAX's threads may hang
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with deaf_workers():
            self._process.start()
        theirs.close()
        self._receive(_START_SECONDS)

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def decode(self, data: bytes | memoryview, max_seconds: float, seconds: float) -> Decoded:
        end = time.monotonic() + seconds
        try:
            self._pipe.send(max_seconds)
            self._pipe.send_bytes(data)
        except OSError:
            raise self._why() from None
        fault, notes = self._receive(end - time.monotonic())
        if fault is not None:
            raise InputError(fault)
        wav = self._receive(end - time.monotonic())
        return Decoded(np.frombuffer(wav, np.float32), notes)

    def _receive(self, seconds: float):
        try:
            if not self._pipe.poll(max(seconds, 0)):
                raise _Ended("decoding it takes longer than this server allows")
            return self._pipe.recv()
        except (EOFError, OSError):
            raise self._why() from None

    def _why(self) -> _Ended:
        self._process.join(2)
        code = self._process.exitcode
        how = signal.strsignal(-code) if code and code < 0 else f"exit code {code}"
        return _Ended(f"it ended the process that decoded it ({how})", code == -signal.SIGKILL)

    def end(self) -> None:
        self._process.kill()
        self._process.join(2)
        self._pipe.close()


# --- in a decoding process -----------------------------------------------------------------------


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    """Takes (limit of seconds, file), gives (fault, warnings) and, without a fault, samples."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server may still need it while it drains
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()
    for what, most in ((resource.RLIMIT_AS, _MEMORY), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(what, (most, most))
    pipe.send(None)
    while True:
        try:
            max_seconds, data = pipe.recv(), pipe.recv_bytes()
        except EOFError:
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                wav, fault = load_audio(io.BytesIO(data), max_seconds), None
            except InputError as error:
                fault = str(error).removeprefix(_UNNAMED)
                # How a user of the library would raise the limit is of no use to a client.
                fault = fault.partition("; raise it with")[0]
        notes = tuple(str(each.message).removeprefix(_UNNAMED) for each in caught)
        pipe.send((fault, notes))
        if fault is None:
            pipe.send(wav.tobytes())
