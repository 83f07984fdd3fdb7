"""The verb `demo`: its clips, its marks, its table, its page, one whole run."""

import json
import re
import unicodedata
from html import escape
from pathlib import Path

import numpy as np
import pytest
from tiny_model import write_checkpoint

from moss_audio_jax import cli, demo, timeline, world
from moss_audio_jax.api import Reply
from moss_audio_jax.text.prompt import split_thinking
from moss_audio_jax.text.timestamps import Segment
from moss_audio_jax.world import espeak

KINDS = ["caption", "words", "events", "time", "reason"]
WORDS = "[0.40]the[0.60][0.60]red[1.00][1.00]fox[1.50][1.80]ran[2.20]"
EVENTS = "0.50 - 1.50: bell ringing\n2.00 - 2.30: glass breaking"


@pytest.fixture(scope="module")
def clips():
    return demo.load_clips()


def test_clips(clips):
    """Small, held out, different; every truth is right by the rules."""
    assert sum(file.stat().st_size for file in demo.CLIPS.iterdir()) < 1_000_000
    assert len({clip.labels["content"] for clip in clips}) == len(clips) == 5
    for clip in clips:
        assert len(clip.wav) / 16000 == pytest.approx(clip.labels["duration"], abs=1e-3)
        assert clip.labels["duration"] <= 8
        assert clip.labels["split"] == "test"
        assert all(world.sentence_part(s["text"]) == "test" for s in clip.labels["sentences"])
        assert [question.kind for question in clip.questions] == KINDS
        for question in clip.questions[1:]:
            mark = demo.judge(question.kind, question.truth, question.truth)
            assert (mark.verdict, list(mark.off)) == ("right", [])
            assert bool(question.thinking) == (question.kind == "reason")


@pytest.mark.skipif(not espeak.available(), reason="needs the extra `world`")
def test_clips_are_of_the_world(clips):
    from tools.make import demo as make_demo

    stored = json.loads((demo.CLIPS / "demo.json").read_text(encoding="utf-8"))["clips"]
    assert [clip.name for clip in clips] == list(make_demo.CLIPS)
    for clip, described in zip(clips, stored, strict=True):
        wav, made = make_demo.make(clip.name)
        np.testing.assert_array_equal(clip.wav, wav)
        assert described == made


@pytest.mark.parametrize(
    ("kind", "truth", "answer", "verdict", "detail"),
    [
        ("words", WORDS, WORDS.replace("0.40", "0.55"), "right", "coverage 100%, off by 19 ms"),
        ("words", WORDS, WORDS.replace("red", "Red."), "right", "coverage 100%, off by 0 ms"),
        ("words", WORDS, WORDS.replace("red", "bed"), "partly", "coverage 75%, off by 0 ms"),
        ("words", WORDS, WORDS[:30], "partly", "coverage 50%, off by 0 ms"),
        ("words", WORDS, "the red fox ran", "wrong", "coverage 0%"),
        ("words", WORDS, "", "wrong", "coverage 0%"),
        ("words", "There is no speech.", "there is no speech", "right", ""),
        ("words", "There is no speech.", "[0.00]yes[0.50]", "wrong", ""),
        (
            "events",
            EVENTS,
            EVENTS.replace("0.50 ", "0.65 "),
            "right",
            "F1 1.00, 2 of 2, 0 extra",
        ),
        (
            "events",
            EVENTS,
            EVENTS.replace("0.50 ", "0.75 "),
            "partly",
            "F1 0.50, 1 of 2, 1 extra",
        ),
        (
            "events",
            EVENTS,
            EVENTS + "\n0.00 - 3.00: rain falling",
            "partly",
            "F1 0.80, 2 of 2, 1 extra",
        ),
        ("events", EVENTS, "a bell", "wrong", "F1 0.00, 0 of 2, 0 extra"),
        ("time", "1.08 - 2.70", "0.88 - 2.70", "right", ""),
        ("time", "1.08 - 2.70", "1.60 - 2.70", "wrong", ""),
        ("time", "1.08 - 2.70", "soon", "wrong", ""),
        ("time", "dog barking and rain falling", "rain falling", "wrong", ""),
        ("reason", "2.24", "2.24.", "right", ""),
        ("reason", "2.24", "many", "wrong", ""),
        ("reason", "the woman", "The woman", "right", ""),
        ("reason", "the woman", "the man", "wrong", ""),
        ("caption", "A dog.", "A dog.", "", ""),
    ],
)
def test_rules(kind, truth, answer, verdict, detail):
    assert demo.judge(kind, answer, truth)[:2] == (verdict, detail)


def test_what_is_drawn_red():
    late = WORDS.replace("[1.80]ran[2.20]", "[2.10]ran[2.50]").replace("red", "bed")
    assert sorted(demo.judge("words", late, WORDS).off) == [1, 3]
    assert sorted(demo.judge("events", EVENTS.replace("glass", "ice"), EVENTS).off) == [1]
    assert list(demo.judge("words", "[0.00]yes[0.50]", "There is no speech.").off) == [0]


