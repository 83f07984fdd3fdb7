import collections
import html
import json
import math
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_audio_jax.errors import InputError
from moss_audio_jax.text import (
    Segment,
    parse_timestamps,
    to_json,
    to_srt,
    to_textgrid,
    to_vtt,
)
from moss_audio_jax.text.timestamps import digits, parse, shift

FEW = settings(max_examples=150, deadline=None)
LINE = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=12)
WORDS = st.lists(LINE.filter(bool), min_size=1, max_size=4).map(" ".join)
CENTISECONDS = st.integers(0, 400_000)


@st.composite
def segments(draw, text=WORDS, unit=100):
    pairs = draw(st.lists(st.tuples(CENTISECONDS, CENTISECONDS, text), max_size=6))
    return [Segment(min(a, b) / unit, max(a, b) / unit, t) for a, b, t in pairs]


# --- reading -------------------------------------------------------------------------------------

NO_BRACKETS = WORDS.filter(lambda t: not re.search(r"[\[［【\]］】]|```|</?think>", t))


@FEW
@given(segments(NO_BRACKETS), st.sampled_from(["", "\n", " ", "\n- ", "\n2. "]))
def test_stamps_round_trip(expected, between):
    text = between.join(f"[{s.start:.2f}]{s.text}[{s.end:.2f}]" for s in expected)
    assert parse(text) == (expected, [], "stamps" if expected else "none")


@FEW
@given(segments(NO_BRACKETS), st.sampled_from([" - ", "-", " – ", " to ", "~"]))
def test_events_round_trip(expected, to):
    text = "\n".join(f"{s.start:.2f}{to}{s.end:.2f}: {s.text}" for s in expected)
    assert parse(text) == (expected, [], "events" if expected else "none")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[0.00]hello there[2.01][2.01]the weather is nice[4.32]",
            [(0, 2.01, "hello there"), (2.01, 4.32, "the weather is nice")],
        ),
        ("0.00 - 57.00: birds chirping", [(0, 57, "birds chirping")]),
        ("[0.0]a[1.0]b[2.0]", [(0, 1, "a"), (1, 2, "b")]),
        (
            "[ 0,5 s ] a b [1:19.54]\n[00:01:23] c [1:00:00.25]",
            [(0.5, 79.54, "a b"), (83, 3600.25, "c")],
        ),
        (
            "［0．5］你好，世界［1.5秒］【1.5】再见【00：02】",
            [(0.5, 1.5, "你好，世界"), (1.5, 2, "再见")],
        ),
        ("[0.0][laughter] ok [sic][1.0]", [(0, 1, "[laughter] ok [sic]")]),
        ("[0.0]in [2024] and [1][3.5]", [(0, 3.5, "in [2024] and [1]")]),
        ("[0]a[2][2]b[3]", [(0, 2, "a"), (2, 3, "b")]),
        ("[0.0]5.[0.4][0.4]-[0.9]", [(0, 0.4, "5."), (0.4, 0.9, "-")]),
        ("```text\n- [0.0]a[1.0]\n- [1.0]b\nc[2.0]\n```", [(0, 1, "a"), (1, 2, "b c")]),
        ("<think>\n[7.0]x[8.0]\n</think>\n\n[0.0]a[1.0]", [(0, 1, "a")]),
        (
            "* 0.0s – 1.5s： dog\n2) **00:02 to 00:10**: cat\n[3 - 4] x\n(5,5-6) - y\n"
            "[7.0] → [8.0] z",
            [(0, 1.5, "dog"), (2, 10, "cat"), (3, 4, "x"), (5.5, 6, "y"), (7, 8, "z")],
        ),
        ("[00:00:01.000 --> 00:00:02.500] hi", [(1, 2.5, "hi")]),
        ("1.0 - 2.0 siren\n0.5至1.5：鸟叫", [(1, 2, "siren"), (0.5, 1.5, "鸟叫")]),
        ("", []),
    ],
)
def test_forms_that_are_read_whole(text, expected):
    found = parse(text)
    assert found.unread == []
    assert found.segments == [Segment(*row) for row in expected]
    assert parse_timestamps(text) == found.segments


