"""Recorded sounds: the table, what each split hears, boxes. Most tests write their own files.

Whether a recording holds what its label says is not tested: labels are those of the packages.
"""

import struct
import zlib
from collections import Counter, defaultdict

import numpy as np
import pytest
import soundfile

from moss_audio_jax.draw import Draw
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.text.labels import ALL_KINDS, KINDS, RECORDED_KINDS
from moss_audio_jax.world import describe, supervision, tasks
from moss_audio_jax.world.recordings import boxes, scenes, sounds, source
from moss_audio_jax.world.recordings.sounds import Recording

LICENCES = {
    "Artistic-1.0",
    "CC-BY-3.0",
    "CC-BY-SA-3.0",
    "CC0-1.0",
    "GFDL-1.3",
    "GPL-2",
    "GPL-2+",
    "GPL-3+",
}


def test_the_table_names_kind_licence_and_author_of_every_recording():
    table = sounds.table()
    assert len(table) >= 150
    assert len({one.kind for one in table}) >= 30
    assert len({one.path for one in table}) == len(table)
    for one in table:
        assert one.kind in ALL_KINDS
        assert one.licence in LICENCES
        assert one.author.strip()
        assert one.split in ("train", "test")
        assert one.unit in ("one", "-")
        assert not one.path.startswith("/")
        assert len(one.digest) == 12
        assert one.unit == "-" or ALL_KINDS[one.kind].unit
    assert {one.package for one in table} == {s.origin for s in sounds.SOURCES}


def test_no_recording_is_in_two_splits_and_new_kinds_are_in_both():
    splits, kinds = defaultdict(set), defaultdict(set)
    for one in sounds.table():
        splits[one.digest].add(one.split)
        kinds[one.kind].add(one.split)
    assert max(len(found) for found in splits.values()) == 1
    for kind in RECORDED_KINDS:
        assert kinds[kind] == {"train", "test"}, kind
    assert all("test" in found for found in kinds.values())
    assert not set(KINDS) & set(RECORDED_KINDS)
    labels = [kind.label for kind in ALL_KINDS.values()]
    assert len(set(labels)) == len(labels)


