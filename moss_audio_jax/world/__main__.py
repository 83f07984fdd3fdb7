"""Writes synthetic scenes: sound with exact labels, and training rows about it.

example:
  moss-audio-jax world --count 100 --output clips --sheet

Writes DIR/wav/*.wav (16 kHz, 16 bit), DIR/rows.jsonl (rows for fine-tuning), DIR/labels.jsonl (one
scene per line) and, with --sheet, DIR/sheet.html (players, spectrograms, labels, rows). The scene
with a given index, split and seed is always the same. Speech needs an extra:
pip install -e '.[world]'. With --recordings, voices come from other packages (--sources lists
them): pip install -e '.[ears]'.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, so that Ctrl-C ends those too
    from moss_audio_jax import cli

    cli.run_verb("world")

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from moss_audio_jax import command, files, world
from moss_audio_jax.errors import UsageError

SHEET_SCENES = 24


def main(argv: Sequence[str]) -> int:
    options = command.parser("world", __doc__)
    options.add_argument("--count", type=command.positive, metavar="N")
    options.add_argument("--output", type=Path, metavar="DIR")
    options.add_argument(
        "--recordings",
        action="store_true",
        help="real and recorded voices, from the packages that are here, in place of espeak's",
    )
    options.add_argument(
        "--judged",
        action="store_true",
        help="with --recordings: without lines that a speech recogniser cannot read",
    )
    options.add_argument(
        "--sources",
        action="store_true",
        help="print the sources of recordings, their licences, and which are here",
    )
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
    if args.sources:
        from moss_audio_jax.world.recordings.source import table

        print(table())
        return 0
    if args.count is None or args.output is None:
        raise UsageError("--count N and --output DIR are required (or --sources, alone)")
    if args.judged and not args.recordings:
        raise UsageError("--judged is about --recordings; give both")
    make = world.scene
    if args.recordings:
        from moss_audio_jax.world.recordings.scenes import scene

        make = functools.partial(scene, judged=args.judged)

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
        make_scene=make,
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
