"""Shards of rows with their audio: made, resumed, read; from tensorflow-io too."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import soundfile
from data_rows import ENCODER, asr, text, write_clip, write_rows

from moss_audio_jax.audio import load_audio
from moss_audio_jax.data import sources
from moss_audio_jax.data.sources import Source, as_file
from moss_audio_jax.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def make_arrayrecord(monkeypatch):
    from tools.make.arrayrecord import make_arrayrecord

    return make_arrayrecord


def batches(make_loader, path, count=3):
    return [batch for batch, _ in zip(make_loader((path,)), range(count), strict=False)]


@pytest.mark.parametrize("audio", ["bytes", "mel"])
def test_training_from_shards_equals_training_from_files(
    corpus, make_loader, make_arrayrecord, tmp_path, audio
):
    rows = str(corpus / "speech.jsonl")
    out = tmp_path / "out"
    assert make_arrayrecord([rows], str(out), audio=audio, shard_count=3) == (23, 0)
    assert len(Source(f"{out}/*.array_record")) == 23
    shards = batches(make_loader, f"{out}/*.array_record")
    for ours, files in zip(shards, batches(make_loader, rows), strict=True):
        assert ours.row_ids == files.row_ids
        for key, value in files.arrays.items():
            np.testing.assert_array_equal(ours.arrays[key], value, err_msg=key)


def test_the_reader_of_the_docs_reads_shards(corpus, make_arrayrecord, tmp_path):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import json, struct.*?)```", page, re.DOTALL)
    names = {}
    exec(code, names)
    assert make_arrayrecord([str(corpus / "speech.jsonl")], str(tmp_path / "out"), shard_count=1)
    (shard,) = (tmp_path / "out").glob("*.array_record")
    found = list(names["rows"](str(shard)))
    lines = (corpus / "speech.jsonl").read_text().splitlines()
    for (row, blobs), line in zip(found, lines, strict=True):
        audio, asked, said = json.loads(line)["conversation"]
        assert row["conversation"][1:] == [asked, said]
        assert blobs == [(corpus / audio["content"]).read_bytes()]


def test_shards_are_resumed_and_bad_rows_listed(make_arrayrecord, tmp_path):
    write_clip(tmp_path / "a.wav", 0.3)
    rows = [asr("a.wav", str(i)) for i in range(7)]
    rows[3], rows[4] = "[]", asr("none.wav", "x")
    path, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    assert make_arrayrecord([path], str(out), rows_per_shard=2) == (5, 2)
    names = sorted(file.name for file in out.glob("*.array_record"))
    assert names == [f"rows-{i:05d}-of-00004.array_record" for i in range(4)]
    before = {name: (out / name).stat().st_mtime_ns for name in names}
    (out / names[1]).unlink()
    (out / f"{names[1]}.partial").write_bytes(b"half")
    assert make_arrayrecord([path], str(out), rows_per_shard=2) == (2, 0)
    after = {name: (out / name).stat().st_mtime_ns for name in names}
    assert [name for name in names if before[name] != after[name]] == [names[1]]
    assert not list(out.glob("*.partial"))
    answers = [row.messages[-1]["content"] for row in Source(f"{out}/*.array_record")]
    assert answers == ["0", "1", "2", "5", "6"]
    bad = [json.loads(line) for line in (out / "bad_rows.jsonl").read_text().splitlines()]
    assert [record["line"] for record in bad] == [4, 5]
    with pytest.raises(InputError, match="audio is 'bytes', this run's 'mel'"):
        make_arrayrecord([path], str(out), rows_per_shard=2, audio="mel")


def test_the_command_and_clips_by_record(make_loader, tmp_path):
    """Several processes write; a JSONL names the clips inside the shards."""
    for i in range(4):
        write_clip(tmp_path / f"{i}.wav", 0.3 + i / 10, seed=i)
    path = write_rows(tmp_path / "rows.jsonl", [asr(f"{i}.wav", str(i)) for i in range(4)])
    command = [sys.executable, str(ROOT / "tools/make/arrayrecord.py"), path, str(tmp_path / "out")]
    subprocess.run(
        [*command, "--shards", "2", "--workers", "2"],
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    clips = [f"out/rows-0000{i // 2}-of-00002.array_record#{i % 2}" for i in range(4)]
    named = write_rows(tmp_path / "named.jsonl", [asr(c, str(i)) for i, c in enumerate(clips)])
    direct, through = (batches(make_loader, each, 1)[0] for each in (path, named))
    np.testing.assert_array_equal(direct.arrays["mels"], through.arrays["mels"])
    np.testing.assert_array_equal(direct.arrays["tokens"], through.arrays["tokens"])


def test_plain_json_records_are_rows(make_loader, tmp_path):
    from array_record.python import array_record_module

    row = {"conversation": [text("user", "a"), text("assistant", "b")]}
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "r.array_record"), "group_size:1")
    writer.write(json.dumps(row).encode())
    writer.close()
    (batch,) = batches(make_loader, str(tmp_path / "r.array_record"), 1)
    assert batch.row_ids[0][0] == "data:0"
    whole = (tmp_path / "r.array_record").read_bytes()
    for data in (b"nothing of the kind", whole[: len(whole) // 2]):
        (tmp_path / "no.array_record").write_bytes(data)
        with pytest.raises(InputError, match=r"no\.array_record: cut short or no ArrayRecord"):
            Source(f"{tmp_path}/*.array_record")
        sources._array_record.cache_clear()  # a reader is kept for each path


@pytest.mark.oracle
def test_tensorflow_io_writes_shards_that_training_reads(tmp_path, make_loader):
    """Makes the environment of tools/make/tfio_decode.py (about 40 s) and runs it there."""
    python = tmp_path / "env" / "bin" / "python"
    if sys.version_info[:2] != (3, 11):
        pytest.skip("tensorflow-io 0.37.1 is tested on Python 3.11")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    requirements = ROOT / "tools" / "make" / "requirements-tfio.txt"
    pip = [python, "-m", "pip", "install", "-q", "--timeout", "20", "--retries", "1"]
    install = subprocess.run([*pip, "-r", requirements], capture_output=True, text=True)
    if install.returncode:
        pytest.skip(f"the package registry gave no tensorflow-io: {install.stderr[-300:]}")

    clips = tmp_path / "clips"
    clips.mkdir()
    rng = np.random.default_rng(0)
    sound = 0.1 * rng.standard_normal((22050, 2))
    kinds = {"a.wav": "PCM_16", "b.flac": "PCM_24", "c.mp3": None, "d.ogg": None, "e.wav": "FLOAT"}
    for name, subtype in kinds.items():
        soundfile.write(clips / name, sound[:, : 1 + (name != "a.wav")], 22050, subtype=subtype)
    (clips / "f.wav").write_bytes(b"RIFF no sound")
    rows = write_rows(clips / "rows.jsonl", [asr(name, name) for name in [*kinds, "f.wav"]])

    def run(source, out):
        return subprocess.run(
            [python, ROOT / "tools" / "make" / "tfio_decode.py", source, out, "--shards", "2"],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"},
        )

    done = run(rows, tmp_path / "rows")
    assert done.returncode == 1, done.stderr  # one row is bad
    assert "5 rows written, 1 bad" in done.stdout
    source = Source(f"{tmp_path}/rows/*.array_record")
    assert [row.messages[-1]["content"] for row in source] == list(kinds)
    for row, name in zip(source, kinds, strict=True):
        ours = load_audio(as_file(row.clips[0]))
        np.testing.assert_allclose(ours, load_audio(clips / name), atol=1e-6)
    (batch,) = batches(make_loader, f"{tmp_path}/rows/*.array_record", 1)
    assert batch.arrays["mels"].dtype == ml_dtypes.bfloat16
    assert batch.arrays["mels"].shape[2:] == (ENCODER.chunk_frames, 128)

    done = run(clips, tmp_path / "folder")
    assert "5 rows written, 1 bad" in done.stdout, done.stderr
    indices = sorted((tmp_path / "folder").glob("*.clips.jsonl"))
    listed = [json.loads(line) for file in indices for line in file.read_text().splitlines()]
    assert [each["clip"] for each in listed] == list(kinds)
    named = [asr(each["content"], each["clip"]) for each in listed]
    through = batches(make_loader, write_rows(tmp_path / "folder" / "named.jsonl", named), 1)[0]
    np.testing.assert_array_equal(through.arrays["mels"], batch.arrays["mels"])
