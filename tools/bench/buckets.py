"""How fast safetensors are read from a bucket on loopback, and how much memory that takes.

    python tools/bench/buckets.py [--gigabytes 1] [--schemes gs s3]
    python tools/bench/buckets.py --checkpoint DIR --work DIR

The server (an emulator of Cloud Storage, or moto) runs in another process. What it can give is
measured first, by plain HTTP on one connection after the other; then a checkpoint's tensors are
read by as many threads as a load uses. One JSON line for each scheme. The servers are written in
Python and answer one request at a time, so their speed, not the line's, is the limit.

With --checkpoint, an official one of any size, this is loaded and converted to native and back, all
in gs://, each in a process of its own. One JSON line for each: whether the bytes are those of the
same on the disk (files: by CRC-32C), the most anonymous memory of the process, and the speed as a
share of that of plain HTTP (of a conversion: of reading and writing once). The share of CPU counts
the server's, too; where other work runs it tells more. --work needs room for three checkpoints, and
is left as it was.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import numpy as np  # noqa: E402

_SERVE = """
import json, sys, loopback
with loopback.servers(*sys.argv[1:]) as urls:
    print(json.dumps(urls), flush=True)
    sys.stdin.read()
"""
_CONVERT = """
import json, sys, time
from moss_audio_jax.weights.convert import convert
began, cpu = time.monotonic(), time.process_time()
convert(*sys.argv[1:], progress=False)
print(json.dumps([time.monotonic() - began, time.process_time() - cpu]))
"""
_LOAD = """
import json, sys, time, zlib, numpy
from moss_audio_jax.weights.convert import load_params
sums, summing = {}, 0.0
def take(path, leaf):  # and drops it, as a load does that makes int8 of it
    global summing
    began = time.thread_time()
    sums[path] = zlib.crc32(numpy.asarray(leaf).view(numpy.uint8))
    summing += time.thread_time() - began
began, cpu = time.monotonic(), time.process_time()
load_params(sys.argv[1], then=take)
print(json.dumps([time.monotonic() - began - summing, time.process_time() - cpu - summing, sums]))
"""
_MAY_DIFFER = {"params/_CHECKPOINT_METADATA", "README.md"}  # it has the time; it is not copied
_SHARD = 128 << 20  # the emulators hold an object and its answer in memory


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--gigabytes", type=float, default=1.0)
    options.add_argument("--schemes", nargs="+", default=["gs", "s3"], choices=("gs", "s3"))
    options.add_argument("--checkpoint", type=Path, help="convert and load this one in gs://")
    options.add_argument("--work", type=Path, help="where the bucket's objects lie meanwhile")
    args = options.parse_args()
    if (args.checkpoint is None) != (args.work is None):
        options.error("--checkpoint and --work belong together")
    held = tempfile.TemporaryDirectory(dir=args.work) if args.work else contextlib.nullcontext()
    with held as work:
        return measure(args, work)


def measure(args: argparse.Namespace, work: str | None) -> int:
    path = os.pathsep.join(sys.path[:2])
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVE, *([f"{work}/bucket"] if work else [])],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        urls = json.loads(server.stdout.readline())
        import loopback

        os.environ.update(loopback.environment(urls))
        if args.checkpoint:
            return 0 if converted(urls["gs"], server.pid, args.checkpoint, Path(work)) else 1
        for scheme in args.schemes:
            print(json.dumps({"scheme": scheme, **measured(scheme, urls, args.gigabytes)}))
    finally:
        server.stdin.close()
        server.wait()
    return 0


def converted(url: str, server: int, checkpoint: Path, work: Path) -> bool:
    """Prints the figures of --checkpoint; whether all bytes are the same.

    Args:
      server: the process that answers at `url`.
    """
    from loopback import BUCKET

    root, same = f"gs://{BUCKET}", True
    os.environ["TMPDIR"] = str(work)

    def told(what: str, moved: float, spent: Spent, plain: Spent | None = None, **more) -> None:
        nonlocal same
        same &= more.get("identical", True)
        about = {
            "what": what,
            "gigabytes": round(moved / 1e9, 2),
            "seconds": round(spent.seconds, 1),
            "cpu_seconds": round(spent.cpu, 1),
            "mb_per_s": round(moved / 1e6 / spent.seconds),
        }
        if plain:
            about["share"] = round(plain.seconds / spent.seconds, 2)
            about["share_of_cpu"] = round(plain.cpu / spent.cpu, 2)
        print(json.dumps({**about, **more}), flush=True)

    official = sums_below(checkpoint)
    size = sum(length for length, _ in official.values())
    here = run(_CONVERT, checkpoint, work / "native", "native")
    told("convert to native, on the disk", 2 * size, here.spent(Spent()))
    native = sums_below(work / "native")
    shutil.rmtree(work / "native")
    here = run(_LOAD, checkpoint)
    told("load, from the disk", size, here.spent(Spent()))
    leaves = here.out[2]

    with spending(server) as put:
        for file in checkpoint.iterdir():
            plain_put(url, file, f"official/{file.name}")
    told("plain HTTP, write", size, put)
    with spending(server) as got:
        for name in listed(url, "official/"):
            plain_get(url, f"official/{name}")
    told("plain HTTP, read", size, got)

    with spending(server) as spent:
        done = run(_LOAD, f"{root}/official")
    identical = done.out[2] == leaves
    more = {"identical": identical, "memory_gib": done.memory_gib}
    told("load", size, done.spent(spent), got, **more)

    both = Spent(put.seconds + got.seconds, put.cpu + got.cpu)
    for layout, source, target, expected in (
        ("native", "official", "native", native),
        ("official", "native", "back", official),
    ):
        with spending(server) as spent:
            done = run(_CONVERT, f"{root}/{source}", f"{root}/{target}", layout)
        there = listed(url, f"{target}/")
        every = there.keys() | expected.keys()
        differ = sorted(name for name in every if there.get(name) != expected.get(name))
        identical, what = not set(differ) - _MAY_DIFFER, f"convert to {layout}"
        more = {"identical": identical, "differ": differ, "memory_gib": done.memory_gib}
        told(what, 2 * size, done.spent(spent), both, **more)
        for name in listed(url, f"{source}/"):  # for which there may be no room
            place = urllib.parse.quote(f"{source}/{name}", safe="")
            asked(url, "DELETE", f"/storage/v1/b/{BUCKET}/o/{place}")
    return same


@dataclasses.dataclass
class Spent:
    """Seconds by the clock, and of CPUs: by the server and by who asks it."""

    seconds: float = 0.0
    cpu: float = 0.0


@contextlib.contextmanager
def spending(server: int) -> Iterator[Spent]:
    """What this process and the server spend meanwhile."""

    def cpu() -> float:
        ticks = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[11:13]
        return time.process_time() + sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    spent, began, before = Spent(), time.monotonic(), cpu()
    yield spent
    spent.seconds, spent.cpu = time.monotonic() - began, cpu() - before


@dataclasses.dataclass(frozen=True)
class Done:
    """What a process printed, its seconds and CPU seconds first, and its most anonymous memory."""

    out: list
    memory_gib: float

    def spent(self, around: Spent) -> Spent:
        """Without its start, and with the server's share of `around`."""
        return Spent(self.out[0], self.out[1] + around.cpu)


