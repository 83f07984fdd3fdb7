"""MECAT: its files become items, predictions its package's files; its scores join ours.

tests/oracle/test_mecat.py compares with the package; here a stand-in notes how it is called.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from moss_audio_jax import command
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.evaluate import mecat, official_files, report, score
from moss_audio_jax.evaluate.benchmarks import load_benchmark
from moss_audio_jax.evaluate.judge import question

SUBTASKS = ("long", "short", "speech", "music", "sound", "environment")


def clip(subset: str) -> dict:
    texts = {name: [f"{name} of a dog", f"{name} with rain", "x"] for name in SUBTASKS}
    return {f"{subset}_clip": {**texts, "domain": subset}}


@pytest.fixture
def captions(tmp_path) -> Path:
    folder = tmp_path / "captions"
    folder.mkdir()
    for subset in mecat.SUBSETS:
        packed = gzip.compress((json.dumps(clip(subset)) + "\n").encode())
        (folder / f"{subset}.jsonl.gz").write_bytes(packed)
    return folder


@pytest.fixture
def questions(tmp_path) -> Path:
    row = {"category": "direct_perception", "difficulty": "basic", "question": "What?"}
    file = tmp_path / "00A.jsonl"
    rows = [{f"k{i}": {**row, "answer": "A dog barks.", "domain": "00A"}} for i in range(3)]
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return file


def test_captions_are_asked_where_the_package_scores_them(captions):
    items = load_benchmark("mecat-caption", captions, "/audio").items
    asked = {
        subset: [item.group["subtask"] for item in items if item.group["domain"] == subset]
        for subset in mecat.SUBSETS
    }
    whole = ["content_long", "content_short", "environment"]
    assert asked["000"] == whole
    assert asked["S00"] == [*whole[:2], "pure_speech", whole[2]]
    assert asked["0M0"] == [*whole[:2], "pure_music", whole[2]]
    assert asked["00A"] == [*whole[:2], "pure_sound", whole[2]]
    for subset in ("0MA", "S0A", "SM0", "SMA"):  # also speech of clips without speech
        assert asked[subset] == [*whole[:2], "mixed_speech", "mixed_music", "mixed_sound", whole[2]]
    first = items[0]
    assert (first.id, first.kind, first.audio) == (
        "000_clip/long",
        "open",
        ("/audio/000_clip.flac",),
    )
    assert first.prompt == "Listen to this audio and describe it in 1-2 sentences"
    assert first.reference == {"answer": ["long of a dog", "long with rain", "x"]}
    truth = question(first, "a dog")[0].partition("Right answer:\n")[2]
    assert truth.startswith("long of a dog\nlong with rain\nx\n\n")
    same = load_benchmark("mecat-caption", captions, prompt="Describe it.").items
    assert {item.prompt for item in same} == {"Describe it."}


def test_questions(questions):
    items = load_benchmark("mecat-qa", questions).items
    assert [(item.id, item.prompt) for item in items] == [
        ("k0", "What?"),
        ("k1", "What?"),
        ("k2", "What?"),
    ]
    assert items[0].audio == (str(questions.parent / "k0.flac"),)
    assert items[0].reference == {"answer": ["A dog barks."]}
    groups = {"subtask": "direct_perception", "domain": "00A", "difficulty": "basic"}
    assert items[0].group == groups
    with pytest.raises(UsageError, match="leave --prompt out"):
        load_benchmark("mecat-qa", questions, prompt="Say")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b"{}", "expected references of MECAT, 000.jsonl.gz to SMA.jsonl.gz"),
        ("SMA.jsonl.gz", b"{}", "SMA.jsonl.gz: not UTF-8 text packed by gzip"),
        ("SMA.jsonl.gz", gzip.compress(b'{"k": 1}', mtime=0)[:-9], "not UTF-8 text packed by gzip"),
        ("SMA.jsonl", b'{"k": 1}', "SMA.jsonl:1: k is a number; expected an object"),
        ("SMA.jsonl", b'{"k": {"short": "x"}}', "SMA.jsonl:1: no 'long'"),
        ("SMA.jsonl", b'{"k": {"long": []}}', "SMA.jsonl:1: long has no texts"),
        ("SMA.jsonl", b'{"k": {"long": [null]}}', "SMA.jsonl:1: long is null; expected text"),
    ],
)
def test_files_that_are_no_references(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_benchmark("mecat-caption", tmp_path / name)


def answered(path: Path, items, skip=()) -> Path:
    """Predictions that say the second reference of each caption."""
    rows = [
        {"id": item.id, "raw_output": f"<think>hm</think>{item.reference['answer'][1]}"}
        for item in items
        if item.id not in skip
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(verb, *words) -> int:
    return command.run(verb.main, list(map(str, words)))


def test_predictions_in_the_form_of_the_package(captions, questions, tmp_path, capsys):
    items = load_benchmark("mecat-caption", captions).items
    said = answered(tmp_path / "p.jsonl", items, skip=("000_clip/long",))
    options = ["--benchmark", "mecat-caption", "--data", captions, "--predictions", said]
    assert run(official_files, *options, "--output", tmp_path / "out") == 1  # one is missing
    told = capsys.readouterr().err
    assert "no prediction for 000_clip/long" in told
    files = [str(tmp_path / "out" / f"{name}.jsonl") for name in SUBTASKS]
    assert f"python -m mecat.evaluate --prediction {' '.join(files)} --task caption" in told
    written = [[json.loads(line) for line in Path(file).read_text().splitlines()] for file in files]
    assert [len(rows) for rows in written] == [7, 8, 5, 5, 5, 8]
    assert written[2][0] == {"0MA_clip": "speech with rain"}

    items = load_benchmark("mecat-qa", questions).items
    rows = [{"id": "k0", "raw_output": None}, {"id": "k1", "raw_output": "None"}]
    said.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--benchmark", "mecat-qa", "--data", questions, "--predictions", said]
    assert run(official_files, *options, "--output", tmp_path / "qa") == 1
    (file,) = (tmp_path / "qa").iterdir()
    assert file.name == "answers.jsonl"
    assert [json.loads(x) for x in file.read_text().splitlines()] == [{"k0": ""}, {"k1": "None"}]


def scored(tmp_path, benchmark, data, said, *words):
    output = tmp_path / "score.json"
    options = ["--benchmark", benchmark, "--data", data, "--predictions", said, "--output", output]
    code = run(score, *options, *words)
    return code, json.loads(output.read_text()) if output.exists() else None


def test_without_an_encoder_the_other_scores_come(questions, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(mecat.ENCODER_KEY, raising=False)
    said = tmp_path / "p.jsonl"
    rows = [{"id": "k0", "raw_output": "A dog barks"}, {"id": "k1", "raw_output": "dog sits"}]
    said.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = tmp_path / "j.jsonl"
    judged.write_text('{"id": "k0", "scores": {"answer": 4}}\n')
    code, result = scored(tmp_path, "mecat-qa", questions, said, "--judgements", judged)
    assert code == 1  # k2 is missing, and so wrong
    assert result["strict"]["word_f1"] == pytest.approx((1 + 2 / 5 + 0) / 3)
    assert result["official"]["judged"]["mean"] == 4
    assert "accuracy" not in result["official"]
    assert result["counts"]["unjudged"] == 0
    told = capsys.readouterr().err
    assert told.count("text encoder") == 1
    assert "note: no DATE and FENSE, which need a text encoder: see --text-encoder\n" in told


PACKAGE = """
import csv, json, os, sys
argv = sys.argv[1:]
at = lambda name: argv[argv.index(name) + 1]
files = argv[argv.index("--prediction") + 1 : argv.index("--task")]
assert os.path.exists("echecker_clotho_audiocaps_base.ckpt"), os.getcwd()
assert os.environ["FENSE_DATA"] == os.getcwd()
assert all(os.environ[f"{name}_OFFLINE"] == "1" for name in ("HF_HUB", "TRANSFORMERS"))
assert os.path.isabs(at("--reference_dir"))
if os.path.exists("broken"):
    sys.exit("cannot load bert")
