"""Generated tokens a second: ours beside the official PyTorch code, same weights, same prompts.

    OMP_NUM_THREADS=1 taskset -c 0 python tools/bench/generate.py [--official DIR] [--rounds 5]
    python tools/bench/generate.py --checkpoint DIR --data SCENES [--tasks asr,asr_words] [--drafts]
    python tools/bench/generate.py --prefix 8 [--seconds 30] [--tokens 64] [--checkpoint DIR]

The model of tools/bench/train.py (50 million parameters, float32, random weights) or --checkpoint;
noise clips of 4 to 8 s; --tokens greedy tokens for each of 16 prompts. Ours answers them one by one
and all at once; the official code (DIR: a clone of its repository) knows one prompt at a time. Each
round times all of them in turn, prefill and encoder included; the first answers are not timed. The
tokens are compared: `same` counts the answers that equal the official ones, in the layout of the
encoder's attention that DIR computes ("full" in the public code). Seconds are processor time of all
threads; bind the process to one core as above. --clock wall takes the wall clock, and needs an idle
machine.

Measures both layouts unless --encoder-attention names one, and prints one JSON line for each:
median tokens a second and range over the rounds, `ratio` of ours to theirs, and `batch_gain`, of 16
at once to one by one. --data and --prefix measure one layout, chunked by default.

--data SCENES: instead of noise the clips of a folder that `moss-audio-jax world` wrote, asked what
--tasks names; answers end by themselves, after 768 tokens at the latest.

--drafts: measures answers with drafts, one by one, instead of 16 at once: `drafting` while they
pay, as users have it, and `always`. `passes` counts the runs of the decoder after prefill, with
drafts or without, `gain` is in seconds to one by one, prefill and encoder included, and `same`
counts the answers that equal those without drafts.

--prefix N: instead, N questions about one clip of noise of --seconds, all at once: `shared`, as
they are, and `apart`, where the clip of each differs by one last bit, so that none is recognised as
another's. One JSON line: median seconds for all N answers and range over the rounds, `gain`, the
median ratio of apart to shared, and `same`, how many answers are equal.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import operator
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moss_audio_jax import command
from moss_audio_jax.api import MossAudio, Prepared, Request
from moss_audio_jax.data.batch import Example
from moss_audio_jax.generate import drafts, engine
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.text import build_prompt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench.train import CLOCKS, PROMPT, STRIPS, write_inputs

COUNT = 16


def prompts(model: MossAudio) -> list[Example]:
    """Noise of 4 to 8 s and one question."""
    rng = np.random.default_rng(0)
    made = []
    for frames in rng.integers(400, 800, COUNT):
        mel = rng.normal(size=(128, frames)).astype(np.float32).clip(-2, 2) / 2
        ids = build_prompt(model.tokenizer, PROMPT, [int(frames)], model.processor.time_markers)
        made.append(Example(ids, (mel,)))
    return made


def scenes(model: MossAudio, folder: Path, tasks: Sequence[str]) -> list[Example]:
    """What is asked of scenes; questions about one clip share its log-mel."""
    made, clips = [], {}
    for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["task"] in tasks:
            clip, question = (message["content"] for message in row["conversation"][:2])
            example = model.prepare(Request(question, (str(folder / clip),)))
            made.append(Example(example.ids, clips.setdefault(clip, example.mels)))
    return made


class Official:
    """The official model and its `generate`, one prompt at a time."""

    def __init__(self, source: Path, checkpoint: Path, audio_token_id: int):
        import torch

        sys.path.insert(0, str(source))
        from src.modeling_moss_audio import MossAudioConfig, MossAudioModel

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        config = MossAudioConfig.from_pretrained(checkpoint)
        for part in (config, config.language_config):
            part._attn_implementation = "sdpa"
        self._model = MossAudioModel.from_pretrained(
            checkpoint, config=config, dtype=torch.float32
        ).eval()
        self._torch, self._audio = torch, audio_token_id

    def answer(self, example: Example, tokens: int) -> list[int]:
        torch = self._torch
        ids = torch.as_tensor(np.asarray(example.ids))[None].long()
        mel = torch.as_tensor(np.asarray(example.mels[0]))[None]
        with torch.no_grad():
            out = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                audio_data=mel,
                audio_data_seqlens=torch.tensor([mel.shape[-1]]),
                audio_input_mask=ids == self._audio,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
            )
        return out[0, ids.shape[1] :].tolist()


def checkpoint_of(folder: Path, args: argparse.Namespace) -> Path:
    if args.checkpoint is not None:
        return args.checkpoint
    write_inputs(folder, 4)
    return folder / "checkpoint"


def measure(folder: Path, args: argparse.Namespace, layout: str) -> dict[str, Any]:
    checkpoint, clock = checkpoint_of(folder, args), CLOCKS[args.clock]
    model = MossAudio.load(checkpoint, "float32", encoder_attention=layout)
    if args.data:
        examples, sampling = scenes(model, args.data, args.tasks.split(",")), Sampling(768)
    else:
        examples, sampling = prompts(model), Sampling(args.tokens, loop_guard=False)
    asked = [Prepared(e.ids, e.mels, sampling=sampling) for e in examples]
    ways = {
        "ours, one by one": lambda: [model.answer([each], 1)[0].ids for each in asked],
        "ours, 16 at once": lambda: [reply.ids for reply in model.answer(asked, COUNT)],
    }
    if args.official:
        official = Official(Path(args.official), checkpoint, model.processor.audio_token_id)
        ways["official"] = lambda: [official.answer(e, args.tokens) for e in asked]
    counted = Counted()
    if args.drafts:
        del ways["ours, 16 at once"]
        ready = dataclasses.replace(sampling, drafts=True)
        eager = [dataclasses.replace(each, sampling=ready) for each in asked]
        for name in ("drafting", "always"):
            ways[name] = functools.partial(counted.answers, model, eager, name == "always")
    answers = {name: way() for name, way in ways.items()}  # compiles
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            model.forget()
            start = clock()
            tokens = sum(map(len, way()))
            speeds[name].append(tokens / (clock() - start))
    one = speeds["ours, one by one"]
    result: dict[str, Any] = {
        "clock": args.clock,
        "cores": len(os.sched_getaffinity(0)),
        "tokens": args.tokens,
        "encoder_attention": layout,
    }
    if many := speeds.get("ours, 16 at once"):
        gains = (b / a for a, b in zip(one, many, strict=True))
        result["batch_gain"] = round(statistics.median(gains), 2)
    for name, found in speeds.items():
        result[name] = {
            "answers": len(asked),
            "tokens_per_second": round(statistics.median(found), 1),
            "range": [round(min(found), 1), round(max(found), 1)],
        }
        if args.official and name != "official":
            pairs = zip(found, speeds["official"], strict=True)
            result[name]["ratio"] = round(statistics.median(a / b for a, b in pairs), 2)
            same = zip(answers[name], answers["official"], strict=True)
            result[name]["same"] = sum(a == b for a, b in same)
    for name in ("drafting", "always") if args.drafts else ():
        pairs = zip(speeds[name], one, strict=True)
        result[name]["gain"] = round(statistics.median(a / b for a, b in pairs), 2)
        plain = answers["ours, one by one"]
        result[name]["same"] = sum(map(operator.eq, answers[name], plain))
        result[name]["tokens"] = sum(map(len, plain))
        result[name]["passes"] = counted.passes[name == "always"]
    return result


class Counted:
    """Answers one by one with drafts, and how many passes of the decoder the last of them took."""

    def __init__(self) -> None:
        self.passes = {}

    def answers(self, model: MossAudio, asked: Sequence[Prepared], always: bool) -> list[list[int]]:
        passes, saved = [], (engine.draft_until, engine.decode_until, drafts.Pace.next)

        def draft_until(*args, **static):
            state, made = saved[0](*args, **static)
            passes.append(int(made))
            return state, made

        def decode_until(params, state, *args, **static):
            before = int(state.answers.position[0])
            state = saved[1](params, state, *args, **static)
            passes.append(int(state.answers.position[0]) - before)
            return state

        engine.draft_until, engine.decode_until = draft_until, decode_until
        if always:
            drafts.Pace.next = lambda self, limit: (drafts.WIDTH, limit)
        try:
            found = [model.answer([each], 1)[0].ids for each in asked]
        finally:
            engine.draft_until, engine.decode_until, drafts.Pace.next = saved
        self.passes[always] = sum(passes)
        return found


def measure_prefix(folder: Path, args: argparse.Namespace, layout: str) -> dict[str, Any]:
    model = MossAudio.load(checkpoint_of(folder, args), "float32", encoder_attention=layout)
    clock = CLOCKS[args.clock]
    sampling = Sampling(args.tokens, loop_guard=False)
    frames = round(100 * args.seconds)
    mel = np.random.default_rng(0).normal(size=(128, frames)).astype(np.float32).clip(-2, 2) / 2
    asked: dict[str, list[Prepared]] = {"shared": [], "apart": []}
    for number in range(args.prefix):
        question = f"{PROMPT} Part {number + 1}."
        ids = build_prompt(model.tokenizer, question, [frames], model.processor.time_markers)
        other = mel.copy()
        other.flat[number] = np.nextafter(other.flat[number], np.float32(1))
        asked["shared"].append(Prepared(ids, (mel,), sampling=sampling))
        asked["apart"].append(Prepared(ids, (other,), sampling=sampling))

    def answers(name: str) -> list[list[int]]:
        return [reply.ids for reply in model.answer(asked[name], args.prefix)]

    same = zip(answers("shared"), answers("apart"), strict=True)  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(args.rounds):
        for name in asked:
            model.forget()
            start = clock()
            answers(name)
            seconds[name].append(clock() - start)
    pairs = zip(seconds["apart"], seconds["shared"], strict=True)
    result: dict[str, Any] = {
        "clock": args.clock,
        "cores": len(os.sched_getaffinity(0)),
        "encoder_attention": layout,
        "questions": args.prefix,
        "seconds_of_sound": args.seconds,
        "prompt_tokens": len(asked["shared"][0].ids),
        "tokens": args.tokens,
        "gain": round(statistics.median(a / b for a, b in pairs), 2),
        "same": sum(a == b for a, b in same),
    }
    for name, found in seconds.items():
        result[name] = {
            "seconds": round(statistics.median(found), 3),
            "range": [round(min(found), 3), round(max(found), 3)],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--official", metavar="DIR", help="clone of the official repository")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--data", type=Path, metavar="SCENES")
    parser.add_argument("--tasks", default="asr,asr_words")
    parser.add_argument("--drafts", action="store_true", help="also with drafts")
    parser.add_argument("--prefix", type=int, metavar="N", help="questions about one clip")
    parser.add_argument("--seconds", type=float, default=30, help="of that clip")
    parser.add_argument("--encoder-attention", choices=STRIPS, help="one layout instead of both")
    parser.add_argument("--clock", choices=CLOCKS, default="processor")
    args = parser.parse_args()
    if args.official and args.data:
        parser.error("--official answers noise: its answers have --tokens tokens each")
    command.keep_memory()  # as the verbs do
    way = measure_prefix if args.prefix else measure
    both = not (args.encoder_attention or args.data or args.prefix)
    for layout in STRIPS if both else [args.encoder_attention or next(iter(STRIPS))]:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(way(Path(folder), args, layout)), flush=True)


if __name__ == "__main__":
    main()
