"""Feeds damaged and hostile inputs to all readers of foreign files.

example:
  python tools/fuzz.py --inputs 20000 --seed 1 --output fuzz
  python tools/fuzz.py --kinds audio --seed 1 --only 417     # one input again, with its traceback

Input i of a kind and a seed is always the same. An input passes if its reader gives a finite result
or raises InputError or UsageError, within --seconds of processor time and --megabytes of memory
beyond those that the process held before. Each kind runs in a separate process, so that crashes and
hangs of native code are found too. A failing input is reduced as far as it still fails in the same
way, and written to --output with its traceback. Exit code 1: something failed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fuzz_kinds import KINDS

from moss_audio_jax.errors import InputError, UsageError


class Failure(NamedTuple):
    """The failure of input `number`; equal faults have the same `signature`."""

    number: int
    signature: str
    detail: str
    data: bytes


# --- one kind in a separate process --------------------------------------------------------------

_HEADROOM = 8 << 30  # bytes of address space beyond those that a kind starts with


class _SlowError(Exception):
    pass


def _alarm(*_: object) -> None:
    raise _SlowError


def _peak_reset() -> int:
    """Bytes that this process holds now; also resets the peak (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def attempt(
    read: Callable[[bytes], None], data: bytes, seconds: float, megabytes: float
) -> tuple[str, str] | None:
    """None if the input passes; else (signature, detail)."""
    before = _peak_reset()
    handler = signal.signal(signal.SIGPROF, _alarm)  # without a handler the signal ends the process
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        read(data)
    except (InputError, UsageError) as error:
        if "\n" in str(error):
            return "a message of several lines", str(error)
    except _SlowError:
        return f"over {seconds:g} s", "".join(traceback.format_exc())
    except SystemExit as stop:
        return f"SystemExit {stop.code}", traceback.format_exc()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "moss_audio_jax" in f.filename or "fuzz" in f.filename]
        at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        return f"{type(error).__name__} at {at}", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
    grown = (_status("VmHWM") - before) / 1e6
    if grown > megabytes:
        return f"over {megabytes:g} MB", f"grew by {grown:.0f} MB"
    return None


def _worker(pipe, name: str, seed: int, numbers: Sequence[int], seconds: float, megabytes: float):
    """Reads inputs one after the other; reports before and after each."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        seeds, mutate, read = KINDS[name].setup(Path(folder))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders print complaints to stderr
        for index, each in enumerate(seeds[:3]):  # reads undamaged inputs first, as a warm-up
            failed = attempt(read, each, 60, 1e6)
            if failed and name != "overrides":
                pipe.send(("done", -1 - index, Failure(-1 - index, *failed, each)))
        limit = _status("VmSize") + _HEADROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        for number in numbers:
            data = make(name, seed, number, mutate, seeds)
            pipe.send(("begin", number, data))
            failed = attempt(read, data, seconds, megabytes)
            if failed:
                data = _smaller(read, data, failed[0], seconds, megabytes)
            pipe.send(("done", number, Failure(number, *failed, data) if failed else None))
        os.chdir("/")
    pipe.send(("end", 0, None))


def make(name: str, seed: int, number: int, mutate: Callable, seeds: Sequence[bytes]) -> bytes:
    """Input `number` of a kind and a seed."""
    return mutate(np.random.default_rng([seed, list(KINDS).index(name), number]), seeds)


def _smaller(
    read: Callable, data: bytes, signature: str, seconds: float, megabytes: float, tries: int = 60
) -> bytes:
    """A part of the input that fails the same way, found by leaving out ever smaller pieces."""
    if "over" in signature:
        return data
    size = len(data) // 2
    while size and tries:
        start = 0
        while start < len(data) and tries:
            tries -= 1
            less = data[:start] + data[start + size :]
            failed = attempt(read, less, seconds, megabytes)
            if failed and failed[0] == signature:
                data = less
            else:
                start += size
        size //= 2
    return data


def fuzz(
    name: str, seed: int, numbers: Sequence[int], seconds: float = 5.0, megabytes: float = 1000.0
) -> Iterator[Failure]:
    """The failures of one kind; a process that dies or hangs is replaced for the next input."""
    context = multiprocessing.get_context("spawn")
    left = list(numbers)
    while left:
        here, there = context.Pipe(duplex=False)
        process = context.Process(
            target=_worker, args=(there, name, seed, left, seconds, megabytes), daemon=True
        )
        process.start()
        there.close()
        current: tuple[int, bytes] | None = None
        ended = False
        try:
            # On a busy machine wall time may be much longer than processor time.
            while here.poll(300 if current is None else max(20 * seconds, 60)):
                word, number, value = here.recv()
                if word == "end":
                    ended = True
                    break
                if word == "begin":
                    current = (number, value)
                    continue
                if value is not None:
                    yield value
                if number >= 0:
                    left.remove(number)
        except EOFError:
            pass
        process.join(1 if ended else 0.2)
        how = f"died ({process.exitcode})" if process.exitcode is not None else "hung"
        process.kill()
        process.join()
        if ended:
            return
        if current is None:
            raise RuntimeError(f"{name}: the process {how} before its first input")
        if current[0] in left:
            left.remove(current[0])
            yield Failure(current[0], f"the process {how}", "", current[1])
        current = None


def main(argv: Sequence[str]) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--inputs", type=int, default=2000, help="total over all kinds; default 2000"
    )
    options.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options.add_argument("--only", type=int, help="only this input of the one kind")
    options.add_argument("--output", type=Path, default=Path("fuzz"), metavar="DIR")
    options.add_argument("--seconds", type=float, default=5.0)
    options.add_argument("--megabytes", type=float, default=1000.0)
    args = options.parse_args(argv)
    print(f"seed {args.seed}")
    total = sum(KINDS[name].share for name in args.kinds)
    failed = 0
    for name in args.kinds:
        count = round(args.inputs * KINDS[name].share / total)
        numbers = range(count) if args.only is None else [args.only]
        started, found = time.perf_counter(), collections.Counter()
        for failure in fuzz(name, args.seed, numbers, args.seconds, args.megabytes):
            found[failure.signature] += 1
            if found[failure.signature] == 1:
                args.output.mkdir(parents=True, exist_ok=True)
                stem = args.output / f"{name}-{args.seed}-{failure.number}"
                stem.with_suffix(KINDS[name].suffix).write_bytes(failure.data)
                stem.with_suffix(".why").write_text(f"{failure.signature}\n{failure.detail}")
                if args.only is not None:
                    print(failure.detail)
        took = time.perf_counter() - started
        print(f"{name:12} {len(numbers):6} inputs {sum(found.values()):5} failed {took:7.1f} s")
        for signature, times in found.most_common():
            print(f"    {times:5} x {signature}")
        failed += sum(found.values())
    print(f"{failed} failed" + (f"; one of each is in {args.output}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
