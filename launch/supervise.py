"""Runs one training command until it is done, on as many slices as there are.

    python launch/supervise.py --slices 2 --processes 2 --devices 4 -- \\
        moss-audio-jax train --config tiny --workdir DIR --config.mesh.data={slices} ...
    python launch/supervise.py --ask "cat slices" -- srun --nodes {slices} ...

{slices} in the command is replaced by the number of slices that there are. With --processes, every
slice is so many processes on this machine, which rehearses several slices on CPU devices (data
across them, fsdp within). Without, the command starts its processes itself.

--ask CMD prints the number of slices that there are: asked before each start, and every two seconds
of a run. If there are more than it uses, the run is asked to save (SIGTERM) and goes on with all of
them. With 0 it waits. Without --ask there are always --slices.

If a process fails or is lost, the others are stopped: by SIGTERM, after --grace seconds by SIGKILL.
Processes on other machines notice by themselves, --heartbeat seconds after one has fallen silent
(MOSS_AUDIO_JAX_HEARTBEAT, of `jax.distributed`). Then the command is run again. It continues from
its newest checkpoint; `train` says how much time was lost since. The pause before a restart doubles
while attempts last less than five minutes. Exit code 2 (wrong use) and more than --restarts
failures end the supervision, with the code of the command.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time

from local_processes import environment, free_port, relay

LONG = 300  # seconds of an attempt that made some progress
LOOK = 2  # seconds between questions


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--slices", type=int, default=1)
    options.add_argument("--ask", metavar="CMD", help="prints how many slices there are now")
    options.add_argument("--processes", type=int, help="of a slice, on this machine")
    options.add_argument("--devices", type=int, default=1, help="CPU devices of each of them")
    options.add_argument("--heartbeat", type=int, default=30, help="seconds; default 30")
    options.add_argument("--grace", type=float, default=10, help="seconds; default 10")
    options.add_argument("--restarts", type=int, default=20, help="after failures; default 20")
    options.add_argument("--pause", type=float, default=5, help="seconds before the first restart")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, command = options.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    if not command or args.slices < 1:
        options.error("expected --slices N >= 1 and -- COMMAND ...")

    stop = threading.Event()  # somebody ended the supervision
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    failures = short = 0
    while True:
        while not (slices := available(args)):
            say("no slice; waiting")
            if stop.wait(LOOK):
                return 1
        begun = time.monotonic()
        running = start(args, command, slices)
        code, saved = watch(args, running, slices, stop)
        lasted = time.monotonic() - begun
        if stop.is_set() or code == 2 or (code == 0 and not saved):
            return code
        if code == 0:
            say(f"saved after {lasted:.0f} s; there are more slices than {slices}")
            continue
        failures += 1
        short = short + 1 if lasted < LONG else 1
        if failures > args.restarts:
            say(f"{failures} failures: no further restart")
            return code
        pause = min(args.pause * 2 ** (short - 1), LONG)
        say(f"failed after {lasted:.0f} s; restart {failures} of {args.restarts} in {pause:g} s")
        if stop.wait(pause):
            return code


def available(args: argparse.Namespace) -> int:
    """How many slices there are; 0 also if nobody can say, as a failing scheduler may recover."""
    if not args.ask:
        return args.slices
    told = subprocess.run(args.ask, shell=True, stdout=subprocess.PIPE, text=True)
    if told.returncode or not told.stdout.strip().isdecimal():
        say(f"{args.ask!r} ended with {told.returncode} and {told.stdout!r}; expected a number")
        return 0
    return int(told.stdout)


def start(args: argparse.Namespace, command: list[str], slices: int) -> list[subprocess.Popen]:
    command = [part.replace("{slices}", str(slices)) for part in command]
    mine = {"MOSS_AUDIO_JAX_HEARTBEAT": str(args.heartbeat), "MOSS_AUDIO_JAX_SLICES": str(slices)}
    if not args.processes:
        running = [subprocess.Popen(command, env=os.environ | mine)]
    else:
        count, port = slices * args.processes, free_port()
        running = [
            subprocess.Popen(
                command,
                env=environment(index, count, args.devices, port) | mine,
                stdout=None if index == 0 else subprocess.PIPE,
                stderr=None if index == 0 else subprocess.STDOUT,
                text=True,
            )
            for index in range(count)
        ]
        for index, process in enumerate(running[1:], 1):
            threading.Thread(target=relay, args=(index, process), daemon=True).start()
    say(f"{slices} slice(s), processes {' '.join(str(process.pid) for process in running)}")
    return running


def watch(
    args: argparse.Namespace, running: list[subprocess.Popen], slices: int, stop: threading.Event
) -> tuple[int, bool]:
    """Waits for the end: (the first exit code that is not 0, whether the run was asked to save)."""
    looked, saving = time.monotonic(), False
    while True:
        codes = [process.poll() for process in running]
        if saving:  # also if it had not yet begun
            codes = [0 if code == -signal.SIGTERM else code for code in codes]
        failed = next((index for index, code in enumerate(codes) if code), None)
        if failed is not None:
            noticed = time.monotonic()
            end(running, args.grace)
            say(
                f"process {failed} ended with {codes[failed]}; the others had ended "
                f"{time.monotonic() - noticed:.1f} s later"
            )
            return codes[failed], saving
        if all(code == 0 for code in codes):
            return 0, saving
        more = False
        if args.ask and time.monotonic() - looked > LOOK:
            looked = time.monotonic()
            more = available(args) > slices
        if (more or stop.is_set()) and not saving:
            saving = True
            for process in running:
                process.terminate()
        time.sleep(0.05)


def end(running: list[subprocess.Popen], grace: float) -> None:
    last = time.monotonic() + grace
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(timeout=max(0, last - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def say(message: str) -> None:
    print(f"supervise: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    code = main()
    sys.exit(code if code >= 0 else 128 - code)  # as shells tell of a signal
