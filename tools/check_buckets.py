"""Checks that a run in a bucket that is killed again and again equals one on a disk.

    python tools/check_buckets.py [--kills 5] [--faults 0.02] [--schemes gs s3] [--local]

The servers are a Cloud Storage emulator and moto on loopback, behind a proxy that breaks a share of
the answers (tests/support/loopback.py). Work folder, rows and start are in the bucket. The run is
killed with SIGKILL at random moments. Its metrics and row ids must be those of a run on a disk that
nobody killed, bit for bit. One JSON line for each scheme; exit code 1: something differs. With
--local each step is also saved on the disk, and every fifth in the bucket. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import loopback  # noqa: E402
import runs  # noqa: E402

KEYS = ("step", "loss", "grad_norm", "tokens", "tokens_seen", "audio_hours_seen", "padding")
STEPS = 16


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--kills", type=int, default=5)
    options.add_argument("--faults", type=float, default=0.02, help="share of answers broken")
    options.add_argument("--schemes", nargs="+", default=["gs", "s3"], choices=("gs", "s3"))
    options.add_argument("--processes", type=int, default=1, help="of the run; each of one device")
    options.add_argument("--local", action="store_true", help="a tier of checkpoints on the disk")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as held, loopback.proxies() as proxies:
        work = Path(held)
        urls = {name: proxy.url for name, proxy in proxies.items()}
        os.environ.update(loopback.environment(urls))
        env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        env["XDG_CACHE_HOME"] = str(work / "cache")
        (work / "data").mkdir()
        runs.write_corpus(work / "data")
        config = work / "small.py"
        runs.write_config(config, work / "data")
        sizes = ("data.batch=2", "data.streams=2", f"train.steps={STEPS}")
        start = f"init_from={work / 'data' / 'start'}"
        subprocess.run(
            run_of(args.processes, config, work / "whole", *sizes, start),
            env=env,
            check=True,
            capture_output=True,
        )
        same = True
        for scheme in args.schemes:
            root = f"{scheme}://{loopback.BUCKET}/check"
            loopback.fill(work / "data", f"{root}/data")
            there = (
                *sizes,
                f"init_from={root}/data/start",
                f"tokenizer={root}/data/start",
                f"data.train=('{root}/data/rows.jsonl',)",
            )
            if args.local:
                tier = (f"folder={work / scheme}", "every=1")
                there += ("checkpoint.every=5", *(f"checkpoint.local.{key}" for key in tier))
            proxies[scheme].share = args.faults
            began = time.monotonic()
            command = run_of(args.processes, config, f"{root}/work", *there)
            starts = [kill(command, env, draw, work / scheme) for _ in range(args.kills)]
            last = subprocess.run(command, env=env, capture_output=True, text=True)
            proxies[scheme].share = 0.0
            if last.returncode:
                print(last.stderr, file=sys.stderr)
            differs = compare(loopback.objects(f"{root}/work"), work / "whole")
            same &= not differs and not last.returncode
            about = {
                "scheme": scheme,
                "kills": sum(killed for _, _, killed in starts),
                "from_and_to_step": [steps for *steps, _ in starts],
                "faults": dict(proxies[scheme].done),
                "requests": len(proxies[scheme].requests),
                "seconds": round(time.monotonic() - began),
                "differs": differs,
            }
            print(json.dumps(about), flush=True)
    return 0 if same else 1


def run_of(processes: int, *words: object) -> list[str]:
    command = runs.command(*words)
    if processes == 1:
        return command
    launcher = [sys.executable, str(ROOT / "launch" / "local_processes.py"), str(processes)]
    return [*launcher, "--devices", "1", "--", *command]


def kill(
    command: list[str], env: dict[str, str], draw: random.Random, disk: Path
) -> tuple[str | None, int | None, bool]:
    """Starts the run and kills it some steps later.

    Returns:
      The step from which it went on ("5 disk" or "5 bucket") and the one that it reached, if any;
      whether it was killed before it was done.
    """
    run = subprocess.Popen(
        command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    steps, seconds = draw.randint(0, 6), draw.uniform(0, 1.5)
    if not steps:  # before the first step: while it loads, or sets up its folder
        time.sleep(draw.uniform(3, 12))
        os.killpg(run.pid, signal.SIGKILL)
    begun, reached, done = None, None, 0
    for text in run.stderr:
        if text.startswith("error"):
            print(text, end="", file=sys.stderr)
        if found := re.search(r"continues at step (\d+) of", text):
            begun = f"{found[1]} {'disk' if str(disk) in text else 'bucket'}"
        if found := re.search(r"\bstep (\d+)/", text):
            reached, done = int(found[1]), done + 1
            if done == steps and reached < STEPS:
                time.sleep(seconds)
                os.killpg(run.pid, signal.SIGKILL)
    return begun, reached, run.wait() == -signal.SIGKILL


def compare(found: dict[str, bytes], whole: Path) -> list[str]:
    """What differs between the logs in the bucket and those on the disk."""
    differs = []
    for name, keys in (("metrics.jsonl", KEYS), ("rows-0.jsonl", ("step", "rows"))):
        there = [json.loads(line) for line in found.get(name, b"").splitlines()]
        here = runs.log(whole, name)
        differs += [
            f"{name}: {key}" for key in keys if [r[key] for r in there] != [r[key] for r in here]
        ]
    return differs


if __name__ == "__main__":
    sys.exit(main())
