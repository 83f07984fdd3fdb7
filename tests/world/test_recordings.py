"""Sources of recordings, what only tests may use, and scenes of them; with a voice made here."""

import dataclasses
import importlib.metadata
import itertools
import json

import numpy as np
import pytest
from recordings import buzz, only
from world_helpers import envelope

from moss_audio_jax import command, world
from moss_audio_jax.data.records import encode_record, parse_row
from moss_audio_jax.draw import Draw
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.world import __main__ as verb
from moss_audio_jax.world.recordings import held_out, scenes, sentences, source
from moss_audio_jax.world.recordings.spoken import spoken
from moss_audio_jax.world.recordings.voices import kokoro
from moss_audio_jax.world.sheet import page

TEXTS = tuple(
    f"{first} {second}"
    for first in ("prompt", "message", "number", "code", "page")
    for second in ("alpha", "bravo", "charlie", "delta", "echo", "golf", "hotel", "india")
)


# --- sources -------------------------------------------------------------------------------------


def test_every_source_says_what_it_is():
    found = source.sources()
    assert len({s.name for s in found}) == len(found)
    for one in found:
        assert one.kind in source.KINDS
        assert one.licence
        assert one.origin
        assert isinstance(one.available(), bool)
        assert one.install or one.available()
    assert {s.kind for s in found} >= {"voice", "text"}
    assert any(isinstance(s, source.Text) and s.available() for s in found)


def test_the_table_tells_what_is_missing(monkeypatch, capsys):
    @dataclasses.dataclass(frozen=True)
    class Missing(source.Voice):
        def available(self):
            return False

    gone = Missing("gone", "voice", "CC0", "nowhere", "pip install gone")
    only(monkeypatch, buzz(), gone)
    assert command.run(verb.main, ["--sources"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["buzz"].endswith("here")
    assert lines["gone"].endswith("pip install gone")
    assert "CC0" in lines["gone"]
    with pytest.raises(InputError, match="pip install gone"):
        gone.require()
    assert gone not in source.of_kind("voice")
    with pytest.raises(UsageError, match="no source 'nope'"):
        source.named("nope")


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (lambda: buzz("mine"), None),
        (lambda: (buzz("mine"), buzz("mine too")), None),
        (lambda: buzz("espeak"), "two sources of recordings are called 'espeak'"),
        (lambda: dataclasses.replace(buzz("mine"), kind="smell"), "each of a kind"),
        (lambda: "mine", "expected a Source"),
        (lambda: 1 // 0, "cannot be imported"),
    ],
)
def test_sources_of_other_packages(loaded, message, monkeypatch):
    class Point:
        name = "mine"

        def load(self):
            return loaded()

    real = importlib.metadata.entry_points

    def entry_points(**given):
        return (Point(),) if given == {"group": source.GROUP} else real(**given)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    find = source.sources.__wrapped__  # not the answer of an earlier test
    if message:
        with pytest.raises(InputError, match=message):
            find()
    else:
        assert "mine" in {s.name for s in find()}


# --- what only tests may use ---------------------------------------------------------------------


def voices():
    return [s for s in source.sources() if isinstance(s, source.Voice)]


def test_no_speaker_of_a_test_speaks_in_training():
    """Of every voice, here or not: who may speak depends on no package."""
    for voice in [*voices(), buzz()]:
        split = {name: {s.name for s in voice.speakers(name)} for name in held_out.SPLITS}
        assert not split["test"] & (split["train"] | split["validation"]), voice.name
        assert split["train"] == split["validation"], voice.name
    by_name = {voice.name: voice for voice in voices()}
    assert "rms" in {s.name for s in by_name["flite"].speakers("test")}
    for name in ("asterisk-en", "asterisk-es"):
        assert by_name[name].speakers("test")
        assert not by_name[name].speakers("train")
    with pytest.raises(UsageError, match="no split 'tests'"):
        by_name["flite"].speakers("tests")


def test_the_held_out_style_is_in_no_voice_of_training():
    (voice,) = (v for v in voices() if v.name == "kokoro")
    for split in held_out.SPLITS:
        for speaker in voice.speakers(split):
            weights = kokoro.mixture(speaker.name)
            assert sum(weights.values()) == pytest.approx(1)
            assert min(weights.values()) >= 0
            share = weights.get(kokoro.HELD_OUT_STYLE, 0)
            assert share > 0.5 if split == "test" else share == 0
            assert (weights.get("jm_kumo", 0) > 0.5) == (speaker.sex == "male")


def test_recordings_are_in_one_split():
    names = [f"file {i}" for i in range(2000)]
    parts = {split: held_out.recordings("mine", names, split) for split in held_out.SPLITS}
    assert sorted(itertools.chain(*parts.values())) == sorted(names)
    assert len(parts["train"]) == pytest.approx(1800, abs=60)
    assert held_out.recordings("asterisk-en", names, "test") == tuple(names)
    assert not held_out.recordings("asterisk-en", names, "train")


def test_no_sentence_of_a_test_is_said_in_training():
    said = {
        split: {sentences.sentence(Draw(split, i), split)[0] for i in range(400)}
        for split in held_out.SPLITS
    }
    for one, other in itertools.combinations(held_out.SPLITS, 2):
        assert not said[one] & said[other]
    for split, texts in said.items():
        assert {world.sentence_part(held_out.plain(text)) for text in texts} == {split}
    # What the English prompts say: known by digest, however it is written.
    for text in ("All circuits are busy now.", "all circuits are busy now"):
        assert not any(held_out.sentence_allowed(text, split) for split in held_out.SPLITS)
    assert any(held_out.sentence_allowed("all birds are busy now", s) for s in held_out.SPLITS)


def test_scenes_hold_only_what_their_split_may_use(monkeypatch):
    rows = buzz("rows", own=TEXTS, timed=False)
    only(monkeypatch, buzz(), rows)
    seen = {split: (set(), set(), set()) for split in ("train", "test")}
    for split, (speakers, files, texts) in seen.items():
        for index in range(25):
            labels = scenes.scene(index, split, content="speech").labels
            for origin, sentence in zip(labels["sources"], labels["sentences"], strict=True):
                speakers.add((origin["source"], origin["speaker"]))
                files.add(origin["file"] and sentence["text"])
                if origin["source"] == "buzz":
                    texts.add(sentence["text"])
    for mine, other in zip(seen["train"], seen["test"], strict=True):
        assert not (mine - {None}) & (other - {None})
    assert len(seen["train"][0]) > 10
    assert all(world.sentence_part(text) == "train" for text in seen["train"][2])


# --- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "language", "said"),
    [
        ("Press 1, or 24 (or 105).", "en", "press one or twenty four or one hundred and five"),
        (
            "You\u2019re \u201cin\u201d \u2013 the re-opened line\u2026",
            "en",
            "you're in the re opened line",
        ),
        ("3D audio", "en", None),
        ("2.5 km", "en", None),
        ("10%", "en", None),
        ("dial #", "en", None),
        ("Appuyez sur 1", "fr", None),
        ("C'est le n\u00famero e\u0301t\u00e9.", "fr", "c'est le n\u00famero \u00e9t\u00e9"),
        (
            "\u041d\u0430\u0436\u043c\u0438\u0442\u0435 - \u0441\u0435\u0439\u0447\u0430\u0441!",
            "ru",
            "\u043d\u0430\u0436\u043c\u0438\u0442\u0435 \u0441\u0435\u0439\u0447\u0430\u0441",
        ),
        (" ... ", "en", None),
    ],
)
def test_what_is_said(written, language, said):
    assert spoken(written, language) == said


