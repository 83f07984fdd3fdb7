"""Annotates raw audio: what is heard when, captions and training rows.

example:
  moss-audio-jax annotate --input recordings --output annotated

Files are cut where one event ends and another begins. Each segment gets a profile of nine classes,
transcripts (if two systems agree) with times of words, speakers, music, events and captions. OUT
holds segments.jsonl (the records, docs/annotate.md), rows.jsonl (training rows; if --output ends in
.jsonl, they are written to that file), dropped.jsonl (what was left out, and why) and index.html.
--config FILE plugs in stronger models (configs/annotate.py is an example); --config.KEY=VALUE
overrides one of its keys. To continue an interrupted run, run the same command again. Needs an
extra: pip install -e '.[annotate]'.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, so that Ctrl-C ends those too
    from moss_audio_jax import cli

    cli.run_verb("annotate")

import sys
from collections.abc import Sequence

from moss_audio_jax import command
from moss_audio_jax.buckets import as_path
from moss_audio_jax.errors import UsageError
from moss_audio_jax.files import shown
from moss_audio_jax.remote import redact


def main(argv: Sequence[str]) -> int:
    options = command.parser("annotate", __doc__)
    options.add_argument(
        "--input",
        required=True,
        metavar="DIR|MANIFEST",
        help="a folder, a .txt, .jsonl or .csv that names files, or one file",
    )
    options.add_argument(
        "--output",
        required=True,
        type=as_path,
        metavar="OUT",
        help="a folder, or FILE.jsonl in it for the rows",
    )
    options.add_argument("--config", metavar="FILE", help="default: the built-in experts")
    options.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="I/N: every N-th file from the I-th on; without it, the same command joins the shards",
    )
    options.add_argument(
        "--workers",
        type=command.positive,
        default=1,
        metavar="N",
        help="number of processes; default 1 (one process can use several cores)",
    )
    options.add_argument(
        "--keep-doubtful",
        action="store_true",
        help="keep rows from the small model even if it does not know the sound",
    )
    args, rest = options.parse_known_args(argv)

    from moss_audio_jax.annotate import defaults, pipeline, source

    shard = source.read_shard(args.shard)
    config = defaults.load(args.config, rest)
    config.rows.keep_doubtful |= args.keep_doubtful
    out, rows_name = args.output, "rows.jsonl"
    if out.suffix == ".jsonl":
        out, rows_name = out.parent, out.name
        if rows_name in ("segments.jsonl", "dropped.jsonl"):
            raise UsageError(f"--output {args.output}: another file of the run has this name")
    for name in pipeline.outputs(rows_name, shard):
        command.distinct(out / name, args.input)
    command.distinct(out, args.input)
    found = source.sharded(source.find(args.input, out), shard)
    if config.checkpoint == defaults.BUNDLED:
        command.say(command.SMALL_MODEL)
    summary = pipeline.annotate(
        found,
        out,
        config,
        rows_name,
        shard,
        args.workers,
        progress=sys.stderr.isatty(),
    )
    for path, why in summary.failed:
        command.say(f"error: {shown(redact(path))}: {why}")
    for warning in summary.warnings:
        command.say(f"warning: {warning}")
    for reason, count in summary.dropped.most_common():
        command.say(f"{count:7d}  {reason}")
    command.say(
        f"{summary.sources - len(summary.failed)} of {summary.sources} file(s), "
        f"{summary.seconds:.0f} s, {summary.segments} segment(s), {summary.rows} row(s) -> "
        f"{shown(args.output)}"
    )
    return 1 if summary.failed else 0
