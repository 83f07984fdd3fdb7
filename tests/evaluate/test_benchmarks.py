"""The files of each benchmark, in its authors' layout, become the same kind of items."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.evaluate.benchmarks import CAPTION_FIELDS, Item, choice_prompt, load_benchmark
from moss_audio_jax.text import tasks
from moss_audio_jax.text.tasks import TRANSCRIBE
from moss_audio_jax.world import rows


def write_json(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


QUESTION = {"id": "q1", "question": "Who speaks?", "choices": ["a man", "a dog"], "answer": "a dog"}
MMAU = {
    **QUESTION,
    "audio_id": "./clips/q1.wav",
    "task": "speech",
    "difficulty": "easy",
    "category": ["Reasoning", "Perception"],
    "sub-category": "Speaker",
}


def test_prompts_are_the_official_ones():
    question, four = "What is it?", ["a", "b", "c", "d"]
    official = f"{tasks.MULTIPLE_CHOICE} What is it?\nA. a\nB. b\nC. c\nD. d"
    assert choice_prompt(question, four) == official
    # Two to eight choices occur; the prompt names their letters in the same words.
    two = choice_prompt(question, four[:2])
    assert two.startswith("Choose the most suitable answer from options A and B for the question ")
    assert "You should output only A or B. Do not" in two
    assert choice_prompt(question, list("abcde")).count("A, B, C, D, and E") == 1
    assert choice_prompt(question, four[:2], "Pick:") == "Pick: What is it?\nA. a\nB. b"


def test_mmau(tmp_path):
    data = write_json(tmp_path / "mmau.json", [MMAU, {**MMAU, "id": "q2", "answer": ""}])
    expected = Item(
        id="q1",
        kind="choice",
        prompt=choice_prompt("Who speaks?", ["a man", "a dog"]),
        audio=(str(tmp_path / "clips/q1.wav"),),
        reference={"choices": ["a man", "a dog"], "answer": "a dog"},
        group={
            "task": "speech",
            "difficulty": "easy",
            "category": ["Reasoning", "Perception"],
            "sub-category": "Speaker",
        },
    )
    for name in ("mmau", "mmau-mini"):
        loaded = load_benchmark(name, data)
        assert (loaded.items[0], loaded.problems) == (expected, [])
        assert loaded.items[1].reference["answer"] is None  # the test set's are not published
    elsewhere = load_benchmark("mmau", data, "/audio", prompt="Choose.", limit=1).items
    assert [item.audio for item in elsewhere] == [("/audio/clips/q1.wav",)]
    assert elsewhere[0].prompt == "Choose. Who speaks?\nA. a man\nB. a dog"


def test_mmar_and_mmsu(tmp_path):
    row = {**QUESTION, "audio_path": "./audio/q.wav", "modality": "mix", "category": "Signal"}
    (item,) = load_benchmark("mmar", write_lines(tmp_path / "mmar.jsonl", [row])).items
    assert item.audio == (str(tmp_path / "audio/q.wav"),)
    assert item.group == {"category": "Signal", "modality": "mix"}
    assert item.reference == {"choices": ["a man", "a dog"], "answer": "a dog"}

    row = {
        "id": 7,
        "audio_path": "q.wav",
        "question": "Which?",
        "choice_a": "x",
        "choice_b": "y",
        "choice_c": "z",
        "choice_d": None,
        "answer_gt": "z",
        "task_name": "stress",
    }
    (item,) = load_benchmark("mmsu", write_lines(tmp_path / "mmsu.jsonl", [row])).items
    assert item.id == "7"
    assert item.reference == {"choices": ["x", "y", "z"], "answer": "z"}
    assert item.group == {"task_name": "stress"}


def test_mmau_pro(tmp_path):
    pytest.importorskip("pyarrow", reason="parquet needs the extra `evaluate`")
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "question": "Q1",
            "answer": "b",
            "choices": ["a", "b"],
            "category": "music",
            "task_identifier": None,
            "kwargs": None,
            "audio_path": ["1.wav", "2.wav"],
        },
        {
            "question": "Q2",
            "answer": "A long one.",
            "choices": None,
            "category": "open",
            "task_identifier": None,
            "kwargs": None,
            "audio_path": ["3.wav"],
        },
        {
            "question": "Q3",
            "answer": "",
            "choices": None,
            "category": "instruction following",
            "task_identifier": "max words",
            "kwargs": '{"n": 3}',
            "audio_path": ["4.wav"],
        },
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pro.parquet")
    closed, open_, instruction = load_benchmark("mmau-pro", tmp_path / "pro.parquet", "/a").items
    assert closed.audio == ("/a/1.wav", "/a/2.wav")
    assert closed.reference == {"choices": ["a", "b"], "answer": "b"}
    assert (closed.id, closed.kind, closed.group) == ("1", "choice", {"category": "music"})
    assert (open_.kind, open_.prompt) == ("open", "Q2")
    assert open_.reference == {"answer": "A long one."}
    assert instruction.reference == {
        "answer": None,
        "task_identifier": "max words",
        "kwargs": '{"n": 3}',
    }


def test_speech_events_and_captions(tmp_path):
    spoken = {"id": "u", "audio": "u.wav", "text": "hello"}
    words = [{"text": "lo", "start": 0.5, "end": 1}, {"text": "hel", "start": 0, "end": 0.5}]
    row = {**spoken, "dimension": "noise", "language": "en", "words": words}
    data = write_lines(tmp_path / "rows.jsonl", [row])
    (asr,) = load_benchmark("asr", data).items
    assert (asr.prompt, asr.reference) == (TRANSCRIBE["none"], {"text": "hello"})
    assert asr.group == {"dimension": "noise", "language": "en"}
    (timed,) = load_benchmark("timestamps", data).items
    assert timed.prompt == TRANSCRIBE["word"]
    assert timed.reference == {"slots": words[::-1], "level": "word"}

    rows = [{"audio": "e.wav", "events": words}, {"audio": "silent.wav", "events": []}]
    events = load_benchmark("events", write_lines(tmp_path / "events.jsonl", rows)).items
    assert [item.id for item in events] == ["e.wav", "silent.wav"]
    assert events[0].prompt == tasks.EVENTS
    assert [item.reference for item in events] == [{"events": words[::-1]}, {"events": []}]

    fields = dict.fromkeys(CAPTION_FIELDS, "x")
    rows = [{"audio": "c.wav", **fields}, {"audio": "d.wav", "caption": {"age": "old"}}]
    captions = load_benchmark("caption", write_lines(tmp_path / "captions.jsonl", rows))
    assert [item.reference for item in captions.items] == [fields, {"age": "old"}]
    assert all(field in captions.items[0].prompt for field in CAPTION_FIELDS)
    assert len(captions.problems) == 1
    assert ":2: d.wav: no gender, pitch, " in captions.problems[0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": None}, "mmau.json: row 2: no 'question'"),
        ({"audio_id": None}, "row 2: no 'audio_id' or 'audio_path'"),
        ({"choices": ["one"]}, r"row 2: 1 choice\(s\); expected 2 to 26"),
        ({"choices": "one, two"}, "row 2: choices are text; expected a list"),
        ({"id": "q1"}, "items 1 and 2 have the same id 'q1'"),
    ],
)
def test_rows_that_cannot_be_asked(tmp_path, row, words):
    data = write_json(tmp_path / "mmau.json", [MMAU, {**MMAU, "id": "q2", **row}])
    with pytest.raises(InputError, match=words):
        load_benchmark("mmau", data)


def test_odd_answers_are_named_and_kept(tmp_path):
    rows = [{**MMAU, "answer": "a cat"}, {**MMAU, "id": "q2", "choices": ["a dog", "a dog"]}]
    loaded = load_benchmark("mmau", write_json(tmp_path / "mmau.json", rows))
    assert len(loaded.items) == 2
    assert loaded.problems == [
        f"{tmp_path}/mmau.json: row 1: q1: the answer 'a cat' is not among the choices",
        f"{tmp_path}/mmau.json: row 2: q2: the answer 'a dog' is among the choices twice",
    ]


def test_bad_use(tmp_path):
    data = write_json(tmp_path / "mmau.json", [MMAU])
    for options, words in [
        ({"limit": 0}, "limit is 0"),
        ({"tasks": ("asr",)}, "are options of world"),
    ]:
        with pytest.raises(UsageError, match=words):
            load_benchmark("mmau", data, **options)
    with pytest.raises(UsageError, match="no benchmark 'mmlu'; expected one of mmau, "):
        load_benchmark("mmlu", data)
    with pytest.raises(InputError, match="is a folder; give the file"):
        load_benchmark("mmau", tmp_path)
    with pytest.raises(InputError, match="no items of mmau"):
        load_benchmark("mmau", write_json(tmp_path / "none.json", []))


# --- the world -----------------------------------------------------------------------------------


def scene(name: str, spoken: bool) -> dict:
    """Labels as described in `world.scenes`, written by hand, without a speech engine."""
    words = [
        {"text": "dogs", "start": 0.5, "end": 0.912},
        {"text": "bark", "start": 1.0, "end": 1.4},
    ]
    sentence = {
        "text": "dogs bark",
        "start": 0.5,
        "end": 1.4,
        "speaker": 0,
        "order": "random",
        "words": words,
    }
    speaker = {
        "voice": "en-1",
        "sex": "female",
        "pitch": "low",
        "speed": "fast",
        "intonation": "flat",
        "accent": "British",
        "whispered": False,
        "f0_hz": 180,
        "words_per_minute": 180,
    }
    event = {"kind": "knock", "start": 2.0, "end": 3.0, "onsets": [2.0, 2.4], "level_db": -3}
    return {
        "version": 1,
        "id": name,
        "seed": 0,
        "split": "test",
        "index": 0,
        "content": "speech",
        "duration": 4.0,
        "language": "en" if spoken else None,
        "speakers": [speaker] if spoken else [],
        "sentences": [sentence] if spoken else [],
        "events": [event],
        "music": None,
        "background": None,
        "room": None,
        "band": None,
        "loudness": {"level": "normal", "rms_dbfs": -20, "peak_dbfs": -6},
        "overlap": [],
        "silence": [],
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    scenes = [scene("test-0-1", True), scene("test-0-2", False)]
    write_lines(folder / "labels.jsonl", scenes)
    made = [row for labels in scenes for row in rows(labels, f"wav/{labels['id']}.wav")]
    write_lines(folder / "rows.jsonl", made)
    return folder


def test_every_row_of_the_world_is_an_item(world):
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    items = load_benchmark("world", world).items
    assert [item.id for item in items] == [row["id"] for row in rows]
    assert [item.prompt for item in items] == [row["conversation"][1]["content"] for row in rows]
    assert {item.audio for item in items} == {
        (str(world / "wav/test-0-1.wav"),),
        (str(world / "wav/test-0-2.wav"),),
    }
    by_task = collections.defaultdict(list)
    for item in items:
        by_task[item.group["task"]].append(item)
    spoken, silent = by_task["asr"]
    assert (spoken.kind, spoken.reference) == ("asr", {"text": "dogs bark"})
    assert (spoken.group["language"], spoken.group["order"]) == ("en", "random")
    assert (silent.kind, silent.reference) == ("open", {"answer": "There is no speech."})
    (words,) = by_task["asr_words"]
    assert words.kind == "timestamps"
    assert words.reference["slots"][0] == {"text": "dogs", "start": 0.5, "end": 0.912}
    assert by_task["asr_sentences"][0].reference["level"] == "sentence"
    timeline = by_task["events"][0].reference["events"]
    assert [(e["text"], e["start"], e["end"]) for e in timeline] == [
        ("woman speaking", 0.5, 1.4),
        ("knocking", 2.0, 3.0),
    ]
    assert by_task["caption_speech_json"][0].reference["gender"] == "female"
    assert by_task["caption_speech"][0].reference == {"sources": [["woman", "female"]]}
    for item in items:
        if item.kind == "choice":
            assert item.reference["answer"] in item.reference["choices"]
            assert item.prompt.count("\nA. ") == 1
    assert {item.kind for item in by_task["choice_letter"]} == {"choice"}
    reasoning = [item for item in items if item.group["task"].startswith("reason_")]
    assert reasoning
    assert not any("<think>" in item.reference["answer"] for item in reasoning)


def test_a_part_of_the_world(world):
    every = [item.id for item in load_benchmark("world", world).items]
    drawn = [item.id for item in load_benchmark("world", world, per_scene=3).items]
    assert collections.Counter(name.split("/")[0] for name in drawn) == {
        "test-0-1": 3,
        "test-0-2": 3,
    }
    assert drawn == [name for name in every if name in drawn]
    more = [item.id for item in load_benchmark("world", world, per_scene=5).items]
    assert set(drawn) < set(more)
    some = load_benchmark("world", world, tasks=("asr", "events")).items
    assert {item.group["task"] for item in some} == {"asr", "events"}
    with pytest.raises(UsageError, match="no task 'sing'"):
        load_benchmark("world", world, tasks=("sing",))
    with pytest.raises(UsageError, match="rows of world contain their prompts"):
        load_benchmark("world", world, prompt="What?")
    with pytest.raises(InputError, match="expected the folder"):
        load_benchmark("world", world / "rows.jsonl")


def test_items_are_had_without_jax(world):
    script = (
        "import sys; from moss_audio_jax.evaluate.benchmarks import load_benchmark; "
        f"assert load_benchmark('world', {str(world)!r}).items; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