def test_sentences_are_words_alone():
    for index in range(200):
        text, origin = sentences.sentence(Draw("words", index), "train")
        assert spoken(text) == text
        assert source.named(origin).kind == "text"


# --- scenes --------------------------------------------------------------------------------------


def test_a_scene_is_the_same_each_time_and_has_the_labels_of_the_world(monkeypatch):
    only(monkeypatch, buzz())
    plain = world.scene(3, content="music").labels
    for index in range(12):
        made, again = scenes.scene(index), scenes.scene(index)
        np.testing.assert_array_equal(made.wav, again.wav)
        assert made.labels == again.labels
        assert set(made.labels) == set(plain) | {"sources", "codec"}
        assert made.wav.dtype == np.float32
        assert abs(len(made.wav) - 16_000 * made.labels["duration"]) <= 8  # milliseconds
        assert np.abs(made.wav).max() <= 1
        json.dumps(made.labels)
        spoken_parts = [s for s in made.labels["sources"] if s["part"] == "speech"]
        assert len(spoken_parts) == len(made.labels["sentences"])
        assert len(made.labels["sources"]) == len(made.labels["sentences"]) + len(
            made.labels["events"]
        ) + (made.labels["music"] is not None)


def test_words_are_where_the_sound_is(monkeypatch):
    """After changes of pitch, formants and speed, microphones and codecs."""
    only(monkeypatch, buzz())
    errors, changed = [], 0
    for index in range(40):
        made = scenes.scene(index, content="speech")
        labels = made.labels
        if labels["room"] or labels["background"]:
            continue
        changed += labels["codec"] is not None
        level = envelope(made.wav)
        for sentence in labels["sentences"]:
            for word in sentence["words"]:
                start, end = round(1000 * word["start"]), round(1000 * word["end"])
                near = level[start - 20 : start + 60] > 0.1 * level[start:end].max()
                errors.append(int(np.argmax(near)) - 20)
    assert changed
    assert len(errors) > 60
    assert np.percentile(np.abs(errors), 95) <= 12


