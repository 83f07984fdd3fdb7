"""One command for the minutes in which an accelerator is at hand: what is fastest, and is it right?

    python tools/device/run.py --minutes 9 --out device/run.jsonl
    python tools/device/run.py --tiny                 # a rehearsal, on any machine
    python tools/device/run.py --parts parity,decode  # some of it
    python tools/device/run.py --list                 # the plan

Each part of PLAN is a process of its own, begun if its seconds are left and ended after them, most
valuable first. So whatever fails, or whenever the run is cut, the other parts' numbers are there:
each is a JSON line, printed and, with --out, written at once. Lines of a part that failed have
"error". Weights are random, but for `parity` and `small`; compiling is not part of a time.

  parity     golden numbers of PyTorch, the CPU beside: float32, greedy tokens, bfloat16's error
  decode     seconds a step of the released 4B, what it must read as a share of the bandwidth
  attention  the kernel with packing as a mask and in its packed layout, plain attention
  train      seconds a step and MFU, 4B's width with fewer layers
  prefill    eight prompts of 2,048 tokens with 120 s of sound: tokens a second and MFU
  xla        decode and train again under options of the compiler
  small      the next stage of the small model, in the folder `small` beside --out
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GRACE = 15  # seconds for a process that was asked to end
# The measurement of each part: module and function. They import JAX, this file does not: the device
# belongs to one process at a time.
MEASURES = {
    "parity": ("parity", "measure"),
    "attention": ("attention", "measure"),
    "train": ("training", "measure"),
    "decode": ("generation", "measure_decode"),
    "prefill": ("generation", "measure_prefill"),
    "small": ("small", "measure"),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
      name: of MEASURES.
      setting: what its function is told.
      seconds: the most it may take.
      xla: an option of XLA, and why it may help.
    """

    name: str
    setting: str
    seconds: float
    xla: tuple[str, str] | None = None

    @property
    def group(self) -> str:
        """What --parts calls it."""
        return "xla" if self.xla else self.name


def _option(name: str, setting: str, flag: str, why: str) -> Part:
    return Part(name, setting, 75, (flag, why))


PLAN = (
    Part("parity", "golden", 60),
    Part("decode", "none:1", 90),
    Part("decode", "weights:1", 90),
    Part("attention", "", 75),
    Part("train", "audio:packed", 90),
    Part("train", "audio:mask", 90),
    Part("decode", "none:64", 75),
    Part("prefill", "auto", 75),
    Part("decode", "weights+cache:64", 75),
    Part("parity", "answers", 75),
    Part("parity", "gradients", 60),
    _option(
        "decode",
        "none:1",
        "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,WHILE,CONDITIONAL",
        "a step has some 820 kernels: the whole loop as one CUDA graph has no launches between",
    ),
    _option(
        "decode",
        "none:1",
        "--xla_gpu_enable_triton_gemm=false",
        "a product with one row is a matrix and a vector: cuBLAS has a kernel for it",
    ),
    _option(
        "decode",
        "weights:1",
        "--xla_gpu_triton_gemm_any=true",
        "Triton converts int8 beside the product; cuBLAS gets a converted copy",
    ),
    _option(
        "train",
        "audio:packed",
        "--xla_gpu_enable_dynamic_slice_fusion=true",
        "the scan cuts each layer's weights out of a stack: the product may read them there",
    ),
    _option(
        "train",
        "audio:packed",
        "--xla_gpu_enable_while_loop_double_buffering=true",
        "two layers in one turn of the scan: fewer copies of what it carries",
    ),
    _option(
        "train",
        "audio:packed",
        "--xla_gpu_enable_triton_gemm=false",
        "products are large: cuBLAS's are as fast, and less is tried while compiling",
    ),
    Part("small", "", 60),  # and all that is left
)