counts = [len(open(file).readlines()) for file in files]
names = ["content_long", "content_short", "pure_speech", "mixed_speech", "environment"]
rows = [(name, count, 0.25, 0.5) for name, count in zip(names, [*counts[:2], 0, 5, counts[5]])]
with open(os.path.join(at("--output_dir"), "evaluation_results_1.csv"), "w") as file:
    csv.writer(file).writerows(
        [("subtask", "num_samples", "fense", "date"), *rows, ("score_caption", "", 0.3, 0.4)]
    )
"""


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A stand-in for the package; returns the folder of an encoder."""
    folder = tmp_path / "site"
    for name, text in (
        ("mecat/__init__.py", ""),
        ("mecat/evaluate.py", PACKAGE),
        ("mecat-1.1.0.dist-info/METADATA", "Metadata-Version: 2.4\nName: mecat\nVersion: 1.1.0\n"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    encoder = tmp_path / "encoder"
    for part in (
        "paraphrase-TinyBERT-L6-v2/modules.json",
        "echecker_clotho_audiocaps_base.ckpt",
        "bert-base-uncased/config.json",
    ):
        (encoder / part).parent.mkdir(parents=True, exist_ok=True)
        (encoder / part).touch()
    return encoder


def test_scores_of_the_package_join_ours(captions, package, tmp_path, capsys, monkeypatch):
    items = load_benchmark("mecat-caption", captions).items
    said = answered(tmp_path / "p.jsonl", items)
    monkeypatch.setenv(mecat.ENCODER_KEY, str(package))
    code, result = scored(tmp_path, "mecat-caption", captions, said)
    assert code == 0
    assert result["by"]["subtask"]["environment"]["official"] == {"date": 50, "fense": 25}
    assert "date" not in result["by"]["subtask"]["pure_speech"]["official"]
    # The package counts a subtask without predictions as 0 in its mean.
    assert "date" not in result["official"]
    assert (
        "note: no DATE and FENSE over all subtasks, because pure_speech" in capsys.readouterr().err
    )
    inputs = result["inputs"]
    assert (inputs["mecat"], inputs["text_encoder"]) == ("1.1.0", str(package))
    assert result["strict"]["word_f1"] == 1

    page = tmp_path / "report.md"
    words = ["--scores", tmp_path / "score.json", "--output", tmp_path / "r.html"]
    assert run(report, *words, "--markdown", page) == 0
    text = page.read_text()
    assert "## MECAT: captions and questions" in text
    assert "| environment | 8 | DATE, % | 50.0 |" in text


def test_an_encoder_that_is_not_whole(captions, package, tmp_path, capsys, monkeypatch):
    said = answered(tmp_path / "p.jsonl", load_benchmark("mecat-caption", captions).items)

    def told(*words):
        code, result = scored(tmp_path, "mecat-caption", captions, said, *words)
        assert (code, result) == (1, None)
        return capsys.readouterr().err

    (package / "broken").touch()
    text = told("--text-encoder", package)
    assert f"error: {package}: mecat.evaluate failed with exit code 1" in text
    with monkeypatch.context() as without:
        without.delenv("PYTHONPATH")
        without.setattr(sys, "path", [])  # where installed packages are looked up
        assert "error: DATE and FENSE need the package mecat: pip install" in told(
            "--text-encoder", package
        )
    (package / "bert-base-uncased/config.json").unlink()
    text = told("--text-encoder", package)
    assert f"error: {package}: no bert-base-uncased/config.json; expected the text encoder" in text
    assert "Nothing is downloaded" in text
    options = ["--benchmark", "mmar", "--data", captions, "--predictions", said]
    options += ["--output", tmp_path / "s.json", "--text-encoder", package]
    assert run(score, *options) == 2
    assert "--text-encoder is for mecat-caption and mecat-qa" in capsys.readouterr().err
