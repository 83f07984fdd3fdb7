"""The report: tables with published rows, a list of answers; no answer is hidden or executed."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from moss_audio_jax import command
from moss_audio_jax.evaluate import __main__ as verb
from moss_audio_jax.evaluate.benchmarks import CAPTION_FIELDS, Item
from moss_audio_jax.evaluate.metrics.verdict import verdict
from moss_audio_jax.evaluate.report import write_report
from moss_audio_jax.evaluate.report_tables import Score, labelled, origins, read_score, sections
from moss_audio_jax.evaluate.score import score_items

HOSTILE = "</script><script>alert(1)</script>|<b>&amp;"
CHOICES = ("a dog", "a cat", "a bird")


def item(kind, name, reference, audio=(), **group):
    return Item(name, kind, f"Question {HOSTILE}", tuple(map(str, audio)), reference, group)


def scored(benchmark, items, answers, model, data="data.jsonl", **options):
    """The score file that `evaluate score` would write for these answers; None is a failure."""
    rows = [
        {"id": one.id, "raw_output": answer, "meta": {"model": f"checkpoints/{model}"}}
        | ({"error": "no sound"} if answer is None else {})
        for one, answer in zip(items, answers, strict=False)
    ]
    result = score_items(benchmark, items, rows, **options)
    return result | {"inputs": {"data": data, "items_hash": "1", "predictions": "p.jsonl"}}


def choices(benchmark, right, model, n=4, **inputs):
    """A score of n questions, of which `right` are right."""
    items = [
        item("choice", f"q{i}", {"choices": [*CHOICES], "answer": "a cat"}, task="sound")
        for i in range(n)
    ]
    result = scored(benchmark, items, ["B"] * right + ["A"] * (n - right), model)
    result["inputs"] |= inputs
    return result


def score(content, name="m", data="data"):
    return Score(Path(f"{name}.json"), name, data, content, name)


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def section(scores, anchor):
    return next(one for one in sections(scores) if one.anchor == anchor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Score files of two models on words, events, captions, Chinese and questions; some audio."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "sound here").mkdir()
    for name in ("a", "b"):
        wav = 0.1 * np.sin(np.arange(16000) / 9)
        soundfile.write(folder / "sound here" / f"{name}.wav", wav, 16000)
    sound = ["elsewhere/sound here/a.wav"], ["elsewhere/sound here/b.wav"]
    slots = [{"start": 0.1, "end": 0.4, "text": "red"}, {"start": 0.4, "end": 0.9, "text": "fox"}]
    timed = [
        item("timestamps", HOSTILE, {"slots": slots, "level": "word"}, sound[0]),
        item("timestamps", "second", {"slots": slots, "level": "word"}, sound[1]),
    ]
    events = [item("events", "bell", {"events": [{**slots[0], "text": "a bell"}]}, sound[0])]
    speech = [
        item("asr", f"s{i}", {"text": "今天天气很好"}, language="zh", dimension=dimension)
        for i, dimension in enumerate(["dialect", "singing", "singing"])
    ]
    captions = [item("caption", "c", dict.fromkeys(CAPTION_FIELDS, "low and calm"))]
    files = {
        "words": ("timestamps", timed, ["[0.10]red[0.40][0.85]fox[0.90]", HOSTILE]),
        "events": ("events", events, ["0.10 - 0.40: a bell"]),
        "speech": ("asr", speech, ["今天天气很好", "今天天很好", None]),
        "captions": ("caption", captions, [json.dumps({"gender": "low", "age": "calm"})]),
        "mmau": (
            "mmau-mini",
            [
                item(
                    "choice",
                    "q",
                    {"choices": [*CHOICES], "answer": "a cat"},
                    sound[1],
                    task=HOSTILE,
                )
            ],
            ["<think>so so"],
        ),
    }
    for name, content in files.items():
        for model in ("good", "bad"):
            result = scored(*content, model)
            (folder / f"{name}-{model}.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


def run(*arguments):
    return command.run(verb.main, ["report", *map(str, arguments)])


def test_four_benchmarks_beside_the_published():
    names = ("mmau-mini", "mmau-pro", "mmar", "mmsu")
    files = [
        score(choices(name, right, "ours")) for name, right in zip(names, range(4), strict=True)
    ]
    four = section([*files, score(choices("mmar", 4, "other"), "other")], "four")
    rows = texts(four.tables[0])
    assert rows[0] == [
        "MOSS-Audio-8B-Thinking",
        "official",
        "77.33",
        "64.92",
        "66.53",
        "75.52",
        "71.08",
    ]
    assert four.tables[0].published == 1
    assert rows[2] == ["m", "strict", "0.00", "25.00", "50.00", "75.00", "37.50"]
    assert rows[4] == ["other", "strict", "–", "–", "100.00", "–", "–"]  # no mean of one
    assert four.tables[0].rows[2][2].note.endswith("mini")
    low, high = files[2].content["confidence"]["strict"]["accuracy"]
    assert four.tables[0].rows[2][4].note == f"[{low:.1f}, {high:.1f}]"


def test_what_an_official_rule_leaves_out_is_said():
    items = [item("choice", i, {"choices": [*CHOICES], "answer": "a cat"}) for i in "12"]
    pro = score(scored("mmau-pro", items, ["B", "Some cat."], "m"))
    msu = score(scored("mmsu", items, ["B", "?"], "m"))
    row = section([pro, msu], "four").tables[0].rows[1]
    assert row[3].note.endswith("\n1 undecided")
    assert (row[5].text, row[5].note.splitlines()[1]) == ("100.00", "of 1 rows")


def test_speech_by_dimension_and_times(folder):
    found = sorted(folder.glob("*-good.json"))
    scores = labelled([read_score(path) for path in found])
    asr = section(scores, "asr").tables[0]
    assert [(row[0], row[3]) for row in texts(asr)[:2]] == [
        ("MOSS-Audio-8B-Instruct", "11.30"),
        ("MOSS-Audio-4B-Instruct", "11.58"),
    ]
    # The failed row counts with all of its six characters.
    assert texts(asr)[2:] == [
        ["good", "dialect", "1", "0.00", "0 / 0 / 0", "0.00", "0 / 0 / 0"],
        ["good", "singing", "2", "58.33", "0 / 7 / 0", "58.33", "0 / 7 / 0"],
        ["good", "overall", "3", "38.89", "0 / 7 / 0", "38.89", "0 / 7 / 0"],
        ["good", "mean of the dimensions", "–", "29.17", "–", "29.17", "–"],
    ]
    timed = texts(section(scores, "timestamps").tables[0])
    assert [row[1:4] for row in timed[:2]] == [
        ["AISHELL-1", "–", "35.77"],
        ["LibriSpeech", "–", "131.61"],
    ]
    # Of four slots of the first clip one is 0.45 s late; the second clip cannot be read.
    assert timed[2] == ["good", "data", "2", "112.50", "225.00", "0.500", "112.50", "0", "0.500"]
    assert texts(section(scores, "events").tables[0])[0][3] == "1.000"
    (figure,) = section(scores, "captions").figures
    assert [name for name, _ in figure.rows] == ["mean", *CAPTION_FIELDS]
    assert dict(figure.rows)["gender"][0].value == 0.5
    assert "3.7252" in section(scores, "captions").notes[0]
    counts = section(scores, "counts")
    table = {
        row[0]: dict(zip(counts.tables[0].head, row, strict=True))
        for row in texts(counts.tables[0])
    }
    assert table["asr"]["errors"] == table["timestamps"]["unparsed"] == "1"
    assert table["mmau-mini"]["truncated thinking"] == "1"
    assert "s2: failed: no sound" in str(counts.tables)


def test_judged_captions_have_the_published_ring():
    items = [item("caption", "c", dict.fromkeys(CAPTION_FIELDS, "calm"))]
    judged = [{"id": "c", "scores": dict.fromkeys(CAPTION_FIELDS, 4)}]
    content = scored("caption", items, ["{}"], "m", judgements=judged)
    captions = section([score(content)], "captions")
    assert [figure.full for figure in captions.figures] == [5, 1]
    published, own = captions.figures[0].rows[0][1]
    assert (published.rule, published.value, own.value) == ("published", 3.7252, 4)
    assert texts(captions.tables[0])[0] == ["mean", "4.0000", "0.0000"]


def test_what_cannot_be_compared_is_said():
    one, two = choices("mmar", 1, "a"), choices("mmar", 2, "b", items_hash="2")
    two["normaliser"] = {"version": "0"}
    scores = [score(one, "a"), score(two, "b")]
    assert "mmar: a, b were scored on different items." in section(scores, "four").notes
    assert origins(scores).notes == ["These scores were made by different normalisers."]


def test_labels_tell_scores_apart():
    def labels(*benchmarks_and_data):
        made = [
            Score(Path(f"{i}.json"), "m", data, {"benchmark": benchmark})
            for i, (benchmark, data) in enumerate(benchmarks_and_data)
        ]
        return [one.label for one in labelled(made)]

    assert labels(("mmau", "x"), ("mmar", "y"), ("asr", "z")) == ["m", "m", "m"]
    assert labels(("asr", "clean"), ("asr", "other")) == ["m · clean", "m · other"]
    assert labels(("asr", "x"), ("asr", "x")) == ["m · 0", "m · 1"]
    # The first score stays in the row of the four benchmarks.
    assert labels(("mmau-mini", "x"), ("mmau", "y"), ("mmar", "z")) == ["m", "m · y", "m"]


@pytest.mark.parametrize(
    ("sums", "expected"),
    [
        ({"strict_right": 1, "strict_rows": 1}, ("right", 1)),
        ({"strict_right": 0.8, "strict_rows": 1}, ("partly", 0.8)),
        ({"time_right": 0, "time_rows": 1}, ("wrong", 0)),
        ({"word_errors": 1, "words": 4}, ("partly", 0.75)),
        ({"word_errors": 9, "words": 4}, ("wrong", 0)),
        ({"word_errors": 0, "words": 0}, ("right", 1)),
        ({"word_errors": 2, "words": 0}, ("wrong", 0)),
        ({"slots": 4, "reference_slots": 4, "slot_shift": 0.4}, ("right", 1)),
        ({"slots": 4, "reference_slots": 4, "slot_shift": 2.0}, ("partly", 0.99)),
        ({"slots": 0, "reference_slots": 4, "slot_shift": 0}, ("wrong", 0)),
        (
            {
                "event_all": 0,
                "event_twice_right": 0,
                "event_right": 0,
                "event_reference": 0,
                "event_estimated": 0,
            },
            ("right", 1),
        ),
        (
            {
                "event_all": 4,
                "event_twice_right": 2,
                "event_right": 1,
                "event_reference": 1,
                "event_estimated": 3,
            },
            ("partly", 0.5),
        ),
        ({"sources_named": 1, "sources": 2}, ("partly", 0.5)),
        (
            {"fields": 13, "field_points": 13.0, "judged_points": 40, "judged_fields": 13},
            ("right", 1),
        ),
        ({}, ("not scored", None)),
    ],
)
def test_verdicts(sums, expected):
    assert verdict(sums)[:2] == expected


class Page(html.parser.HTMLParser):
    """Parses a page: tags, text outside scripts, and the rows' JSON."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts, self._in = [], "", [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        if self._in == "script":
            self.scripts[-1] += data
        else:
            self.text += data


