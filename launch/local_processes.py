"""Starts N JAX processes of one run on this machine, as on a pod.

    python launch/local_processes.py 2 --devices 4 -- moss-audio-jax train --config ...

This uses the real `jax.distributed` with CPU collectives, so that it tests what runs on the hosts
of a pod. Each process gets `--devices` CPU devices. Lines of process 0 are printed unchanged; lines
of the others are prefixed with the process's number. SIGTERM and Ctrl-C go to all processes. If one
fails, the others are stopped, and its exit code is returned.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("processes", type=int)
    options.add_argument("--devices", type=int, default=1, help="CPU devices of each process")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, command = options.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    if not command or args.processes < 1:
        options.error("expected N >= 1 and -- COMMAND ...")

    running = [
        subprocess.Popen(
            command,
            env=environment(index, args.processes, args.devices, port),
            stdout=None if index == 0 else subprocess.PIPE,
            stderr=None if index == 0 else subprocess.STDOUT,
            text=True,
        )
        for port in [free_port()]
        for index in range(args.processes)
    ]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: [p.send_signal(got) for p in running])
    readers = [
        threading.Thread(target=relay, args=(index, process), daemon=True)
        for index, process in enumerate(running)
        if index
    ]
    for reader in readers:
        reader.start()
    code = wait(running)
    for reader in readers:
        reader.join(timeout=5)
    return code


def environment(index: int, count: int, devices: int, port: int) -> dict[str, str]:
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [f for f in flags if "xla_force_host_platform_device_count" not in f]
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        # A CPU program from the cache runs its collectives in no fixed order, so that processes
        # would take one for another (JAX 0.10: "Received data size doesn't match").
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"]),
        "MOSS_AUDIO_JAX_COORDINATOR": f"127.0.0.1:{port}",
        "MOSS_AUDIO_JAX_PROCESSES": str(count),
        "MOSS_AUDIO_JAX_PROCESS": str(index),
    }


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def relay(index: int, process: subprocess.Popen) -> None:
    for line in process.stdout:
        sys.stderr.write(f"[{index}] {line}")


def wait(running: list[subprocess.Popen]) -> int:
    """The first exit code that is not 0, after stopping the others; 0 if all succeed."""
    while True:
        codes = [process.poll() for process in running]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            for process in running:
                process.terminate()
            for process in running:
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()
            return failed
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
