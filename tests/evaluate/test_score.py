"""Scores and exports from files, as users run them, with faults in their inputs."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moss_audio_jax import command
from moss_audio_jax.errors import InputError
from moss_audio_jax.evaluate import official_files, report, score
from moss_audio_jax.evaluate.benchmarks import Item, load_benchmark
from moss_audio_jax.evaluate.predictions import by_id, read_judgements, read_predictions
from moss_audio_jax.evaluate.score import asked, score_items

CASES = Path(__file__).parents[3] / "shared/cases/text"
MINI = Path(__file__).parents[3] / "shared/benchmarks/mmau-test-mini.json"


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def choice_item(name, answer, *choices, **group):
    return Item(name, "choice", "?", (), {"choices": list(choices), "answer": answer}, group)


def said(**answers):
    return [{"id": name, "raw_output": raw} for name, raw in answers.items()]


CHOICES = ("a dog", "a cat", "a bird")
ITEMS = [
    choice_item("1", "a dog", *CHOICES, task="sound", category=["x", "y"]),
    choice_item("2", "a cat", *CHOICES, task="sound", category="x"),
    choice_item("3", "a bird", *CHOICES, task="music", category="y"),
    choice_item("4", "a bird", *CHOICES, task="music", category="y"),
]


def test_official_and_strict_side_by_side():
    result = score_items(
        "mmau",
        ITEMS,
        said(**{"1": "A", "2": "It is a cat I think", "3": "<think>c</think>a dog"}),
    )
    # The official script skips row 4; row 1 becomes "a dog"; row 2 is right, as its words match.
    assert result["official"]["accuracy"] == pytest.approx(200 / 3)
    assert result["official"]["accuracy_verbatim"] == pytest.approx(100 / 3)
    assert result["strict"]["accuracy"] == 25.0
    assert (result["n"], result["official"]["rows"], result["strict"]["rows"]) == (4, 3, 4)
    assert result["by"]["task"]["sound"]["official"]["accuracy"] == 100
    assert result["by"]["task"]["music"]["strict"]["accuracy"] == 0
    # A row with a list of categories counts in each of them.
    assert {k: v["n"] for k, v in result["by"]["category"].items()} == {"x": 2, "y": 3}
    low, high = result["confidence"]["strict"]["accuracy"]
    assert 0 <= low <= 25 <= high <= 100
    counts = result["counts"]
    assert (counts["predicted"], counts["missing"], counts["unparsed"]) == (3, 1, 1)
    assert [row["status"] for row in result["rows"]] == ["ok", "unparsed", "ok", "missing"]
    assert result["problems"] == ["4: no prediction"]
    json.dumps(result)


def test_an_official_file_is_scored_as_its_script_does():
    rows = [{**row, "official_key": "model_output"} for row in said(**{"1": "A", "2": "a cat"})]
    result = score_items("mmau", ITEMS[:2], rows)
    assert result["official"]["accuracy"] == 50  # the letter is not a word of the answer
    assert result["official"]["accuracy_letters_mapped"] == 100
    assert result["strict"]["accuracy"] == 100


def test_mmsu_in_the_order_of_its_file():
    rows = [{**row, "official_key": "response"} for row in said(**{"2": "B", "1": "", "3": "eh"})]
    result = score_items("mmsu", ITEMS[:3], rows)
    # Row 1 gets the B of row 2, which is wrong; row 3 is not counted.
    assert result["official"] == {"accuracy": 50, "rows": 2}
    assert result["strict"]["accuracy"] == pytest.approx(100 / 3)
    # Our predictions are taken in the order of the data: the first row has no row before it.
    assert score_items("mmsu", ITEMS[:3], said(**{"2": "B", "1": "", "3": "eh"}))["official"] == {
        "accuracy": 100,
        "rows": 1,
    }


def test_mmau_pro_and_its_judge():
    kwargs = {"N": 2}
    follow = {"answer": None, "task_identifier": "Number Words (at least)", "kwargs": kwargs}
    items = [
        choice_item("1", "a dog", *CHOICES, category="sound"),
        choice_item("2", "a cat", *CHOICES, category="sound"),
        Item("3", "open", "Why?", (), {"answer": "Rain."}, {"category": "open"}),
        Item("4", "open", "Say.", (), follow, {"category": "instruction following"}),
    ]
    rows = said(**{"1": "A", "2": "cat, surely", "3": "It rains.", "4": "two words"})
    result = score_items("mmau-pro", items, rows)
    assert result["official"]["undecided"] == 1  # only its embedding model can tell
    assert result["official"]["accuracy"] == pytest.approx(200 / 3)
    assert (result["counts"]["unjudged"], result["strict"]["rows"]) == (1, 3)
    judged = [{"id": "3", "scores": {"answer": 4}}]
    result = score_items("mmau-pro", items, rows, judgements=judged)
    assert result["official"]["accuracy"] == pytest.approx(100 * (1 + 0 + 0.8 + 1) / 4)
    assert result["official"]["judged"]["mean"] == 4


def test_unpublished_answers_are_left_out():
    result = score_items("mmau", [ITEMS[0], choice_item("9", None, "x", "y")], said(**{"1": "A"}))
    assert result["strict"] == {"accuracy": 100, "rows": 1}
    assert result["counts"]["without_reference"] == 1


def test_transcripts_sum_over_the_corpus():
    pytest.importorskip("whisper_normalizer", reason="English needs the extra `evaluate`")

    def spoken(name, text, **group):
        return Item(name, "asr", "?", (), {"text": text}, group)

    items = [
        spoken("1", "one two three four", language="en", dimension="clean"),
        spoken("2", "It's fine.", language="en", dimension="noisy"),
        spoken("3", "今天很好", language="zh", dimension="clean"),
    ]
    rows = said(**{"1": "1234", "2": "it is", "3": "<think>今天很好"})
    result = score_items("asr", items, rows)
    # Whisper makes one number of the digits: 1234 | it is fine | four characters, none said.
    assert result["strict"]["reference_words"] == 1 + 3 + 4
    assert result["strict"]["wer"] == pytest.approx(100 * (0 + 1 + 4) / 8)
    assert result["strict"]["deletions"] == 5
    assert result["official"] == result["strict"]  # no official script, no other rule
    assert result["by"]["dimension"]["clean"]["strict"]["wer"] == pytest.approx(100 * 4 / 5)
    assert result["counts"]["truncated_thinking"] == 1
    # A missing item is deleted, not dropped.
    missing = score_items("asr", items, rows[:2])
    assert missing["strict"]["wer"] == result["strict"]["wer"]
    assert result["normaliser"]["hash"]


def test_timelines_and_captions():
    slots = [{"text": "hi", "start": 0.0, "end": 0.5}, {"text": "you", "start": 0.5, "end": 1.0}]
    items = [
        Item("1", "timestamps", "?", (), {"slots": slots, "level": "word"}, {}),
        Item("2", "timestamps", "?", (), {"slots": slots, "level": "word"}, {}),
    ]
    rows = said(**{"1": "[0.10]hi[0.50][0.50]you[1.10]", "2": "hi you"})
    strict = score_items("timestamps", items, rows)["strict"]
    assert strict["aas_slot_ms"] == pytest.approx(50)
    assert strict["aas_token_ms"] == pytest.approx(100)
    assert strict["bias_ms"] == pytest.approx(50)
    assert (strict["coverage"], strict["unparsed_share"]) == (0.5, 0.5)

    heard = [{"text": "Rain", "start": 0.0, "end": 4.0}, {"text": "dog", "start": 1.0, "end": 2.0}]
    item = Item("1", "events", "?", (), {"events": heard}, {})
    rows = said(**{"1": "0.1 - 4.5: rain\n1.0 - 2.0: a cat"})
    result = score_items("events", [item], rows)
    assert result["strict"]["event_f1"] == 0.5
    assert result["strict"]["any_label"]["event_f1"] == 1
    assert result["strict"]["miou"] == pytest.approx(3.9 / 4.5 / 2)
    assert (result["strict"]["r@0.5"], result["strict"]["event_f1_macro"]) == (0.5, 0.5)
    assert result["official"]["event_f1_macro"] == 1  # sed_eval leaves out what was never said

    item = Item("1", "caption", "?", (), {"gender": "male", "tone": "calm and warm"}, {})
    rows = said(**{"1": '{"gender": "Male", "tone": "warm"}'})
    judged = [{"id": "1", "scores": {"gender": 5, "tone": 3}}]
    result = score_items("caption", [item], rows, judgements=judged)
    assert result["strict"]["fields"] == {"mean": 0.75, "gender": 1, "tone": 0.5}
    assert result["official"]["judged"] == {"mean": 4, "gender": 5, "tone": 3}


def test_the_world():
    pytest.importorskip("whisper_normalizer", reason="English needs the extra `evaluate`")

    def asked(name, task, kind, reference, **group):
        return Item(name, kind, "?", (), reference, {"task": task, **group})

    items = [
        asked("1", "choice_letter", "choice", {"choices": ["a", "b"], "answer": "b"}),
        asked("2", "time_when", "open", {"answer": "1.00 - 2.00"}),
        asked("3", "tempo", "open", {"answer": "100"}),
        asked("4", "count", "open", {"answer": "3"}),
        asked("5", "caption", "caption", {"sources": [["rain"], ["man", "male"]]}),
        asked("6", "asr", "asr", {"text": "hi you"}, language="en", order="random"),
        asked("7", "asr", "asr", {"text": "hi you"}, language="en", order="grammatical"),
    ]
    answers = ["B", "1.1 - 2.1 s", "<think>98?</think>98", "2", "A man talks.", "hi", "hi you"]
    rows = [{"id": str(i), "raw_output": a} for i, a in enumerate(answers, 1)]
    result = score_items("world", items, rows)
    strict = result["strict"]
    assert {
        name: strict[name]
        for name in (
            "choice_accuracy",
            "time_accuracy",
            "tempo_accuracy",
            "open_accuracy",
            "wer",
            "sources_named",
        )
    } == {
        "choice_accuracy": 100,
        "time_accuracy": 100,
        "tempo_accuracy": 100,
        "open_accuracy": 0,
        "wer": 25,
        "sources_named": 0.5,
    }
    assert "accuracy" not in strict
    assert {k: v["strict"]["wer"] for k, v in result["by"]["order"].items()} == {
        "random": 50,
        "grammatical": 0,
    }
    assert result["by"]["task"]["count"]["strict"]["open_accuracy"] == 0


# --- files ---------------------------------------------------------------------------------------


def test_reading_predictions(tmp_path):
    file = tmp_path / "p.jsonl"
    failed = {"id": "8", "raw_output": None}
    whole = [{"id": 7, "raw_output": "x"}, {"raw_output": "y"}, ["no"], failed]
    cut = '{"id": "9", "raw_output": "你'.encode()[:-1]
    file.write_bytes("\n".join(map(json.dumps, whole)).encode() + b"\n\nnonsense\n" + cut)
    rows, problems = read_predictions(file)
    assert [row["id"] for row in rows] == ["7", "8"]
    assert len(problems) == 4
    assert [":2: no id" in problems[0], "is a list; expected a JSON object" in problems[1]] == [
        True,
        True,
    ]
    assert [f"{file}:6" in problems[2], "half-written" in problems[3]] == [True, True]

    table = [
        {"id": "1", "model_output": "A", "answer": "gold"},
        {"id": "2", "answer": "gold"},
        {"id": "3", "model_output": None},
    ]
    file.write_text(json.dumps(table))
    rows, problems = read_predictions(file)
    assert not problems
    found, _ = by_id(rows)
    assert {k: v["raw_output"] for k, v in found.items()} == {"1": "A", "3": None}  # never gold
    assert found["1"]["official_key"] == "model_output"
    assert [row.get("answer") for row in rows] == ["A", None, None]
    with pytest.raises(InputError, match="no such file"):
        read_predictions(tmp_path / "none.jsonl")

    twice = [{"id": "1", "raw_output": None}, *said(**{"1": "a"}), *said(**{"1": "b"})]
    found, problems = by_id(twice)
    assert found["1"]["raw_output"] == "a"
    assert len(problems) == 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"id": "1", "raw_output": ["x"]}', ":1: 1: raw_output is a list"),
        ('{"id": "1", "raw_output": 5}', ":1: 1: raw_output is a number"),
        ('{"id": "1", "raw_output": "x", "meta": null}', ":1: 1: meta is null"),
        ('{"id": "1", "raw_output": "x", "thinking": {}}', ":1: 1: thinking is an object"),
        ('{"id": "1", "raw_output": "x", "audio_seconds": "x"}', ":1: 1: audio_seconds is text"),
        ('{"id": {"a": 1}, "raw_output": "x"}', ":1: the id is an object"),
        ('{"id": true, "raw_output": "x", "error": false}', ":1: True: error is true or false"),
        ('{"id": "1", "response": [1]}', ":1: response is a list"),
        (
            '{"id": "1", "raw_output": ' + "9" * 5000 + "}",
            ":1: not usable JSON (an integer of thousands",
        ),
        ('{"id": "1", "raw_output": ' + "[" * 100_000, ":1: not usable JSON (it nests too deeply"),
        (b'{"id": "caf\xe9", "raw_output": "x"}', ":1: not valid UTF-8"),
        ("42", ":1: is a number; expected a JSON object"),
    ],
)
def test_damaged_predictions_are_one_line_each(tmp_path, row, said):
    file = tmp_path / "p.jsonl"
    row = row if isinstance(row, bytes) else row.encode()
    file.write_bytes(row + b'\n{"id": "2", "raw_output": "x"}\n')
    rows, (problem,) = read_predictions(file)
    assert [one["id"] for one in rows] == ["2"]
    assert problem.startswith(f"{file}{said}")
    assert len(problem) < 500


def test_judgements_are_checked(tmp_path):
    rows = [
        {"id": "a", "scores": {"tone": 5}},
        {"id": "b", "scores": None, "error": "x"},
        {"id": "c", "scores": {"tone": 6}},
        {"id": "d", "scores": {"tone": True}},
        {"id": "e", "scores": [1]},
        {"id": "f", "scores": {}},
        {"id": "g", "scores": {"t": 2.5}},
    ]
    fit, problems = read_judgements(lines(tmp_path / "j.jsonl", rows))
    assert [row["id"] for row in fit] == ["a", "b"]
    assert [problem.split(": ")[1] for problem in problems] == [*"cdefg"]


def test_what_was_asked():
    """The largest --limit of several runs counts; a prediction without one means all items."""
    rows = [{"id": "1", "raw_output": "A", "meta": {"limit": n}} for n in (1, 3, 2)]
    assert asked(ITEMS, rows) == ITEMS[:3]
    assert asked(ITEMS, [*rows, {"id": "1", "raw_output": "A", "meta": {}}]) is ITEMS
    assert asked(ITEMS, said(**{"1": "A"})) is ITEMS
    assert asked(ITEMS, [{"id": "1", "raw_output": "A", "meta": {"limit": -1}}]) is ITEMS
    assert asked(ITEMS, []) is ITEMS


def test_words_of_scripts_with_marks_and_characters_of_scripts_without_spaces():
    """One wrong vowel sign is one wrong word; the score says which units it counts in a row."""
    texts = {"hi": ("किताब", "कीताब"), "ta": ("மீன்", "மான்"), "th": ("สวัสดี ครับ", "สวัสดี")}
    items = [
        Item(code, "asr", "?", (), {"text": text}, {"language": code})
        for code, (text, _) in texts.items()
    ]
    answers = said(**{code: answer for code, (_, answer) in texts.items()})
    result = score_items("asr", items, answers)
    by = {code: one["strict"] for code, one in result["by"]["language"].items()}
    for code, letters in (("hi", 5), ("ta", 4)):
        assert (by[code]["wer"], by[code]["reference_words"]) == (100, 1)
        assert (by[code]["substitutions"], by[code]["rows_in_words"]) == (1, 1)
        assert by[code]["cer"] == pytest.approx(100 / letters)
        assert by[code]["rows_in_characters"] == 0
    # Spaces in Thai, which are optional, do not count.
    assert (by["th"]["reference_words"], by["th"]["deletions"]) == (10, 4)
    assert by["th"]["cer"] == by["th"]["wer"] == 40
    assert (by["th"]["rows_in_characters"], by["th"]["rows_in_words"]) == (1, 0)
    assert "characters" in result["counted"]["wer"]


def test_what_is_read_is_not_written_over(tmp_path, capsys):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(DATA))
    file = lines(tmp_path / "p.jsonl", said(q0="A", q1="B", q2="A"))
    (tmp_path / "link.json").symlink_to(file)
    before = data.read_bytes(), file.read_bytes()
    asked = ("--benchmark", "mmau", "--data", data, "--predictions", file)
    for output in (data, file, tmp_path / "link.json"):
        for verb in (score, official_files):
            words = [str(word) for word in (*asked, "--output", output)]
            assert command.run(verb.main, words) == 2
            assert f"{output}: is the output and also an input" in capsys.readouterr().err
    assert (data.read_bytes(), file.read_bytes()) == before
    assert run(*asked, "--output", tmp_path / "s.json") == 0
    scores = ["--scores", str(tmp_path / "s.json"), "--output"]
    page = str(tmp_path / "page.html")
    for words in ([*scores, scores[1]], [*scores, page, "--markdown", page]):
        assert command.run(report.main, words) == 2


def test_predictions_of_two_settings_are_named(tmp_path):
    metas = [{"model": "a", "decoding": {"seed": 0}, "code_version": str(n)} for n in range(3)]
    rows = [
        row | {"meta": meta} for row, meta in zip(said(q0="A", q1="B", q2="A"), metas, strict=True)
    ]
    items = [choice_item(f"q{n}", "A") for n in range(3)]
    assert score_items("mmau", items, rows)["problems"] == []
    rows[2]["meta"] = {**metas[2], "model": "b"}
    (problem,) = score_items("mmau", items, rows)["problems"]
    assert problem.endswith('several settings: model "a" (2), "b" (1)')


def test_an_old_score_outlives_a_failure(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(DATA))
    file = lines(tmp_path / "p.jsonl", said(q0="A", q1="B", q2="A"))
    output = tmp_path / "s.json"
    output.write_text("old")
    options = ("--benchmark", "mmau", "--data", data, "--predictions", file, "--output", output)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run(*options) == 1
    assert "s.json: not written: the disk is full" in capsys.readouterr().err
    assert output.read_text() == "old"
    assert not list(tmp_path.glob(".*"))
    assert run(*options) == 0
    assert json.loads(output.read_text())["n"] == 3


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not here")
def test_the_case_of_two_wrong_vowel_signs(tmp_path):
    options = (
        "--benchmark",
        "asr",
        "--data",
        CASES / "ref.jsonl",
        "--predictions",
        CASES / "predictions.jsonl",
        "--output",
        tmp_path / "s.json",
    )
    assert run(*options) == 0
    strict = json.loads((tmp_path / "s.json").read_text())["strict"]
    assert (strict["wer"], strict["reference_words"]) == (100, 2)


DATA = [
    {
        "id": f"q{i}",
        "question": "?",
        "choices": ["a dog", "a cat"],
        "answer": answer,
        "audio_id": f"{i}.wav",
        "audio_path": f"{i}.wav",
        "task": "sound",
        "difficulty": "easy",
        "choice_a": "a dog",
        "choice_b": "a cat",
        "answer_gt": answer,
    }
    for i, answer in enumerate(["a dog", "a cat", "a dog"])
]


def run(*argv: object) -> int:
    return command.run(score.main, [str(word) for word in argv])


def test_from_the_command_line(tmp_path, capsys):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(DATA))
    answers = [*said(q0="A", q1="B", q2="a dog"), {"id": "q2", "raw_output": "b"}]
    answers[2:3] = [{"id": "q2", "raw_output": None, "error": "q2.wav: no such file"}]
    file = lines(tmp_path / "p.jsonl", [*answers[:3], *said(q9="x")])
    with open(file, "a") as appended:
        appended.write('{"id": "q0", "raw')
    options = ("--benchmark", "mmau", "--data", data, "--predictions", file)
    assert run(*options, "--output", tmp_path / "s.json") == 1
    heard = capsys.readouterr()
    for named in ("half-written", "q9: predicted, but no item", "q2: failed: q2.wav: no such"):
        assert named in heard.err
    assert "66.6667" in heard.out
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["counts"] == {
        "predicted": 3,
        "missing": 0,
        "unknown_ids": 1,
        "duplicate_ids": 0,
        "broken_lines": 1,
        "errors": 1,
        "unparsed": 0,
        "truncated_thinking": 0,
        "empty": 0,
        "without_reference": 0,
        "unjudged": 0,
    }
    assert result["strict"]["accuracy"] == pytest.approx(200 / 3)
    assert result["official"]["accuracy"] == pytest.approx(200 / 3)

    lines(file, said(q0="A", q1="B", q2="A"))
    assert run(*options, "--output", tmp_path / "s.json", "--no-rows") == 0
    assert "rows" not in json.loads((tmp_path / "s.json").read_text())
    elsewhere = '{"id": "zz", "raw_output": "A"}'
    for broken, expected in (("", "no predictions at all"), (elsewhere, "other ids")):
        file.write_text(broken)
        assert run(*options, "--output", tmp_path / "s2.json") == 1
        assert expected in capsys.readouterr().err
        assert not (tmp_path / "s2.json").exists()
    assert run(*options) == 2


@pytest.mark.parametrize(
    ("name", "key", "texts"),
    [
        ("mmau", "model_output", ["a dog", "a cat, I hear", "", None]),
        ("mmar", "answer_prediction", ["a dog", "a cat, I hear", "", None]),
        ("mmsu", "response", ["A", "a cat, I hear", None, None]),
    ],
)
def test_exports_score_the_same(tmp_path, name, key, texts):
    rows = [*DATA, {**DATA[0], "id": "q3"}]
    if name == "mmsu":
        rows = [{k: v for k, v in row.items() if k not in ("choices", "answer")} for row in rows]
    data = lines(tmp_path / "data.jsonl", rows)
    answers = said(q0="<think>hm</think>A", q1="a cat, I hear", q2=None)
    file = lines(tmp_path / "p.jsonl", answers)
    output = tmp_path / "official.json"
    options = ["--benchmark", name, "--data", data, "--predictions", file, "--output", output]
    assert command.run(official_files.main, list(map(str, options))) == 1  # q3 is missing
    text = output.read_text()
    written = json.loads(text) if name == "mmau" else [json.loads(x) for x in text.splitlines()]
    assert [row.get(key) for row in written] == texts
    assert [key in row for row in written] == [True, True, True, False]
    assert all(new.items() >= old.items() for new, old in zip(written, rows, strict=True))
    items = load_benchmark(name, data).items
    ours = score_items(name, items, answers)
    theirs = score_items(name, items, read_predictions(output)[0])
    assert ours["official"]["accuracy"] == theirs["official"]["accuracy"]
    assert ours["official"]["rows"] == theirs["official"]["rows"]


def test_mmau_pro_table(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="parquet needs the extra `evaluate`")
    import pyarrow

    rows = [
        {
            "question": "?",
            "answer": "rain",
            "choices": ["rain", "snow"],
            "category": "sound",
            "task_identifier": None,
            "kwargs": None,
            "audio_path": ["1.wav"],
        }
    ] * 3
    data, output = tmp_path / "pro.parquet", tmp_path / "out.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    items = load_benchmark("mmau-pro", data).items
    found, _ = by_id(said(**{"1": "A", "2": "snow"}))
    official = official_files.official_rows("mmau-pro", data, items, found)
    official_files.write("mmau-pro", official, output)
    assert parquet.read_table(output)["model_output"].to_pylist() == ["rain", "snow", None]
    read, _ = read_predictions(output)
    assert [(row["id"], row["raw_output"]) for row in read] == [
        ("1", "rain"),
        ("2", "snow"),
        ("3", None),
    ]


@pytest.mark.skipif(not MINI.exists(), reason="no shared/benchmarks beside the checkout")
def test_mmau_mini_as_released():
    items = load_benchmark("mmau-mini", MINI).items
    answers = [{"id": item.id, "raw_output": item.reference["answer"]} for item in items]
    result = score_items("mmau-mini", items, answers, with_rows=False)
    # Chords named like another choice's letter ("D" of G, A#, D, E) stay unclear.
    assert result["strict"]["accuracy"] == 99.7
    assert result["official"]["accuracy"] == 100
    assert result["n"] == 1000
    assert {k: v["n"] for k, v in result["by"]["task"].items()} == {
        "music": 334,
        "sound": 333,
        "speech": 333,
    }


def test_many_processes_score_alike(tmp_path):
    items = [choice_item(str(i), "a dog", *CHOICES) for i in range(4001)]
    rows = [{"id": item.id, "raw_output": "ABC"[int(item.id) % 3]} for item in items]
    assert score_items("mmau", items, rows, processes=2) == score_items("mmau", items, rows)


def test_scoring_starts_no_jax():
    program = (
        "import sys, moss_audio_jax.evaluate.score, moss_audio_jax.evaluate.official_files;"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
