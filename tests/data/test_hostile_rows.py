"""Unforeseen rows, clips that take too long to read, data that has changed."""

import json
import os
import re
import signal
import threading
import warnings
from concurrent.futures import CancelledError

import numpy as np
import pytest
from data_rows import ENCODER, asr, audio, fragile, text, write_clip, write_rows

from moss_audio_jax.data import examples, sources
from moss_audio_jax.data.examples import Job
from moss_audio_jax.data.loader_config import LoaderConfig
from moss_audio_jax.data.records import Rejected, encode_record, parse_row
from moss_audio_jax.data.reports import RowReport
from moss_audio_jax.data.shards import write_shard
from moss_audio_jax.data.sources import Location, Source, SourceError, read_location
from moss_audio_jax.data.workers import Workers
from moss_audio_jax.errors import InputError, UsageError

SECONDS = 2.0  # that a row may take where one of them hangs


def spans(**more):
    return {"conversation": [audio("clip.wav"), *asr("", "hi")["conversation"][1:]], **more}


def weighing(weight):
    return json.dumps(asr("clip.wav", "hi")).removesuffix("}") + f', "weight": {weight}}}'


HOSTILE = [  # row, reason
    (asr("https://example.invalid/a.wav", "hi"), "https://.*expected a local path"),
    (asr("file:///etc/passwd", "hi"), "file:///etc/passwd: nothing here reads such addresses"),
    (asr("http://[", "hi"), "nothing here reads such addresses"),
    (asr("s3://", "hi"), "s3://: cannot be read"),
    (asr("gs://", "hi"), "gs://: cannot be read"),
    (asr("\ud800x.wav", "hi"), r"\\ud800x\.wav: cannot be opened"),
    (asr("a\0b.wav", "hi"), "cannot be opened"),
    (asr("gone.wav", "hi", id="\ud83d \u2028"), r"gone\.wav: no such file"),
    (asr(".", "hi"), "is a directory"),
    (asr("none.array_record#0", "hi"), "no such file"),
    (weighing("1" + "0" * 400), '"weight" is 10+ [.]{3}; expected a number from'),
    (weighing("1" * 5000), "an integer of thousands of digits"),
    (weighing("1e308"), r'"weight" is 1e\+308'),
    (weighing("Infinity"), '"weight" is inf'),
    (weighing("NaN"), '"weight" is nan'),
    (weighing("true"), '"weight" is True'),
    (weighing('"1"'), "\"weight\" is '1'"),
    ("[" * 100_000, "nests too deeply"),
    ({"conversation": ["zip://a::b"]}, r"messages\[0\] is 'zip://a::b'; expected an object"),
    ({"conversation": [asr("clip.wav", "hi")["conversation"]]}, "expected an object"),
    ({"conversation": {"role": "user"}}, 'no "conversation"'),
    ({"conversation": [{"role": ["user"], "message_type": {}, "content": 1}]}, "role is"),
    (asr("clip.wav", 7), "content is a int"),
    (asr("clip.wav", "hi", id=[1]), '"id" is'),
    (spans(words=[{"text": "a", "start": 0, "end": 10**400}]), r"words\[0\] is .* <= 1e\+06"),
    (spans(tags=[{"name": "a", "start": -1, "end": 0}]), r"tags\[0\] is"),
    (spans(tags={"name": "a"}), '"tags" is'),
    (spans(branches=[{"messages": ["x"]}]), r"messages\[0\] is 'x'"),
    (b'{"conversation": "\xff"}', "not valid UTF-8"),
]


