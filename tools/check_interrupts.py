"""Checks that Ctrl-C always ends every verb with exit code 130: starts verbs and interrupts them.

    python tools/check_interrupts.py --workdir check [--tries 60] [--seed 0] [--verbs demo,plan]

First each verb runs to its end once, which fills the cache of programs and measures its time. Then
the verbs take turns. SIGINT goes to the whole process group, as from a terminal, at a random moment
between 0.2 s and that time (at most --longest); every third try sends a second one 0.01 to 0.5 s
later. If a verb ends before its signal, the try is repeated. A try passes if the exit code is 130,
stderr has no line with "Traceback" or "Exception ignored", and no process of the group is left.
Prints one line per try, and one JSON line at the end. Exit code 1: a try failed. A verb whose extra
is missing is named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "moss_audio_jax" / "assets" / "demo"
SMALL = ROOT / "moss_audio_jax" / "assets" / "small"
FIRST = 0.2  # seconds; later if Python takes longer until it runs the first line of the package
PATIENCE = 120  # seconds after which a try counts as hanging


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--workdir", type=Path, required=True, metavar="DIR")
    options.add_argument("--tries", type=int, default=60)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--verbs", help="only these verbs, like demo,plan; default all")
    options.add_argument(
        "--longest",
        type=float,
        default=20.0,
        metavar="S",
        help="latest moment of the signal; default 20",
    )
    args = options.parse_args()
    work = args.workdir.resolve()
    verbs = commands(work)
    if args.verbs:
        verbs = {name: verbs[name] for name in args.verbs.split(",")}

    times = {}
    for name, words in verbs.items():
        start = time.time()
        done = subprocess.run(started(work, name, words), cwd=work, capture_output=True, text=True)
        times[name] = min(time.time() - start, args.longest)
        last = (done.stderr.splitlines() or [""])[-1]
        print(f"{name}: {times[name]:.1f} s, exit code {done.returncode}: {last}", flush=True)
        if done.returncode not in (0, 1, 3):  # 3: `plan` found that a run does not fit
            del times[name]
    start = time.time()
    subprocess.run([sys.executable, "-c", "import moss_audio_jax"], check=True)
    first = max(FIRST, 1.5 * (time.time() - start))
    print(f"seed {args.seed}, the first moment {first:.2f} s", flush=True)
    random_ = random.Random(args.seed)
    names, bad = list(times), []
    for number in range(args.tries):
        name = names[number % len(names)]
        twice = number % 3 == 2
        for _ in range(20):
            moment = random_.uniform(first, max(times[name], first))
            again = random_.uniform(0.01, 0.5) if twice else None
            found = interrupted(started(work, name, verbs[name]), work, moment, again)
            if found is not None:
                break
        else:
            raise SystemExit(f"{name}: always ends before its signal; its work is too small")
        code, seconds, problem = found
        print(
            f"{number:3d} {name:<10} at {moment:5.2f} s{' twice' if twice else ''}: "
            f"{code} after {seconds:.1f} s{f': {problem}' if problem else ''}",
            flush=True,
        )
        if problem:
            bad.append(
                {
                    "verb": name,
                    "at": round(moment, 3),
                    "again": again,
                    "code": code,
                    "problem": problem,
                }
            )
    print(json.dumps({"check": "interrupts", "seed": args.seed, "tries": args.tries, "bad": bad}))
    return int(bool(bad))


def commands(work: Path) -> dict[str, list[object]]:
    """Verb -> a command that takes some seconds; makes the files that it reads."""
    (work / "out").mkdir(parents=True, exist_ok=True)
    clips = sorted(DEMO.glob("*.flac"))
    long = work / "long.wav"
    soundfile.write(long, np.concatenate([soundfile.read(clip)[0] for clip in clips]), 16_000)
    manifest = work / "manifest.jsonl"
    rows = [{"id": clip.stem, "audio": str(clip), "text": "a"} for clip in clips]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    conversations = [
        {
            "conversation": [
                {"role": "user", "message_type": "audio", "content": str(clip)},
                {"role": "user", "message_type": "text", "content": "Which?"},
                {"role": "assistant", "message_type": "text", "content": clip.stem},
            ]
        }
        for clip in clips
    ]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations))
    train = [
        "train",
        "--config",
        ROOT / "configs" / "tiny.py",
        "--workdir",
        "{fresh}",
        f"--config.tokenizer={SMALL}",
        f"--config.data.train=('{work / 'rows.jsonl'}',)",
        "--config.model.decoder.vocab_size=4096",
        "--config.train.steps=8",
        "--config.checkpoint.every=2",
        "--config.data.batch=2",
        "--config.data.length=256",
        "--config.data.workers=2",
    ]
    return {
        "demo": ["demo", "--output", "{fresh}.html"],
        "generate": ["generate", "--audio", *clips[:3], "--prompt", "Describe this audio."],
        "transcribe": [
            "transcribe",
            "--audio",
            long,
            "--timestamps",
            "word",
            "--window-seconds",
            6,
        ],
        "convert": ["convert", "--input", SMALL, "--output", "{fresh}", "--format", "official"],
        "world": ["world", "--count", 60, "--output", "{fresh}", "--processes", 2],
        "annotate": ["annotate", "--input", long, "--output", "{fresh}", "--workers", 2],
        "evaluate": [
            "evaluate",
            "infer",
            "--benchmark",
            "asr",
            "--data",
            manifest,
            "--output",
            "{fresh}.jsonl",
        ],
        "train": train,
        "budget": [
            "plan",
            "--config",
            ROOT / "configs" / "tiny.py",
            "--topology",
            "v5e:2x2",
            "--budget",
            f"--config.tokenizer={SMALL}",
        ],
        "plan": [
            "plan",
            "--config",
            ROOT / "configs" / "tiny.py",
            "--topology",
            "v5e:2x2",
            f"--config.tokenizer={SMALL}",
        ],
    }


_fresh = 0


def started(work: Path, name: str, words: list[object]) -> list[str]:
    """The command line of one try; {fresh} becomes a name that no other try has."""
    global _fresh
    _fresh += 1
    fresh = str(work / "out" / f"{name}-{os.getpid()}-{_fresh}")
    words = [str(word).replace("{fresh}", fresh) for word in words]
    return [sys.executable, "-m", "moss_audio_jax.cli", *words]


def interrupted(
    command: list[str], work: Path, moment: float, again: float | None
) -> tuple[int, float, str] | None:
    """(exit code, seconds from signal to end, what is wrong or ""); None: it ended earlier."""
    process = subprocess.Popen(
        command,
        cwd=work,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        pass
    else:
        process.stderr.close()
        return None
    sent = time.time()
    os.killpg(process.pid, signal.SIGINT)
    if again is not None:
        time.sleep(again)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return process.returncode, time.time() - sent, f"still there after {PATIENCE} s"
    seconds = time.time() - sent
    if process.returncode == 0 and seconds < 0.5:
        return None  # the verb was about to end
    wrong = [
        line for line in errors.splitlines() if "Traceback" in line or "Exception ignored" in line
    ]
    if process.returncode != 130 or wrong:
        return process.returncode, seconds, f"stderr ends {errors[-2000:]!r}"
    for _ in range(50):  # waits for processes that end after their parent
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return process.returncode, seconds, ""
        time.sleep(0.1)
    left = subprocess.run(["ps", "-o", "args=", "-g", str(process.pid)], capture_output=True)
    os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, seconds, f"left in its group: {left.stdout.decode()[:500]}"


if __name__ == "__main__":
    sys.exit(main())
