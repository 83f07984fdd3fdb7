"""Plug-ins that fail in many ways: the checker never finds a contradiction in the output."""

import json
import os
import sys
from pathlib import Path

import annotate_runs as runs
import plugins
import pytest

from moss_audio_jax.annotate import defaults, experts, merge
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.remote import Chat

REQUEST = {
    "clip": "a.flac",
    "audio": "/in/a.wav",
    "start": 2.0,
    "end": 5.0,
    "duration": 3.0,
    "evidence": {"text": "a b c d", "template": "A dog barks."},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for i in range(3):
        runs.write_clip(folder, f"clip{i}", i)
    return folder


def faults():
    found = [(step, fault) for step, bad in plugins.BAD.items() for fault in bad]
    return found + [(step, fault) for step in experts.STEPS for fault in plugins.BAD_ANYWHERE]


@pytest.mark.parametrize(("step", "fault"), faults())
def test_a_bad_reply_is_refused_or_made_safe(step, fault):
    class One:
        def answer(self, requests):
            return [fault] * len(requests)

    ((reply, problem),) = experts.ask(One(), step, [REQUEST])
    if step in ("caption", "unify") and problem is None:  # its words are checked against the record
        record = {
            "start": 2.0,
            "end": 5.0,
            "words": [],
            "sentences": [],
            "speakers": [],
            "music": {},
            "events": [],
        }
        problems = merge.filled(reply["text"], [], record)[1]
        assert problems or reply["text"] in ("It happens.", "{}")
    else:
        assert reply is None
        assert problem
        assert "\n" not in problem


def test_everything_bad_at_once_changes_nothing(clips, tmp_path):
    honest = runs.config()
    runs.run(clips, tmp_path / "honest", honest)
    c = runs.config()
    runs.expert("bad", "plugins:bad", c)
    c.sound.events = c.sound.caption = c.sound.judge = c.unified = c.music.expert = "bad"
    c.speech.diarise = "bad"
    summary = runs.run(clips, tmp_path / "bad", c)
    records, rows = runs.checked(tmp_path / "bad")
    assert not summary.failed
    assert len(rows) == len(runs.lines(tmp_path / "honest" / "rows.jsonl")) > 50
    keys = ("profile", "events", "words", "speakers", "captions", "unified")
    before = runs.lines(tmp_path / "honest" / "segments.jsonl")
    assert [[r[k] for k in keys] for r in records] == [[r[k] for k in keys] for r in before]
    named = runs.lines(tmp_path / "bad" / "dropped.jsonl")
    assert {n["field"] for n in named} >= {"events", "diarise", "unify", "caption", "judge"}
    assert all(n["reason"].startswith(("default: bad: ", "dropped: ")) for n in named)


def test_bad_words_leave_a_transcript_without_times(clips, tmp_path):
    c = runs.config()
    runs.expert("words", "plugins:bad", c)
    runs.run(clips, tmp_path / "out", c)
    records, _ = runs.checked(tmp_path / "out")
    assert any(r["transcript"] for r in records)
    assert not any(r["words"] for r in records)


def test_systems_that_disagree_are_not_kept(clips, tmp_path):
    c = runs.config()
    runs.expert("two", "plugins:bad", c)
    runs.run(clips, tmp_path / "out", c)
    records, rows = runs.checked(tmp_path / "out")
    assert any(r["asr"] for r in records)
    assert not any(r["transcript"] for r in records)
    assert not any(row["task"].startswith("asr_") for row in rows)


def test_a_language_model_writes_and_code_fills_in_the_times(clips, tmp_path):
    c = runs.config()
    runs.expert("model", "plugins:write", c)
    c.unified = c.sound.caption = "model"
    runs.run(clips, tmp_path / "out", c)
    records, _ = runs.checked(tmp_path / "out")
    told = [r for r in records if r["unified"].startswith("In this clip, ")]
    assert len(told) >= len([r for r in records if r["events"] or r["sentences"]]) > 3
    for record in told:
        for event in record["events"]:
            assert f"{event['start']:.2f} - {event['end']:.2f} s" in record["unified"]


def test_a_diarisation_system_says_who_speaks(clips, tmp_path):
    c = runs.config()
    runs.expert("who", "plugins:diarise", c)
    c.speech.diarise = "who"
    c.speech.pause = 0.01  # each word is a sentence
    runs.run(clips, tmp_path / "out", c)
    records, _ = runs.checked(tmp_path / "out")
    spoken = [record for record in records if record["sentences"]]
    assert spoken
    for record in spoken:
        middle = (record["start"] + record["end"]) / 2
        late = [s["start"] + s["end"] > 2 * middle for s in record["sentences"]]
        assert [s["speaker"] for s in record["sentences"]] == list(map(int, late))
        assert {"field": "speakers", "system": "who"} in record["provenance"]


# --- kinds ---------------------------------------------------------------------------------------

ECHO = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    print("loading the model ...")
    print(json.dumps({"id": request["id"], "events": [
        {"label": "gong", "start": 0.5, "end": request["duration"]}]}))
"""


def command(script, timeout=60.0):
    return experts.make(
        "x", {"kind": "command", "target": (sys.executable, "-c", script), "timeout": timeout}
    )


def test_a_command():
    replies = experts.ask(command(ECHO), "events", [REQUEST, REQUEST | {"duration": 2.0}])
    assert [reply["events"][0]["end"] for reply, _ in replies] == [3.0, 2.0]


@pytest.mark.parametrize(
    ("script", "timeout", "words"),
    [
        ("print('no JSON')", 60, "no line of JSON"),
        ("import sys; sys.exit('no GPU')", 60, "exit code 1 no GPU"),
        ("while True: print('x' * 1000)", 60, "wrote more than"),
        ("import time; time.sleep(600)", 0.5, "took longer than 0.5 s"),
        ("print('{\"id\": 0}')", 60, "events is None"),
        ('print(\'{"id": true, "events": []}\')', 60, "no line of JSON"),
        ("print('[' * 100000); print('{\"id\": 0, \"a\": ' + '9' * 5000 + '}')", 60, "no line of"),
    ],
)
def test_a_command_that_fails(script, timeout, words):
    ((reply, problem),) = experts.ask(command(script, timeout), "events", [REQUEST])
    assert reply is None
    assert words in problem


def test_replay_and_endpoint(tmp_path, monkeypatch):
    row = {"audio": "elsewhere/a.wav", "start": 2.0, "end": 5.0, "text": "hi"}
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n")
    replay = experts.make("x", {"kind": "replay", "target": str(tmp_path / "r.jsonl")})
    found = experts.ask(replay, "transcribe", [REQUEST, REQUEST | {"start": 3.0}])
    assert found[0][0]["text"] == "hi"
    assert "no row" in found[1][1]
    asked = []
    monkeypatch.setattr(Chat, "ask", lambda self, prompt: asked.append(prompt) or '{"score": 4}')
    endpoint = experts.make("x", {"kind": "endpoint", "target": "http://x/v1", "model": "m"})
    assert experts.ask(endpoint, "judge", [REQUEST]) == [({"score": 4}, None)]
    assert experts.ask(endpoint, "unify", [REQUEST]) == [({"text": '{"score": 4}'}, None)]
    assert "A dog barks." in asked[0]
    assert "sound cannot be sent" in experts.ask(endpoint, "events", [REQUEST])[0][1]


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ({"kind": "oracle", "target": "x"}, UsageError, "'oracle'; expected entry_point"),
        ({"kind": "command"}, UsageError, "no target"),
        ({"kind": "command", "target": "x", "tiemout": 1}, UsageError, "'tiemout'"),
        ({"kind": "entry_point", "target": "plugins:none"}, InputError, "cannot be imported"),
        ({"kind": "entry_point", "target": "no_such"}, InputError, "cannot be imported"),
        ({"kind": "replay", "target": "/no/such.jsonl"}, InputError, "/no/such.jsonl: no such"),
        ({"kind": "replay", "target": "/dev/zero"}, InputError, "/dev/zero: is not a regular file"),
        ("command", UsageError, "expected {'kind'"),
        ({"kind": "command", "target": "x", "timeout": "soon"}, UsageError, "timeout is 'soon'"),
        ({"kind": "endpoint", "target": "x"}, UsageError, "expected http"),
        ({"kind": "endpoint", "target": "http://x", "key_from": "sk-1"}, UsageError, "key-from is"),
    ],
)
def test_an_expert_that_cannot_be(spec, error, words):
    with pytest.raises(error, match=words):
        experts.make("x", spec)


def test_a_command_is_told_any_file_name_and_may_be_no_program(tmp_path):
    script = (
        "import json, os, sys\n"
        "r = json.loads(sys.stdin.readline())\n"
        "print(json.dumps({'id': 0, 'text': os.fsencode(r['audio']).hex()}))"
    )
    name = b"/in/caf\xe9\n.wav"
    asked = REQUEST | {"audio": os.fsdecode(name)}
    assert experts.ask(command(script), "transcribe", [asked])[0][0]["text"] == name.hex()
    for word in ("/no/such", "a\0b"):
        made = experts.make("x", {"kind": "command", "target": word})
        ((reply, problem),) = experts.ask(made, "transcribe", [REQUEST])
        assert reply is None
        assert problem


def test_settings_are_checked(tmp_path):
    with pytest.raises(UsageError, match=r"speech\.align is 'whisper'"):
        defaults.load(None, ["--config.speech.align=whisper"])
    (tmp_path / "a.py").write_text(
        "from moss_audio_jax.annotate import defaults\n"
        "def get_config():\n    c = defaults.get_config()\n    c.speach = 1\n    return c\n"
    )
    with pytest.raises(UsageError, match="no key speach"):
        defaults.load(str(tmp_path / "a.py"))
    assert defaults.load(None, ["--config.speech.threshold=0.1"]).speech.threshold == 0.1
    example = Path(__file__).parents[2] / "configs" / "annotate.py"
    c = defaults.load(str(example), ["--config.experts.whisper.target=('python', 'mine.py')"])
    made = experts.make("whisper", c.experts.whisper)
    assert made == experts.Command(("python", "mine.py"), 3600.0)
