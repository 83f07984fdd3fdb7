"""How fast safetensors are read from a bucket on loopback, and how much memory that takes.

    python tools/bench/buckets.py [--gigabytes 1] [--schemes gs s3]

The server (an emulator of Cloud Storage, or moto) runs in another process. What it can give is
measured first, by plain HTTP on one connection after the other; then a checkpoint's tensors are
read by as many threads as a load uses. One JSON line for each scheme. The servers are written in
Python and answer one request at a time, so their speed, not the line's, is the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import numpy as np  # noqa: E402

_SERVE = """
import json, sys, loopback
with loopback.servers() as urls:
    print(json.dumps(urls), flush=True)
    sys.stdin.read()
"""
_SHARD = 128 << 20  # the emulators hold an object and its answer in memory


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--gigabytes", type=float, default=1.0)
    options.add_argument("--schemes", nargs="+", default=["gs", "s3"], choices=("gs", "s3"))
    args = options.parse_args()
    path = os.pathsep.join(sys.path[:2])
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVE],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        urls = json.loads(server.stdout.readline())
        import loopback

        os.environ.update(loopback.environment(urls))
        for scheme in args.schemes:
            print(json.dumps({"scheme": scheme, **measured(scheme, urls, args.gigabytes)}))
    finally:
        server.stdin.close()
        server.wait()
    return 0


def measured(scheme: str, urls: dict[str, str], gigabytes: float) -> dict[str, float]:
    import loopback

    from moss_audio_jax import buckets
    from moss_audio_jax.weights import safetensors

    folder = f"{scheme}://{loopback.BUCKET}/speed"
    count = max(1, round(gigabytes * 1e9 / _SHARD))
    shape = (_SHARD // 4096, 1024)
    block = np.random.default_rng(0).standard_normal(shape, np.float32)
    header = safetensors._header({"x": (shape, block.dtype)})
    for number in range(count):
        buckets.write(f"{folder}/{number}.safetensors", header + block.tobytes())

    one = f"/{loopback.BUCKET}/speed/0.safetensors"
    if scheme == "gs":
        name = urllib.parse.quote("speed/0.safetensors", safe="")
        one = f"/storage/v1/b/{loopback.BUCKET}/o/{name}?alt=media"
    began, got = time.monotonic(), 0
    for start in range(0, _SHARD, 16 << 20):
        span = {"Range": f"bytes={start}-{start + (16 << 20) - 1}"}
        request = urllib.request.Request(urls[scheme] + one, headers=span)
        if scheme == "s3":
            request.add_header("Authorization", "AWS none:none")
        got += len(urllib.request.urlopen(request).read())
    line = got / (time.monotonic() - began)

    readers = [safetensors.Reader(f"{folder}/{number}.safetensors") for number in range(count)]
    before, most = resident(), 0
    rows = 1024  # 4 MiB at a time, as a load takes them
    pieces = [(r, slice(at, at + rows)) for r in readers for at in range(0, shape[0], rows)]

    def take(piece: tuple) -> int:
        nonlocal most
        reader, part = piece
        found = reader.read("x", (part,))
        assert np.array_equal(found[0], block[part.start]), "other bytes"
        most = max(most, resident())
        return found.nbytes

    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        total = sum(pool.map(take, pieces))
    speed = total / (time.monotonic() - began)
    return {
        "gigabytes": round(total / 1e9, 3),
        "plain_http_mb_per_s": round(line / 1e6),
        "safetensors_mb_per_s": round(speed / 1e6),
        "share": round(speed / line, 2),
        "memory_grew_mb": round((most - before) / 1e6),
    }


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
