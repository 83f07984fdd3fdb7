"""Reads timestamps in answers, and writes them as SRT, VTT and JSON (TextGrid: textgrid.py).

Two forms are read: stamps around a text (a sentence or a word)

    [0.00]hello there[2.01][2.01]the weather is nice[4.32]

and an event timeline, one event per line

    0.00 - 57.00: birds chirping

Models do not keep to these forms exactly, so reading is tolerant: it knows clocks (mm:ss,
hh:mm:ss), units, decimal commas, other dashes and "to", full-width brackets and colons, bullets,
code fences, and a thinking block before the answer. `unread` lists the pieces that it cannot read.
"""

from __future__ import annotations

import dataclasses
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from moss_audio_jax.errors import InputError
from moss_audio_jax.text.prompt import split_thinking

_NUMBER = r"\d{1,9}(?:[.,．]\d{1,9})?"
_CLOCK = r"(?:\d{1,3}[:：])?\d{1,3}[:：]\d{2}(?:[.,．]\d{1,9})?"
_UNIT = r"(?:\s*(?:seconds?|secs?|s|秒)(?![A-Za-z]))?"
_TIME = rf"(?:{_CLOCK}|{_NUMBER}){_UNIT}"
_STAMP = re.compile(rf"[\[［【]\s*({_TIME})\s*[\]］】]")
_OPENS = "[［【"
_IN_STAMP = re.compile(r"[\s\d.,:：．]*")
_TO = r"\s*(?:-+>?|[‐-―−~～→]|to\b|至|到)\s*"
_OPEN, _CLOSE = r"[\[［【(（]\s*", r"\s*[\]］】)）]"
_BULLET = r"(?:[-*•·]|\d{1,3}[.)、](?!\d))\s*"
_EVENT = re.compile(
    rf"\s*(?:{_BULLET})?(?:\*\*)?"
    rf"(?:(?P<bare>({_TIME}){_TO}({_TIME}))|{_OPEN}({_TIME}){_TO}({_TIME}){_CLOSE}"
    rf"|{_OPEN}({_TIME}){_CLOSE}{_TO}{_OPEN}({_TIME}){_CLOSE})(?![A-Za-z\d.])"
    r"(?:\*\*)?\s*(?P<colon>[:：|,，]|[-–—]\s)?(?:\*\*)?(?P<text>.*)"
)
_FENCE = re.compile(r"^[ \t]*```[\w+-]*[ \t]*$\n?", re.MULTILINE)
_LINE_BULLET = re.compile(rf"(?<=\n)[ \t]*{_BULLET}\Z")

# A time as both forms write it, and nothing that merely looks like a number: within a stamp, or one
# of the two times of an event.
_WRITTEN = re.compile(
    r"\[([0-9]+\.[0-9]+)\]|(?<![0-9.,])([0-9]+\.[0-9]+) - ([0-9]+\.[0-9]+)(?![0-9]|[.,][0-9])"
)

LATEST = 1e9  # seconds: the latest time that can be written; times that can be read are smaller
_CUE = 500  # milliseconds: how long a subtitle without a length is shown


@dataclasses.dataclass(frozen=True)
class Segment:
    """A text and when it is heard: start and end in seconds."""

    start: float
    end: float
    text: str


class Parsed(NamedTuple):
    """The result of `parse`.

    segments: in the order of the text; 0 <= start <= end, seconds.
    unread: pieces that were not understood, or only in part (see `parse`).
    format: "stamps", "events" or "none".
    """

    segments: list[Segment]
    unread: list[str]
    format: Literal["stamps", "events", "none"]


def parse_timestamps(text: str) -> list[Segment]:
    """The segments of an answer in the order of the text; [] if there are none."""
    return parse(text).segments