def test_one_page_that_needs_nothing_and_runs_nothing(folder, capsys):
    files = sorted(folder.glob("*.json"))
    made, markdown = folder / "report.html", folder / "report.md"
    names = [HOSTILE if "bad" in file.name else "good" for file in files]
    code = run(
        "--scores",
        *files,
        "--names",
        *names,
        "--output",
        made,
        "--markdown",
        markdown,
        "--audio-root",
        folder,
        "--embed-audio",
        1,
    )
    assert code == 0
    assert "10 score file(s)" in capsys.readouterr().out
    text = made.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.scripts) == 2  # the filters, and that of timeline
    assert not any("<script>alert" in script for script in page.scripts)
    assert not any(tag == "b" for tag, _ in page.tags)
    for tag, attrs in page.tags:
        for key in ("src", "href"):
            assert attrs.get(key, "#").startswith(("#", "data:", "sound%20here/")), tag
    assert not re.search("https?:|@import|url\\(", text)
    assert HOSTILE in page.text  # the model's name, as text

    rows = [attrs for tag, attrs in page.tags if tag == "details" and "data-tags" in attrs]
    assert len(rows) == 2 + 1 + 3 + 1 + 1  # an item appears once for both models
    assert sum("status: truncated_thinking" in row["data-tags"] for row in rows) == 1
    assert any(f"{HOSTILE}: wrong" in row["data-tags"] for row in rows)
    assert "[0.10]red[0.40][0.85]fox[0.90]" in page.text
    assert "so so" in page.text
    # One clip is embedded once, with its spectrogram, and used for words and for events;
    # the page links to the other.
    assert text.count("data:audio/flac") == text.count("data:image/png") == 1
    assert [attrs["data-same"] for _, attrs in page.tags if "data-same" in attrs] == ["0", "1"]
    assert text.count('src="sound%20here/b.wav"') == 2

    lines = markdown.read_text(encoding="utf-8").splitlines()
    scores = labelled(list(map(read_score, files, names)))
    tables = [table for one in [*sections(scores), origins(scores)] for table in one.tables]
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == sum(2 + len(table.rows) for table in tables)
    widths = {len(re.findall(r"(?<!\\)\|", row)) - 1 for row in rows}
    assert widths == {len(table.head) for table in tables}  # a | in a name splits no cell
    assert not any("<script" in line or "<b>" in line for line in lines)


