"""A process that answers requests: bytes in, bytes out."""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
from collections.abc import Sequence

from moss_audio_jax.errors import InputError


class Worker:
    """Runs a script that reads requests on stdin and answers on stdout; one thread at a time asks.

    A request and an answer are each a length (uint32, native order) and bytes.
    """

    def __init__(self, arguments: Sequence[str], name: str):
        """`arguments` of Python: options, the script, its own; `name`: for messages."""
        self._name = name
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, request: bytes) -> bytes:
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
