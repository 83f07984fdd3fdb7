"""The verb `world`: files, rows that the loader reads, the page, errors as one line."""

import json
import re
import struct
import zlib

import numpy as np
import pytest

from moss_audio_jax import command, files, world
from moss_audio_jax.audio import load_audio, log_mel
from moss_audio_jax.data.sources import Source
from moss_audio_jax.timeline import spectrogram_png
from moss_audio_jax.world import __main__ as verb
from moss_audio_jax.world.sheet import page


def run(*arguments):
    return command.run(verb.main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("processes", [1, 2])
def test_files(processes, tmp_path, capsys):
    out = tmp_path / "out"
    code = run(
        "--count",
        5,
        "--output",
        out,
        "--content",
        "sound",
        "--start",
        7,
        "--sheet",
        "--processes",
        processes,
    )
    assert code == 0
    assert "5 scene(s)" in capsys.readouterr().err
    labels = [json.loads(line) for line in (out / "labels.jsonl").read_text().splitlines()]
    assert [one["index"] for one in labels] == [7, 8, 9, 10, 11]
    for one in labels:
        made = world.scene(one["index"], content="sound")
        assert one == made.labels | {"audio": one["audio"]}
        np.testing.assert_array_equal(load_audio(out / one["audio"]), made.wav)
    source = Source(str(out / "rows.jsonl"))
    assert len(source) == sum(len(world.rows(one, "")) for one in labels)
    assert all((out / source[i].clips[0]).is_file() for i in range(len(source)))
    sheet = (out / "sheet.html").read_text()
    assert sheet.count("<audio ") == sheet.count("data:audio/flac") == 5
    assert not re.search(r"https?://", sheet)
    assert not list(out.glob("*.partial"))


def test_errors(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert run("--count", 1, "--output", tmp_path, "--content", "music") == 1
    assert "holds rows.jsonl already" in capsys.readouterr().err
    assert run("--count", 1, "--output", tmp_path / "a", "--split", "tset") == 2
    assert run("--count", 1, "--output", tmp_path / "a", "--max-seconds", 1) == 2
    assert (
        run(
            "--count",
            1,
            "--output",
            tmp_path / "a",
            "--split",
            "test_combinations",
            "--content",
            "music",
        )
        == 2
    )
    assert not (tmp_path / "a").exists()
    assert capsys.readouterr().err.count("\n") == 3  # one line each


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_one_line(processes, small_disk, capsys):
    out = small_disk / "out"
    code = run("--count", 30, "--output", out, "--content", "sound", "--processes", processes)
    assert code == 1
    assert re.fullmatch(
        r"error: .*out/wav/.*wav: not written: the disk is full \(.* MB free in .*, up to .* MB "
        r"needed\); make room or use another folder\n",
        capsys.readouterr().err,
    )
    assert [path.name for path in out.iterdir()] == ["wav"]
    kept = list((out / "wav").iterdir())
    assert kept
    for path in kept:
        assert path.suffix == ".wav"
        load_audio(path)  # refuses one that is cut short


def test_what_a_killed_run_left(tmp_path, capsys):
    """Its unfinished files go; its clips stay, and are named as what no row holds."""
    (tmp_path / "wav").mkdir()
    (tmp_path / ".rows.jsonl.123.partial").write_text("{}")
    (tmp_path / "wav" / ".a.wav.123.partial").write_text("")
    (tmp_path / "wav" / "train-0-00000009-music.wav").write_text("")
    assert run("--count", 1, "--output", tmp_path, "--content", "music", "--processes", 1) == 0
    assert (
        "1 clip(s) of an earlier run, which did not end, are in no row" in capsys.readouterr().err
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.jsonl", "rows.jsonl", "wav"]
    assert len(list((tmp_path / "wav").iterdir())) == 2


def test_a_folder_in_use_is_named(tmp_path, capsys):
    arguments = ("--count", 1, "--output", tmp_path, "--content", "music", "--processes", 1)
    with files.Lock(tmp_path, "world"):
        assert run(*arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: in use by world (process ")
    assert not list(tmp_path.iterdir())
    assert run(*arguments) == 0


def test_spectrogram():
    """The picture's brightest pixels are where the sound is; it decodes as a PNG."""
    wav = np.zeros(16000, np.float32)
    wav[8000:] = 0.5 * np.sin(2 * np.pi * 3000 * np.arange(8000) / 16000)
    png = spectrogram_png(wav)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, data = 8, b""
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at : at + 8])
        content = png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            kind + content
        )
        if kind == b"IHDR":
            width, height = struct.unpack(">II", content[:8])
        data += content if kind == b"IDAT" else b""
        at += 12 + size
    assert (width, height) == (100, 128)
    lines = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, 1 + 3 * width)
    light = lines[:, 1:].reshape(height, width, 3).sum(2, dtype=int)
    brightest = np.unravel_index(np.argmax(light), light.shape)
    expected = np.argmax(log_mel(wav)[:, 75])
    assert abs((127 - brightest[0]) - expected) <= 1
    assert brightest[1] >= 48
    assert light[:, :45].max() < light[:, 55:].max() / 2


def test_page_escapes(tmp_path):
    """Labels are escaped as text."""
    import soundfile

    made = world.scene(0, content="sound")
    soundfile.write(tmp_path / "a.wav", made.wav, 16000)
    text = page([(tmp_path / "a.wav", made.labels | {"id": "<script>x</script>"})])
    assert "<script>x" not in text