def width(line):
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in line)


@pytest.mark.parametrize("columns", [20, 61, 100, 211])
def test_table_holds_whatever_is_said(clips, columns):
    said = [
        "\x1b[2J\x07 gone",
        "很" * 300,
        "a" * 5000,
        "",
        "<script>alert(1)</script> & [0.1]\n\n-",
    ]
    replies = [Reply(text, None, [], "length") for _ in clips for text in said]
    marks = [demo.Mark("wrong", "WER 100%, times off by 1000 ms", [0])] * len(replies)
    lines = demo.table(clips, replies, marks, columns).splitlines()
    assert max(map(width, lines)) == max(columns, 60)
    assert all(line.isprintable() for line in lines)
    assert sum(line.startswith("What is heard?") for line in lines) == 5
    page = demo.page(clips, replies, marks, "note")
    assert "<script>alert" not in page
    assert page.count("<script>") == 1


@pytest.mark.parametrize(
    ("raw", "finish", "shown", "steps"),
    [
        ("<think>\n5 - 3\n</think>\n\n2", "stop", "2", "5 - 3"),
        (
            "<think>\n5 - 3\n</think>\n\n2</think>",
            "stop",
            "(malformed: a thinking tag in the answer) 2</think>",
            "5 - 3",
        ),
        ("5 - 3</think>", "stop", "(no answer, only thinking) 5 - 3", None),
        ("<think>5 - 3", "length", "(no answer, only thinking) 5 - 3 (cut short: too long)", None),
        ("a a a", "loop", "a a a (ended: it repeated itself)", None),
        ("", "stop", "(nothing)", None),
    ],
)
def test_a_malformed_reply_is_shown_as_what_it_is(clips, raw, finish, shown, steps):
    thinking, answer = split_thinking(raw)
    reply = Reply(answer.strip(), thinking, [], finish)
    assert demo.said(reply) == shown
    replies = [reply] * 25
    marks = [demo.Mark("wrong")] * 25
    table = demo.table(clips, replies, marks, 400)
    assert table.startswith(demo.SYNTHETIC)
    assert shown in table
    page = demo.page(clips, replies, marks, "note")
    assert demo.SYNTHETIC in page
    thought = f'<div class="steps">{steps}</div>' if steps else ""
    cell = f"<td>{thought}{escape(shown)}</td>"
    assert page.count(cell) == 25


def test_lanes_stay_in_the_picture():
    bars = [
        Segment(0.2, 0.5, "a"),
        Segment(0.4, 0.9, "b & c"),
        Segment(0.9, 70.0, "d"),
        Segment(50.0, 60.0, "e"),
        *[Segment(0.9, 1.0, "x")] * 30,
    ]
    wav = 0.1 * np.sin(np.arange(16000, dtype=np.float32))
    drawn = timeline.clip(wav, [timeline.Lane("one", bars, timeline.WORDS, off={1})])
    found = re.findall(r'<svg x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"', drawn)
    boxes = [tuple(map(float, box)) for box in found]
    assert len(boxes) == len(bars)
    assert all(x >= 0 and w > 0 and x + w <= 1000 for x, _, w in boxes)
    assert boxes[0] == (200.0, boxes[0][1], 300.0)
    assert boxes[0][1] != boxes[1][1]  # they overlap
    assert len({y for _, y, _ in boxes}) == 8  # rows are limited, even for a long answer
    assert drawn.count("#d01030") == 2  # one bar: its fill and its stroke
    assert "b &amp; c" in drawn


def test_whole_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "LIMITS", dict.fromkeys(KINDS, 12))
    checkpoint = write_checkpoint(tmp_path / "tiny", max_positions=1024)
    arguments = ["demo", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "a.html")]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.count("data:audio/flac") == page.count("data:image/png") == 5
    assert page.count("<tr>") == 5 * 6
    assert not re.search(r"(https?:|src=\"[^d])", page)  # needs nothing else
    last = out.splitlines()[-1]
    counts = r"0 of 20 right, \d+ partly, \d+ wrong; 5 captions not judged. \d+ s."
    assert re.fullmatch(counts, last)
    assert last in page
    assert "random weights" in err

    assert cli.main([*arguments, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["kind"] for row in rows] == 5 * KINDS
    for row in rows:
        assert row["random_weights"]
        assert row["mark"] == (demo.judge(row["kind"], row["answer"], row["truth"]).verdict or None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "nowhere/demo.html"], "nowhere/demo.html: expected a file in a folder"),
        (["--output", "."], ".: expected a file"),
        pytest.param(
            ["--output", "/proc/demo.html"],
            "/proc: not a writable folder",
            marks=pytest.mark.skipif(not Path("/proc").is_dir(), reason="only Linux has /proc"),
        ),
        (["--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_errors(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", *arguments]) == 1
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
