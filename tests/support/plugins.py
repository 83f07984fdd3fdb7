"""Plug-ins as users write them: correct ones, and one for each kind of failure."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def transcribe(request):
    return {"text": "hello there my friend", "language": "en"}


def mishear(request):
    return {"text": "nothing of the kind at all", "language": "en"}


def align(request):
    words = request["evidence"]["text"].split()
    step = request["duration"] / (len(words) + 1)
    return {
        "words": [
            {"text": w, "start": step * (i + 0.3), "end": step * (i + 1)}
            for i, w in enumerate(words)
        ]
    }


def diarise(request):
    """Two speakers, one after the other."""
    middle = request["duration"] / 2
    return {
        "turns": [
            {"speaker": "B", "start": middle, "end": request["duration"]},
            {"speaker": "A", "start": 0.0, "end": middle},
        ]
    }


def _world_words(request):
    """The words of the scene's labels whose middle lies within the segment."""
    labels = json.loads(Path(request["audio"]).with_suffix(".json").read_text())
    words = [word for sentence in labels["sentences"] for word in sentence["words"]]
    inside = [w for w in words if request["start"] <= (w["start"] + w["end"]) / 2 < request["end"]]
    return inside, labels["language"]


def world_transcribe(request):
    words, language = _world_words(request)
    gap = "" if language == "zh" else " "
    return {"text": gap.join(word["text"] for word in words), "language": language}


def world_align(request):
    start, seconds = request["start"], request["duration"]
    return {
        "words": [
            {
                "text": word["text"],
                "start": max(word["start"] - start, 0),
                "end": min(word["end"] - start, seconds),
            }
            for word in _world_words(request)[0]
        ]
    }


def gong(request):
    return {"events": [{"label": "gong", "start": 0.1, "end": min(1.0, request["duration"])}]}


def write(request):
    """A language model that follows its instructions: every fact once, times as placeholders."""
    told = []
    for fact in request["evidence"]["facts"]:
        what = f'"{fact["said"]}" is heard' if "said" in fact else fact["what"].rstrip(".")
        told.append(f"at {fact['slot']} {what}")
    return {"text": "In this clip, " + "; ".join(told) + "."}


def slow(request):
    """Reports that it runs, and waits until it is released."""
    Path(os.environ["SLOW_AT"]).write_text(request["clip"])
    while not Path(os.environ["SLOW_GO"]).exists():
        time.sleep(0.05)
    return transcribe(request)


def _event(label="dog barking", start=0.1, end=0.2, **more):
    return {"label": label, "start": start, "end": end, **more}


class _Text(str):
    pass


class _Mine(dict):
    def get(self, key, default=None):
        raise LookupError("mine")


def _nested():
    value = []
    for _ in range(100_000):
        value = [value]
    return value


HUGE = 10**400
LONG = "word " * 100_000
BAD_ANYWHERE = (
    None,
    7,
    "text",
    [],
    {},
    {"text": None},
    {"events": "none"},
    {"words": {}},
    _Mine(text="a"),
    {"text": _nested(), "events": _nested(), "words": _nested(), "score": _nested()},
)
BAD = {
    "transcribe": (
        {"text": LONG},
        {"text": 5},
        {"text": "a\ud800b"},
        {"text": "a", "language": 1},
        {"text": "a", "language": "x" * 99},
        {"text": "a", "language": "\ud800"},
    ),
    "align": (
        {"words": [{"text": "hello", "start": 0, "end": 0.1}]},  # not all of them
        {"words": [{"text": "hello", "start": -3, "end": 1}]},
        {"words": [{"text": "hello", "start": float("nan"), "end": 1}]},
        {"words": [{"text": w, "start": 90 - i, "end": 91} for i, w in enumerate("abcd")]},
    ),
    "diarise": (
        {"turns": []},
        {"turns": [{"speaker": 1, "start": 0, "end": 0.1}]},
        {"turns": [{"speaker": "A", "start": 0.5, "end": 0.1}]},
        {"turns": [{"speaker": "A", "start": 0, "end": 1e9}]},
        {"turns": [{"speaker": "x" * 99, "start": 0, "end": 0.1}]},
        {"turns": [{"speaker": "a\x00", "start": 0, "end": 0.1}]},
        {"turns": [{"speaker": "A", "start": 0, "end": 0.1}] * 100_000},
    ),
    "events": (
        {"events": [_event(start=-5)]},
        {"events": [_event(end=1e9)]},
        {"events": [_event(start=0.5, end=0.1)]},
        {"events": [_event(start="0.1")]},
        {"events": [_event(start=True)]},
        {"events": [_event(label="")]},
        {"events": [_event(label="3.20 - 4.10")]},
        {"events": [_event(label='say "this"')]},
        {"events": [_event(score=7)]},
        {"events": [_event()] * 1_000_000},
        {"events": [_event(end=HUGE)]},
        {"events": [_event(start=-HUGE)]},
        {"events": [_event(score=HUGE)]},
        {"events": [_event(start=float("-inf"), end=float("inf"))]},
        {"events": [_event(label="a\ud800")]},
        {"events": [_event(label="a\x00")]},
        {"events": [_nested()]},
        {"events": [_Mine(_event())]},
    ),
    "music": (
        {"tempo": 1e6},
        {"tempo": HUGE},
        {"tempo": float("nan")},
        {"key": "H dur moll"},
        {"instruments": ["x" * 999]},
        {"lyrics": LONG},
    ),
    "caption": (
        {"text": ""},
        {"text": LONG},
        {"text": "A dragon roars from 1.00 to 99.00 s."},
        {"text": "A siren wails at [1]."},
        {"text": "Something is heard at [1] [2] [3] [4] [5] [6] [7] [8] [999]."},
        {"text": 'A man says "never said" while it rains at [1].'},
        {"text": "It happens."},
        {"text": _Text("{}")},
    ),
    "judge": ({"score": 0}, {"score": "good"}, {"score": True}, {"score": HUGE}),
}
BAD["unify"] = BAD["caption"]


def bad(request):
    """A different fault for each request; every ninth time an exception."""
    faults = [*BAD[request["step"]], *BAD_ANYWHERE]
    number = sum(request["clip"].encode()) + request["id"]
    if number % 9 == 0:
        raise RuntimeError("out of memory\non the device")
    if number % 9 == 4:
        sys.exit("no licence")
    return faults[number % len(faults)]
