"""Rows and records, files of rows, mixtures, packing, the report of bad rows, workers."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import ml_collections
import ml_dtypes
import numpy as np
import pytest
from data_rows import ENCODER, asr, text, write_clip, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_audio_jax.data import workers
from moss_audio_jax.data.loader_config import LoaderConfig
from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.data.packing import Room, Size, emptiest, pack, place, strips_of
from moss_audio_jax.data.pipeline import eval_batches
from moss_audio_jax.data.records import AudioFile, Rejected, encode_record, parse_row
from moss_audio_jax.data.reports import RowReport
from moss_audio_jax.data.sources import Source
from moss_audio_jax.errors import InputError


def test_a_record_holds_its_row_and_clips():
    mel = np.arange(256, dtype=np.float32).reshape(128, 2).astype(ml_dtypes.bfloat16)
    raw = {
        "conversation": [*asr("a.flac", "x")["conversation"][:1], *asr("b", "y")["conversation"]]
    }
    record = encode_record({**raw, "weight": 2, "id": "né"}, [b"fLaC...", mel])
    row = parse_row(record)
    assert (row.messages, row.weight, row.id, row.task) == (raw["conversation"], 2.0, "né", None)
    assert row.clips[0] == AudioFile(b"fLaC...", "a.flac")
    assert row.clips[1].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(row.clips[1], mel)
    for broken in (record[:-1], record[:40], record[:6], encode_record(raw, [b"one"])):
        with pytest.raises(InputError, match=r"cut short|1 clips for 2"):
            parse_row(broken)


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_lines_are_found_whatever_ends_them(tmp_path, monkeypatch, block):
    monkeypatch.setattr("moss_audio_jax.data.sources._BLOCK", block)
    one, two, three = (json.dumps(asr("ä.wav", f"é {n}")) for n in range(3))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"\ufeff{one}\r\n\r\n\n{two}\n}}\n{three}".encode())
    source = Source([str(path), str(path)])
    assert len(source) == 8
    assert [source.location(i).line for i in range(8)] == [1, 4, 5, 6] * 2
    assert [source[i].messages[-1]["content"] for i in (7, 0, 5)] == ["é 2", "é 0", "é 1"]
    with pytest.raises(InputError, match="not valid JSON"):
        source[2]
    with pytest.raises(InputError, match=r"gone\.jsonl: no such file"):
        Source(str(tmp_path / "gone.jsonl"))
    for nothing in ("\n\n", " ", "\t\n \r\n\n  "):
        (tmp_path / "empty.jsonl").write_text(nothing)
        with pytest.raises(InputError, match=r"empty\.jsonl: holds no rows"):
            Source(str(tmp_path / "empty.jsonl"))
    blanks = f"   \n{one}   \n \t\r\n\f\n{two}\n\n   {three}   \n  "
    path.write_text(blanks)
    source = Source(str(path))
    assert [source.location(i).line for i in range(len(source))] == [2, 5, 7]
    assert [source[i].messages[-1]["content"] for i in range(3)] == ["é 0", "é 1", "é 2"]
    path.write_text(f"{one}\n{two}          ")  # no line ends with these spaces
    assert len(Source(str(path))) == 2
    with pytest.raises(InputError, match=r"rows\.csv: expected a file"):
        Source(str(tmp_path / "rows.csv"))


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """{name: path} of files with 10, 90 and 40 rows."""
    folder = tmp_path_factory.mktemp("sizes")
    chat = {"conversation": [text("user", "a"), text("assistant", "b")]}
    return {
        name: write_rows(folder / f"{name}.jsonl", [chat] * rows)
        for name, rows in (("a", 10), ("b", 90), ("c", 40))
    }


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ((30, 40, 30), (0.3, 0.4, 0.3)),
        (("sqrt", "sqrt", "sqrt"), (1 / 6, 1 / 2, 1 / 3)),
        ((None, None, None), (1 / 14, 9 / 14, 4 / 14)),  # by size
    ],
)
def test_mixture_shares_and_epochs(sizes, weights, shares):
    spec = ml_collections.ConfigDict()
    for name, weight in zip(sizes, weights, strict=True):
        spec[name] = {"paths": (sizes[name],)} | ({"weight": weight} if weight else {})
    mixture = Mixture(spec, seed=1)
    drawn = [mixture[i] for i in range(2000)]
    for part, share in enumerate(shares):
        rows = [row for p, row in drawn if p == part]
        assert len(rows) / 2000 == pytest.approx(share, abs=0.004)
        count = len(mixture.parts[part].source)
        epochs = [rows[i : i + count] for i in range(0, len(rows) - count + 1, count)]
        assert len(epochs) >= 2
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    again, other = Mixture(spec, seed=1), Mixture(spec, seed=2)
    assert [again[i] for i in (1999, 3, 700)] == [drawn[i] for i in (1999, 3, 700)]
    assert [other[i] for i in range(50)] != drawn[:50]


def test_mixture_of_groups(sizes):
    spec = {
        "speech": {
            "parts": {
                "a": {"paths": sizes["a"], "weight": "sqrt"},
                "b": {"paths": sizes["b"], "weight": "sqrt"},
            },
            "weight": 3,
        },
        "text": {"paths": sizes["c"], "weight": 1},
    }
    mixture = Mixture(spec)
    assert [part.name for part in mixture.parts] == ["speech/a", "speech/b", "text"]
    assert [part.share for part in mixture.parts] == pytest.approx([0.1875, 0.5625, 0.25])
    counts = Counter(mixture[i][0] for i in range(1600))
    assert [counts[part] for part in range(3)] == pytest.approx([300, 900, 400], abs=4)
    in_order = mixture.in_order()
    assert len(in_order) == mixture.rows
    first = len(mixture.parts[0].source)
    assert [in_order[i].row_id for i in (0, first - 1, first + 7)] == [
        "speech/a:0",
        f"speech/a:{first - 1}",
        "speech/b:7",
    ]
    wrong = (
        ({"a": {"paths": sizes["a"], "weight": 0}}, r"data\.a\.weight is 0"),
        ({"a": {"paths": sizes["a"], "wieght": 1}}, "wieght"),
        ({"a": {"paths": sizes["a"], "weight": 1}, "b": sizes["b"]}, "side by side"),
        ({"a": {"weight": 1}}, "needs either paths or parts"),
        ({}, "no parts"),
        (7, "data is 7"),
    )
    for spec, message in wrong:
        with pytest.raises(InputError, match=message):
            Mixture(spec)


def test_large_parts_are_shuffled_by_grain(sizes, monkeypatch):
    monkeypatch.setattr("moss_audio_jax.data.mixture._SMALL", 5)
    mixture = Mixture(sizes["b"])
    epochs = [[mixture[90 * epoch + i][1] for i in range(90)] for epoch in range(2)]
    assert all(sorted(epoch) == list(range(90)) for epoch in epochs)
    assert epochs[0] != epochs[1] != sorted(epochs[1])


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(1, 100), st.lists(st.integers(1, 20), max_size=5)),
        min_size=1,
        max_size=40,
    ),
    st.integers(0, 3),
    st.booleans(),
)
def test_packing_loses_nothing_and_overfills_nothing(pairs, together, share):
    sizes = [Size(tokens, tuple(pieces)) for tokens, pieces in pairs]
    room = Room(100, strips=5, length=20, share=share)
    together = min(together, len(sizes))
    if not room.holds(sizes[:together]):
        together = 0
    rows = pack(sizes, room, together)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    used = [
        Size(
            sum(sizes[i].tokens for i in row),
            tuple(n for i in row for n in sizes[i].pieces),
        )
        for row in rows
    ]
    assert all(u.tokens <= 100 and strips_of(u.pieces, room) <= 5 for u in used)
    assert not together or rows[0][:together] == list(range(together))
    few = dataclasses.replace(room, examples=3)
    assert all(len(row) <= 3 for row in pack(sizes, few))
    if len(rows) > 1:
        fullness = [room.share_of(u) for u in used]
        assert fullness[emptiest(rows, sizes, room)] == min(fullness[1:])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 20), max_size=30), st.booleans(), st.randoms())
def test_pieces_of_a_strip_stand_apart(pieces, share, random):
    room = Room(100, strips=30, length=20, share=share)
    taken = {}
    for n, (strip, start) in zip(pieces, place(pieces, room), strict=True):
        assert start >= 0
        assert start + n <= 20
        here = set(range(start, start + n))
        beside = here | {start - 1, start + n}
        assert not beside & taken.setdefault(strip, set())
        taken[strip] |= here
    assert share or len(taken) == len(pieces)
    other = random.sample(pieces, len(pieces))
    assert strips_of(other, room) == strips_of(pieces, room)


@pytest.mark.parametrize("length", [4096, 8192])
def test_packing_fills_rows(length, monkeypatch):
    from tools.bench.pipeline import packing_fill

    fill = packing_fill(length, length // 64)
    assert 0.98 < fill["tokens"] <= 1
    tight = packing_fill(length, length // 160)  # strips run out before tokens
    assert 0.95 < tight["sound"] <= 1
    assert tight["tokens"] < fill["tokens"]


def test_eval_takes_every_row_in_order(tokenizer, tmp_path):
    for i in range(5):
        write_clip(tmp_path / f"{i}.wav", 0.4 + i / 10)
    rows = [asr(f"{i}.wav", f"row {i}") for i in range(5)]
    rows[1], rows[3] = "{", asr("3.wav", "x" * 400)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    config = LoaderConfig(batch=4, length=300, chunks=4, max_bad_share=0.3, workers=0)
    batches = [
        list(eval_batches(Mixture({"held": path}), tokenizer, ENCODER, config, i, n, str(tmp_path)))
        for i, n in ((0, 1), (0, 2), (1, 2))
    ]
    ids = [[batch.row_ids for batch in each] for each in batches]
    assert ids[0] == [[["held:0"], [], ["held:2"], []], [["held:4"], [], [], []]]
    assert [a + b for a, b in zip(ids[1], ids[2], strict=True)] == ids[0]
    last = batches[0][-1]
    assert last.stats["bad"] == last.stats["overlong"] == 1
    assert last.stats["seen"] == 5
    assert not last.arrays["segment_ids"][1:].any()
    assert not last.arrays["weights"][1:].any()
    assert len((tmp_path / "eval_bad_rows.jsonl").read_text().splitlines()) == 1
    assert len((tmp_path / "eval_overlong_rows.jsonl").read_text().splitlines()) == 1


def test_the_report_survives_a_kill_and_other_writers(tmp_path):
    path = tmp_path / "bad_rows.jsonl"
    rows = [Rejected(True, "s", line, f"data:{line}", "why") for line in range(4)]
    first, second = RowReport(str(path)), RowReport(str(path))
    first.add(rows[0])
    second.add(rows[0])
    second.add(rows[1])
    first.add(rows[1])
    with path.open("a") as file:
        file.write('{"source": "s", "li')  # killed while it wrote
    for report in (first, second, RowReport(str(path))):
        report.add(rows[2])
    lines = [json.loads(line)["line"] for line in path.read_text().splitlines()]
    assert lines == [0, 1, 2]


def test_workers_start_no_jax_and_end_with_their_parent(tmp_path):
    pool = workers.Workers(eval, 1, 60)
    (loaded,) = pool.submit(["set(__import__('sys').modules)"])()
    pool.close()
    assert "moss_audio_jax.data.examples" in loaded
    assert not loaded & {"jax", "grain"}
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\n"
        "from moss_audio_jax.data.workers import Workers\n"
        "if __name__ == '__main__':\n"
        "    workers = Workers(eval, 1, 60)\n"
        "    print(*workers.submit(['__import__(\"os\").getpid()'])(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(200):
        if not _alive(worker):
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its parent")


def _alive(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