def parse(text: str) -> Parsed:
    """Reads an answer in both forms and takes the form that gives more segments.

    How broken input is read:
      - single stamps are a chain: `[0.0]a[1.0]b[2.0]` is a from 0 to 1, b from 1 to 2;
      - a text whose closing stamp is missing ends at the next stamp; the last one ends where it
        starts, and is listed in `unread` too;
      - an end before its start is moved to the start, and the piece is listed in `unread` too;
      - text outside all stamps or events, and a stamp without a text, are in `unread`;
      - brackets without a time are text, and so are bare whole numbers (`[2024]`) if any other
        stamp has a decimal point or the form of a clock.
    """
    _, answer = split_thinking(text)
    # A newline in front, because bullets are recognised only after a line break.
    answer = "\n" + _FENCE.sub("", answer.replace("\r\n", "\n"))
    stamps = _parse_stamps(answer)
    events = _parse_events(answer)
    if len(events.segments) > len(stamps.segments):
        return events
    if stamps.segments:
        return stamps
    return Parsed([], [answer.strip()] if answer.strip() else [], "none")


def without_stamps(text: str) -> str:
    """An answer's words, without stamps such as `[1.20]`."""
    return " ".join(_STAMP.sub(" ", text).split())


def digits(text: str) -> Iterator[tuple[int, int]]:
    """(index, place) of each digit of the times that a text writes as `[12.34]` or `0.50 - 12.34`.

    `place` is the power of ten that the digit counts in seconds: 1 for tens, -2 for hundredths.
    Clocks (1:02.5) and whole numbers are no such times, because our forms write none.
    """
    for match in _WRITTEN.finditer(text):
        for group in filter(match.group, (1, 2, 3)):
            start, point = match.start(group), match[group].index(".")
            for at, character in enumerate(match[group]):
                if character != ".":
                    yield start + at, point - at - (at < point)


def shift(segments: Iterable[Segment], seconds: float) -> list[Segment]:
    """Moves segments `seconds` later, for example from a window to the whole recording."""
    return [Segment(s.start + seconds, s.end + seconds, s.text) for s in segments]


# --- writers -----------------------------------------------------------------------------------
# Each takes segments in any order and returns the text of a file. Each raises InputError, naming
# the segment, if its times are not finite, negative or beyond LATEST, or if it ends before it
# starts. Characters that no text file can hold (lone surrogates, zero bytes) become U+FFFD.


def to_srt(segments: Iterable[Segment]) -> str:
    """SubRip subtitles in order of their starts; times are rounded to milliseconds.

    A segment without a length is shown for half a second, or until the next one starts; if
    others start in the same millisecond, all share one cue, with the times of the first that lasts.
    """
    cues = [
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{text.replace('-->', '->')}\n"
        for number, (start, end, text) in enumerate(_cues(segments), 1)
    ]
    return "\n".join(cues)


def to_vtt(segments: Iterable[Segment]) -> str:
    """WebVTT subtitles as `to_srt` makes them; & < > are escaped."""
    cues = ["WEBVTT\n"]
    for start, end, text in _cues(segments):
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        cues.append(f"{_clock(start, '.')} --> {_clock(end, '.')}\n{text}\n")
    return "\n".join(cues)


def to_json(segments: Iterable[Segment]) -> str:
    """A JSON list of {"start", "end", "text"}, seconds unrounded."""
    rows = [dataclasses.asdict(s) for s in checked(segments)]
    return json.dumps(rows, ensure_ascii=False, indent=2) + "\n"


def checked(segments: Iterable[Segment]) -> list[Segment]:
    checked = []
    for number, s in enumerate(segments, 1):
        if not 0 <= s.start <= s.end <= LATEST:
            raise InputError(
                f"segment {number} ({s.text[:40]!r}) runs from {s.start} to {s.end} s; "
                f"expected 0 <= start <= end <= {LATEST:.0f}"
            )
        checked.append(dataclasses.replace(s, text=_UNWRITABLE.sub("\ufffd", s.text)))
    return checked


_UNWRITABLE = re.compile("[\0\ud800-\udfff]")


def _cues(segments: Iterable[Segment]) -> list[tuple[int, int, str]]:
    """(start, end, text) in milliseconds, by start; every cue ends later than it starts."""
    rows = [(round(s.start * 1000), round(s.end * 1000), _lines(s.text)) for s in checked(segments)]
    rows.sort(key=lambda row: row[0])
    cues: list[tuple[int, int, str]] = []
    waiting: list[str] = []  # texts without a length that start with the next cue
    for number, (start, end, text) in enumerate(rows):
        following = rows[number + 1][0] if number + 1 < len(rows) else None
        if start == end and start == following:
            waiting.append(text)
            continue
        if start == end:
            end = start + _CUE if following is None else min(start + _CUE, following)
        cues.append((start, end, "\n".join(filter(None, [*waiting, text]))))
        waiting = []
    return cues


