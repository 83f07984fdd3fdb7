"""The verb from files to rows: whole runs, shards, kills, unusable inputs."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import annotate_runs as runs
import numpy as np
import pytest
import soundfile
from tiny_model import AUDIO_ID

from moss_audio_jax import cli
from moss_audio_jax.annotate import merge, pipeline, source, speech, tasks
from moss_audio_jax.annotate.record import SCHEMA, schema_problems
from moss_audio_jax.annotate.sound import clause
from moss_audio_jax.audio import load_audio
from moss_audio_jax.audio.lengths import mel_frames
from moss_audio_jax.data.records import parse_row
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.text import load_tokenizer
from moss_audio_jax.text.prompt import build_conversation
from moss_audio_jax.text.timestamps import parse
from tools.make import toy

TELLS_OF_ALL = ("segments.jsonl", "rows.jsonl", "dropped.jsonl", "manifest.json", "index.html")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(folder of four clips, the content of each, OUT of one run over them)."""
    folder = tmp_path_factory.mktemp("corpus")
    truth = {f"clip{i}.wav": runs.write_clip(folder / "in", f"clip{i}", i) for i in range(4)}
    runs.run(folder / "in", folder / "out")
    return folder / "in", truth, folder / "out"


def test_records_cover_every_file_and_tell_what_is_there(corpus):
    _, truth, out = corpus
    records, _ = runs.checked(out)
    for name, told in truth.items():
        own = [r for r in records if r["audio"].endswith(name)]
        assert own[0]["start"] == 0
        assert own[-1]["end"] == pytest.approx(told["seconds"], abs=0.001)
        assert all(a["end"] == b["start"] for a, b in itertools.pairwise(own))
        found = [(e["label"], e["start"], e["end"]) for r in own for e in r["events"]]
        for event in told["events"]:
            assert any(
                label == event["label"] and abs(start - event["start"]) < 0.05
                for label, start, _ in found
            )
        assert {label for label, _, _ in found} == {e["label"] for e in told["events"]}
        (spoken,) = [r for r in own if r["transcript"]]
        assert spoken["start"] - 0.3 < told["voice"][0] < spoken["end"]
        assert [w["text"] for w in spoken["words"]] == list(runs.VOICE)
        assert spoken["wer_agreement"] == 0
        assert spoken["speakers"][0]["pitch_hz"] == pytest.approx(130, rel=0.05)
        assert '"hello there my friend"' in spoken["captions"]["speech"]
        # A clip is a part of the source.
        wav, rate = soundfile.read(out / spoken["clip"], dtype="float32")
        whole = load_audio(spoken["audio"])
        first = round(spoken["start"] * rate)
        np.testing.assert_allclose(wav, whole[first : first + len(wav)], atol=2**-14)


def test_rows_are_what_training_reads(corpus, tmp_path):
    _, _, out = corpus
    records, rows = runs.checked(out)
    toy.write_byte_tokenizer(tmp_path)
    ids = {f"audio_{name}_id": AUDIO_ID + i for i, name in enumerate(("token", "start", "end"))}
    (tmp_path / "processor_config.json").write_text(json.dumps(ids))
    tokenizer = load_tokenizer(tmp_path)
    by_clip = {record["clip"]: record for record in records}
    texts = set()
    for row in rows:
        parsed = parse_row(json.dumps(row).encode())
        assert (out / parsed.clips[0]).is_file()
        record = by_clip[parsed.clips[0]]
        frames = mel_frames(soundfile.info(out / parsed.clips[0]).frames)
        said = build_conversation(tokenizer, parsed.messages, [frames])
        learned = said.ids[said.answer_mask]
        assert tokenizer.decode(learned).startswith(row["conversation"][2]["content"])
        assert row["provenance"]["start"] == record["start"]
        texts.add((parsed.clips[0], row["conversation"][1]["content"]))
        answer = row["conversation"][2]["content"]
        if row["task"] == "events":
            segments = parse(answer).segments
            assert all(0 <= s.start <= s.end <= record["end"] - record["start"] for s in segments)
            local = [(round(e["start"] - record["start"], 2), e["label"]) for e in record["events"]]
            assert [(s.start, s.text) for s in segments if "speaking" not in s.text] == local
        if row["task"] == "asr_words":
            assert [s.text for s in parse(answer).segments] == list(runs.VOICE)
        if row["task"] == "count":
            label = re.search('"(.*)"', row["conversation"][1]["content"])[1]
            assert answer == str(sum(e["label"] == label for e in record["events"]))
        if row["task"] == "absent":
            asked = row["conversation"][1]["content"]
            assert not any(e["label"] in asked for e in record["events"])
    assert len(texts) == len(rows)  # no question about a clip is repeated
    count = Counter(row["task"] for row in rows)
    assert count.keys() >= {
        "asr",
        "asr_words",
        "asr_sentences",
        "events",
        "caption_speech",
        "caption_sound",
        "caption",
        "time_what",
        "time_when",
        "word_when",
        "count",
        "present",
        "absent",
        "choice_letter",
    }
    assert count["absent"] <= 1.5 * count["present"] + 1
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["rows"] == len(rows) == sum(manifest["tasks"].values())
    assert manifest["segments"] == len(records)
    page = (out / "index.html").read_text()
    assert page.count("<audio ") == 4
    assert not re.search(r"https?://", page)