def wave(seed: int, seconds: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 0.3 * rng.standard_normal(round(16000 * seconds))


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A table of six files: dogs, which bark once in each, and long horses."""
    rows = []
    for number, (kind, split, unit, seconds) in enumerate(
        [
            ("dog", "train", "one", 0.2),
            ("dog", "train", "one", 0.25),
            ("dog", "test", "one", 0.3),
            ("horse", "train", "-", 1.0),
            ("horse", "train", "-", 9.0),
            ("horse", "test", "-", 1.5),
        ]
    ):
        path = tmp_path / "sounds" / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        wav = wave(number, seconds)
        if seconds > 6:
            wav[: 16000 * 7] *= 0.05  # the loudest part comes late
        soundfile.write(path, wav, 16000, "FLOAT")
        digest = sounds.digest(path.read_bytes())
        rows.append(
            Recording(kind, split, unit, "zoo", f"sounds/{number}.wav", digest, "CC0-1.0", "me")
        )
    use(monkeypatch, tmp_path, rows)
    return rows


def use(monkeypatch, root, rows):
    packages = sorted({one.package for one in rows})
    here = tuple(sounds.Sounds(name, "sound", "CC0-1.0", name, f"get {name}") for name in packages)
    monkeypatch.setenv(sounds.ROOT, str(root))
    monkeypatch.setattr(sounds, "table", lambda: tuple(rows))
    monkeypatch.setattr(sounds, "of_kind", lambda kind: tuple(s for s in here if s.available()))
    sounds.load.cache_clear()
    sounds._by_kind.cache_clear()
    boxes.members.cache_clear()


@pytest.fixture(autouse=True)
def clean():
    yield
    sounds.load.cache_clear()
    sounds._by_kind.cache_clear()
    boxes.members.cache_clear()


def test_each_split_hears_its_own_files(made):
    parts = {one.path: one.split for one in made}
    for split, wanted in (("train", "train"), ("validation", "train"), ("test", "test")):
        heard = Counter(
            sounds.make(kind, split, Draw("draws", split, kind, i)).file
            for kind in ("dog", "horse")
            for i in range(20)
        )
        assert {parts[file] for file in heard} == {wanted}
        assert set(heard) == {path for path, part in parts.items() if part == wanted}


def test_onsets_are_where_the_units_begin(made):
    counts = set()
    for i in range(20):
        sound = sounds.make("dog", "test", Draw("dog", i))
        counts.add(len(sound.onsets))
        loud = np.abs(sound.wav) > 0
        starts = np.flatnonzero(loud[1:] & ~loud[:-1]) + 1
        long_gaps = [s for s in starts if not loud[max(s - 400, 0) : s].any()]
        assert [0, *long_gaps] == sound.onsets
        assert len(sound.wav) <= 6.5 * 16000
    assert min(counts) == 1
    assert max(counts) >= 5
    assert sounds.make("horse", "test", Draw("horse")).onsets == []


def test_a_long_recording_keeps_its_loudest_moment(made):
    files = {}
    for i in range(20):
        sound = sounds.make("horse", "train", Draw("long", i))
        files[sound.file] = sound
        assert len(sound.wav) <= 6 * 16000
        assert np.abs(sound.wav).max() > 1  # the RMS of the loudest 50 ms is 1
    long = files["sounds/4.wav"]
    assert len(long.wav) > 2 * 16000 / 1.08  # from 5% of the level on, it is above -40 dB


def test_what_differs_from_the_table_is_refused(made, tmp_path):
    soundfile.write(tmp_path / "sounds" / "2.wav", wave(99), 16000)
    with pytest.raises(InputError, match=r"sounds/2.wav of zoo differs"):
        sounds.make("dog", "test", Draw("differs"))
    with pytest.raises(UsageError, match=r"no recording of kind 'cat' in split 'test'.*dog, horse"):
        sounds.make("cat", "test", Draw("cat"))
    (tmp_path / "sounds" / "5.wav").unlink()
    assert sounds.recordings("train") == {}  # the package is not whole, so it is not here
    with pytest.raises(InputError, match=r"sounds/5.wav is not here: apt-get install zoo"):
        sounds.load(made[5])


def openttd(members: list[bytes]) -> bytes:
    head, body = b"", b""
    for data in members:
        head += struct.pack("<II", 8 * len(members) + len(body), len(data))
        body += bytes([6]) + b"title\0" + data
    return head + body


def qt(name: str, data: bytes, flags: int) -> bytes:
    """A file of Qt resources, version 3, that holds `folder/NAME`."""
    names, at = b"", []
    for text in ("folder", name):
        at.append(len(names))
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
    stored = struct.pack(">I", len(data)) + zlib.compress(data) if flags else data
    contents = struct.pack(">I", len(stored)) + stored
    tree = struct.pack(">IHIIQ", 0, 2, 1, 1, 0)  # the root has one entry, which is number 1
    tree += struct.pack(">IHIIQ", at[0], 2, 1, 2, 0)
    tree += struct.pack(">IHHHIQ", at[1], flags, 0, 0, 0, 0)
    start = 24  # the header of version 3 ends with flags of all entries
    header = struct.pack(">4s5I", b"qres", 3, start + len(contents) + len(names), start, 0, 0)
    header = header[:16] + struct.pack(">II", start + len(contents), 0)
    return header + contents + names + tree


@pytest.mark.parametrize("flags", [0, 1])
def test_boxes_hold_what_was_put_in(tmp_path, flags):
    qt_box, set_of_sounds = tmp_path / "a.rcc", tmp_path / "b.cat"
    qt_box.write_bytes(qt("goose.ogg", b"honk" * 50, flags))
    set_of_sounds.write_bytes(openttd([b"one", b"three"]))
    assert boxes.members(qt_box) == {"folder/goose.ogg": b"honk" * 50}
    assert boxes.members(set_of_sounds) == {"0": b"one", "1": b"three"}
    set_of_sounds.write_bytes(openttd([b"one", b"three"])[:-2])
    boxes.members.cache_clear()
    with pytest.raises(InputError, match=r"b.cat: expected Qt resources or an OpenTTD set"):
        boxes.members(set_of_sounds)


def test_a_recording_in_a_box_is_read(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "x.wav", wave(3), 16000)
    data = (tmp_path / "x.wav").read_bytes()
    (tmp_path / "b.cat").write_bytes(openttd([b"", data]))
    row = Recording("gong", "test", "-", "box", "b.cat!1", sounds.digest(data), "CC0-1.0", "me")
    use(monkeypatch, tmp_path, [row])
    made = sounds.make("gong", "test", Draw("box"))
    assert made.file == "b.cat!1"
    assert 0.25 < len(made.wav) / 16000 <= 0.3
    with pytest.raises(InputError, match="holds no 2"):
        sounds.load(row._replace(path="b.cat!2"))


def test_scenes_of_the_test_split_hold_test_recordings_alone(made):
    files = {one.path: one.split for one in made}
    heard = set()
    for i in range(12):
        labels = scenes.scene(i, "test", content="sound").labels
        assert len(labels["sources"]) == len(labels["events"])
        for event, origin in zip(labels["events"], labels["sources"], strict=True):
            assert origin["source"] == "recordings"
            assert files[origin["file"]] == "test"
            assert event["kind"] in ("dog", "horse")
            assert set(event) == {"kind", "start", "end", "onsets", "level_db"}
            heard.add(origin["file"])
    assert heard == {path for path, part in files.items() if part == "test"}
    trained = {
        origin["file"]
        for i in range(30)
        for origin in scenes.scene(i, "train", content="sound").labels["sources"]
    }
    assert trained - {None}
    assert all(files[f] == "train" for f in trained - {None})
    assert None in trained  # procedural sounds


def test_what_is_not_counted_is_not_asked(made):
    """A neighing horse has no units; a dog in a recording of several barks is not counted."""
    labels = scenes.scene(0, "test", content="sound").labels
    event = {"kind": "dog", "start": 0.2, "end": 1.0, "onsets": [], "level_db": 0.0}
    labels |= {"events": [event], "sources": [], "sentences": [], "music": None}
    rows = tasks.rows(labels, "x.wav")
    assert describe.sound_caption(labels) == "A dog barks."
    assert not [row for row in rows if row["task"] == "count"]
    assert not [row for row in rows if "(0 " in str(row)]
    labels["events"] = [event | {"onsets": [0.2, 0.6]}]
    counts = [row for row in tasks.rows(labels, "x.wav") if row["task"] == "count"]
    assert [row["conversation"][-1]["content"] for row in counts] == ["2"]


def test_tags_of_recordings_come_after_those_of_the_world():
    assert supervision.RECORDED_TAGS[: len(supervision.TAGS)] == supervision.TAGS
    assert {f"sound:{kind}" for kind in ALL_KINDS} <= set(supervision.RECORDED_TAGS)
    assert len(set(supervision.RECORDED_TAGS)) == len(supervision.RECORDED_TAGS)


def test_the_packages_that_are_here_hold_what_the_table_says():
    here = [s for s in sounds.SOURCES if s.available()]
    if not here:
        pytest.skip(f"no package of recorded sounds is here, such as {sounds.SOURCES[0].origin}")
    for package in here:
        for one in package.recordings():
            wav = sounds.load(one)  # checks the digest
            assert len(wav) > 0.03 * 16000, one.path
            assert np.abs(wav).max() > 1e-3, one.path
    assert set(here) <= set(source.of_kind("sound"))
