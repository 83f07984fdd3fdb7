"""Clips of known events with a detector's posteriors beside them, and runs over them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile

from moss_audio_jax import world
from moss_audio_jax.annotate import defaults, merge, pipeline, source, tasks
from moss_audio_jax.annotate.record import SCHEMA, schema_problems
from moss_audio_jax.text.labels import KINDS

RATE, FPS = 16_000, 50.0
VOICE = ("hello", "there", "my", "friend")


def write_clip(folder: Path, name: str, seed: int, voice: bool = True) -> dict:
    """NAME.wav, two world scenes and then a buzzing "voice"; NAME.npz, what a detector would say.

    Returns {"events": [{"label", "start", "end"}], "voice": (start, end) or None, "seconds"}.
    """
    parts, events, at = [], [], 0.0
    for i in range(2):
        made = world.scene(2 * seed + i, content="sound", max_seconds=6)
        parts.append(made.wav)
        events += [
            {"label": KINDS[e["kind"]].label, "start": at + e["start"], "end": at + e["end"]}
            for e in made.labels["events"]
        ]
        at += len(made.wav) / RATE
    spoken = None
    if voice:
        t = np.arange(2 * RATE) / RATE
        pulses = sum(np.sin(2 * np.pi * 130 * h * t) / h for h in range(1, 20))
        parts.append((0.1 * pulses * (1 + np.sin(2 * np.pi * 4 * t))).astype(np.float32))
        spoken = (at, at + 2.0)
        at += 2.0
    wav = np.concatenate([*parts, np.zeros(RATE // 2, np.float32)])
    seconds = len(wav) / RATE
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / f"{name}.wav", wav, RATE)
    labels = [*(kind.label for kind in KINDS.values()), "speech"]
    frames = np.zeros((round(seconds * FPS), len(labels)), np.float32)
    voices = [{"label": "speech", "start": spoken[0], "end": spoken[1]}] if spoken else []
    for event in [*events, *voices]:
        first, last = round(event["start"] * FPS), round(event["end"] * FPS)
        frames[first:last, labels.index(event["label"])] = 0.9
    np.savez(folder / f"{name}.npz", frames=frames, fps=FPS, labels=np.array(labels))
    return {"events": events, "voice": spoken, "seconds": seconds}


def config(**keys):
    """Settings without the small model: posteriors from the files, words from `plugins`."""
    c = defaults.get_config()
    c.checkpoint = ""
    c.posteriors = "{folder}/{stem}.npz"
    categories = {kind.label: kind.category for kind in KINDS.values()}
    categories = {k: v if v != "human sound" else "sounds of things" for k, v in categories.items()}
    c.classes = tuple({**categories, "speech": "speech"}.items())
    expert("one", "plugins:transcribe", c)
    expert("two", "plugins:transcribe", c)
    expert("words", "plugins:align", c)
    c.speech.systems = ("one", "two")
    c.speech.align = "words"
    for key, value in keys.items():
        part, _, name = key.rpartition("__")
        (c[part] if part else c)[name] = value
    return c


def expert(name: str, target, c, kind: str = "entry_point", **more) -> None:
    c.experts[name] = {"kind": kind, "target": target, **more}


def run(folder: Path, out: Path, c=None, shard=(0, 1), workers: int = 1):
    c = config() if c is None else c
    defaults.check(c)
    sources = source.sharded(source.find(folder), shard)
    return pipeline.annotate(sources, out, c, shard=shard, workers=workers)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def files(out: Path) -> dict[str, bytes]:
    """All files that a run wrote, by their path in OUT."""
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}


def checked(out: Path) -> tuple[list[dict], list[dict]]:
    """(records, rows) of a run, all of which pass the checkers."""
    records, rows = lines(out / "segments.jsonl"), lines(out / "rows.jsonl")
    by_clip = {record["clip"]: record for record in records}
    for record in records:
        assert schema_problems(record, SCHEMA) == []
        assert merge.check(record) == []
        assert (out / record["clip"]).is_file()
    for row in rows:
        clip = row["conversation"][0]["content"]
        assert tasks.check_row(row, by_clip[clip]) == [], row
    return records, rows
