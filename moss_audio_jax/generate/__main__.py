"""Asks a model about sound.

example:
  moss-audio-jax generate --checkpoint DIR --audio talk.mp3 --prompt "Describe this audio."

Each file is a separate question; with --together all files are clips of one question. Answers go to
stdout, everything else to stderr.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, so that Ctrl-C ends those too
    from moss_audio_jax import cli

    cli.run_verb("generate")

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moss_audio_jax import command
from moss_audio_jax.errors import UsageError
from moss_audio_jax.files import shown
from moss_audio_jax.generate.options import BATCH_SIZE, Sampling

if TYPE_CHECKING:
    from moss_audio_jax.generate.request import Prepared


def main(argv: Sequence[str]) -> int:
    options = command.parser("generate", __doc__)
    command.add_model_options(options)
    options.add_argument("--audio", nargs="*", default=[], metavar="FILE")
    options.add_argument("--prompt", required=True, metavar="TEXT")
    options.add_argument("--system", metavar="TEXT", help="replaces the default system text")
    options.add_argument("--together", action="store_true", help="all files belong to one prompt")
    options.add_argument(
        "--no-time-markers",
        action="store_true",
        help="leave out the seconds between the audio tokens",
    )
    options.add_argument("--json", action="store_true", help="one JSON object a line")
    options.add_argument("--stream", action="store_true", help="print text as it is generated")
    options.add_argument("--batch-size", type=command.positive, default=BATCH_SIZE, metavar="N")
    sampling_options(options)
    args = options.parse_args(argv)

    from moss_audio_jax.api import Request, Stream

    groups = [args.audio] if args.together or not args.audio else [[file] for file in args.audio]
    if args.stream and (len(groups) > 1 or args.json):
        raise UsageError("--stream is for one question and plain text")
    sampling = sampling_from(args)
    wrong = command.look(args.audio)
    for line in wrong.values():
        command.say(line)
    asked = [group for group in groups if not wrong.keys() & set(group)]
    if not asked:
        return 1
    model = command.load_model(args)
    markers = False if args.no_time_markers else None

    def prepare(group: Sequence[str]) -> list[Prepared]:
        return [model.prepare(Request(args.prompt, group, sampling, args.system, markers))]

    started = time.perf_counter()
    answers, frames, progress = 0, 0, sys.stderr.isatty()
    for share in command.shares(asked, prepare, args.batch_size, progress):
        prompts = [prompt for _, (prompt,) in share]
        if args.stream:
            stream = Stream(model, prompts[0])
            for piece in stream:
                print(piece, end="", flush=True)
            print()
            _explain(stream.reply, share[0][0])
            return 0
        replies = model.answer(prompts, args.batch_size, progress)
        for (group, _), prompt, reply in zip(share, prompts, replies, strict=True):
            answers += 1
            frames += sum(mel.shape[1] for mel in prompt.mels)
            if args.json:
                _warn(reply, group)
                row: dict[str, Any] = {"audio": group, "prompt": args.prompt}
                row |= dataclasses.asdict(reply)
                del row["logprobs"], row["heard"]  # no option asks for them
                row |= {"n_prompt_tokens": len(prompt.ids), "n_output_tokens": len(reply.ids)}
                row |= {"random_weights": model.random_weights}
                print(json.dumps(row, ensure_ascii=not command.writes_unicode()))
                continue
            if len(groups) > 1:
                print(f"== {shown(group[0])}")
            if reply.thinking:
                command.say(f"(thinking) {reply.thinking}")
            print(reply.text)
            if model.random_weights:
                print("(random weights: this answer is noise)")
            _explain(reply, group)
        sys.stdout.flush()
    if answers:
        seconds = time.perf_counter() - started
        command.say(f"{frames / 100:.1f} s of audio, {answers} answer(s), {seconds:.1f} s")
    return 0 if answers == len(groups) else 1


def sampling_options(options: argparse.ArgumentParser) -> None:
    """One option for each field of `Sampling` that fits on a command line, with its default."""
    group = options.add_argument_group("sampling")
    group.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"default {Sampling.max_new_tokens}"
    )
    group.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="default 0: always take the most likely token",
    )
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--repetition-penalty", type=float, metavar="R")
    group.add_argument("--seed", type=int)
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end the answer before this text; may be repeated",
    )
    group.add_argument(
        "--thinking-budget", type=int, metavar="N", help="close a <think> block after N tokens"
    )
    group.add_argument(
        "--no-loop-guard",
        dest="loop_guard",
        action="store_false",
        help="do not end an answer that repeats itself",
    )
    group.add_argument(
        "--drafts", action="store_true", help="guess tokens ahead; the answer stays the same"
    )
    options.set_defaults(
        **{
            name: list(value) if name == "stop" else value
            for name, value in dataclasses.asdict(Sampling()).items()
        }
    )


def sampling_from(args: argparse.Namespace) -> Sampling:
    """The `Sampling` of parsed `sampling_options`."""
    return Sampling.of(vars(args))


def _warn(reply: Any, group: Sequence[str]) -> None:
    """Says what a reader should know of the sound; with several files a warning names its clip."""
    command.warn(reply.warnings, group[0] if len(group) == 1 else None)


def _explain(reply: Any, group: Sequence[str]) -> None:
    _warn(reply, group)
    if reply.finish_reason == "loop":
        command.say(
            "note: the answer repeated itself and was ended (--no-loop-guard turns this off)"
        )
    elif reply.finish_reason == "length":
        command.say("note: the answer reached --max-new-tokens and may be cut short")