def test_files_that_no_run_made_are_kept(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "a.wav", np.zeros(8000), 16_000)
    plain = ["--config.checkpoint=", "--config.speech.systems=()"]

    def annotate(given: str, output: str) -> tuple[int, str]:
        words = ["annotate", "--input", str(tmp_path / given), "--output", str(tmp_path / output)]
        code = cli.main([*words, *plain])
        return code, capsys.readouterr().err

    (tmp_path / "out").mkdir()
    for name in ("index.html", "segments.jsonl", "mine.jsonl"):
        (tmp_path / "out" / name).write_text("mine")
        code, said = annotate("in", "out/mine.jsonl")
        assert code == 1
        assert f"{name}: exists, and is not of a run of annotate" in said
        assert (tmp_path / "out" / name).read_text() == "mine"
        (tmp_path / "out" / name).unlink()
    assert annotate("in", "out/mine.jsonl")[0] == 0
    assert annotate("in", "out/mine.jsonl")[0] == 0  # its own
    code, said = annotate("out/mine.jsonl", "out/mine.jsonl")
    assert code == 2
    assert "is the output and also an input" in said


def test_its_own_clips_are_no_sources(corpus, tmp_path, capsys):
    """The folder of results inside the folder of sound."""
    folder, _, out = corpus
    inside = tmp_path / "in"
    shutil.copytree(folder, inside)
    shutil.copytree(out, inside / "out")
    assert len(source.find(inside)) > 4
    assert [each.id for each in source.find(inside, inside / "out")] == [
        each.id for each in source.find(folder)
    ]
    assert cli.main(["annotate", "--input", str(inside), "--output", str(inside)]) == 2
    assert "is the output and also an input" in capsys.readouterr().err


def test_the_same_file_twice_gives_its_rows_once(corpus, tmp_path):
    folder, _, _ = corpus
    for name in ("a", "b"):
        for suffix in ("wav", "npz"):
            (tmp_path / f"{name}.{suffix}").write_bytes((folder / f"clip0.{suffix}").read_bytes())
    runs.run(tmp_path, tmp_path / "out")
    _, rows = runs.checked(tmp_path / "out")
    assert {row["provenance"]["audio"] for row in rows} == {str(tmp_path / "a.wav")}
    reasons = Counter(n["reason"] for n in runs.lines(tmp_path / "out" / "dropped.jsonl"))
    assert reasons[f"dropped: the same sound as in {tmp_path / 'a.wav'}"] >= len(rows)


def test_a_run_on_sound_that_the_systems_do_not_know_says_so(corpus, tmp_path):
    folder, _, agreed = corpus
    assert json.loads((agreed / "manifest.json").read_text())["warnings"] == []
    config = runs.config()
    runs.expert("two", "plugins:mishear", config)
    summary = runs.run(folder, tmp_path, config)
    (warning,) = summary.warnings
    assert warning.startswith("only 0 of 4 segments with speech have a transcript")
    assert json.loads((tmp_path / "manifest.json").read_text())["warnings"] == [warning]
    assert "only 0 of 4 segments" in (tmp_path / "index.html").read_text()


def test_shards_and_workers_make_one_run(corpus, tmp_path):
    folder, _, out = corpus
    for index in (1, 0):
        runs.run(folder, tmp_path, shard=(index, 2), workers=1 + index)
    names = [f"rows-0000{i}-of-00002.jsonl" for i in range(2)]
    assert all((tmp_path / name).is_file() for name in names)
    assert not (tmp_path / "rows.jsonl").exists()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "records").iterdir()}
    runs.run(folder, tmp_path)
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "records").iterdir()}
    assert after == before  # nothing is made again
    joined = {k: v for k, v in runs.files(tmp_path).items() if "-of-" not in k}
    assert joined == runs.files(out)