@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_is_wrong_with_a_row_it_is_listed_and_the_run_goes_on(
    make_loader, tmp_path, workers
):
    write_clip(tmp_path / "clip.wav", 0.5)
    good = json.dumps(asr("clip.wav", "good \ud800")).encode()  # which is read as U+FFFD
    lines = [row if isinstance(row, (str, bytes)) else json.dumps(row) for row, _ in HOSTILE]
    lines = [line.encode() if isinstance(line, str) else line for line in lines]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([good, *lines, good]))
    keys = {"max_bad_share": 1.0, "workers": workers, "words": 8, "tags": ("a",), "branches": 2}
    loader = make_loader((str(path),), report_dir=str(tmp_path), batch=2, window=40, **keys)
    for _ in range(3):
        names = {name for row in next(loader).row_ids for name in row}
        assert names <= {"data:0", f"data:{len(lines) + 1}"}
    listed = [json.loads(x) for x in (tmp_path / "bad_rows.jsonl").read_bytes().splitlines()]
    assert sorted(each["line"] for each in listed) == list(range(2, len(lines) + 2))
    for each in listed:
        expected = HOSTILE[each["line"] - 2][1]
        assert re.search(expected, each["reason"]), each["reason"]
        assert len(each["reason"]) <= 400
    assert "\ud83d \u2028" in [each.get("id") for each in listed]


def test_the_report_is_written_and_read_whatever_is_in_it(tmp_path):
    path = tmp_path / "bad_rows.jsonl"
    rows = [
        Rejected(True, "\udce9.jsonl", line, "data:0", "why", id)
        for line, id in enumerate(["\ud800", "a\nb\x85\u2028", "x" * 10_000, None])
    ]
    RowReport(str(path)).add(rows[0])
    with path.open("ab") as file:
        file.write(b'\0\0\0\n{"source": ["s"], "line": {}}\n[]\n7\n\xff\n\n' + b"[" * 10**5 + b"\n")
    report = RowReport(str(path))
    for row in rows * 2:
        report.add(row)
    RowReport(str(path)).add(rows[2])
    lines = path.read_bytes().split(b"\n")
    listed = [json.loads(line) for line in [lines[0], *lines[-4:-1]]]
    assert [each.get("id") for each in listed[:2]] == ["\ud800", "a\nb\x85\u2028"]
    assert len(listed[2]["id"]) < 300
    assert {each["source"] for each in listed} == {"\udce9.jsonl"}
    assert len(lines) == 1 + 7 + 3 + 1  # each row once; an end behind the last
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder: not written"):
        RowReport(str(tmp_path / "folder")).add(rows[0])


def test_a_record_may_hold_anything(make_loader, tmp_path):
    """Damaged payloads and invalid log-mels each only lose their own row."""
    rows = [asr("a", f"row {i}", id="\ud800") for i in range(5)]
    mels = [np.full((128, 40), value, np.float32) for value in (0.1, 0.2, np.nan, 3e38, 0.3)]
    mels[1] = np.random.default_rng(0).normal(size=(128, 40)).astype(np.float32)
    records = [encode_record(row, [mel]) for row, mel in zip(rows, mels, strict=True)]
    described = records[0].replace(b'"frames": 40', b'"frames": 1e')
    path = str(tmp_path / "rows.array_record")
    write_shard(path, [*records, described, b"MAJ1\xff\xff\xff\xff", b"MAJ1", b""])
    whole = bytearray((tmp_path / "rows.array_record").read_bytes())
    whole[10_000] ^= 1  # within the second, which does not compress
    (tmp_path / "rows.array_record").write_bytes(whole)
    keys = {"max_bad_share": 1.0, "report_dir": str(tmp_path), "window": 9, "batch": 2}
    loader = make_loader((path,), **keys)
    names = {name for _ in range(4) for row in next(loader).row_ids for name in row}
    assert names == {"data:0", "data:4"}
    listed = [json.loads(x) for x in (tmp_path / "bad_rows.jsonl").read_bytes().splitlines()]
    reasons = {each["line"]: each["reason"] for each in listed}
    assert sorted(reasons) == [2, 3, 4, 6, 7, 8, 9]
    assert "RuntimeError: Corrupted Riegeli/records file" in reasons[2]
    assert "NaN or beyond 1000" in reasons[3]
    assert "NaN or beyond 1000" in reasons[4]


