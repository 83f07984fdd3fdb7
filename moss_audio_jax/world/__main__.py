"""Writes synthetic scenes: sound with exact labels, and training rows about it.

example:
  moss-audio-jax world --count 100 --output clips --sheet

Writes DIR/wav/*.wav (16 kHz, 16 bit), DIR/rows.jsonl (rows for fine-tuning), DIR/labels.jsonl (one
scene per line) and, with --sheet, DIR/sheet.html (players, spectrograms, labels, rows). The scene
with a given index, split and seed is always the same. Speech needs an extra:
pip install -e '.[world]'.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, so that Ctrl-C ends those too
    from moss_audio_jax import cli

    cli.run_verb("world")

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from moss_audio_jax import command, files, world

SHEET_SCENES = 24


def main(argv: Sequence[str]) -> int:
    options = command.parser("world", __doc__)
    options.add_argument("--count", type=command.positive, required=True, metavar="N")
    options.add_argument("--output", type=Path, required=True, metavar="DIR")
    options.add_argument("--split", choices=tuple(world.SPLITS), default="train")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--start", type=int, default=0, metavar="I", help="index of the first scene"
    )
    options.add_argument(
        "--content",
        choices=tuple(world.CONTENTS),
        help="what every scene contains; default: it varies",
    )
    options.add_argument(
        "--max-seconds",
        type=float,
        default=world.MAX_SECONDS,
        metavar="S",
        help=f"no scene is longer than this; default {world.MAX_SECONDS:g}",
    )
    options.add_argument(
        "--sheet",
        action="store_true",
        help=f"write a page that plays the first {SHEET_SCENES} scenes",
    )
    options.add_argument(
        "--processes",
        type=command.positive,
        default=os.cpu_count() or 1,
        metavar="N",
        help="default: one per CPU core",
    )
    args = options.parse_args(argv)

    seconds, shown = 0.0, []
    for labels in world.write(
        args.output,
        range(args.start, args.start + args.count),
        args.split,
        args.seed,
        args.content,
        args.max_seconds,
        min(args.processes, args.count),
        progress=sys.stderr.isatty(),
    ):
        seconds += labels["duration"]
        if len(shown) < SHEET_SCENES:
            shown.append(labels)
    command.say(f"{args.count} scene(s), {seconds:.0f} s of sound -> {args.output}")
    if args.sheet:
        from moss_audio_jax.world.sheet import page

        clips = [(args.output / labels["audio"], labels) for labels in shown]
        target = args.output / "sheet.html"
        files.write_whole(target, page(clips))
        command.say(f"listen: {target}")
    return 0