def test_rows_of_words_without_times(monkeypatch):
    only(monkeypatch, buzz(timed=False))
    made = scenes.scene(5, content="speech+sound")
    tasks = {row["task"] for row in world.rows(made.labels, "a.wav")}
    assert {"asr", "asr_sentences", "count_words", "speaker_sex"} <= tasks
    assert not tasks & {"asr_words", "word_when", "word_what", "reason_word"}
    row = world.record(made.labels, "a.wav")
    assert not {"words", "tags"} & set(row)
    frames = np.zeros((128, round(100 * made.labels["duration"])), np.float32)
    parsed = parse_row(encode_record(row, [frames]))
    assert parsed.words is None
    assert parsed.tags is None
    asked = next(r for r in world.rows(made.labels, "") if r["task"] == "count_words")
    said = " ".join(s["text"] for s in made.labels["sentences"])
    assert asked["conversation"][2]["content"] == str(len(said.split()))


def test_what_is_unknown_of_a_speaker_is_not_asked(monkeypatch):
    only(monkeypatch, buzz())
    labels = scenes.scene(5, content="speech").labels
    labels = labels | {"speakers": [labels["speakers"][0]]}
    for sentence in labels["sentences"]:
        sentence["speaker"] = 0
    hidden = dict.fromkeys(("pitch", "speed", "intonation", "accent"))
    unknown = labels | {"speakers": [labels["speakers"][0] | hidden]}
    tasks = {row["task"] for row in world.rows(unknown, "a.wav")}
    assert "speaker_sex" in tasks
    assert not tasks & {"speaker_pitch", "speaker_speed", "speaker_tone", "speaker_accent"}
    assert "None" not in json.dumps(world.rows(unknown, "a.wav"))
    known = labels | {"speakers": [labels["speakers"][0] | {"pitch": "low", "speed": "slow"}]}
    tasks = {row["task"] for row in world.rows(known, "a.wav")}
    assert {"speaker_pitch", "speaker_speed"} <= tasks


def test_pitch_is_a_class_only_where_it_is_clear(monkeypatch):
    only(monkeypatch, buzz())
    for index in range(12):
        for speaker in scenes.scene(index, "test", content="speech").labels["speakers"]:
            assert speaker["f0_hz"] == pytest.approx(
                103 if speaker["sex"] == "male" else 200, rel=0.05
            )
            assert speaker["pitch"] == "medium"


def test_a_judge_sends_lines_back(monkeypatch):
    only(monkeypatch, buzz())
    heard = []

    def reads(line):
        heard.append(line.text)
        return len(line.text.split()) > 3

    monkeypatch.setattr(scenes.listener, "reads", reads)
    for index in range(8):
        labels = scenes.scene(index, content="speech", judged=True).labels
        assert labels["id"].endswith("-judged")
        assert all(len(s["text"].split()) > 3 for s in labels["sentences"])
    assert any(len(text.split()) <= 3 for text in heard)
    heard.clear()
    monkeypatch.setattr(type(buzz()), "certain", True)
    scenes.scene(0, content="speech", judged=True)
    assert not heard


def test_errors(monkeypatch):
    for bad in ({"split": "test_voices"}, {"content": "noise"}, {"max_seconds": 3}):
        with pytest.raises(UsageError):
            scenes.scene(0, **bad)
    with pytest.raises(UsageError):
        scenes.scene(-1)
    only(monkeypatch)
    with pytest.raises(InputError, match="no source of voices here has a speaker for the split"):
        scenes.scene(0, content="speech")
    only(monkeypatch, buzz())
    monkeypatch.setattr(
        type(buzz()), "say", lambda *_: (_ for _ in ()).throw(InputError("no such word"))
    )
    with pytest.raises(InputError, match="no such word"):
        scenes.scene(0, content="speech")


def test_files_and_page(monkeypatch, tmp_path, capsys):
    only(monkeypatch, buzz(), buzz("untimed", timed=False))
    out = tmp_path / "out"
    given = ["--recordings", "--count", "4", "--output", str(out), "--sheet", "--processes", "1"]
    assert command.run(verb.main, [*given, "--content", "speech"]) == 0
    labels = [json.loads(line) for line in (out / "labels.jsonl").read_text().splitlines()]
    assert [one["index"] for one in labels] == [0, 1, 2, 3]
    assert labels[2] == scenes.scene(2, content="speech").labels | {"audio": labels[2]["audio"]}
    assert page([(out / one["audio"], one) for one in labels])
    capsys.readouterr()
    assert command.run(verb.main, ["--count", "1"]) == 2
    assert "--count N and --output DIR are required" in capsys.readouterr().err
    assert command.run(verb.main, ["--count", "1", "--output", "x", "--judged"]) == 2
    assert "--recordings" in capsys.readouterr().err
