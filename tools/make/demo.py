"""Writes the clips and questions of `moss-audio-jax demo`: NAME.flac and demo.json.

    python tools/make/demo.py [FOLDER]

FOLDER is moss_audio_jax/assets/demo/ by default. The clips are five scenes of the split "test" of
`world`; no training set contains their sentences or seeds. They were chosen because they are short
and different, before any model was asked. Needs the extra `world`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from moss_audio_jax import world
from moss_audio_jax.audio.lengths import SAMPLE_RATE

TARGET = Path(__file__).parents[2] / "moss_audio_jax" / "assets" / "demo"
SPLIT = "test"
# name -> index, and the task for each kind of question (the first row of a task is used)
CLIPS = {
    "two_people": (19, {"time": "time_what", "reason": "reason_faster"}),
    "cow_drill_laser": (22, {"time": "time_when", "reason": "reason_gap"}),
    "trumpet_band": (34, {"time": "time_when", "reason": "reason_beat"}),
    "speech_and_applause": (51, {"time": "time_when", "reason": "reason_word"}),
    "all_at_once": (54, {"time": "time_what", "reason": "reason_more"}),
}
BULKY = ("notes", "chords", "beats", "phones")


def make(name: str) -> tuple[np.ndarray, dict[str, Any]]:
    """A clip: float32 [n] at 16 kHz, and its entry in demo.json."""
    index, tasks = CLIPS[name]
    scene = world.scene(index, SPLIT)
    labels = _without_bulky(scene.labels)
    rows = world.rows(scene.labels, f"{name}.flac")
    words = "asr_words" if labels["sentences"] else "asr"
    tasks = {"caption": "caption", "words": words, "events": "events"} | tasks
    questions = []
    for kind, task in tasks.items():
        row = next(row for row in rows if row["task"] == task)
        _, prompt, answer = (message["content"] for message in row["conversation"])
        questions.append({"kind": kind, "task": task, "prompt": prompt, "answer": answer})
    return scene.wav, {"name": name, "labels": labels, "questions": questions}


def _without_bulky(labels: Any) -> Any:
    if isinstance(labels, list):
        return [_without_bulky(item) for item in labels]
    if isinstance(labels, dict):
        return {k: _without_bulky(item) for k, item in labels.items() if k not in BULKY}
    return labels


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    folder.mkdir(parents=True, exist_ok=True)
    clips = []
    for name in CLIPS:
        wav, described = make(name)
        pcm = (wav * 32768).astype(np.int16)  # exact: scenes are rounded to 16 bits
        soundfile.write(folder / f"{name}.flac", pcm, SAMPLE_RATE, "PCM_16", compression_level=1.0)
        clips.append(described)
    text = json.dumps({"clips": clips}, ensure_ascii=False, indent=1)
    (folder / "demo.json").write_text(text + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir())
    seconds = sum(clip["labels"]["duration"] for clip in clips)
    print(f"{folder}: {len(clips)} clips, {seconds:.1f} s, {size} bytes")


if __name__ == "__main__":
    main()