class Printer:
    """Writes JSON lines, each whole and at once."""

    def __init__(self, out: Path | None) -> None:
        self._start, self._lock = time.perf_counter(), threading.Lock()
        self._file = None
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._file = out.open("a", encoding="utf-8")

    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def __call__(self, part: Part, **fields: Any) -> None:
        line = {"part": part.name, "setting": part.setting}
        if part.xla:
            line["xla"], line["why"] = part.xla
        with self._lock:
            text = json.dumps(line | fields | {"at": round(self.elapsed(), 1)})
            for stream in filter(None, (sys.stdout, self._file)):
                print(text, file=stream, flush=True)


def main() -> None:
    args = parsed()
    if args.list:
        for part in args.parts:
            flag, why = part.xla or ("", "")
            print(f"{part.seconds:4.0f} s  {part.group:9} {part.name} {part.setting} {flag}  {why}")
    elif args.measure:
        measure(*args.measure, tiny=args.tiny)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        parts, budget = args.parts, 60 * args.minutes
        if args.tiny:  # where it is rehearsed, others may work too
            parts = [dataclasses.replace(part, seconds=4 * part.seconds) for part in parts]
            budget *= 4
        run(parts, budget, Printer(args.out), args.tiny)


def run(parts: list[Part], budget: float, emit: Printer, tiny: bool) -> None:
    """Runs the parts one after the other, each if there is time."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": cache,  # of programs that several parts compile
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "MOSS_AUDIO_JAX_CACHE": "off",
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        }
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")  # 0.75 by itself
        for part in parts:
            left = budget - emit.elapsed()
            if left < part.seconds:
                emit(part, left_out=f"{left:.0f} s are left; it is given {part.seconds:.0f}")
                continue
            seconds = left - GRACE if part.name == "small" else part.seconds
            one(part, seconds, environment, emit, tiny)


def one(part: Part, seconds: float, environment: dict, emit: Printer, tiny: bool) -> None:
    """Runs one part's process, and passes its lines on as they come."""
    if part.xla:
        flags = f"{environment.get('XLA_FLAGS', '')} {part.xla[0]}".strip()
        environment = environment | {"XLA_FLAGS": flags}
    command = [sys.executable, __file__, "--measure", part.name, part.setting]
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        child = subprocess.Popen(
            [*command, *["--tiny"] * tiny],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
        reader = threading.Thread(target=_pass_on, args=(child.stdout, part, emit))
        reader.start()
        why = ""
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            why, code = f"took more than {seconds:.0f} s; ", _end(child)
        except BaseException:
            _end(child)
            raise
        reader.join(GRACE)
        if code or (why and part.name != "small"):
            errors.seek(0)
            emit(part, error=f"{why}exit code {code}: {errors.read()[-600:].strip()}")


def _end(child: subprocess.Popen) -> int:
    """Asks a process and its children to end, and ends them if they do not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
    return child.returncode


def _pass_on(lines: Iterator[str], part: Part, emit: Printer) -> None:
    for line in lines:
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            print(line, end="", file=sys.stderr)  # what a library printed
        else:
            emit(part, **fields)


def measure(name: str, setting: str, tiny: bool) -> None:
    """In a part's own process: prints its lines."""
    from tools.device.measure import TINY, Sizes, describe

    module, function = MEASURES[name]
    found: Callable = getattr(importlib.import_module(f"tools.device.{module}"), function)
    sizes = TINY if tiny else Sizes()
    about = describe(sizes) if name != "small" else {}  # a stage has the device for itself
    for fields in found(setting, sizes):
        print(json.dumps(about | fields), flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    groups = list(dict.fromkeys(part.group for part in PLAN))
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--parts", default=",".join(groups), help="default all", metavar="A,B")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where lines are written too")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes, any machine, four times the time"
    )
    parser.add_argument("--list", action="store_true", help="print the plan and end")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    asked = args.parts.split(",")
    if wrong := set(asked) - set(groups):
        parser.error(f"--parts: {sorted(wrong)[0]!r}; expected some of {', '.join(groups)}")
    small = str((args.out or Path("device/run.jsonl")).resolve().parent / "small")
    args.parts = [
        dataclasses.replace(part, setting=small) if part.name == "small" else part
        for part in PLAN
        if part.group in asked
    ]
    return args


if __name__ == "__main__":
    main()
