"""Asks a model about five short clips of sound, and compares its answers with the truth.

example:
  moss-audio-jax demo

For each clip it asks what is heard, for words and events with their times, about a time, and a
question that needs reasoning. Prints a table, and writes demo.html: players, spectrograms, and the
words and events of truth and model along the time axis. The clips are part of the package and were
not used in training. They are synthetic, like all sound that the small model was trained on, so the
result says nothing about recordings. The model is the bundled small one unless --checkpoint names
another. Nothing is downloaded.

right, partly, wrong: by the strict rules of `moss-audio-jax evaluate` for the benchmark `world`.
  words     partly: some of the words, or not within 0.2 s on average
  events    partly: some of the events, or too many events. The onset must be right within 0.2 s,
            the offset within 0.2 s or half of the event's length
  times     right: start and end within 0.2 s
  others    right: the same answer. Captions are not judged
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, so that Ctrl-C ends those too
    from moss_audio_jax import cli

    cli.run_verb("demo")

import json
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moss_audio_jax import command, timeline
from moss_audio_jax.audio import load_audio
from moss_audio_jax.evaluate.items import Item
from moss_audio_jax.evaluate.metrics.rows import Scorer
from moss_audio_jax.evaluate.metrics.verdict import off, verdict
from moss_audio_jax.files import check_target, write_whole
from moss_audio_jax.text.prompt import split_thinking
from moss_audio_jax.text.timestamps import parse_timestamps
from moss_audio_jax.text.tokenizer import THINK

if TYPE_CHECKING:
    from moss_audio_jax.api import Reply

SYNTHETIC = "All sound here is synthetic, voices too."  # at most 60 columns
CLIPS = Path(__file__).parent / "assets" / "demo"
# The most tokens of an answer: over 1.5 times those of the longest true answer of its kind.
LIMITS = {"caption": 192, "words": 256, "events": 128, "time": 48, "reason": 128}


class Question(NamedTuple):
    """`kind`: a key of LIMITS. `truth`: the answer; `thinking`: the steps towards it, or None."""

    kind: str
    task: str
    prompt: str
    truth: str
    thinking: str | None


class DemoClip(NamedTuple):
    """wav float32 [n], 16 kHz; labels as in `world.scenes`, without single notes."""

    name: str
    wav: np.ndarray
    labels: dict[str, Any]
    questions: list[Question]


class Mark(NamedTuple):
    """`verdict`: right, partly, wrong, or "" if no rule applies; `detail`: the figures behind it.

    `off`: indices of the answer's segments that the truth does not have at that time.
    """

    verdict: str
    detail: str = ""
    off: Collection[int] = ()


def load_clips() -> list[DemoClip]:
    """The bundled clips with their questions."""
    described = json.loads((CLIPS / "demo.json").read_text(encoding="utf-8"))
    return [
        DemoClip(
            clip["name"],
            load_audio(CLIPS / f"{clip['name']}.flac"),
            clip["labels"],
            [_question(**question) for question in clip["questions"]],
        )
        for clip in described["clips"]
    ]


def _question(kind: str, task: str, prompt: str, answer: str) -> Question:
    thinking, truth = split_thinking(answer)
    return Question(kind, task, prompt, truth.strip(), thinking)


# --- marks ---------------------------------------------------------------------------------------


def judge(kind: str, answer: str, truth: str) -> Mark:
    """The mark that `evaluate score --benchmark world` gives to an answer."""
    if kind == "caption":  # a caption may be right in many ways
        return Mark("")
    true, said = ([dict(vars(s)) for s in parse_timestamps(text)] for text in (truth, answer))
    if kind == "words" and true:
        form, reference = "timestamps", {"slots": true, "level": "word"}
    elif kind == "events":
        form, reference = "events", {"events": true}
    else:
        form, reference = "open", {"answer": truth}
    item = Item("", form, "", (), reference, {})
    (row,) = Scorer("world").score([item], {"": {"raw_output": answer}})
    word, _, detail = verdict(row.sums)
    return Mark(word, detail, off(said, true) if kind in ("words", "events") else ())


# --- the table -----------------------------------------------------------------------------------

_SHORT = {"caption": "What is heard?", "words": "Words and times", "events": "Events and times"}
_MOST = 420  # characters of an answer in the table; the page has them all


def table(
    clips: Sequence[DemoClip], replies: Sequence[Reply], marks: Sequence[Mark], columns: int
) -> str:
    """Plain text in lines of up to `columns` columns (at least 60)."""
    columns = max(columns, 60)
    first, last = min(24, max(14, columns // 5)), 14
    middle = (columns - first - last - 6) // 2
    widths = (first, middle, middle, last)
    rule = "-" * columns
    lines = [SYNTHETIC, *_row(("question", "the model says", "truth", "mark"), widths)]
    for clip, answers in grouped(clips, replies, marks):
        lines += [rule, f"{clip.name}: {_about(clip)}", rule]
        for question, reply, mark in answers:
            verdict = ": ".join(filter(None, mark[:2])) or "(yours)"
            asked = _SHORT.get(question.kind, question.prompt)
            lines += _row((asked, said(reply), question.truth, verdict), widths)
    return "\n".join([*lines, rule])


def said(reply: Reply) -> str:
    """The answer; if it is missing or malformed, the output that came instead."""
    words = reply.text or "(nothing)"
    if not reply.text and reply.thinking:
        words = f"(no answer, only thinking) {reply.thinking}"
    elif any(tag in reply.text for tag in THINK):
        words = f"(malformed: a thinking tag in the answer) {reply.text}"
    return words + {
        "length": " (cut short: too long)",
        "loop": " (ended: it repeated itself)",
    }.get(reply.finish_reason, "")


def grouped(
    clips: Sequence[DemoClip], replies: Sequence[Reply], marks: Sequence[Mark]
) -> Iterator[tuple[DemoClip, list[tuple[Question, Reply, Mark]]]]:
    """Each clip with its (question, reply, mark)."""
    rest = iter(zip(replies, marks, strict=True))
    for clip in clips:
        yield clip, [(question, *next(rest)) for question in clip.questions]


def summary(marks: Sequence[Mark], seconds: float) -> str:
    count = {v: sum(mark.verdict == v for mark in marks) for v in ("right", "partly", "wrong", "")}
    return (
        f"{count['right']} of {len(marks) - count['']} right, {count['partly']} partly, "
        f"{count['wrong']} wrong; {count['']} captions not judged. {seconds:.0f} s."
    )


def _about(clip: DemoClip) -> str:
    return f"{clip.labels['content'].replace('+', ', ')}, {clip.labels['duration']:.1f} s"


def _row(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    wrapped = [_wrapped(cell, width) for cell, width in zip(cells, widths, strict=True)]
    for number in range(max(map(len, wrapped))):
        parts = [lines[number] if number < len(lines) else "" for lines in wrapped]
        yield "  ".join(
            part + " " * (width - _width(part)) for part, width in zip(parts, widths, strict=True)
        ).rstrip()


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at spaces and after `]` if possible."""
    if len(text) > _MOST:
        text = text[:_MOST] + " ..."
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for piece in re.findall(r"[^\s\[]+\s*|\[[^\s\]]*\]?\s*|\s+|.", _printable(paragraph)):
            if line and _width((line + piece).rstrip()) > width:
                lines.append(line.rstrip())
                line = ""
            line += piece
            while _width(line.rstrip()) > width:  # a piece longer than a line
                fits = next(n for n in range(len(line), 0, -1) if _width(line[:n]) <= width)
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line.rstrip())
    return lines


