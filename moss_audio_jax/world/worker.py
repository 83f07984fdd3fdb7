"""A process that answers requests: bytes in, bytes out."""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from moss_audio_jax.errors import InputError


class Worker:
    """A process that runs a script of `forked.py`; one thread at a time asks it."""

    def __init__(self, name: str, options: Sequence[str], script: Path, *arguments: str):
        """`name`: for messages. `options`: of Python. `arguments`: of the script."""
        self._name = name
        self._lock = threading.Lock()
        server = Path(__file__).with_name("forked.py")
        self._process = subprocess.Popen(
            [sys.executable, *options, str(server), str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, request: bytes) -> bytes:
        """The answer, or b"" if the script could not give one."""
        with self._lock:
            try:
                self._process.stdin.write(struct.pack("=I", len(request)) + request)
                self._process.stdin.flush()
                head = self._process.stdout.read(4)
                if len(head) == 4:
                    return self._process.stdout.read(struct.unpack("=I", head)[0])
            except BrokenPipeError:
                pass
        raise InputError(f"{self._name} ended unexpectedly; does its wheel fit this machine?")