def test_clips_beyond_what_a_row_holds_are_not_read(make_loader, tmp_path):
    write_clip(tmp_path / "clip.wav", 5)
    rows = [asr("clip.wav", "good"), {"conversation": [audio("clip.wav")] * 1000}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    loader = make_loader((path,), report_dir=str(tmp_path), batch=1, window=2)
    next(loader)
    (listed,) = (tmp_path / "overlong_rows.jsonl").read_text().splitlines()
    assert "2 of its 1000 clips need 13 chunks; a row of the batch has 8" in listed


def job(part, index=0):
    return Job(index, Location("rows.jsonl", index + 1, 0, 0), f"data:{index}", part)


def test_a_row_that_hangs_or_crashes_costs_itself_alone():
    """In worker processes: a row that sleeps for ever, and one whose decoder ends the process."""
    workers = Workers(fragile, 1, SECONDS)
    parts = ["", "hangs", "", "crashes", *[""] * 20]
    made = workers.submit([job(part, i) for i, part in enumerate(parts)])()
    expected = [i for i, part in enumerate(parts) if not part]
    assert [each for each in made if not isinstance(each, Rejected)] == expected
    late, crashed = made[1], made[3]
    assert (late.bad, late.line, late.row_id) == (True, 2, "data:1")
    assert "longer than data.row_seconds, 2 s" in late.reason
    assert "Segmentation fault" in crashed.reason
    with pytest.raises(InputError, match="process was killed"):
        workers.submit([job("is killed")])()
    hanging = workers.submit([job("hangs"), job("")])
    closing = threading.Timer(0.5, workers.close)
    closing.start()
    with pytest.raises(CancelledError):
        hanging()
    closing.join()


def test_storage_that_does_not_answer_is_no_bad_rows():
    answered = threading.Event()
    workers = Workers(lambda job: answered.wait(60), 0, 0.01)
    with pytest.raises(InputError, match="8 rows, one after the other, each took longer"):
        workers.submit([job("", i) for i in range(20)])()
    answered.set()
    workers.close()


def test_a_clip_that_cannot_be_waited_for(make_loader, tmp_path, monkeypatch, request):
    """In this process: a thread is left behind; the run stops on a signal, also while it hangs."""
    for name in ("clip", "stuck"):
        write_clip(tmp_path / f"{name}.wav", 0.5)
    rows = [asr("stuck.wav" if i == 3 else "clip.wav", f"row {i}") for i in range(6)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    answered = threading.Event()
    load = examples.load_audio

    def load_audio(file):
        return load(file) if "stuck" not in str(file) or answered.wait(60) else None

    monkeypatch.setattr(examples, "load_audio", load_audio)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGALRM, before))
    keys = {"packing": False, "batch": 1, "window": 6, "max_bad_share": 1.0}
    keys |= {"report_dir": str(tmp_path)}
    loader = make_loader((path,), row_seconds=SECONDS, **keys)
    names = {name for _ in range(5) for row in next(loader).row_ids for name in row}
    assert names == {f"data:{i}" for i in (0, 1, 2, 4, 5)}
    (listed,) = (tmp_path / "bad_rows.jsonl").read_text().splitlines()
    assert "longer than data.row_seconds" in listed
    state = loader.state()
    loader.close()

    loader = make_loader((path,), row_seconds=3600.0, **keys)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(KeyboardInterrupt):
        list(loader)
    loader.close()
    answered.set()
    resumed = make_loader((path,), **keys)
    resumed.restore(state)
    assert len({name for _ in range(6) for row in next(resumed).row_ids for name in row}) == 6