def test_killed_and_started_again(corpus, tmp_path, monkeypatch):
    folder, _, out = corpus
    script = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(Path(runs.__file__).parent)!r}]
import annotate_runs as runs
c = runs.config()
runs.expert("two", "plugins:slow", c)
runs.run(Path({str(folder)!r}), Path({str(tmp_path / "out")!r}), c)
"""
    env = os.environ | {"SLOW_AT": str(tmp_path / "at"), "SLOW_GO": str(tmp_path / "go")}
    process = subprocess.Popen([sys.executable, "-c", script], env=env)
    while not (tmp_path / "at").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "out" / "records").glob("*.json"))
    for name in ("SLOW_AT", "SLOW_GO"):
        monkeypatch.setenv(name, env[name])
    (tmp_path / "go").touch()
    c = runs.config()
    runs.expert("two", "plugins:slow", c)
    runs.run(folder, tmp_path / "out", c)
    again = runs.files(tmp_path / "out")
    here = runs.files(out)
    assert again.keys() == here.keys()
    keys = [k for k in here if not k.endswith(".json")]
    assert [again[k] for k in keys] == [here[k] for k in keys]


def test_another_config_makes_everything_again(corpus, tmp_path):
    folder, _, _ = corpus
    sources = source.find(folder)[:1]
    for on, expected in ((0.5, True), (0.99, False)):
        pipeline.annotate(sources, tmp_path, runs.config(sound__on=on, segment__off=0.1))
        records, _ = runs.checked(tmp_path)
        assert any(r["events"] for r in records) == expected


# --- what cannot be used -------------------------------------------------------------------------


def test_bad_files_are_named_and_nothing_else_is_lost(tmp_path, capsys):
    folder = tmp_path / "in"
    runs.write_clip(folder, "good", 1, voice=False)
    (folder / "good.npz").unlink()
    (folder / "empty.wav").touch()
    (folder / "text.mp3").write_text("this is no sound\n" * 99)
    whole = (folder / "good.wav").read_bytes()
    (folder / "cut.wav").write_bytes(whole[: len(whole) // 2])
    noise = np.random.default_rng(0).normal(0, 0.05, (48_000, 8))
    soundfile.write(folder / "eight.wav", noise, 16_000)
    soundfile.write(folder / "fast.wav", noise[:, 0], 96_000)
    soundfile.write(folder / "short.wav", noise[:800, 0], 16_000)
    soundfile.write(folder / "silent.wav", np.zeros(48_000), 16_000)
    soundfile.write(folder / "clipped.wav", np.clip(noise[:, 0] * 60, -1, 1), 16_000)
    names = "\n".join([*(f.name for f in sorted(folder.iterdir())), "missing.wav"])
    (folder / "list.txt").write_text(names)
    code = cli.main(
        [
            "annotate",
            "--input",
            str(folder / "list.txt"),
            "--output",
            str(tmp_path / "o/r.jsonl"),
            "--config.checkpoint=",
            "--config.speech.systems=()",
            "--config.page_clips=2",
        ]
    )
    said = capsys.readouterr().err
    assert code == 1
    page = (tmp_path / "o" / "index.html").read_text()
    assert page.count("<audio ") == 2
    assert "<h1>the first 2 of 6 annotated files</h1>" in page
    assert "4 file(s) could not be annotated" in page
    for name, why in (
        ("empty.wav", "is empty"),
        ("text.mp3", "is not audio"),
        ("cut.wav", "cut short"),
        ("missing.wav", "no such file"),
    ):
        assert re.search(f"error: .*{name}: .*{why}", said), said
        assert re.search(f"<li>[^<]*{name}: [^<]*{why}", page), page
    assert re.search("warning: .*clipped.wav: clipped: .*%", said)
    assert re.search("warning: .*silent.wav: silent", said)
    assert "6 of 10 file(s)" in said
    records = runs.lines(tmp_path / "o" / "segments.jsonl")
    assert all(merge.check(record) == [] for record in records)
    lengths = {}
    for record in records:
        lengths[Path(record["audio"]).stem] = record["end"]
    assert lengths.keys() == {"good", "eight", "fast", "short", "silent", "clipped"}
    assert (lengths["short"], lengths["fast"], lengths["eight"]) == (0.05, 0.5, 3.0)
    (silent,) = [r for r in records if "silent" in r["audio"]]
    assert silent["level"]["silent"]
    assert silent["unified"] == "Silence."
    assert (tmp_path / "o" / "r.jsonl").is_file()
    dropped = runs.lines(tmp_path / "o" / "dropped.jsonl")
    assert sum(n["field"] == "source" for n in dropped) == 4
    assert any("shorter than 0.5 s" in n["reason"] for n in dropped)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--input", "nowhere"), (1, "nowhere: no such file")),
        (("--input", ".", "--shard", "2/2"), (2, "--shard 2/2")),
        (("--input", ".", "--config.speech.nothing=1"), (2, "nothing")),
        (("--input", ".", "--config", "none.py"), (1, "none.py: no such config")),
        (("--input", ".", "--colour", "red"), (2, "--colour")),
    ],
)
def test_bad_use_is_one_line(argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = cli.main(["annotate", "--output", "out", *argv])
    (line,) = capsys.readouterr().err.splitlines()
    assert code == words[0]
    assert words[1] in line
    assert not (tmp_path / "out").exists()


def test_a_folder_tells_what_it_leaves_out(tmp_path):
    for name in ("a.wav", "b.caf", "c.au", "d.mkv", "e.txt", ".f.wav", "g.sox"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    with pytest.warns(UserWarning, match="left out") as told:
        found = source.find(tmp_path)
    assert [Path(s.path).name for s in found] == ["a.wav", "b.caf", "c.au", "d.mkv"]
    link, others = (str(each.message) for each in told)
    assert link == f"{tmp_path}/link: is a link to a folder; left out (give that folder by itself)"
    assert "3 file(s) are not named like sound and are left out: .f.wav, e.txt, g.sox;" in others


def test_a_manifest_of_lines_may_name_any_file(tmp_path):
    names = ["#1.wav", " lead.wav", "trail.wav ", "plain.wav"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "l.txt").write_text("\n".join([*names, "# a comment", "  plain.wav "]))
    assert [Path(s.path).name for s in source.find(tmp_path / "l.txt")] == names


def test_manifests(tmp_path):
    for name in ("a.wav", "b/c.flac", "b/c.wav"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, np.zeros(1600), 16_000)
    found = source.find(tmp_path)
    assert [Path(s.path).name for s in found] == ["a.wav", "c.flac", "c.wav"]
    assert len({s.id for s in found}) == 3
    (tmp_path / "l.txt").write_text("b/c.wav\n\n# a comment\na.wav\n")
    (tmp_path / "l.csv").write_text("n,audio\n1,b/c.wav\n2,a.wav\n")
    (tmp_path / "l.jsonl").write_text('{"audio": "b/c.wav"}\n{"audio": "a.wav"}\n')
    listed = [source.find(tmp_path / f"l.{kind}") for kind in ("txt", "csv", "jsonl")]
    assert listed[0] == listed[1] == listed[2]
    assert [s.path for s in listed[0]] == [str(tmp_path / "b/c.wav"), str(tmp_path / "a.wav")]
    assert {s.id for s in listed[0]} < {s.id for s in found}
    (tmp_path / "bad.jsonl").write_text('{"audio": "a.wav"}\n{"sound": 1}\n')
    with pytest.raises(InputError, match=r"bad\.jsonl, line 2: no audio file named"):
        source.find(tmp_path / "bad.jsonl")
    assert source.read_shard("1/3") == (1, 3)
    with pytest.raises(UsageError):
        source.read_shard("3/3")


# --- pieces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 96_000])
def test_blocks_are_what_load_audio_gives(rate, tmp_path):
    wav = np.random.default_rng(rate).normal(0, 0.1, (3 * rate + 17, 2))
    soundfile.write(tmp_path / "a.wav", wav, rate, subtype="FLOAT")
    with source.Sound(str(tmp_path / "a.wav"), tmp_path) as sound:
        made = np.concatenate(list(sound.blocks()))
        whole = load_audio(tmp_path / "a.wav")
        np.testing.assert_array_equal(made, whole)
        np.testing.assert_array_equal(sound.read(0.5, 1.25), whole[8000:20000])
    assert [f.name for f in tmp_path.iterdir()] == ["a.wav"]


def test_agreement_by_words_and_characters():
    def said(*texts):
        return [{"system": str(i), "text": text} for i, text in enumerate(texts)]

    assert speech.agreement(["we go home now", "we go hole now"]) == 0.25
    assert speech.agreement(["今天天气好", "今天天气"]) == 0.2
    assert speech.agreement(["Hello, there!", "hello there"]) == 0
    assert speech.agreement(["alone"]) is None
    assert speech.choose(said("a b c d", "a b c e"), "en", 0.3, 2)[0] == "a b c d"
    text, rate, why = speech.choose(said("a b", "c d"), "en", 0.3, 2)
    assert (text, rate) == (None, 1.0)
    assert "disagree" in why
    assert "too few transcripts (1/2)" in speech.choose(said("a b", ""), "en", 0.3, 2)[2]
    assert speech.choose(said("", ""), None, 0.3, 2) == (None, 0.0, None)
    # With three, the one nearest to the others.
    near = said("a b c d e f", "a b c d e g", "a b c d e h g")
    assert speech.choose(near, "en", 0.4, 2)[0] == "a b c d e g"


def test_units_and_sentences():
    assert speech.units("Well, hello - 你好。OK") == ["Well,", "hello-", "你", "好。", "OK"]
    assert speech.joined(["你", "好", "ok", "go"]) == "你好 ok go"
    words = [
        {"text": t, "start": s, "end": s + 0.2}
        for t, s in (("hi.", 0.0), ("how", 0.3), ("are", 0.6), ("you", 1.9))
    ]
    assert [s["text"] for s in speech.sentences(words, 0.5)] == ["hi.", "how are", "you"]
    assert (speech.language("你 ok"), speech.language("été"), speech.language("да")) == (
        "zh",
        "en",
        None,
    )


def test_the_schema_finds_what_is_wrong(corpus):
    _, _, out = corpus
    record = runs.lines(out / "segments.jsonl")[0]
    assert schema_problems(record) == []
    assert SCHEMA["required"][:4] == ["id", "audio", "start", "end"]
    for change, words in (
        ({"start": "0"}, "record.start is '0'"),
        ({"start": -1.0}, "expected 0 to"),
        ({"words": [{"text": "a", "start": 0.0}]}, "record.words[0] lacks 'end'"),
        ({"profile": {**record["profile"], "dogs": 1.0}}, "unknown key 'dogs'"),
        ({"profile": {**record["profile"], "speech": 1.2}}, "profile.speech is 1.2"),
        ({"unified": ""}, "record.unified is empty"),
        ({"level": {**record["level"], "silent": 1}}, "expected boolean"),
        ({"wer_agreement": float("nan")}, "nan"),
    ):
        assert any(words in problem for problem in schema_problems(record | change))


def test_the_checker_finds_what_is_wrong(corpus):
    """The checkers report each corruption of a good record or row."""
    _, _, out = corpus
    records, rows = runs.checked(out)
    record = next(r for r in records if r["transcript"])
    heard = next(r for r in records if r["events"])
    event = heard["events"][0]
    late = {**event, "end": heard["end"] + 1}
    for good, change, words in (
        (heard, {"events": [late]}, "outside the segment"),
        (heard, {"events": []}, "has no evidence"),
        (heard, {"unified": "At 99.99 s a bang."}, "99.99 is in no field"),
        (heard, {"unified": "Somebody says hello."}, "no speech"),
        (heard, {"unified": "Music plays."}, "no music"),
        (heard, {"unified": 'It says "boo".'}, "was not said"),
        (heard, {"level": {**heard["level"], "silent": True}}, "silent segment"),
        (heard, {"absent": [event["label"]]}, "both heard and absent"),
        (record, {"words": record["words"][::-1]}, "not in order"),
        (record, {"words": record["words"][1:]}, "differ"),
        (record, {"speakers": []}, "speaker that is not listed"),
    ):
        assert any(words in problem for problem in merge.check(good | change)), words
    missing = heard["absent"][0]
    told = heard | {"unified": f"Then {clause(missing)}."}
    assert any("was not heard" in problem for problem in merge.check(told))
    row = next(row for row in rows if row["task"] == "time_when")
    own = next(r for r in records if r["clip"] == row["conversation"][0]["content"])
    answer = row["conversation"][2]
    spoilt = {**row, "conversation": [*row["conversation"][:2], {**answer, "content": "7.77 - 8"}]}
    assert tasks.check_row(spoilt, own)


def test_repair_takes_out_what_cannot_be(corpus):
    _, _, out = corpus
    records, _ = runs.checked(out)
    record = json.loads(json.dumps(next(r for r in records if r["transcript"])))
    start, end = record["start"], record["end"]
    record["events"] = [
        {"label": "gong", "start": start - 1, "end": start + 0.5, "score": 1.0},
        {"label": "boom", "start": end + 1, "end": end + 2, "score": 1.0},
    ]
    notes = merge.repair(record, lambda a, b: False)
    assert [e["label"] for e in record["events"]] == ["gong"]
    assert record["events"][0]["start"] == start
    assert [why.split(":")[0] for _, why in notes] == ["repaired", "dropped"]
    notes = merge.repair(record, lambda a, b: True)
    assert record["events"] == record["words"] == []
    assert len(notes) == 2
