"""The command line: its answers, its errors, and the files that it leaves."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
from tiny_model import tone, write_checkpoint, write_wav

from moss_audio_jax import (
    MossAudio,
    Segment,
    __version__,
    cli,
    command,
    files,
    parse_timestamps,
)
from moss_audio_jax.generate import request
from moss_audio_jax.weights import safetensors
from moss_audio_jax.weights.adapters import save_adapters
from moss_audio_jax.weights.opening import read_config
from tools.make.toy import write_byte_tokenizer

ROOT = Path(__file__).parents[1]
NOISE = "(random weights: this answer is noise)\n"
NOTE = "note: this checkpoint has random weights; its answers are noise"
FEW = ("--max-new-tokens", "6", "--no-loop-guard")


class Result(NamedTuple):
    code: int
    out: str
    lines: list[str]  # of stderr


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "toy")


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """cli.main in a folder with a.wav (1 s) and b.wav (2.5 s)."""
    monkeypatch.chdir(tmp_path)
    write_wav(tmp_path / "a.wav", tone(1.0))
    write_wav(tmp_path / "b.wav", tone(2.5, 880))

    def main(*argv: object) -> Result:
        capsys.readouterr()
        code = cli.main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return Result(code, out, err.splitlines())

    return main


def generate(toy: Path, *argv: object) -> tuple:
    return ("generate", "--checkpoint", toy, "--prompt", "hi", *FEW, *argv)


def refused(result: Result, code: int, *words: str) -> None:
    """One line of error that holds `words`, nothing on stdout."""
    assert result.code == code
    assert result.out == ""
    (line,) = [line for line in result.lines if line != NOTE]
    assert line.startswith("error: ")
    for word in words:
        assert word in line


# --- good paths --------------------------------------------------------------------------------


def test_one_answer_in_every_form(run, toy):
    text = run(*generate(toy, "--audio", "a.wav"))
    assert text.code == 0
    assert text.out.endswith("\n" + NOISE)
    answer = text.out.removesuffix("\n" + NOISE)
    assert text.lines[:2] == [
        NOTE,
        "note: the answer reached --max-new-tokens and may be cut short",
    ]
    assert text.lines[2].startswith("1.0 s of audio, 1 answer(s), ")

    row = json.loads(run(*generate(toy, "--audio", "a.wav", "--json")).out)
    assert row["audio"] == ["a.wav"]
    assert (row["text"], row["thinking"]) == (answer, None)
    assert (row["finish_reason"], row["random_weights"]) == ("length", True)
    assert len(row["ids"]) == row["n_output_tokens"] == 6

    streamed = run(*generate(toy, "--audio", "a.wav", "--stream"))
    assert (streamed.code, streamed.out.strip()) == (0, answer)
    assert streamed.lines[0] == NOTE


def test_several_files_alone_and_together(run, toy):
    rows = [
        json.loads(run(*generate(toy, "--json", "--audio", file)).out)
        for file in ("a.wav", "b.wav")
    ]
    assert rows[0]["ids"] != rows[1]["ids"]
    both = run(*generate(toy, "--audio", "a.wav", "--audio", "b.wav", "--batch-size", 2))
    headed = "".join(f"== {row['audio'][0]}\n{row['text']}\n{NOISE}" for row in rows)
    assert both.out == headed
    together = json.loads(
        run(*generate(toy, "--json", "--together", "--audio", "a.wav", "b.wav")).out
    )
    assert together["audio"] == ["a.wav", "b.wav"]
    # The second clip adds 32 placeholders, a marker for the second 2, start, end and a newline.
    assert together["n_prompt_tokens"] == rows[0]["n_prompt_tokens"] + 32 + 1 + 3
    without = run(*generate(toy, "--json", "--no-time-markers", "--audio", "b.wav"))
    assert json.loads(without.out)["n_prompt_tokens"] == rows[1]["n_prompt_tokens"] - 1
    system = run(*generate(toy, "--json", "--system", "x", "--audio", "b.wav"))
    shorter = len("You are a helpful assistant.") - 1
    assert json.loads(system.out)["n_prompt_tokens"] == rows[1]["n_prompt_tokens"] - shorter


def test_text_only_and_stop(run, toy):
    row = json.loads(run(*generate(toy, "--json")).out)
    assert row["audio"] == []
    # Stop at the first character that occurs only once in the answer.
    text = row["text"]
    stop = next(c for c in text[1:] if text.count(c) == 1 and c != "�")
    stopped = json.loads(run(*generate(toy, "--json", "--stop", stop)).out)
    assert stopped["text"] == text[: text.index(stop)].strip()
    assert stopped["finish_reason"] == "stop"


def test_a_mesh_changes_nothing(run, toy):
    alone = run(*generate(toy, "--audio", "a.wav"))
    assert run(*generate(toy, "--audio", "a.wav", "--mesh", "data=2,tensor=2")).out == alone.out


def test_there_and_back_and_the_same_answer(run, toy):
    assert run("convert", "--input", toy, "--output", "native", "--format", "native") == Result(
        0, "", ["wrote native (native)"]
    )
    assert run("convert", "--input", "native", "--output", "back", "--format", "official").code == 0
    assert {f.name for f in Path("back").iterdir()} == {f.name for f in toy.iterdir()}
    for file in toy.iterdir():
        assert (Path("back") / file.name).read_bytes() == file.read_bytes()
    answers = [run(*generate(folder, "--audio", "a.wav")).out for folder in (toy, "native")]
    assert answers[0] == answers[1]


def test_transcripts_into_a_folder(run, toy):
    """One good file among bad ones still gets its transcript."""
    argv = ("transcribe", "--checkpoint", toy, *FEW, "--timestamps", "sentence", "--audio")
    shown = run(*argv, "a.wav")
    assert shown.code == 0
    (segment,) = parse_timestamps(shown.out)
    assert segment == Segment(0.0, 1.0, segment.text)
    written = run(*argv, "missing.wav", "a.wav", "--out", "new/out", "--format", "srt")
    assert written.code == 1
    assert "error: missing.wav: no such file" in written.lines
    assert written.lines[-1] == "a.wav -> new/out/a.srt"
    assert [f.name for f in Path("new/out").iterdir()] == ["a.srt"]
    srt = Path("new/out/a.srt").read_text(encoding="utf-8")
    assert srt.startswith("1\n00:00:00,000 --> 00:00:01,000\n")
    assert run(*argv, "missing.wav", "--out", "none").code == 1
    assert not Path("none").exists()
    # A file that cannot be written does not lose the next one.
    Path("half/a.srt/there").mkdir(parents=True)
    half = run(*argv, "a.wav", "b.wav", "--out", "half", "--format", "srt")
    assert half.code == 1
    assert any(line.startswith("error: half/a.srt: not written") for line in half.lines)
    assert half.lines[-1] == "b.wav -> half/b.srt"


# --- sound that cannot be used -----------------------------------------------------------------


def test_bad_sound_is_named_and_the_good_answered(run, toy):
    Path("empty.wav").touch()
    Path("text.wav").write_text("this is no sound\n" * 100)
    soundfile.write("whole.mp3", tone(4.0), 16_000)
    whole = Path("whole.mp3").read_bytes()
    Path("cut.mp3").write_bytes(whole[: len(whole) // 2])
    write_wav(Path("zero.wav"), np.zeros(0))
    write_wav(Path("short.wav"), tone(0.009))
    write_wav(Path("nan.wav"), np.where(np.arange(16_000) == 8000, np.nan, tone(1.0)))
    write_wav(Path("long.wav"), tone(30.0))
    expected = {
        "missing.wav": "no such file",
        "empty.wav": "is empty",
        "text.wav": "not audio",
        "cut.mp3": "cut short",
        "zero.wav": "no samples",
        "short.wav": "at least 10 ms",
        "nan.wav": "NaN or infinite, the first at 0.500 s",
        "long.wav": "30 s of audio alone make 375 tokens, but the model has 256 positions",
        ".": "is a directory",
    }
    alone = run(*generate(toy, "--audio", "a.wav")).out
    result = run(*generate(toy, "--audio", *list(expected)[:4], "a.wav", *list(expected)[4:]))
    assert result.code == 1
    assert result.out == "== a.wav\n" + alone
    errors = [line for line in result.lines if line.startswith("error: ")]
    assert len(errors) == len(expected)
    for file, words in expected.items():
        (line,) = [line for line in errors if line.startswith(f"error: {file}: ")]
        assert words in line
    # Faults at the beginning of a file are reported before the model is loaded.
    early = result.lines[: result.lines.index(NOTE)]
    assert {line.split(": ")[1] for line in early} >= {"missing.wav", "empty.wav", "text.wav", "."}
    refused(run(*generate(toy, "--audio", "text.wav", "--stream")), 1, "text.wav")
    refused(run(*generate(toy, "--together", "--audio", "a.wav", "nan.wav")), 1, "nan.wav")


@pytest.mark.parametrize(
    "argv",
    [
        ("generate", "--prompt", "hi", "--audio", "gone.wav", "empty.wav"),
        ("generate", "--prompt", "hi", "--together", "--audio", "a.wav", "gone.wav"),
        ("generate", "--prompt", "hi", "--stream", "--audio", "gone.wav"),
        ("transcribe", "--audio", "gone.wav", "empty.wav"),
    ],
)
def test_sound_is_looked_at_before_a_model_is_loaded(run, argv):
    Path("empty.wav").touch()
    result = run(*argv, "--checkpoint", "nowhere")
    assert (result.code, result.out) == (1, "")
    errors = [f"error: {file}: " for file in ("gone.wav", "empty.wav") if file in argv]
    assert len(result.lines) == len(errors)
    for line, start in zip(result.lines, errors, strict=True):
        assert line.startswith(start)


def test_warnings_are_lines_and_part_of_the_json(run, toy):
    write_wav(Path("zero.wav"), np.zeros(16_000))
    said = "every sample is 0: what the answer says was not heard"
    asked = run(*generate(toy, "--json", "--audio", "zero.wav", "a.wav"))
    assert asked.code == 0
    assert [json.loads(line)["warnings"] for line in asked.out.splitlines()] == [[said], []]
    assert f"warning: zero.wav: {said}" in asked.lines
    together = run(*generate(toy, "--together", "--audio", "a.wav", "zero.wav"))
    assert f"warning: clip 2: {said}" in together.lines
    written = run("transcribe", "--checkpoint", toy, *FEW, "--audio", "zero.wav")
    assert f"warning: zero.wav: 0.00-1.00 s: {said}" in written.lines


def test_who_answers_is_said_where_nobody_chose(capsys, monkeypatch):
    small = types.SimpleNamespace(tokenizer=True, random_weights=False)
    monkeypatch.setattr(MossAudio, "load", lambda *_, **__: small)
    for argv, lines in (([], [command.SMALL_MODEL]), (["--checkpoint", "mine"], [])):
        options = command.parser("x", "")
        command.add_model_options(options)
        assert command.load_model(options.parse_args(argv)) is small
        assert capsys.readouterr().err.splitlines() == lines
    assert "only synthetic sound" in command.SMALL_MODEL


def test_windows_too_long_for_the_model_spare_the_other_files(run, toy):
    write_wav(Path("long.wav"), tone(30.0))
    argv = ("transcribe", "--checkpoint", toy, *FEW, "--audio", "long.wav", "a.wav")
    result = run(*argv)
    assert result.code == 1
    assert result.out.startswith("== a.wav\n")
    (error,) = [line for line in result.lines if line.startswith("error: ")]
    assert error.startswith("error: long.wav: 0.00-30.00 s: ")
    assert "256 positions" in error


# --- checkpoints that cannot be used -----------------------------------------------------------


def tensors(change):
    """A spoiler that rewrites the weights."""

    def spoil(folder: Path) -> None:
        with safetensors.Reader(folder) as reader:
            old = {name: reader.read(name) for name in reader.tensors}
        new = change(dict(old))
        (folder / "model.safetensors").unlink()
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in new.items()}
        with safetensors.Writer(folder, shapes) as writer:
            for name, tensor in new.items():
                writer.write(name, tensor)

    return spoil


def header(change):
    """A spoiler that rewrites the text of the weights' header."""

    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        raw = file.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        text = change(raw[8:end].decode()).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])

    return spoil