@pytest.mark.parametrize(
    ("text", "expected", "unread"),
    [
        ("Sure:\n[0.0]a[1.0]\nBye", [(0, 1, "a")], ["Sure:", "Bye"]),
        ("[0.0]a[1.0][1.0]b\n[2.0]c[3.0]", [(0, 1, "a"), (1, 2, "b"), (2, 3, "c")], []),
        ("[0.0]a\n[2.0]b\n[4.0]c", [(0, 2, "a"), (2, 4, "b"), (4, 4, "c")], ["[4.0]c"]),
        ("[0.0]a[1.0][1.0]b[2.", [(0, 1, "a"), (1, 1, "b")], ["[1.0]b[2."]),
        ("[5.0]a[3.0]", [(5, 5, "a")], ["[5.0]a[3.0]"]),
        ("[0.0][1.0]a[2.0][4.0]", [(1, 2, "a")], ["[0.0]", "[4.0]"]),
        (
            "5.0 - 3.0: x\n1 - 2 people talk\n3.0 - 4.0:",
            [(5, 5, "x")],
            ["5.0 - 3.0: x", "1 - 2 people talk", "3.0 - 4.0:"],
        ),
        ("no times at all", [], ["no times at all"]),
        ("<think>\n[0.0]a[1.0]", [], []),
    ],
)
def test_what_is_not_understood_is_reported(text, expected, unread):
    found = parse(text)
    assert found.segments == [Segment(*row) for row in expected]
    assert found.unread == unread


@FEW
@given(st.text(st.sampled_from("[]【(0123456789.,:：-–to s\n*`<think>/你a"), max_size=60))
def test_any_text_is_read_and_loses_no_letter(text):
    found = parse(text)
    assert all(0 <= s.start <= s.end < math.inf and s.text for s in found.segments)
    if "think" not in text and "`" not in text:
        kept = "".join([s.text for s in found.segments] + found.unread)
        assert kept.count("你") >= text.count("你")


# --- writing: read back by readers of the formats' own rules -------------------------------------


def seconds(clock):
    hours, minutes, rest = clock.replace(",", ".").split(":")
    return round(int(hours) * 3600 + int(minutes) * 60 + float(rest), 3)


def read_cues(text):
    cues = []
    for block in re.split(r"\n\n+", text.strip("\n")):
        head, *lines = block.split("\n")
        if "-->" not in head and lines:
            head, *lines = lines
        if " --> " in head:
            start, end = head.split(" --> ")
            cues.append(Segment(seconds(start), seconds(end), "\n".join(lines)))
    return cues


@FEW
@given(segments(st.one_of(WORDS, st.just("a\nb <i>&amp;"))))
def test_subtitles_round_trip(expected):
    srt = to_srt(expected)
    cues = read_cues(srt)
    assert re.findall(r"(?m)^(\d+)\n\d\d+:", srt) == [str(i + 1) for i in range(len(cues))]
    vtt = to_vtt(expected)
    assert vtt.startswith("WEBVTT\n")
    assert [Segment(c.start, c.end, html.unescape(c.text)) for c in read_cues(vtt)] == cues
    # Cues with a length are unchanged, none is missing, and every cue ends later than it starts.
    assert all(a.start < a.end for a in cues)
    assert [c.start for c in cues] == sorted(c.start for c in cues)
    lasting = [(s.start, s.end) for s in expected if s.start < s.end]
    assert not collections.Counter(lasting) - collections.Counter((c.start, c.end) for c in cues)
    lines = [line for text in (s.text for s in expected) for line in text.split("\n")]
    assert sorted(line for c in cues for line in c.text.split("\n")) == sorted(lines)