def test_rows_beyond_the_limit_are_counted(tmp_path):
    content = choices("mmar", 3, "m", n=5)
    without = {key: value for key, value in choices("mmsu", 1, "m").items() if key != "rows"}
    notes = write_report([score(content), score(without, "n")], tmp_path / "r.html", rows=3)
    assert notes == [
        "m.json: only the worst 3 of 5 rows; see --rows.",
        "n.json has no rows: it was scored with --no-rows.",
    ]
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert all(note in Page(text).text for note in notes)
    rows = [attrs for tag, attrs in Page(text).tags if "data-tags" in attrs]
    assert [row["data-tags"].splitlines()[2] for row in rows] == [
        "m: right",
        "m: wrong",
        "m: wrong",
    ]


def test_bad_score_files_are_named(tmp_path, capsys):
    good = choices("mmar", 1, "m")
    bad = {
        "half.json": ('{"benchmark": "mmar"', "not valid JSON"),
        "list.json": ("[]", "everything is missing"),
        "empty.json": ("{}", "benchmark is missing"),
        "nan.json": (json.dumps(good | {"n": float("nan")}), "n is missing"),
        "inf.json": (json.dumps(good | {"strict": {"wer": 1e400}}), "strict/wer is missing"),
        "wide.json": (
            json.dumps(good | {"counts": {"errors": 10**400}}),
            "counts/errors is missing",
        ),
        "group.json": (json.dumps(good | {"strict": {"wer": {"a": 1}}}), "strict/wer is missing"),
        "said.json": (json.dumps(good | {"problems": "many"}), "problems is missing"),
        "from.json": (json.dumps(good | {"meta": [1]}), "meta is missing"),
        "bounds.json": (
            json.dumps(good | {"confidence": {"strict": {"accuracy": [1]}}}),
            "confidence/strict/accuracy",
        ),
        "span.json": (
            json.dumps(
                good
                | {
                    "rows": [
                        {
                            "id": "1",
                            "kind": "events",
                            "sums": {},
                            "reference": {"events": [{"start": 0}]},
                        }
                    ]
                }
            ),
            "rows/0",
        ),
        "sums.json": (
            json.dumps(
                good
                | {
                    "rows": [
                        {"id": "1", "kind": "asr", "reference": {}, "sums": {"word_errors": 1}}
                    ]
                }
            ),
            "rows/0",
        ),
        "deep.json": ("[" * 100_000, "nests too deeply"),
        "latin.json": (b'{"benchmark": "caf\xe9"}', "not valid UTF-8"),
        "text.json": (json.dumps(good | {"strict": {"accuracy": "high"}}), "strict/accuracy"),
        "by.json": (json.dumps(good | {"by": {"task": {"x": {}}}}), "by/task/x"),
        "rows.json": (json.dumps(good | {"rows": [{"id": "1"}]}), "rows/0"),
        "gone.json": (None, "no such file"),
    }
    for name, (text, _) in bad.items():
        if text is not None:
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "good.json").write_text(json.dumps(good))
    paths = [tmp_path / name for name in bad]
    output = tmp_path / "r.html"
    assert run("--scores", *paths, tmp_path / "good.json", "--output", output) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    for (name, (_, problem)), line in zip(bad.items(), lines, strict=True):
        assert name in line
        assert problem in line
    assert "mmar" in output.read_text(encoding="utf-8")  # the good one is there

    output.unlink()
    assert run("--scores", *paths, "--output", output) == 1
    assert "none of the score files" in capsys.readouterr().err.splitlines()[-1]
    assert run("--scores", *paths, "--names", "one", "--output", output) == 2
    assert run("--scores", *paths, "--output", tmp_path / "no" / "r.html") == 1
    assert not output.exists()


