"""A run survives odd file names, broken manifests, wrong replies of experts, and Ctrl-C."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import annotate_runs as runs
import numpy as np
import pytest
import soundfile

from moss_audio_jax import cli
from moss_audio_jax.annotate import pipeline, source
from moss_audio_jax.annotate.ears import Ears
from moss_audio_jax.data.records import parse_row
from moss_audio_jax.files import Lock

WAV = (0.1 * np.random.default_rng(0).normal(size=12_000)).astype(np.float32)
PLAIN = ("--config.checkpoint=", "--config.speech.systems=()")  # only measured evidence


def put(folder: Path, *names: bytes) -> None:
    for name in names:
        path = os.path.join(os.fsencode(folder), name)
        with open(path, "wb") as file:
            soundfile.write(file, WAV, 16_000, format="WAV")


def annotate(given: Path, out: Path, *more: str) -> int:
    return cli.main(["annotate", "--input", str(given), "--output", str(out), *PLAIN, *more])


NAMES = [
    b"caf\xe9.wav",
    "café.wav".encode(),
    b"two\nlines.wav",
    b"-dash.wav",
    "\U0001f600.wav".encode(),
    b"x" * 250 + b".wav",
    ("\U00010348" * 62).encode() + b".wav",
    b"a 'b' \"c\" {d} %s $e.wav",
    b" .wav",
    "\u2028\u202e.wav".encode(),
    b"\xff\xfe.wav",
]


def test_any_file_name(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    put(tmp_path / "in", *NAMES)
    put(tmp_path / "in", b"\xe9mpty.wav")
    (tmp_path / "in" / os.fsdecode(b"\xe9mpty.wav")).write_bytes(b"")
    os.mkfifo(tmp_path / "in" / "pipe.wav")
    os.symlink("nowhere", tmp_path / "in" / "link.wav")
    assert annotate(tmp_path / "in", tmp_path / "out") == 1
    said = capsys.readouterr().err.splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == 3
    assert any("pipe.wav: is not a regular file" in line for line in errors)
    assert any("link.wav: no such file" in line for line in errors)
    assert any("\\udce9mpty.wav: " in line and "empty" in line for line in errors)
    assert said[-1].startswith("11 of 14 file(s)")
    records = runs.lines(tmp_path / "out" / "segments.jsonl")
    found = {os.path.basename(os.fsencode(record["audio"])) for record in records}
    assert found == set(NAMES)
    assert all((tmp_path / "out" / record["clip"]).is_file() for record in records)
    for line in (tmp_path / "out" / "rows.jsonl").read_bytes().splitlines():
        assert (tmp_path / "out" / parse_row(line).clips[0]).is_file()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "records").iterdir()}
    assert annotate(tmp_path / "in", tmp_path / "out") == 1  # a second run keeps all of it
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "records").iterdir()}


def test_any_manifest(tmp_path, capsys):
    put(tmp_path, b"good.wav", b"raw\xe9.wav", "létters.wav".encode())
    field = b"x" * 140_000
    manifests = {
        "utf16.txt": ("good.wav\nlétters.wav\n".encode("utf-16"), 2, []),
        "utf16le.txt": ("good.wav\nlétters.wav\n".encode("utf-16-le"), 2, []),
        "mark.csv": (b"\xef\xbb\xbfaudio\r\ngood.wav\r\n", 1, []),
        "latin1.csv": (b"audio,n\ngood.wav,1\nraw\xe9.wav,2\nl\xe9tters.wav,3\n", 3, []),
        "bytes.txt": (b"raw\xe9.wav\ngood.wav", 2, []),
        "bytes.jsonl": (b'{"audio": "raw\xe9.wav"}\n', 1, []),
        "long.csv": (b"note,audio\n" + field + b",good.wav\n,gone.wav\n", 1, ["no such file"]),
        "quote.csv": (b'audio,n\ngood.wav,1\n"' + field + b"\n", 1, ["is not a path"]),
        "bad.jsonl": (
            b'{"audio": "good.wav"}\n{"audio": \n[1]\n{"audio": ["a"]}\n{"audio": "a\\u0000b"}\n'
            b'{"audio": "\\ud800.wav"}\n{"audio": "https://me:pw1234@host/a.wav?sig=pw1234"}\n'
            + b"[" * 100_000
            + b'\n{"audio": "/dev/zero"}\n',
            1,
            [
                "line 2: the row: not valid JSON",
                "line 3: the row is a list",
                "line 4: ",
                "line 5: ",
                "\\ud800.wav: ",
                "line 7: https://***@host/a.wav?sig=***: is a URL",
                "line 8: the row: not usable JSON",
                "/dev/zero: is not a regular file",
            ],
        ),
    }
    for name, (data, good, problems) in manifests.items():
        (tmp_path / name).write_bytes(data)
        code = annotate(tmp_path / name, tmp_path / f"out-{name}")
        said = capsys.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == (1 if problems else 0), (name, said)
        assert len(errors) == len(problems), (name, said)
        for words in problems:
            assert any(words in line for line in errors), (name, words, errors)
        assert "pw1234" not in said
        assert f"\n{good} of " in f"\n{said}"
        written = runs.files(tmp_path / f"out-{name}")
        assert not any(b"pw1234" in content for content in written.values())
    (tmp_path / "parts.jsonl").write_text('{"audio_filepath": "good.wav", "offset": 2.5}\n')
    assert annotate(tmp_path / "parts.jsonl", tmp_path / "parts") == 0
    assert "rows name parts of files" in capsys.readouterr().err


def test_the_files_are_looked_at_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    put(tmp_path, b"a.wav")
    (tmp_path / "list.txt").write_text("gone.wav\nlost.wav\n")
    loaded = []
    monkeypatch.setattr(Ears, "load", lambda folder: loaded.append(folder))
    words = ["annotate", "--output", str(tmp_path / "out"), "--input"]
    assert cli.main([*words, str(tmp_path / "list.txt")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("note: the bundled small model answers; it knows only synthetic sound")
    assert said.count("no such file") == 2
    assert "0 of 2 file(s)" in said
    assert loaded == []
    # An unusable model gives one line, not one per file.
    words += [str(tmp_path), "--config.checkpoint=/no/such"]
    assert cli.main(words) == 1
    left_out, line = capsys.readouterr().err.splitlines()
    assert "are left out: list.txt, " in left_out  # and what the run before wrote there
    assert "/no/such" in line


def test_progress_is_shown(tmp_path, capsys):
    put(tmp_path, b"a.wav")
    c = runs.defaults.get_config()
    c.checkpoint, c.speech.systems = "", ()
    pipeline.annotate(source.find(tmp_path / "a.wav"), tmp_path / "out", c, progress=True)
    assert "audio-seconds/s" in capsys.readouterr().err


def test_a_folder_has_one_run_at_a_time(tmp_path, capsys):
    put(tmp_path, b"a.wav", b"b.wav")
    out = tmp_path / "out"

    def codes(*shards: str) -> list[int]:
        return [annotate(tmp_path, out, *(["--shard", s] if s else [])) for s in shards]

    with Lock(out, "annotate"):
        assert codes("", "0/2") == [2, 2]
    assert f"out: in use by annotate (process {os.getpid()}" in capsys.readouterr().err
    shard = "-00000-of-00002"
    with Lock(out, "annotate", shared=True), Lock(out, "annotate", f"shard{shard}"):
        assert codes("", "0/2", "1/2") == [2, 2, 0]
    assert codes("0/2", "") == [0, 0]


def test_ctrl_c_ends_the_run_and_its_workers(tmp_path, monkeypatch):
    """One line, exit code 130, and no process left, not even an expert's; a rerun continues."""
    put(tmp_path, b"a.wav", b"b.wav", b"c.wav")
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import os, sys, time\n"
        f"open(os.path.join({str(tmp_path)!r}, f'at{{os.getpid()}}'), 'w')\n"
        "time.sleep(600)\n"
    )
    config = tmp_path / "config.py"
    config.write_text(
        "from moss_audio_jax.annotate import defaults\n"
        "def get_config():\n"
        "    c = defaults.get_config()\n"
        "    c.checkpoint = ''\n"
        f"    c.experts.slow = dict(kind='command', target=({sys.executable!r}, {str(slow)!r}))\n"
        "    c.speech.systems, c.speech.gate = ('slow',), 0.0\n"
        "    return c\n"
    )
    words = ["annotate", "--input", str(tmp_path), "--output", str(tmp_path / "out")]
    words += ["--config", str(config)]
    run = subprocess.Popen(
        [sys.executable, "-m", "moss_audio_jax.cli", *words, "--workers", "2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while len(found := list(tmp_path.glob("at*"))) < 2:
        assert run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: the run and its workers
    _, said = run.communicate(timeout=120)
    left_out, *said = said.splitlines()
    assert "left out: config.py, slow.py" in left_out
    assert (run.returncode, said) == (130, ["interrupted"])
    until = time.monotonic() + 60
    for pid in [run.pid, *(int(path.name[2:]) for path in found)]:
        while os.path.exists(f"/proc/{pid}") and not _zombie(pid):
            assert time.monotonic() < until
            time.sleep(0.05)
    config.write_text(config.read_text().replace("('slow',)", "()"))
    assert cli.main(words) == 0


def _zombie(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


# --- secrets -------------------------------------------------------------------------------------


@pytest.fixture
def endpoint():
    """The URL of a server that refuses, and reports what it was sent."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(403)
            self.end_headers()
            self.wfile.write(f"not you: {self.headers['Authorization']} {self.path}".encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_no_secret_is_written(endpoint, tmp_path, capsys, monkeypatch):
    runs.write_clip(tmp_path / "in", "a", 1)
    monkeypatch.setenv("SOME_KEY", "kEyOne12345")
    c = runs.config()
    url = f"http://me:kEyTwo12345@{endpoint}/v1?api_key=kEyThree12345"
    runs.expert("keyed", url, c, "endpoint", model="m", key_from="SOME_KEY")
    runs.expert("plain", url, c, "endpoint", model="m")
    script = "import sys; sys.exit(' '.join(['bad arguments:', *sys.argv[1:]]))"
    argv = (
        sys.executable,
        "-c",
        script,
        "--api-key",
        "kEyFour12345",
        "--token=kEyFive12345",
        "OTHER_KEY=kEySix12345",
    )
    runs.expert("command", argv, c, "command")
    c.unified, c.sound.caption, c.sound.events = "keyed", "plain", "command"
    runs.run(tmp_path / "in", tmp_path / "out", c)
    said = "".join(capsys.readouterr())
    for name, content in runs.files(tmp_path / "out").items():
        assert not re.search(rb"kEy\w+12345", content), name
    assert "12345" not in said
    reasons = {n["field"]: n["reason"] for n in runs.lines(tmp_path / "out" / "dropped.jsonl")}
    assert "HTTP 403 not you: Bearer *** /v1/chat/completions?api_key=***" in reasons["unify"]
    assert "HTTP 403 not you: Basic ***" in reasons["caption"]
    assert reasons["events"].endswith("bad arguments: --api-key *** --token=*** OTHER_KEY=***")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    told = manifest["config"]["experts"]
    assert told["keyed"]["target"] == f"http://***@{endpoint}/v1?api_key=***"
    assert told["command"]["target"][3:] == ["--api-key", "***", "--token=***", "OTHER_KEY=***"]
    assert told["keyed"]["key_from"] == "SOME_KEY"