def _printable(text: str) -> str:
    """Removes control characters, which a model may write and a terminal would obey."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _width(text: str) -> int:
    """Columns of a text in a terminal: wide letters take two, combining marks none."""
    return sum(
        0
        if unicodedata.combining(letter)
        else 2
        if unicodedata.east_asian_width(letter) in "WF"
        else 1
        for letter in text
    )


# --- the page ------------------------------------------------------------------------------------

_STYLE = """
table { table-layout: fixed; }
th:first-child { width: 22%; }
th:last-child { width: 14%; }
.right { background: #dff2df; }
.partly { background: #fdf0cf; }
.wrong { background: #f9dcdc; }
.steps { color: #777; font-size: 12px; }
"""


def page(
    clips: Sequence[DemoClip], replies: Sequence[Reply], marks: Sequence[Mark], note: str
) -> str:
    """One HTML file that needs no other files. `note`: a line under the heading."""
    sections = [
        f"<p><b>{SYNTHETIC}</b> This project's <code>world</code> made it, and all sound that the "
        "small model was trained on: right answers here say nothing about recordings.</p>"
        f"<p>{escape(note)}</p><p>Click on a spectrogram to play from that point. Red bars are "
        "not in the truth at that time.</p>"
    ]
    for clip, answers in grouped(clips, replies, marks):
        lanes = []
        for kind, colour in (("words", timeline.WORDS), ("events", timeline.EVENTS)):
            question, reply, mark = next(a for a in answers if a[0].kind == kind)
            true, heard = parse_timestamps(question.truth), parse_timestamps(reply.text)
            if true or heard:
                lanes.append(timeline.Lane(f"{kind}, truth", true, colour))
                lanes.append(timeline.Lane(f"{kind}, model", heard, colour, mark.off))
        rows = []
        for question, reply, mark in answers:
            # Without an answer, `said` shows the thinking.
            answer = _thought(reply.thinking if reply.text else None) + escape(said(reply))
            true = _thought(question.thinking) + escape(question.truth)
            verdict = escape("\n".join(filter(None, mark[:2])))
            rows.append(
                f"<tr><td>{escape(question.prompt)}</td><td>{answer}</td><td>{true}</td>"
                f'<td class="{mark.verdict}">{verdict}</td></tr>'
            )
        sections.append(
            f"<section><h2>{escape(clip.name)}: {escape(_about(clip))}</h2>\n"
            f"{timeline.clip(clip.wav, lanes)}\n"
            "<table><tr><th>question</th><th>the model says</th><th>truth</th><th>mark</th></tr>\n"
            + "\n".join(rows)
            + "</table>\n<details><summary>labels</summary><pre>"
            + escape(json.dumps(clip.labels, ensure_ascii=False, indent=1))
            + "</pre></details></section>"
        )
    return timeline.document("MOSS-Audio on JAX: demo", sections, _STYLE)


def _thought(steps: str | None) -> str:
    return f'<div class="steps">{escape(steps)}</div>' if steps else ""


def main(argv: Sequence[str]) -> int:
    options = command.parser("demo", __doc__)
    command.add_model_options(options)
    options.add_argument(
        "--output",
        type=Path,
        default=Path("demo.html"),
        metavar="FILE",
        help="the page; default demo.html",
    )
    options.add_argument(
        "--json", action="store_true", help="print a JSON object per answer instead of the table"
    )
    args = options.parse_args(argv)
    check_target(args.output)

    started = time.perf_counter()
    clips = load_clips()
    asked = [(clip, question) for clip in clips for question in clip.questions]
    model = command.load_model(args)
    command.say(f"{len(asked)} questions about {len(clips)} clips; first JAX compiles")
    from moss_audio_jax import api

    requests = []
    for clip in clips:
        sound = api.Clip(clip.wav)  # is encoded once for all questions
        for question in clip.questions:
            sampling = api.Sampling(max_new_tokens=LIMITS[question.kind])
            requests.append(api.Request(question.prompt, [sound], sampling))
    replies = model.generate_batch(
        requests,
        batch_size=len(asked),  # one prefill and one decode loop, so that little is compiled
        progress=sys.stderr.isatty(),
    )
    marks = [judge(q.kind, r.text, q.truth) for (_, q), r in zip(asked, replies, strict=True)]
    line = summary(marks, time.perf_counter() - started)
    command.warn(dict.fromkeys(warning for reply in replies for warning in reply.warnings))
    write_whole(args.output, page(clips, replies, marks, line))
    if args.json:
        for (clip, question), reply, mark in zip(asked, replies, marks, strict=True):
            row = {"clip": clip.name} | question._asdict()
            row |= {"answer": reply.text, "answer_thinking": reply.thinking}
            row |= {"finish_reason": reply.finish_reason, "mark": mark.verdict or None}
            row |= {"detail": mark.detail, "random_weights": model.random_weights}
            row |= {"warnings": reply.warnings}
            print(json.dumps(row, ensure_ascii=False))
        command.say(line)
    else:
        print(table(clips, replies, marks, shutil.get_terminal_size((100, 24)).columns))
        print(line)
    command.say(f"page: {args.output}")
    return 0
