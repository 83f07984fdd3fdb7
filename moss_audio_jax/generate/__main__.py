"""Asks a model about sound.

example:
  moss-audio-jax generate --checkpoint DIR --audio talk.mp3 --prompt "Describe this audio."

Each file is a question of its own; with --together all of them are clips of one question. The
answer goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from moss_audio_jax import command
from moss_audio_jax.errors import UsageError


def main(argv: Sequence[str]) -> int:
    options = command.parser("generate", __doc__)
    command.add_model_options(options)
    options.add_argument("--audio", nargs="*", default=[], metavar="FILE")
    options.add_argument("--prompt", required=True, metavar="TEXT")
    options.add_argument("--system", metavar="TEXT", help="replaces the default system text")
    options.add_argument("--together", action="store_true", help="all files in one prompt")
    options.add_argument("--no-time-markers", action="store_true",
                         help="no seconds between the audio tokens")  # fmt: skip
    options.add_argument("--json", action="store_true", help="one JSON object a line")
    options.add_argument("--stream", action="store_true", help="print text as it comes")
    options.add_argument("--batch-size", type=command.positive, default=8, metavar="N")
    sampling_options(options)
    args = options.parse_args(argv)

    from moss_audio_jax.api import Request

    groups = [args.audio] if args.together or not args.audio else [[file] for file in args.audio]
    if args.stream and (len(groups) > 1 or args.json):
        raise UsageError("--stream is for one question and plain text")
    sampling = sampling_from(args)
    model = command.load_model(args)
    requests = [
        Request(args.prompt, audio, sampling, args.system, False if args.no_time_markers else None)
        for audio in groups
    ]
    if args.stream:
        request = requests[0]
        reply = model.generate(
            request.text,
            request.audio,
            system=request.system,
            time_markers=request.time_markers,
            on_text=lambda piece: print(piece, end="", flush=True),
            **dataclasses.asdict(sampling),
        )
        print()
        _explain(reply)
        return 0

    prompts, failed = command.collect(requests, model.prepare)
    asked = [i for i, prompt in enumerate(prompts) if prompt is not None]
    started = time.perf_counter()
    replies = model.answer(
        [(prompts[i], sampling) for i in asked],
        batch_size=args.batch_size,
        progress=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - started
    for i, reply in zip(asked, replies, strict=True):
        if args.json:
            row: dict[str, Any] = {"audio": groups[i], "prompt": args.prompt}
            row |= dataclasses.asdict(reply)
            row |= {"n_prompt_tokens": len(prompts[i].ids), "n_output_tokens": len(reply.ids)}
            print(json.dumps(row | {"random_weights": model.random_weights}, ensure_ascii=False))
            continue
        if len(groups) > 1:
            print(f"== {groups[i][0]}")
        if reply.thinking:
            command.say(f"(thinking) {reply.thinking}")
        print(reply.text)
        if model.random_weights:
            print("(random weights: this answer is noise)")
        _explain(reply)
    if asked:
        audio_seconds = sum(mel.shape[1] for i in asked for mel in prompts[i].mels) / 100
        command.say(f"{audio_seconds:.1f} s of audio, {len(asked)} answer(s), {seconds:.1f} s")
    return 1 if failed else 0


def sampling_options(options: argparse.ArgumentParser) -> None:
    """One option for each field of `Sampling` that fits on a command line; greedy by default."""
    group = options.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, default=1024, metavar="N")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T",
                       help="default 0: always the most likely token")  # fmt: skip
    group.add_argument("--top-k", type=int, default=0, metavar="K")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--stop", action="append", default=[], metavar="TEXT",
                       help="end the answer before this text; may be given again")  # fmt: skip
    group.add_argument("--thinking-budget", type=int, metavar="N",
                       help="close a <think> block after N tokens")  # fmt: skip
    group.add_argument("--no-loop-guard", dest="loop_guard", action="store_false",
                       help="let an answer repeat itself to the end")  # fmt: skip


def sampling_from(args: argparse.Namespace) -> Any:
    """The `Sampling` of parsed `sampling_options`."""
    from moss_audio_jax.generate.sampling import Sampling

    given = vars(args) | {"stop": tuple(args.stop)}
    names = {field.name for field in dataclasses.fields(Sampling)}
    return Sampling(**{name: value for name, value in given.items() if name in names})


def _explain(reply: Any) -> None:
    if reply.finish_reason == "loop":
        command.say(
            "note: the answer went round in circles and was ended (--no-loop-guard lets it)"
        )
    elif reply.finish_reason == "length":
        command.say("note: the answer reached --max-new-tokens and may be cut short")


if __name__ == "__main__":
    sys.exit(command.run(main))