def test_in_a_browser(folder, tmp_path):
    """Rows open, times are drawn, and no part of an answer becomes an element."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no chromium to open the page with")
    scores = [read_score(path) for path in sorted(folder.glob("*-good.json"))]
    write_report(labelled(scores), folder / "seen.html", audio_root=folder, embed=1)
    text = (folder / "seen.html").read_text(encoding="utf-8")
    opening = "<script>document.querySelectorAll('#list details').forEach(d => d.open = true);"
    end = text.rindex("</body>")
    (folder / "seen.html").write_text(f"{text[:end]}{opening}</script>{text[end:]}")
    dom = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}",
            "--virtual-time-budget=2000",
            "--dump-dom",
            (folder / "seen.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    listed = dom[dom.index('id="list"') : dom.index('id="origins"')]
    assert listed.count("<details") == 8
    assert "8 of 8" in dom  # the filters ran
    # Both clips of words and the one of events: truth above model, late words in red.
    assert listed.count(">truth</text>") == listed.count(">good</text>") == 3
    assert (
        len(re.findall(r"<title>0\.85 - 0\.90: fox</title><rect[^>]*stroke=\"#d01030\"", listed))
        == 1
    )
    assert listed.count('src="data:image/png') == 2  # the clip in the page, of words and events
    assert listed.count('src="sound%20here/b.wav"') == 2
    assert "<mark>气</mark>" in listed  # the character that a transcript lacks
    assert "<script>" not in listed
    assert "<b>" not in listed
