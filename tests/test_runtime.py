"""The process of a verb: how Ctrl-C ends it at any moment, and what remains afterwards.

Each case is a process without JAX; tools/check_interrupts.py interrupts the verbs themselves.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moss_audio_jax import runtime

ROOT = Path(__file__).parents[1]
PROGRAM = """
import atexit, hashlib, sys, threading, time
from moss_audio_jax import runtime

def ready():
    print("ready", flush=True)

def wait():
    ready()
    time.sleep(60)

def long_in_c():  # without Python's lock, as XLA compiles
    runtime._GRACE = 0.3
    ready()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

class Deleted:
    def __del__(self):
        wait()

def main():
{main}
    return 3

runtime.run_as_process(main)
"""
# name: (what runs, how often Ctrl-C comes, exit code, what is printed after "ready")
CASES = {
    "cleans up": ("try: wait()\nfinally: print('clean')", 1, 130, "clean\n"),
    "again while it cleans up": ("try: wait()\nfinally: wait()", 2, 130, "ready\n"),
    "made another error": (
        "try: wait()\nexcept KeyboardInterrupt: raise ImportError('numpy failed')",
        1,
        130,
        "",
    ),
    "swallowed": ("try: wait()\nexcept KeyboardInterrupt: print('goes on')", 1, 130, "goes on\n"),
    "in a destructor": ("Deleted()\nwhile True: time.sleep(1)", 1, 130, ""),
    "while importing": ("try: import slow\nexcept BaseException: pass\ntime.sleep(60)", 1, 130, ""),
    "in C": ("long_in_c()", 1, 130, ""),
    "after its end": ("atexit.register(wait)", 1, 130, ""),
    "not at all": (
        "atexit.register(print, 'exit')\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), print('thread'))).start()\nready()",
        0,
        3,
        "thread\nexit\n",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_ctrl_c(case, tmp_path):
    main, times, code, said = CASES[case]
    (tmp_path / "slow.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    body = "".join(f"    {line}\n" for line in main.split("\n"))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace("{main}", body)],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    printed = ""
    try:
        for _ in range(max(times, 1)):
            line = process.stdout.readline()
            printed += line
            assert line == "ready\n", process.stderr.read()
            time.sleep(0.1)  # it has printed and is about to wait
            if times:
                process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=50)
    finally:
        process.kill()
    assert (process.returncode, errors) == (code, "")
    assert (printed + out).removeprefix("ready\n") == said


def test_deaf_workers():
    """A process that is started within the context ignores Ctrl-C; its parent does not."""
    with runtime.deaf_workers():
        worker = subprocess.Popen(
            [sys.executable, "-c", "print(input())"],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    worker.send_signal(signal.SIGINT)
    assert worker.communicate("still here", timeout=50) == ("still here\n", None)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


POOL = """
import concurrent.futures, multiprocessing, os, time
from moss_audio_jax.runtime import end_with_parent

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(2, context, end_with_parent)
    busy = [pool.submit(time.sleep, seconds) for seconds in (1, 600)]
    busy[0].result()
    print(*pool._processes, flush=True)
    busy[1].result()
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """One of them works, one waits for work."""
    (tmp_path / "pool.py").write_text(POOL)
    parent = subprocess.Popen(
        [sys.executable, "pool.py"],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    workers = [int(each) for each in parent.stdout.readline().split()]
    parent.kill()
    parent.communicate()
    assert len(workers) == 2
    end = time.monotonic() + 50
    left = workers
    while left and time.monotonic() < end:
        time.sleep(0.1)
        left = [each for each in left if alive(each)]
    for each in left:
        os.kill(each, signal.SIGKILL)
    assert not left


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # In a container there may be nobody who asks how an orphan ended.
    status = Path(f"/proc/{process}/status")
    return not (status.exists() and "State:\tZ" in status.read_text())
