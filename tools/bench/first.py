"""Where the seconds of a first answer go: imports, weights, each compiled program, the rest.

    python tools/bench/first.py [--verbs generate,api] [--rounds 1]

Each verb runs in a process of its own with the small model, first with an empty cache of programs,
then with the full one. Seconds are processor time of all threads, so that a busy machine does not
matter; `wall` is the clock's. Prints one JSON line for each run:

  start      the interpreter, before its first line
  imports    of everything, whenever it happens
  load       checkpoints, without imports and programs
  programs   {name: [seconds to trace and lower it, to compile it or to read it from the cache]}
  run        all the rest: reading sound, preparing batches, running programs, writing answers
  exit       after the verb's last line
"""

from __future__ import annotations

import argparse
import atexit
import builtins
import contextlib
import importlib
import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLIPS = ROOT / "moss_audio_jax" / "assets" / "demo"
SPEECH = str(CLIPS / "two_people.flac")
API = f"""
import moss_audio_jax as mj
model = mj.MossAudio.load()
print(model.generate("What is heard?", {SPEECH!r}).text)
"""
VERBS = {
    "help": ["--help"],
    "generate": ["generate", "--audio", SPEECH, "--prompt", "What is heard?"],
    "transcribe": ["transcribe", "--audio", SPEECH, "--timestamps", "word"],
    "demo": ["demo", "--output", "demo.html"],
    "infer": [
        "evaluate",
        "infer",
        "--benchmark",
        "asr",
        "--data",
        "rows.jsonl",
        "--output",
        "answers.jsonl",
    ],
    "api": [],
}


class Spans:
    """Processor time by name; a span's time is not that of the one around it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open = ["run"]
        self._since = time.process_time()
        self.seconds["start"] = self._since

    def enter(self, name: str) -> None:
        self._note()
        self._open.append(name)

    def leave(self) -> None:
        self._note()
        self._open.pop()

    def within(self, name: str) -> bool:
        return name in self._open

    def _note(self) -> None:
        now = time.process_time()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def span(self, name: str):
        self.enter(name)
        try:
            yield
        finally:
            self.leave()


def watch(spans: Spans) -> None:
    """Opens a span around every import, `MossAudio.load`, and each step to a program."""

    def timed(plain):
        def call(name, *args, **kwargs):
            if name in sys.modules or spans.within("imports"):
                return plain(name, *args, **kwargs)
            with spans.span("imports"):
                return plain(name, *args, **kwargs)

        return call

    builtins.__import__ = timed(builtins.__import__)
    importlib.import_module = timed(importlib.import_module)

    import jax.monitoring

    from moss_audio_jax.api import MossAudio

    steps = {
        "/jax/core/compile/jaxpr_trace_duration": "trace",
        "/jax/core/compile/jaxpr_to_mlir_module_duration": "trace",
        "/jax/core/compile/backend_compile_duration": "compile",
    }

    def begin(event, _, fun_name="", **__):
        if event in steps:
            # Functions within a program are traced with it.
            outer = next((name for name in spans._open if name.startswith("trace ")), None)
            name = fun_name.removeprefix("jit(").removesuffix(")").rpartition(".")[2]
            spans.enter(outer or f"{steps[event]} {name}")

    def end(event, _, **__):
        if event in steps:
            spans.leave()

    jax.monitoring.register_scalar_listener(begin)
    jax.monitoring.register_event_duration_secs_listener(end)

    plain = MossAudio.load

    def load(*args, **kwargs):
        with spans.span("load"):
            return plain(*args, **kwargs)

    MossAudio.load = load


def child(verb: str, report: str) -> None:
    """Runs a verb in this process, and writes its spans to a file when it ends."""
    spans = Spans()
    with spans.span("imports"):
        if verb != "help":
            watch(spans)

    def told() -> None:
        spans._note()
        Path(report).write_text(json.dumps(spans.seconds))

    atexit.register(told)
    if verb == "api":
        exec(API, {})
        return
    sys.argv = ["moss-audio-jax", *VERBS[verb]]
    runpy.run_module("moss_audio_jax.cli", run_name="__main__")


def measured(verb: str, folder: Path, cache: str) -> dict:
    """One run of a verb."""
    report = folder / "spans.json"
    env = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    (folder / "answers.jsonl").unlink(missing_ok=True)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, __file__, "--child", verb, str(report)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{verb}: {done.stderr}")
    seconds = json.loads(report.read_text())
    total = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    names = dict.fromkeys(n.partition(" ")[2] for n in seconds if n.startswith("compile "))
    programs = {
        name: [round(seconds.get(f"{step} {name}", 0), 2) for step in ("trace", "compile")]
        for name in names
    }
    parts = {name: round(s, 2) for name, s in seconds.items() if " " not in name}
    # Traced and not compiled: shapes that were asked for.
    parts["run"] += round(
        sum(s for n, s in seconds.items() if n.startswith("trace ") and n[6:] not in names), 2
    )
    exit = round(total - sum(seconds.values()), 2)
    return {
        "verb": verb,
        "cache": cache,
        "wall": round(wall, 2),
        "processor": round(total, 2),
        **{name: parts.get(name, 0.0) for name in ("start", "imports", "load")},
        "compiled": round(sum(map(sum, programs.values())), 2),
        "run": round(parts["run"], 2),
        "exit": exit,
        "programs": programs,
    }


def write_rows(folder: Path) -> None:
    """Rows for `evaluate infer`: the five clips of the demo."""
    rows = ({"audio": str(clip), "text": ""} for clip in sorted(CLIPS.glob("*.flac")))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--verbs", default=",".join(VERBS), metavar="A,B,...")
    options.add_argument("--rounds", type=int, default=1)
    args = options.parse_args()
    for verb in args.verbs.split(","):
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                write_rows(Path(folder))
                for cache in ("empty", "full"):
                    print(json.dumps(measured(verb, Path(folder), cache)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
