"""Scores the small model on held-out recordings; prints a table and writes WORKDIR/recordings.

    python tools/small/score_recordings.py --workdir small [--checkpoint DIR] [--only prompts rms]

Of voices that no training hears: prompts that a woman read for telephones (also through their
codec), flite's voice rms, and new speakers of kokoro, each clip a line without anything else. And
test scenes of the world of recordings with only sounds, only music, and only speech. A run that was
stopped continues. Needs the extras `ears` and `evaluate`, and Debian's packages (docs/world.md).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from moss_audio_jax import files, world
from moss_audio_jax.annotate.ears import Ears
from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.draw import Draw
from moss_audio_jax.world.recordings import channels, scenes, sentences
from moss_audio_jax.world.recordings.source import Voice, named

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.small.score import misheard, run


class Lines(NamedTuple):
    """A voice's lines: how many, the codec that they go through, and the split of its speakers."""

    voice: str
    count: int
    codec: str | None = None
    split: str = "test"


LINES = {
    "prompts": Lines("asterisk-en", 300),
    "prompts_g722": Lines("asterisk-en", 300, "g722"),
    "rms": Lines("flite", 100),
    "kokoro": Lines("kokoro", 60),
    "trained": Lines("flite", 100, split="train"),  # what rms says, by speakers of the training
}
SCENES = {  # content -> the tasks that are asked
    "sound": "events,any_speech,any_music",
    "music": "instrument,tempo,any_speech,any_music",
    "speech": "asr,any_speech,any_music",
}
FIGURES = (  # (name, set, key of the score's "strict", goal)
    ("WER, recorded prompts, %", "prompts", "wer", "<= 40"),
    ("WER, the same through G.722, %", "prompts_g722", "wer", "<= 40"),
    ("WER, flite rms, %", "rms", "wer", "<= 25"),
    ("WER, new speakers of kokoro, %", "kokoro", "wer", "<= 15"),
    ("WER, scenes of speech, %", "speech", "wer", ""),
    ("event timeline F1, recorded sounds", "sound", "event_f1", ">= 0.6"),
    ("tempo within 5%, %", "music", "tempo_accuracy", ""),
)
BY_TASK = (  # (name, sets, tasks, goal); a row is right if all of a clip's are
    ("instrument of the melody, %", ("music",), ("instrument",), ">= 90"),
    ("speech, music and sounds told apart, %", tuple(SCENES), ("any_speech", "any_music"), ">= 95"),
)


def write_lines(folder: Path, lines: Lines) -> None:
    """Writes FOLDER/wav and FOLDER/rows.jsonl, rows of the benchmark `asr`."""
    voice = named(lines.voice)
    assert isinstance(voice, Voice)
    voice.require()
    speakers = voice.speakers(lines.split)
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(lines.count):
        draw = Draw("line", lines.voice, index)
        speaker = speakers[index % len(speakers)]
        own = voice.texts(speaker, lines.split)
        text = own[index % len(own)] if own else sentences.sentence(draw, "test")[0]
        wav = np.pad(voice.say(text, speaker, draw).wav * 0.5, SAMPLE_RATE // 5)
        if lines.codec:
            wav = channels.coded(wav, lines.codec)
        soundfile.write(folder / "wav" / f"{index:04d}.wav", wav, SAMPLE_RATE)
        rows.append({"id": f"{index:04d}", "audio": f"wav/{index:04d}.wav", "text": text})
    files.write_whole(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def score(name: str, workdir: Path, checkpoint: Path, output: Path, count: int) -> dict:
    """Makes a set if it is not there, asks, and returns the score's dict."""
    data = workdir / f"recordings-{name}"
    if name in LINES:
        if not (data / "rows.jsonl").exists():
            write_lines(data, LINES[name])
        asked = ["--benchmark", "asr", "--data", data / "rows.jsonl"]
    else:
        if not (data / "rows.jsonl").exists():
            made = world.write(
                data, range(count), "test", content=name, max_seconds=12, make_scene=scenes.scene
            )
            for _ in made:
                pass
        asked = ["--benchmark", "world", "--data", data, "--tasks", SCENES[name]]
    answers, scored = output / f"{name}.jsonl", output / f"{name}.json"
    infer = ["--checkpoint", checkpoint, "--max-new-tokens", 256, "--temperature", 0]
    run("moss_audio_jax.evaluate", "infer", *asked, *infer, "--output", answers)
    run("moss_audio_jax.evaluate", "score", *asked, "--predictions", answers, "--output", scored)
    return json.loads(scored.read_text(encoding="utf-8"))


def clips(scored: dict, tasks: tuple[str, ...]) -> list[bool]:
    """Whether all answers of a clip to `tasks` are right, for each clip that has one."""
    right: dict[str, bool] = {}
    for row in scored["rows"]:
        scene, _, task = row["id"].rpartition("/")
        if task.partition("-")[2] in tasks:
            right[scene] = right.get(scene, True) and row["sums"]["open_right"] == 1
    return list(right.values())


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--workdir", type=Path, required=True, metavar="DIR")
    options.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, metavar="DIR")
    options.add_argument("--only", nargs="+", choices=(*LINES, *SCENES), default=(*LINES, *SCENES))
    options.add_argument("--scenes", type=int, default=100, help="of each content")
    options.add_argument("--output", type=Path, help="default WORKDIR/recordings_scores")
    args = options.parse_args()
    output = args.output or args.workdir / "recordings_scores"
    output.mkdir(parents=True, exist_ok=True)
    ask = functools.partial(
        score,
        workdir=args.workdir,
        checkpoint=args.checkpoint,
        output=output,
        count=args.scenes,
    )
    scores = {name: ask(name) for name in args.only}
    print("| metric | result | 95% | goal |\n|---|---|---|---|")
    for what, name, key, goal in FIGURES:
        if name in scores and scores[name]["strict"].get(key) is not None:
            value = scores[name]["strict"][key]
            low, high = scores[name]["confidence"]["strict"][key]
            print(f"| {what} | {value:.3g} | {low:.3g} - {high:.3g} | {goal} |")
    ears = Ears.load(args.checkpoint)
    for name in args.only if "pieces" in ears.has else ():
        if name in LINES:
            folder = args.workdir / f"recordings-{name}"
            lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
            rows = map(json.loads, lines)
            wrong = misheard(ears, [(folder / row["audio"], row["text"]) for row in rows])
            print(f"| characters wrong, CTC head, {name}, % | {wrong:.3g} | | |")
    for what, names, tasks, goal in BY_TASK:
        if set(names) <= scores.keys():
            right = list(itertools.chain(*(clips(scores[name], tasks) for name in names)))
            print(f"| {what} | {100 * np.mean(right):.3g} | {len(right)} clips | {goal} |")


if __name__ == "__main__":
    main()
