"""Makes a page from score files: tables beside published figures, and all answers with audio.

example:
  moss-audio-jax evaluate report --scores mmau.json mmar.json asr.json --output report.html \\
      --markdown report.md

The HTML file needs no other files, except audio that is linked instead of embedded. Score files of
several models and benchmarks may be mixed. A model's name comes from --names or from its
predictions.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from moss_audio_jax import command
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.evaluate.report_page import AnswersSection, page
from moss_audio_jax.evaluate.report_tables import (
    Cell,
    Score,
    Section,
    labelled,
    origins,
    read_score,
    sections,
)
from moss_audio_jax.files import check_target, shown, write_whole
from moss_audio_jax.runtime import code_version

TITLE = "MOSS-Audio on JAX: evaluation"


def write_report(
    scores: Sequence[Score],
    output: Path,
    markdown: Path | None = None,
    audio_root: Path | None = None,
    embed: int = 24,
    rows: int = 5000,
) -> list[str]:
    """Writes the page and, if wanted, the same tables in Markdown.

    Args:
      scores: the result of `labelled`.
      audio_root, embed, rows: see `report_page.AnswersSection`.

    Returns:
      A note for each thing that the page leaves out; the page contains these notes too.
    """
    found, made_from = sections(scores), origins(scores)
    answers = AnswersSection(scores, output, audio_root, embed, rows)
    made_from.notes.extend(answers.notes)
    about = _about(scores)
    write_whole(output, page(TITLE, about, found, answers.html, made_from))
    if markdown is not None:
        write_whole(markdown, "\n".join(_markdown(about, [*found, made_from])) + "\n")
    return answers.notes


def _about(scores: Sequence[Score]) -> str:
    models, benchmarks = (
        list(dict.fromkeys(values))
        for values in ((s.model for s in scores), (s.benchmark for s in scores))
    )
    items = sum(s.content["n"] for s in scores)
    return (
        f"{', '.join(models)} on {', '.join(benchmarks)}: {items:,} answers in {len(scores)} score "
        f"file(s). Made {datetime.date.today().isoformat()} by moss_audio_jax {code_version()}."
    )


# --- Markdown ------------------------------------------------------------------------------------


def _markdown(about: str, found: Sequence[Section]) -> Iterable[str]:
    yield f"# {TITLE}\n\n{_inline(about)}"
    for section in found:
        yield f"\n## {section.title}"
        for note in section.notes:
            yield f"\n{_inline(note)}"
        for table in section.tables:
            if table.title:
                yield f"\n### {_inline(table.title)}"
            yield f"\n| {' | '.join(map(_inline, table.head))} |"
            yield "|" + " --- |" * len(table.head)
            yield from (f"| {' | '.join(map(_cell, row))} |" for row in table.rows)


def _cell(cell: Cell) -> str:
    note = ", ".join(cell.note.split("\n"))
    if note and not note.startswith("["):
        note = f"({note})"
    text = _inline(f"{cell.text} {note}".strip())
    return f"**{text}**" if cell.bad else text


def _inline(text: str) -> str:
    """Text on one line, escaped for Markdown."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    for letter in "\\`*_|[]":
        text = text.replace(letter, "\\" + letter)
    return text


# --- command line --------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    options = command.parser("evaluate report", __doc__)
    options.add_argument(
        "--scores", type=Path, nargs="+", required=True, metavar="FILE", help="from evaluate score"
    )
    options.add_argument(
        "--names", nargs="+", metavar="NAME", help="names of the models, one per score file"
    )
    options.add_argument("--output", type=Path, required=True, metavar="FILE.html")
    options.add_argument(
        "--markdown", type=Path, metavar="FILE.md", help="the same tables in Markdown"
    )
    options.add_argument(
        "--audio-root",
        type=Path,
        metavar="DIR",
        help="folder of the audio, if it has moved since scoring",
    )
    options.add_argument(
        "--embed-audio",
        type=_count,
        default=24,
        metavar="N",
        help="number of clips (up to 30 s) in the page; default 24",
    )
    options.add_argument(
        "--rows",
        type=_count,
        default=5000,
        metavar="N",
        help="answers per score file, the worst ones; default 5000",
    )
    args = options.parse_args(argv)
    if args.names and len(args.names) != len(args.scores):
        raise UsageError(
            f"{len(args.names)} --names for {len(args.scores)} --scores; expected one for each"
        )
    for file, count in collections.Counter(map(os.path.realpath, args.scores)).items():
        if count > 1:
            raise UsageError(f"--scores {shown(file)}: was given {count} times; expected it once")
    for file in filter(None, (args.output, args.markdown)):
        command.distinct(file, *args.scores)
        check_target(file)
    command.distinct(args.output, args.markdown)
    if args.audio_root is not None and not args.audio_root.is_dir():
        raise InputError(f"{args.audio_root}: --audio-root is not a folder")
    named = list(zip(args.scores, args.names or [None] * len(args.scores), strict=True))
    scores = labelled([score for _, score in command.usable(named, lambda one: read_score(*one))])
    if not scores:
        raise InputError("none of the score files can be used")
    notes = write_report(
        scores, args.output, args.markdown, args.audio_root, args.embed_audio, args.rows
    )
    for note in notes:
        command.say(f"note: {note}")
    written = " and ".join(str(file) for file in (args.output, args.markdown) if file)
    print(f"{len(scores)} score file(s) -> {written}")
    return 1 if len(scores) < len(named) else 0


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(command.run(main))
