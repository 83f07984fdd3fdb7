"""Speed and memory of conversion: official -> native -> official, each in a process of its own.

    python tools/bench/convert.py --size 4b                   a random checkpoint, made first
    python tools/bench/convert.py --checkpoint DIR            an official checkpoint

Prints one JSON line: seconds, bytes a second and peak resident memory of both directions, and
whether the bytes of every tensor came back. Needs room for two checkpoints beside the input in
--workdir; what it wrote is removed.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

from moss_audio_jax.config import RELEASED
from moss_audio_jax.weights import safetensors

_CHILD = """
import json, resource, sys, time
from moss_audio_jax.weights.convert import convert
start = time.perf_counter()
convert(*sys.argv[1:4], progress=False)
unit = 1 if sys.platform == "darwin" else 1024
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
print(json.dumps({"seconds": round(time.perf_counter() - start, 1), "peak_rss_bytes": peak}))
"""


def same_bytes(one: str | Path, other: str | Path) -> bool:
    with safetensors.Reader(one) as a, safetensors.Reader(other) as b:
        if a.tensors.keys() != b.tensors.keys():
            return False
        return all(
            a.tensors[name].dtype == b.tensors[name].dtype
            and a.tensors[name].shape == b.tensors[name].shape
            and a.read(name).tobytes() == b.read(name).tobytes()
            for name in a.tensors
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--size", choices=sorted(RELEASED))
    source.add_argument("--checkpoint", help="an official checkpoint")
    parser.add_argument("--workdir", help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.workdir) as work:
        checkpoint = args.checkpoint
        if checkpoint is None:
            checkpoint = f"{work}/random"
            tool = Path(__file__).parents[1] / "make" / "random_checkpoint.py"
            subprocess.run([sys.executable, str(tool), checkpoint, args.size], check=True)
        with safetensors.Reader(checkpoint) as reader:
            shapes = reader.tensors.values()
            nbytes = sum(t.dtype.itemsize * math.prod(t.shape) for t in shapes)
        report: dict = {"checkpoint": args.size or args.checkpoint, "bytes": nbytes}
        for name, paths in {
            "to_native": (checkpoint, f"{work}/native", "native"),
            "to_official": (f"{work}/native", f"{work}/official", "official"),
        }.items():
            child = [sys.executable, "-c", _CHILD, *paths]
            out = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
            report[name] = json.loads(out)
            report[name]["bytes_per_second"] = round(nbytes / report[name]["seconds"])
        report["identical"] = same_bytes(checkpoint, f"{work}/official")
    print(json.dumps(report))
    if not report["identical"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