def _clock(time: int, point: str) -> str:
    """hh:mm:ss and milliseconds of a time in milliseconds."""
    rest, milliseconds = divmod(time, 1000)
    rest, whole = divmod(rest, 60)
    hours, minutes = divmod(rest, 60)
    return f"{hours:02d}:{minutes:02d}:{whole:02d}{point}{milliseconds:03d}"


def _lines(text: str) -> str:
    """The text without blank lines: one would end the cue."""
    return "\n".join(line for line in text.splitlines() if line.strip())


# --- readers -----------------------------------------------------------------------------------


def _parse_stamps(answer: str) -> Parsed:
    found = list(_STAMP.finditer(answer))
    if any(not _bare_whole(stamp[1]) for stamp in found):
        found = [stamp for stamp in found if not _bare_whole(stamp[1])]
    segments: list[Segment] = []
    unread: list[str] = []
    opening: re.Match[str] | None = None  # the stamp at which the next text starts
    explicit = False  # that stamp did not end a segment
    chained = False  # some segment started at the stamp that ended another
    for stamp in found:
        before = answer[opening.end() : stamp.start()] if opening else answer[: stamp.start()]
        piece = _one_line(_LINE_BULLET.sub("", before))
        if opening is None:
            if piece:
                unread.append(piece)
            explicit = True
        elif piece:
            source = opening[0] + piece + stamp[0]
            times = (_seconds(opening[1]), _seconds(stamp[1]))
            segments.append(_segment(*times, piece, source, unread))
            chained |= not explicit
            explicit = False
        else:
            if explicit:
                unread.append(opening[0])
            explicit = True
        opening = stamp
    if opening is not None:
        rest = _one_line(answer[opening.end() :])
        piece = _without_cut_stamp(rest)
        if piece and (explicit or chained):
            start = _seconds(opening[1])
            segments.append(Segment(start, start, piece))
            unread.append(opening[0] + rest)
        elif rest:
            unread.append(rest)
        elif explicit:
            unread.append(opening[0])
    return Parsed(segments, unread, "stamps")


def _parse_events(answer: str) -> Parsed:
    segments: list[Segment] = []
    unread: list[str] = []
    for line in filter(str.strip, answer.split("\n")):
        match = _EVENT.fullmatch(line)
        times = [t for t in match.groups()[1:7] if t] if match else []
        # "1 - 2 people talk" is not an event: bare whole numbers need a colon or brackets.
        if not match or (
            match["bare"] and not match["colon"] and any(_bare_whole(t) for t in times)
        ):
            unread.append(line.strip())
            continue
        text = match["text"].strip()
        if text:
            segments.append(_segment(*map(_seconds, times), text, line.strip(), unread))
        else:
            unread.append(line.strip())
    return Parsed(segments, unread, "events")


def _segment(start: float, end: float, text: str, source: str, unread: list[str]) -> Segment:
    if end < start:
        unread.append(source)
    return Segment(start, max(start, end), text)


def _one_line(piece: str) -> str:
    return " ".join(filter(None, map(str.strip, piece.split("\n"))))


def _without_cut_stamp(text: str) -> str:
    """The text without a timestamp at its end that the token limit cut off."""
    at = max(map(text.rfind, _OPENS))
    cut = at >= 0 and _IN_STAMP.fullmatch(text, at + 1)
    return text[:at].rstrip() if cut else text


def _bare_whole(time: str) -> bool:
    return time.isdecimal()


def _seconds(time: str) -> float:
    """Seconds of a clock or a number, with or without a unit."""
    time = unicodedata.normalize("NFKC", time).replace(",", ".")
    seconds = 0.0
    for part in re.findall(r"[\d.]+", time):
        seconds = seconds * 60 + float(part)
    return round(seconds, 6)  # 60 + 19.54 is 79.53999999999999