def test_a_window_is_continued_without_the_rows_that_were_bad_then(make_loader, tmp_path):
    """Even if they can be read now; otherwise the rest of the window would have other rows."""
    for i in range(12):
        write_clip(tmp_path / f"{i}.wav", 0.3 + i / 10, seed=i)
    rows = [asr(f"{i}.wav", "word " * i + "end") for i in range(12)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    keys = {"streams": 1, "batch": 1, "window": 12, "max_bad_share": 1.0}
    (tmp_path / "7.wav").rename(tmp_path / "away.wav")
    loader = make_loader((path,), **keys)
    next(loader)
    state = json.loads(json.dumps(loader.state()))
    assert len(state["streams"]["0"]["left_out"]) == 1
    rest = []
    while loader.state()["streams"]["0"]["offset"]:
        rest.append(next(loader).row_ids)
    assert rest
    counts = loader.state()["streams"]["0"]
    (tmp_path / "away.wav").rename(tmp_path / "7.wav")
    resumed = make_loader((path,), report_dir=str(tmp_path), **keys)
    resumed.restore(state)
    assert [next(resumed).row_ids for _ in rest] == rest
    assert resumed.state()["streams"]["0"] == counts
    later = {name for _ in range(6) for row in next(resumed).row_ids for name in row}
    assert "data:7" in later
    assert "when the window that the run continues in" in (tmp_path / "bad_rows.jsonl").read_text()


def test_data_is_known_by_its_content(make_loader, tmp_path):
    def rows(answer):
        return [{"conversation": [text("user", "?"), text("assistant", answer)]}] * 20

    one, two = (write_rows(tmp_path / f"{a}.jsonl", rows(a)) for a in ("yes", "not"))
    same = write_rows(tmp_path / "moved" / "same.jsonl", rows("not"))
    loader = make_loader((one, two))
    next(loader)
    state = json.loads(json.dumps(loader.state()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_loader((one, same)).restore(state)
    for paths, named in (((two, two), "not.jsonl"), ((one, one), "yes.jsonl")):
        with pytest.raises(InputError, match=f"{named}: holds other rows than the saved run"):
            make_loader(paths).restore(state)
    del state["config"]["content"]
    with pytest.warns(UserWarning, match="could not be checked"):
        make_loader((two, two)).restore(state)


def test_of_large_shards_a_sample_is_looked_at(tmp_path, monkeypatch):
    path = tmp_path / "rows.array_record"
    write_shard(str(path), [os.urandom(100_000) for _ in range(60)])
    whole = bytearray(path.read_bytes())
    digest = Source(str(path)).digests
    assert Source(str(path)).digests == digest
    assert len(digest[0]) == 16
    size = len(whole)
    assert size > 4 << 20
    for at in (0, 65535, 4096 * 2, (size - 4096) * 20 // 63, size - 65536, size - 1):
        whole[at] ^= 1
        path.write_bytes(whole)
        assert sources._sampled(str(path)) != digest[0]
        whole[at] ^= 1
    path.write_bytes(whole)
    assert sources._sampled(str(path)) == digest[0]
    path.write_bytes(whole[:-1])
    assert sources._sampled(str(path)) != digest[0]


def test_a_file_of_rows_that_is_gone_is_no_bad_row(make_loader, tmp_path):
    rows = [{"conversation": [text("user", "?"), text("assistant", "yes")]}] * 20
    path = write_rows(tmp_path / "rows.jsonl", rows)
    loader = make_loader((path,), max_bad_share=1.0)
    location = Source(path).location(19)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(SourceError, match="became shorter while it was in use"):
        read_location(location)
    sources._opened.cache_clear()
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(InputError, match=r"rows\.jsonl: no such file"):
        next(loader)
    os.mkfifo(path)
    with pytest.raises(InputError, match="is not a regular file"):
        Source(path)
    with pytest.raises(InputError, match=r"https://.*nothing here reads such addresses"):
        Source("https://example.invalid/rows.jsonl")
    with pytest.raises(InputError, match=r"no/a\.array_record: not written"):
        write_shard(str(tmp_path / "no" / "a.array_record"), [b"x"])


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf"), "60", True])
def test_the_time_limit_is_a_number_of_seconds(seconds):
    with pytest.raises(UsageError, match=r"data\.row_seconds is"):
        LoaderConfig(batch=1, length=1, chunks=0, row_seconds=seconds).validate(ENCODER)


def test_a_row_of_a_gigabyte_is_refused(tmp_path):
    location = Location(write_rows(tmp_path / "rows.jsonl", ["{}"]), 1, 0, 1 << 30)
    with pytest.raises(InputError, match="bytes of JSON; at most"):
        parse_row(read_location(location))
