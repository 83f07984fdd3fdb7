"""Answers the requests of a `Worker`, each from a fork of a process that has answered none.

`python forked.py SCRIPT ARGUMENTS`: the script's `prepare(*arguments)` makes a function from the
bytes of a request to those of the answer. What a synthesiser remembers of one request can
therefore not change the next. An answer of length 0 means that the function raised. Only the
standard library is imported.
"""

import os
import runpy
import struct
import sys


def main() -> None:
    script, *arguments = sys.argv[1:]
    answer = runpy.run_path(script)["prepare"](*arguments)
    while True:
        head = sys.stdin.buffer.read(4)
        if len(head) < 4:
            return
        request = sys.stdin.buffer.read(struct.unpack("=I", head)[0])
        child = os.fork()
        if child == 0:
            try:
                _write(answer(request))
            except BaseException:
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            _write(b"")


def _write(answer: bytes) -> None:
    sys.stdout.buffer.write(struct.pack("=I", len(answer)) + answer)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # Ctrl-C has ended the process that asked
        os._exit(0)
