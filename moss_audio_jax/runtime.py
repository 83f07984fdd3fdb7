"""The process of a verb: its streams, Ctrl-C, JAX's cache of programs, the code's version.

It imports little, because Ctrl-C works properly only after this file is imported.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import re
import signal
import sys
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    import types
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

INTERRUPTED = 130  # a shell's exit code for a process that Ctrl-C ended: 128 + SIGINT
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8  # malloc.h
_GRACE = 10.0  # seconds that a verb has to clean up after Ctrl-C


def run_as_process(main: Callable[[], int]) -> NoReturn:
    """Runs `main`, and ends this process with the exit code that it returns.

    Ctrl-C (SIGINT) raises KeyboardInterrupt in `main`, so that it can clean up. The process then
    ends with 130: when `main` is done, at a second Ctrl-C, or at the latest after ten seconds (a
    program may be compiling).
    """
    _open_streams()
    # Python's resource tracker outlives a process that Ctrl-C ended and frees its semaphores, but
    # would print a warning for each.
    quiet = "ignore:resource_tracker:UserWarning"
    given = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = f"{given},{quiet}" if given else quiet
    _Interrupts().run(main)


class _Interrupts:
    """Handles SIGINT from the first line of a process to the last."""

    def __init__(self) -> None:
        self._asked = False

    def run(self, main: Callable[[], int]) -> NoReturn:
        # A shell starts background jobs with SIGINT ignored; that stays.
        try:
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, self._interrupt)
                sys.unraisablehook = self._unraisable
                self._watch()
            code = main()
        except BaseException as error:
            # Libraries turn KeyboardInterrupt into other exceptions: an interrupted import fails.
            if not self._asked and not isinstance(error, KeyboardInterrupt):
                raise
            code = INTERRUPTED
        if self._asked or code == INTERRUPTED:
            _leave()
        # The work is done, so no exception is needed for cleaning up.
        if signal.getsignal(signal.SIGINT) == self._interrupt:
            signal.signal(signal.SIGINT, _leave)
        # Ends like a process of `multiprocessing`: threads first, then exit handlers. Python's
        # usual end destroys modules one by one, and Ctrl-C would crash it there.
        threading._shutdown()
        atexit._run_exitfuncs()
        _flush()
        os._exit(code)

    def _interrupt(self, _: int, frame: types.FrameType | None) -> None:
        # C++ modules such as JAX's call Python while they are imported, and an exception from such
        # a call aborts the process (SIGABRT, SIGSEGV).
        if self._asked or _importing(frame):
            _leave()
        self._asked = True
        raise KeyboardInterrupt

    def _unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Called if Python would print an exception and continue, for example in a destructor."""
        if unraisable.exc_type is KeyboardInterrupt:
            _leave()
        if not self._asked:
            sys.__unraisablehook__(unraisable)

    def _watch(self) -> None:
        """Starts a thread that notices signals at once.

        Python itself handles them between two of its instructions, which may take minutes.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

        def wait() -> None:
            while signal.SIGINT not in os.read(reading, 1):
                pass
            threading.Event().wait(_GRACE)
            _leave()

        threading.Thread(target=wait, daemon=True).start()


def _importing(frame: types.FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _leave(*_: object) -> NoReturn:
    """Ends the process with 130, without Python's usual shutdown.

    Threads may still compute or compile. They would crash or hang while the interpreter destroys
    what they use.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    _flush()
    if "multiprocessing" in sys.modules:
        for worker in sys.modules["multiprocessing"].active_children():
            worker.kill()
    os._exit(INTERRUPTED)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # for example, Ctrl-C interrupted a flush
            stream.flush()


@contextlib.contextmanager
def deaf_workers() -> Iterator[None]:
    """Processes started in this context ignore Ctrl-C; their parent handles it and ends them.

    A terminal sends SIGINT to all processes at once, and each would print a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it has ended, in whatever way.

    For processes that `multiprocessing` started: those of a pool never end if their parent is
    killed outright.
    """
    import multiprocessing

    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _open_streams() -> None:
    """Opens a replacement for stdin, stdout or stderr if it was closed (`>&-`).

    Otherwise the next opened file would get the stream's number, and with it the stream's output.
    The replacement of stdin is empty; writing to that of stdout fails, because an answer would be
    lost; that of stderr discards everything.
    """
    for number, name, how in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):  # the stream is open after all
                os.fstat(number)
                continue
            opened = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
            stream = open(number, how, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            setattr(sys, name, stream)


def keep_compiled() -> None:
    """Keeps the programs that JAX compiles on disk, for later processes.

    They are in ~/.cache/moss_audio_jax/xla ($XDG_CACHE_HOME). JAX's own settings take precedence
    (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE and similar ones in jax.config). With
    MOSS_AUDIO_JAX_CACHE=off in the environment nothing is kept, nor where the CPU is made to be
    several devices: a program that comes from the disk runs its collectives in no fixed order there
    (JAX 0.10), and the devices may wait for one another until XLA ends the process.
    """
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    if jax.config.jax_compilation_cache_dir or os.environ.get("MOSS_AUDIO_JAX_CACHE") == "off":
        return
    flags = os.environ.get("XLA_FLAGS", "")
    asked = re.findall(r"--xla_force_host_platform_device_count=(\d+)", flags)
    if jax.config.jax_num_cpu_devices > 1 or int((asked or [1])[-1]) > 1:
        return
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(caches, "moss_audio_jax", "xla")
    jax.config.update("jax_compilation_cache_dir", folder)
    # JAX's default limit is one second; an answer has a dozen programs that compile faster.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    reset_cache()  # JAX reads the folder only once, at its first compilation


def keep_memory() -> None:
    """On CPUs, lets this process keep memory that was freed.

    By default glibc returns large buffers at once, and the system has to clear their pages again
    for the next step.
    """
    import jax

    if jax.default_backend() == "cpu":
        _mallopt({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1})


def return_memory() -> None:
    """Returns large buffers to the system when they are freed, if the C library is glibc.

    By default glibc keeps buffers of up to 32 MB. Buffers that are allocated next to them then keep
    them in memory: gigabytes, while a large model is loaded.
    """
    large = 1 << 19  # bytes
    _mallopt({_MMAP_THRESHOLD: large, _TRIM_THRESHOLD: large, _MMAP_MAX: 65_536, _ARENA_MAX: 1})


def trim_memory() -> None:
    """Returns what small freed buffers occupy, for example after compiling."""
    if libc := _glibc("malloc_trim"):
        libc.malloc_trim(0)


def _mallopt(options: dict[int, int]) -> None:
    if libc := _glibc("mallopt"):
        for option, value in options.items():
            libc.mallopt(option, value)


def _glibc(name: str) -> ctypes.CDLL | None:
    """The C library, if it has a function of this name."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, name) else None


@functools.cache
def code_version() -> str:
    """The package's version and a hash of its code: "0.1.0+3f2a90c1b7de".

    The configs in a wheel do not count.
    """
    import hashlib
    from pathlib import Path

    from moss_audio_jax import __version__

    package = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package)
        if name.parts[0] != "configs":
            digest.update(f"{name}\0".encode() + file.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def from_all(value: Any) -> list[Any]:
    """The JSON values of all processes, in order. All processes must call it."""
    import jax

    if jax.process_count() == 1:
        return [value]
    import json

    import numpy as np
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(data)]))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [
        json.loads(bytes(row[: int(size)])) for row, size in zip(rows, np.ravel(sizes), strict=True)
    ]