def test_a_cue_without_a_length_gets_one():
    """Half a second, or until the next start; cues that start together are shown together."""
    rows = [Segment(4, 4, "d"), Segment(1, 1, "a"), Segment(2, 2, "b"), Segment(2, 2.25, "c")]
    rows += [Segment(4.3, 4.3, "e"), Segment(9, 9.0004, "f")]
    assert [(c.start, c.end, c.text) for c in read_cues(to_vtt(rows))] == [
        (1, 1.5, "a"),
        (2, 2.25, "b\nc"),
        (4, 4.3, "d"),
        (4.3, 4.8, "e"),
        (9, 9.5, "f"),
    ]
    # A text cannot look like another cue, nor contain characters that no file can.
    (cue,) = read_cues(to_srt([Segment(0, 1, "a\n\n2\n00:00:05,000 --> 00:00:06,000\nb\ud800\0")]))
    assert cue.text == "a\n2\n00:00:05,000 -> 00:00:06,000\nb\ufffd\ufffd"


def test_subtitle_clocks_carry_and_blank_lines_do_not_end_a_cue():
    rows = [Segment(59.9996, 3599.9995001, "a\n\n  \nb --> c"), Segment(360000, 360000.0004, "")]
    assert to_srt(rows) == (
        "1\n00:01:00,000 --> 01:00:00,000\na\nb -> c\n\n2\n100:00:00,000 --> 100:00:00,500\n\n"
    )
    assert "00:01:00.000 --> 01:00:00.000\na\nb --&gt; c\n" in to_vtt(rows)
    assert (to_srt([]), to_vtt([]), json.loads(to_json([]))) == ("", "WEBVTT\n", [])


def read_textgrid(text):
    """Tiers [(class, rows)] with the checks that Praat makes: touching intervals, right counts."""
    assert text.startswith('File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0\n')
    body = re.sub(r"\n\s*", "\n", text)
    string, number = r'"((?:[^"]|"")*)"', r"([\d.]+)"
    total = float(re.search(rf"xmax = {number}", body)[1])
    tiers = re.split(r"\nitem \[\d+\]:\n", body)[1:]
    assert int(re.search(r"\nsize = (\d+)\n", body)[1]) == len(tiers)
    out = []
    for tier in tiers:
        kind = re.match(r'class = "(\w+)"', tier)[1]
        size = int(re.search(r"(?:intervals|points): size = (\d+)", tier)[1])
        if kind == "IntervalTier":
            found = re.findall(rf"xmin = {number}\nxmax = {number}\ntext = {string}", tier)
            rows = [(float(a), float(b), t.replace('""', '"')) for a, b, t in found]
            assert [a for a, _, _ in rows] == [0.0, *[b for _, b, _ in rows[:-1]]]
            assert rows[-1][1] == total
            assert all(a < b for a, b, _ in rows)
        else:
            found = re.findall(rf"number = {number}\nmark = {string}", tier)
            rows = [(float(a), float(a), t.replace('""', '"')) for a, t in found]
            assert [a for a, _, _ in rows] == sorted({a for a, _, _ in rows})
        assert len(rows) == size
        out.append((kind, rows))
    return total, out


@FEW
@given(segments(WORDS, unit=1000), st.none() | st.floats(0.001, 1e4))
def test_textgrid_round_trip(expected, duration):
    total, tiers = read_textgrid(to_textgrid(expected, duration))
    assert total >= max([s.end for s in expected] + [round(duration or 0, 6)])
    found = [row for kind, rows in tiers for row in rows if kind == "IntervalTier" and row[2]]
    lasting = [(s.start, s.end, s.text) for s in expected if s.start < s.end]
    assert sorted(found) == sorted(lasting)
    points = [row[2] for kind, rows in tiers for row in rows if kind == "TextTier"]
    moments = [s.text for s in expected if s.start == s.end]
    assert sorted(" ".join(points).split()) == sorted(" ".join(moments).split())