def run(code: str, *words: object) -> Done:
    most = 0
    child = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    while child.poll() is None:
        with contextlib.suppress(OSError):
            about = Path(f"/proc/{child.pid}/status").read_text()
            most = max(most, sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\s*(\d+)", about))))
        time.sleep(0.05)
    if child.returncode:
        raise SystemExit(f"exit code {child.returncode}: {code} {words}")
    return Done(json.loads(child.stdout.read()), round(most / (1 << 20), 2))


Sums = dict[str, tuple[int, str]]  # {name: (bytes, CRC-32C)}


def sums_below(folder: Path) -> Sums:
    """Of all files below."""
    import google_crc32c

    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            crc = google_crc32c.Checksum()
            with open(file, "rb") as opened:
                while piece := opened.read(1 << 24):
                    crc.update(piece)
            name = str(file.relative_to(folder))
            found[name] = file.stat().st_size, base64.b64encode(crc.digest()).decode()
    return found


def asked(url: str, method: str, path: str, data: bytes = b"", **headers: str) -> tuple:
    """(status, headers, body) of one request on a connection of its own."""
    connection = http.client.HTTPConnection(url.partition("://")[2])
    with contextlib.closing(connection):
        connection.request(method, path, data, {k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def plain_put(url: str, file: Path, name: str) -> None:
    """Writes an object by a resumable upload, in pieces as large as those of gcsfs."""
    from loopback import BUCKET

    size, step = file.stat().st_size, 50 << 20
    query = urllib.parse.urlencode({"uploadType": "resumable", "name": name})
    _, headers, _ = asked(url, "POST", f"/upload/storage/v1/b/{BUCKET}/o?{query}")
    there = headers["Location"].removeprefix(url)
    with open(file, "rb") as opened:
        for at in range(0, size, step):
            data = opened.read(step)
            span = f"bytes {at}-{at + len(data) - 1}/{size}"
            status, _, _ = asked(url, "PUT", there, data, Content_Range=span)
    assert status == 200, f"{name}: {status}"


def plain_get(url: str, name: str) -> None:
    """Reads an object by ranges."""
    from loopback import BUCKET

    path = f"/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(name, safe='')}?alt=media"
    at, step = 0, 16 << 20
    while True:
        status, _, data = asked(url, "GET", path, Range=f"bytes={at}-{at + step - 1}")
        assert status == 206, f"{name}: {status}"
        at += len(data)
        if len(data) < step:
            return


def listed(url: str, prefix: str) -> Sums:
    """Of the objects of a prefix, as the bucket lists them."""
    from loopback import BUCKET

    query = urllib.parse.urlencode({"prefix": prefix})
    _, _, data = asked(url, "GET", f"/storage/v1/b/{BUCKET}/o?{query}")
    items = json.loads(data)["items"]
    return {i["name"].removeprefix(prefix): (int(i["size"]), i["crc32c"]) for i in items}


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