def truncated(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100_000)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def config(part: str | None, key: str, value: object):
    def spoil(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        (raw[part] if part else raw)[key] = value
        (folder / "config.json").write_text(json.dumps(raw))

    return spoil


def written(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


NORM = "language_model.norm.weight"
WEIGHTS = {
    "missing": (tensors(lambda t: t.pop(NORM) is None or t), NORM, "missing"),
    "extra": (tensors(lambda t: t | {"extra.weight": t[NORM]}), "extra.weight", "unexpected"),
    "misshapen": (tensors(lambda t: t | {NORM: t[NORM][:-1]}), NORM, "[31]", "[32]"),
    "twice": (header(lambda h: h.rstrip()[:-1] + "," + h.rstrip()[1:]), "is repeated"),
    "dtype": (header(lambda h: h.replace('"F32"', '"F64"', 1)), "dtype F64"),
    "truncated": (truncated, "model.safetensors", "truncated"),
    "pickle": (pickled, "pytorch_model.bin", "pickle"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json", "no such file"),
    "no JSON": (written("config.json", "{"), "config.json", "not valid JSON"),
    "a list": (written("config.json", "[]"), "config.json", "expected a JSON object"),
    "activation": (config("language_config", "hidden_act", "relu"), "hidden_act is 'relu'"),
    "no number": (config("audio_config", "d_model", "wide"), "d_model is 'wide'"),
    "other model": (config(None, "model_type", "whisper"), "model_type is 'whisper'"),
}
# Files on which the weights do not depend, and which a conversion copies unchanged.
FILES = {
    "vocabulary": (
        lambda f: write_byte_tokenizer(f) or _more_pieces(f, 500),
        "the tokenizer does not fit the model: its ids go up to 499",
        "vocabulary has 384 entries",
    ),
    "audio ids": (
        written("processor_config.json", '{"audio_token_id": 4000}'),
        "audio_token_id 4000 does not fit the model",
    ),
    "no tokenizer": (
        lambda f: [(f / name).unlink() for name in ("vocab.json", "merges.txt")],
        "no tokenizer",
    ),
    "half a tokenizer": (lambda f: (f / "merges.txt").unlink(), "merges.txt"),
    "mel": (written("processor_config.json", '{"mel_dim": 80}'), "mel_dim is 80"),
}


@pytest.mark.parametrize("verb", ["generate", "transcribe"])
def test_adapters_of_another_model_are_named(run, toy, verb):
    """Before the weights are read. tests/evaluate merges adapters that fit."""
    config = read_config(toy)
    wider = dataclasses.replace(config.decoder, hidden_size=48)
    shapes = {"a": (wider.layers, 48, 2), "b": (wider.layers, 2, wider.heads * wider.head_dim)}
    query = "language_model/layers/self_attn/q_proj/lora_"
    adapters = {query + side: np.ones(shape, np.float32) for side, shape in shapes.items()}
    save_adapters("lora", adapters, 4.0, dataclasses.replace(config, decoder=wider))
    options = ["--prompt", "hi"] if verb == "generate" else []
    options += ["--checkpoint", toy, "--audio", "a.wav", "--lora"]
    refused(run(verb, *options, "lora"), 1, "lora_A.weight has shape [2, 48]", "require [2, 32]")
    refused(run(verb, *options, "a.wav"), 1, "a.wav: not a folder of LoRA adapters")


def _more_pieces(folder: Path, count: int, first: int = 270) -> None:
    """Pieces up to id count - 1; by default past those that the audio ids stand for."""
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocab |= {f"piece{i}": i for i in range(first, count)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")


VALUES = {
    "rope": (config("language_config", "rope_theta", "x"), "rope_theta is 'x'"),
    "rope object": (config("language_config", "rope_parameters", [1]), "rope_parameters"),
    "taps": (config("audio_config", "deepstack_encoder_layer_indexes", ["a"]), "deepstack_"),
    "inject": (config(None, "deepstack_num_inject_layers", "3"), "deepstack_num_inject_layers"),
    "vocabulary over audio ids": (
        lambda f: _more_pieces(f, 500, 261),
        "the tokenizer does not fit the model: its ids go up to 499",
    ),
}


@pytest.mark.parametrize("case", [*WEIGHTS, *FILES, *VALUES])
def test_bad_checkpoints(run, toy, case):
    spoil, *words = (WEIGHTS | FILES | VALUES)[case]
    shutil.copytree(toy, "bad")
    spoil(Path("bad"))
    refused(run(*generate("bad", "--audio", "a.wav")), 1, "bad", *words)
    if case in WEIGHTS:
        before = set(os.listdir())
        convert = ("convert", "--input", "bad", "--output", "out", "--format", "native")
        refused(run(*convert), 1, "bad", *words)
        assert set(os.listdir()) == before  # hidden ones too


def test_folders_that_are_none(run):
    refused(run(*generate("nowhere")), 1, "nowhere", "no such file")
    refused(run(*generate("a.wav")), 1, "a.wav", "Not a directory")


# --- bad use -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nonsense"], ["--nonsense", "--help"]),
        (["--dtype", "int8"], ["--dtype", "int8"]),
        (["--mesh", "tensor"], ["--mesh", "'tensor'"]),
        (["--mesh", "data=2,data=2"], ["--mesh", "each axis once"]),
        (["--mesh", "pipeline=2"], ["pipeline"]),
        (["--mesh", "data=64"], ["does not fit 8 device"]),
        (["--encoder-attention", "none"], ["--encoder-attention"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--repetition-penalty", "0"], ["repetition_penalty is 0"]),
        (["--temperature", "nan"], ["temperature is nan"]),
        (["--top-p", "1.5"], ["top_p is 1.5"]),
        (["--stream", "--json"], ["--stream"]),
        (["--prompt", "and that?"], ["--prompt", "was given twice"]),
        (["--stream", "--audio", "a.wav", "b.wav"], ["--stream"]),
    ],
)
def test_bad_options(run, toy, options, words):
    refused(run(*generate(toy, *options)), 2, *words)


def test_bad_use_of_transcribe(run, toy):
    argv = ("transcribe", "--checkpoint", toy, "--audio", "a.wav")
    refused(run(*argv, "--format", "srt"), 2, "--format srt needs --timestamps")
    refused(run(*argv, "--window-seconds", "0"), 2, "at least 1 s")
    os.mkdir("c")
    shutil.copy("a.wav", "c/a.wav")
    refused(run(*argv, "c/a.wav", "--out", "o"), 2, "a.wav", "c/a.wav", "o/a.txt")
    refused(run(*argv, "--out", "b.wav"), 1, "b.wav", "not a writable folder")
    os.symlink("nowhere", "link")
    refused(run(*argv, "--out", "link/in"), 1, "link", "not a writable folder")
    assert not Path("o").exists()


def test_verbs(run):
    unknown = run("sing")
    refused(unknown, 2, "'sing'", *cli.VERBS)
    assert run().code == 2
    for option in ("--help", "-h"):
        shown = run(option)
        assert shown.code == 0
        assert all(f"\n  {verb} " in shown.out for verb in cli.VERBS)
    assert run("--version").out.strip().endswith(importlib.metadata.version("moss_audio_jax"))
    for verb in cli.VERBS.keys() - {"demo", "serve"}:  # which need nothing
        refused(run(verb), 2, "required")


# --- writing -----------------------------------------------------------------------------------


def test_an_output_that_exists(run, toy):
    convert = ("convert", "--input", toy, "--format", "native", "--output")
    shutil.copytree(toy, "old")
    refused(run(*convert, "old"), 1, "old", "already exists")
    assert {f.name for f in Path("old").iterdir()} == {f.name for f in toy.iterdir()}
    assert run(*convert, "old", "--overwrite").code == 0
    assert not Path("old/model.safetensors").exists()
    os.mkdir("precious")
    Path("precious/letters.txt").write_text("dear")
    refused(run(*convert, "precious", "--overwrite"), 1, "precious", "not a checkpoint")
    assert Path("precious/letters.txt").read_text() == "dear"
    for name in ("letters.txt", "checkpoints"):  # a model beside something else, and a run
        shutil.copytree(toy, f"with-{name}")
        os.mkdir(f"with-{name}/{name}")
        refused(run(*convert, f"with-{name}", "--overwrite"), 1, "not a checkpoint", name)
        assert Path(f"with-{name}", name).exists()
    refused(run(*convert, toy), 2, "different folders")

    os.symlink("old", "link")  # as to a larger disk: it stays, and what it names is replaced
    changed = Path("old/config.json").stat().st_ino
    assert run(*convert, "link", "--overwrite").code == 0
    assert Path("link").is_symlink()
    assert Path("old/config.json").stat().st_ino != changed
    assert not [name for name in os.listdir() if name.startswith(".")]


def test_a_full_disk_leaves_nothing(run, toy, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = set(os.listdir())
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.os, "pwrite", full)
        convert = ("convert", "--input", toy, "--output", "out", "--format", "official")
        refused(run(*convert), 1, "out", "the disk is full")
    assert set(os.listdir()) == before

    os.mkdir("o")
    Path("o/a.txt").write_text("an older transcript")
    monkeypatch.setattr(files.os, "fsync", full)
    result = run("transcribe", "--checkpoint", toy, *FEW, "--audio", "a.wav", "--out", "o")
    assert result.code == 1
    assert result.lines[-1].startswith("error: o/a.txt: not written: the disk is full")
    assert os.listdir("o") == ["a.txt"]
    assert Path("o/a.txt").read_text() == "an older transcript"


@pytest.mark.parametrize("verb", ["generate", "transcribe"])
def test_answers_are_out_before_more_is_read(run, toy, monkeypatch, verb):
    """Nine files of which each call of the engine takes two; b.wav is no longer there then."""
    monkeypatch.setattr(command, "BATCHES_AT_ONCE", 2)
    names = [f"{i}.wav" for i in range(8)]
    for name in names:
        shutil.copy("a.wav", name)
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    held, log_mel = [], request.Clip.log_mel

    def watched(clip, dtype):
        held.append(out.getvalue().count("== "))
        return log_mel(clip, dtype)

    def missing(files):  # as if b.wav went while the model was loaded
        os.remove("b.wav")
        return {}

    monkeypatch.setattr(request.Clip, "log_mel", watched)
    monkeypatch.setattr(command, "look", missing)
    options = ["--checkpoint", toy, *FEW, "--batch-size", 1, "--audio", *names[:3], "b.wav"]
    options += [*names[3:], *(["--prompt", "hi"] if verb == "generate" else [])]
    result = run(verb, *options)
    assert result.code == 1
    assert [line for line in result.lines if "b.wav" in line]
    assert held == [0, 0, 2, 2, 4, 4, 6, 6]
    headings = [line for line in out.getvalue().splitlines() if line.startswith("== ")]
    assert headings == [f"== {name}" for name in names]


# --- processes of their own --------------------------------------------------------------------


def process(*argv: object, **how) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONWARNINGS")}
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
        **how,
    )


IMPORTED = """
import sys
from moss_audio_jax import cli
code = cli.main(sys.argv[1:])
print(code, *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""
NEVER = {"grain", "matplotlib", "optax", "orbax", "scipy", "tensorstore", "torch", "transformers"}


@pytest.mark.parametrize(
    ("words", "never"),
    [
        (["--help"], NEVER | {"av", "flax", "jax", "numpy"}),
        (["generate", "--help"], NEVER | {"av", "flax", "jax", "numpy"}),
        (["generate", "--prompt", "hi", *FEW, "--audio", "a.wav"], NEVER | {"rapidfuzz"}),
    ],
    ids=["help", "help of a verb", "an answer"],
)
def test_a_verb_imports_only_what_it_needs(words, never, toy, tmp_path):
    """By name: those that take a tenth of a second or more, and that an answer does without."""
    write_wav(tmp_path / "a.wav", tone(1.0))
    model = ("--checkpoint", toy) if "--audio" in words else ()
    done = process("-c", IMPORTED, *words, *model, cwd=tmp_path)
    code, *found = done.stderr.splitlines()[-1].split()
    assert code == "0"
    assert "moss_audio_jax" in found
    assert not never & set(found)


def test_the_console_script_says_nothing_but_its_own(toy, tmp_path):
    """stderr has no lines from libraries: the mp3 decoder, JAX, Orbax."""
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="moss-audio-jax")
    assert entry.load() is cli.main
    soundfile.write(tmp_path / "whole.mp3", tone(4.0), 16_000)
    whole = (tmp_path / "whole.mp3").read_bytes()
    (tmp_path / "cut.mp3").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp3").write_text("no sound")
    native = process(
        "-m",
        "moss_audio_jax.cli",
        "convert",
        "--input",
        toy,
        "--output",
        "native",
        "--format",
        "native",
        cwd=tmp_path,
    )
    assert (native.returncode, native.stdout, native.stderr) == (0, "", "wrote native (native)\n")
    asked = process(
        "-m",
        "moss_audio_jax.generate",
        "--checkpoint",
        "native",
        "--prompt",
        "hi",
        "--audio",
        "cut.mp3",
        "text.mp3",
        cwd=tmp_path,
    )
    assert (asked.returncode, asked.stdout) == (1, "")
    lines = [line for line in asked.stderr.splitlines() if line != NOTE]
    assert sorted(line.split(": ")[:2] for line in lines) == [
        ["error", "cut.mp3"],
        ["error", "text.mp3"],
    ]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_is_a_module_with_an_example(verb):
    shown = process("-m", f"moss_audio_jax.{verb}", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"example:\n  moss-audio-jax {verb}" in shown.stdout


@pytest.mark.parametrize(
    ("closed", "words", "code", "out", "err"),
    [
        (">&-", ["--version"], 1, "", "error: stdout: not written: Bad file descriptor\n"),
        (">&-", ["generate", "--help"], 1, "", "error: stdout: not written: Bad file descriptor\n"),
        (">/dev/full", ["--help"], 1, "", "error: stdout: not written: No space left on device\n"),
        ("2>&-", ["sing"], 2, "", ""),
        ("<&-", ["--version"], 0, f"moss-audio-jax {__version__}\n", ""),
        ("<&- >&- 2>&-", ["sing"], 2, "", ""),
    ],
)
def test_streams_that_are_closed(closed, words, code, out, err):
    shell = f'exec "$@" {closed}'
    done = subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, "-m", "moss_audio_jax.cli", *words],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    program = (
        "from moss_audio_jax import runtime; import sys, os; "
        "runtime.run_as_process(lambda: (open('number', 'w').write("
        "str(os.open('number', os.O_RDONLY))), print('lost', file=sys.stderr), 0)[-1])"
    )
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", program],
        cwd=tmp_path,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0
    assert int((tmp_path / "number").read_text()) > 2


def test_a_reader_that_leaves_is_no_error():
    """`moss-audio-jax ... | head`: no traceback, not even at exit."""
    read, write = os.pipe()
    os.close(read)
    script = (
        "import sys; from moss_audio_jax import command; "
        "sys.exit(command.run(lambda argv: print('answer'), []))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's memory alone is kept")
def test_freed_memory_is_kept():
    program = """if True:
        import os
        import sys

        import numpy as np

        from moss_audio_jax import command

        def resident():
            pages = int(open("/proc/self/statm").read().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

        if sys.argv[1] == "keep":
            command.keep_memory()
        before = resident()
        np.ones(200_000_000, np.uint8)
        print(resident() - before)
    """
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    kept, returned = (
        float(
            subprocess.run(
                [sys.executable, "-c", program, how],
                env=env,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for how in ("keep", "return")
    )
    assert returned < 50 < 150 < kept