def test_textgrid_tiers():
    rows = [Segment(1, 2, 'say "hi"'), Segment(2, 3, "b"), Segment(1.5, 4, "c"), Segment(3, 3, "d")]
    assert read_textgrid(to_textgrid(rows, 5)) == (
        5.0,
        [
            ("IntervalTier", [(0, 1, ""), (1, 2, 'say "hi"'), (2, 3, "b"), (3, 5, "")]),
            ("IntervalTier", [(0, 1.5, ""), (1.5, 4, "c"), (4, 5, "")]),
            ("TextTier", [(3, 3, "d")]),
        ],
    )
    assert read_textgrid(to_textgrid([], 2.5)) == (2.5, [("IntervalTier", [(0, 2.5, "")])])
    assert read_textgrid(to_textgrid([]))[0] > 0


@FEW
@given(segments(), st.integers(0, 10**6))
def test_json_and_shift(expected, offset):
    moved = shift(expected, offset)
    assert [Segment(**row) for row in json.loads(to_json(moved))] == moved
    assert [s.start for s in moved] == [s.start + offset for s in expected]
    assert [s.text for s in moved] == [s.text for s in expected]


@pytest.mark.parametrize("write", [to_srt, to_vtt, to_json, to_textgrid])
@pytest.mark.parametrize("times", [(2, 1), (-1, 1), (0, math.inf), (math.nan, 1), (0, 1e308)])
def test_writers_name_an_impossible_segment(write, times):
    with pytest.raises(InputError, match=r"segment 2 \('bad'\) runs from"):
        write([Segment(0, 1, "good"), Segment(*times, "bad")])


def test_a_textgrid_of_no_possible_length():
    with pytest.raises(InputError, match="the duration is nan s"):
        to_textgrid([Segment(0, 1, "good")], math.nan)
    with pytest.raises(InputError, match="the duration is 1e"):
        to_textgrid([], 1e308)


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("[9.98]ten[10.02]", ["9.98", "10.02"]),
        ("[99.9]a[100.0]7 8.5[1234.567]", ["99.9", "100.0", "1234.567"]),
        ("3.10 - 4.05: 2 dogs\n- 4.50 - 112.25: rain", ["3.10", "4.05", "4.50", "112.25"]),
        ("12.34 - 15.60", ["12.34", "15.60"]),
        ("<think>3.00 - 1.25 = 1.75.</think>1.75", ["3.00", "1.25"]),
        ("120.5 beats, [12] and [1:02.50], 3 - 5 dogs, 1.2.3 - 4.5, 0.5 - 1.25.5, v[1.x]", []),
        ("12,5 - 13.0, [1.5, 2.5], 1.5-2.5", []),
        ("", []),
    ],
)
def test_digits_of_times_have_their_places(text, times):
    """Summed by their places, the digits of each time are its seconds."""
    found = [(text[index], 10.0**place, index) for index, place in digits(text)]
    assert "".join(digit for digit, _, _ in found) == "".join(times).replace(".", "")
    for time_ in times:
        its, found = found[: len(time_) - 1], found[len(time_) - 1 :]
        assert sum(int(d) * worth for d, worth, _ in its) == pytest.approx(float(time_), abs=1e-9)
        assert text[its[0][2] : its[-1][2] + 1] == time_


@pytest.mark.parametrize(
    ("before", "again", "after"),
    [
        ("[0.0]a[1.0]b", " ", "[" + "1" * 1000 + "x"),
        ("[0.0]a[1.0]b", "\n ", "c[2.0]"),
        ("", "[1", ""),
        ("", "1 ", "- 2 x"),
        ("- ", " ", "1 - "),
        ("1 ", "-", ""),
        ("", "[0.0]a[9.0]", ""),
    ],
)
def test_hostile_answers_take_linear_time(before, again, after):
    """200,000 characters; quadratic code would take minutes. The guard only catches hangs."""
    started = time.process_time()
    to_textgrid(parse(before + again * (200_000 // len(again)) + after).segments)
    assert time.process_time() - started < 30
