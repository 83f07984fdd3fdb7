"""Inference: answers depend only on the item, and nothing is lost or done twice."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_model import tiny_config, tone, write_checkpoint, write_wav

from moss_audio_jax import MossAudio, Request, Sampling
from moss_audio_jax import command as commands
from moss_audio_jax.evaluate import __main__ as verb
from moss_audio_jax.evaluate import infer as module
from moss_audio_jax.evaluate.benchmarks import Item
from moss_audio_jax.evaluate.infer import item_seed
from moss_audio_jax.files import Lock
from moss_audio_jax.models import lora
from moss_audio_jax.tree import flatten
from moss_audio_jax.weights.adapters import save_adapters

ROOT = Path(__file__).parents[2]
TOKENS = ("--max-new-tokens", "5")
ITEMS = 14


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("evaluate") / "toy")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """ITEMS clips of 0.2 to 3 s, out of order; in bad.jsonl with three that cannot be asked."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number, seconds in enumerate(np.random.default_rng(0).permutation(ITEMS) * 0.2 + 0.2):
        write_wav(folder / f"{number}.wav", tone(seconds, 200 + 50 * number))
        rows.append({"id": f"clip {number}", "audio": f"{number}.wav", "text": "x"})
    write_wav(folder / "long.wav", tone(25.0))
    (folder / "broken.wav").write_bytes(b"RIFF nothing more")
    bad = [{"id": name, "audio": f"{name}.wav", "text": "x"} for name in ("gone", "broken", "long")]
    for name, some in (("good", rows), ("bad", [bad[0], *rows[:2], *bad[1:]])):
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture
def evaluate(toy, data, tmp_path, monkeypatch):
    """`evaluate infer` of good.jsonl here -> (exit code, predictions in the order of the file)."""

    def run(output: str, *options: object, rows: str = "good") -> tuple[int, list[dict]]:
        code = main(command(toy, data / f"{rows}.jsonl", tmp_path / output, *options))
        return code, read(tmp_path / output)

    return run


def main(argv: list[str]) -> int:
    return commands.run(verb.main, argv)


def command(toy: Path, data: Path, output: Path, *options: object) -> list[str]:
    argv = [
        "infer",
        "--benchmark",
        "asr",
        "--data",
        data,
        "--checkpoint",
        toy,
        "--output",
        output,
        *TOKENS,
        *options,
    ]
    return [str(word) for word in argv]


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def timeless(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_prediction_says_all(evaluate, toy, data, capsys):
    code, rows = evaluate("p.jsonl")
    assert code == 0
    assert [row["id"] for row in rows] == [f"clip {number}" for number in range(ITEMS)]
    model = MossAudio.load(toy, "float32")
    reply = model.generate_batch(
        [
            Request("Transcribe the audio.", str(data / f"{number}.wav"), Sampling(5))
            for number in range(ITEMS)
        ]
    )[3]
    row = rows[3]
    assert row.pop("seconds") > 0
    meta = row.pop("meta")
    raw = model.tokenizer.decode(reply.ids)
    assert row == {
        "id": "clip 3",
        "prompt": "Transcribe the audio.",
        "raw_output": raw,
        "thinking": None,
        "answer": reply.text,
        "parsed": row["parsed"],
        "parse_status": "ok",
        "finish_reason": reply.finish_reason,
        "n_prompt_tokens": row["n_prompt_tokens"],
        "n_output_tokens": len(reply.ids),
        "audio_seconds": row["audio_seconds"],
        "warnings": [],
    }
    seconds = [row["audio_seconds"] for row in rows[:3] + rows[4:]] + [row["audio_seconds"]]
    np.testing.assert_allclose(sorted(seconds), 0.2 * np.arange(1, ITEMS + 1), atol=0.011)
    assert row["n_prompt_tokens"] > 12.5 * row["audio_seconds"]
    assert (meta["model"], meta["lora"], meta["dtype"]) == (str(toy), None, "float32")
    assert (meta["random_weights"], meta["encoder_attention"]) == (True, "chunked")
    assert meta["decoding"]["max_new_tokens"] == 5
    assert meta["code_version"].startswith("0.1.0+")
    said = capsys.readouterr().err
    assert f"asr: {ITEMS} items; the first one (clip 0) asks:\n  Transcribe the audio.\n" in said
    assert f"{ITEMS} answer(s), 0 with a warning, 0 failed, 21 s of audio" in said


def test_batch_mesh_and_order_change_nothing(evaluate, monkeypatch):
    """With sampling, so that a wrong random key would show."""
    sampled = ("--temperature", "1", "--seed", "3")
    _, expected = evaluate("one.jsonl", "--batch", "1", *sampled)
    assert len({row["raw_output"] for row in expected}) > ITEMS // 2
    monkeypatch.setattr(module, "BATCHES_AT_ONCE", 1)
    for output, *options in (
        ("sixteen.jsonl", "--batch", "16"),
        ("mesh.jsonl", "--batch", "16", "--mesh", "data=8"),
    ):
        code, found = evaluate(output, *options, *sampled)
        assert (code, timeless(found)) == (0, timeless(expected)), output
    _, other = evaluate("other.jsonl", *sampled[:3], "4")
    differing = [a["raw_output"] != b["raw_output"] for a, b in zip(other, expected, strict=True)]
    assert sum(differing) > ITEMS // 2


def test_seeds_belong_to_items():
    seeds = [item_seed(seed, name) for seed in range(20) for name in ("a", "b", "1", "1a")]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert item_seed(3, "clip 0") == 329663659  # the same on any machine, in any version


def test_killed_and_resumed(evaluate, toy, data, tmp_path):
    """Killed repeatedly, at any byte: nothing is lost, repeated or changed."""
    _, expected = evaluate("whole.jsonl", "--batch", "2")
    output = tmp_path / "killed.jsonl"
    partial = tmp_path / "killed.jsonl.partial.jsonl"

    class Killed(BaseException):
        """An exception that no code may catch."""

    write, made = module.Journal.write, []
    for survived in (0, 1, 4, 3, 2):
        left = itertools.count(survived, -1)

        def dying(journal, row, left=left):
            if next(left) == 0:
                write(journal, row)  # half of it
                journal._file.flush()
                os.truncate(partial, partial.stat().st_size - 40)
                raise Killed
            write(journal, row)
            made.append(row["id"])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.Journal, "write", dying)
            with pytest.raises(Killed):
                main(command(toy, data / "good.jsonl", output, "--batch", "2"))
        assert not output.exists()
        assert [row["id"] for row in map(json.loads, partial.read_text().split("\n")[:-1])] == made
    code, found = evaluate("killed.jsonl", "--batch", "2")
    assert (code, timeless(found)) == (0, timeless(expected))
    assert len(set(made)) == len(made) == 10
    assert {file.name for file in tmp_path.iterdir()} == {"whole.jsonl", "killed.jsonl"}
    # Again: nothing to do, nothing done.
    before = output.read_bytes()
    assert evaluate("killed.jsonl")[0] == 0
    assert output.read_bytes() == before


def test_bad_items_are_named_counted_and_tried_again(evaluate, data, tmp_path, capsys):
    code, rows = evaluate("p.jsonl", rows="bad")
    assert code == 1
    assert [row["id"] for row in rows] == ["gone", "clip 0", "clip 1", "broken", "long"]
    errors = {row["id"]: row["error"] for row in rows if "error" in row}
    assert errors["gone"] == f"{data / 'gone.wav'}: no such file"
    assert str(data / "broken.wav") in errors["broken"]
    assert "256 positions" in errors["long"]
    assert all(
        (row["raw_output"], row["parsed"], row["parse_status"]) == (None, None, "error")
        for row in rows
        if "error" in row
    )
    said = capsys.readouterr().err.splitlines()
    named = [line.split(": ")[1] for line in said if line.startswith("error: ")]
    assert named == [str(data / "gone.wav"), "broken", "long"]  # missing files come first
    assert any("2 answer(s), 0 with a warning, 3 failed" in line for line in said)

    good = [row for row in rows if "error" not in row]
    write_wav(data / "gone.wav", tone(1.0))
    try:
        code, again = evaluate("p.jsonl", rows="bad")
    finally:
        (data / "gone.wav").unlink()
    assert code == 1
    assert [row["id"] for row in again if "error" in row] == ["broken", "long"]
    assert again[1:3] == good  # the same lines, not answered again
    # A part of the data: the rest of the predictions stays.
    code, rows = evaluate("p.jsonl", "--limit", "2", rows="bad")
    assert (code, rows[:3]) == (0, again[:3])
    assert len(rows) == 5


def test_what_a_reply_warns_of_is_kept_and_said(evaluate, monkeypatch, capsys):
    answer = MossAudio.answer

    def warned(self, prompts, batch_size, on_reply):
        def told(number, reply):
            on_reply(number, dataclasses.replace(reply, warnings=("it is a guess",) * (number > 0)))

        return answer(self, prompts, batch_size, on_reply=told)

    monkeypatch.setattr(MossAudio, "answer", warned)
    code, rows = evaluate("p.jsonl", "--batch-size", "32")
    assert code == 0
    kept = [row["id"] for row in rows if row["warnings"] == ["it is a guess"]]
    said = capsys.readouterr().err
    assert len(kept) == ITEMS - 1
    assert f"warning: {kept[0]}: it is a guess\n" in said
    assert f"warning: {ITEMS - 4} more like this; see " in said
    assert f"{ITEMS} answer(s), {ITEMS - 1} with a warning, 0 failed" in said


def test_audio_that_is_not_there_is_one_line_before_the_model(tmp_path, capsys):
    rows = [{"id": str(n), "audio": f"{n}.wav", "text": "x"} for n in range(1000)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = command(tmp_path / "no model", data, tmp_path / "p.jsonl", "--audio-root", tmp_path)
    assert main(argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: none of the 1,000 audio file(s) under {tmp_path} exists, such as "
        f"{tmp_path / '0.wav'}; see --audio-root"
    )
    (tmp_path / "7.wav").write_bytes(b"")
    assert main(argv) == 1
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert said[:3] == [
        f"error: {tmp_path / f'{n}.wav'}: no such file; see --audio-root" for n in range(3)
    ]
    assert said[3] == "error: 996 more like this"
    assert len(said) == 5  # and that there is no such model


def test_one_process_owns_an_output(toy, data, tmp_path, capsys):
    """A second process gets one line; other files in the folder are free; nothing is left."""
    argv = command(toy, data / "good.jsonl", tmp_path / "p.jsonl", "--limit", "1")
    with Lock(tmp_path, "evaluate infer", "p.jsonl"):
        assert main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"error: {tmp_path / 'p.jsonl'}: in use by evaluate infer (process " in line
        with Lock(tmp_path, "evaluate infer", "q.jsonl"):
            pass
    assert main(argv) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["p.jsonl"]
    # A score of only the asked items says so; a score of more counts the others as missing.
    capsys.readouterr()
    scored = tmp_path / "score.json"
    ask = [
        "score",
        "--benchmark",
        "asr",
        "--data",
        str(data / "good.jsonl"),
        "--predictions",
        str(tmp_path / "p.jsonl"),
        "--output",
        str(scored),
    ]
    assert main(ask) == 0
    result = json.loads(scored.read_text())
    assert (result["n"], result["inputs"]["limit"], result["counts"]["missing"]) == (1, 1, 0)
    assert f"only the first 1 of {ITEMS} items were asked" in capsys.readouterr().err
    assert "limit" not in result["meta"]
    assert main([*ask, "--limit", "2"]) == 1
    assert json.loads(scored.read_text())["counts"]["missing"] == 1


def test_parts_of_files_are_asked_alone(evaluate, toy, data, tmp_path, capsys):
    """The answer about a part equals that about a file with only this part."""
    low, high = tone(1.0, 300), tone(0.5, 900)
    write_wav(tmp_path / "both.wav", np.concatenate([low, high]))
    write_wav(tmp_path / "high.wav", high)
    rows = [
        {"id": "part", "audio": "both.wav", "offset": 1.0, "duration": 0.5, "text": "x"},
        {"id": "rest", "audio": "both.wav", "offset": 1.0, "text": "x"},
        {"id": "file", "audio": "high.wav", "text": "x"},
        {"id": "behind", "audio": "both.wav", "offset": 2, "text": "x"},
        {"id": "longer", "audio": "both.wav", "duration": 2.1, "text": "x"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(command(toy, tmp_path / "rows.jsonl", tmp_path / "p.jsonl")) == 1
    part, rest, file, behind, longer = read(tmp_path / "p.jsonl")
    assert part["raw_output"] == rest["raw_output"] == file["raw_output"]
    assert part["audio_seconds"] == rest["audio_seconds"] == file["audio_seconds"] == 0.5
    assert "holds 1.50 s; the part from 2 s to the end is not in it" in behind["error"]
    assert "the part from 0 s to 2.1 s is not in it" in longer["error"]


def test_damaged_predictions_are_asked_again(evaluate, tmp_path, capsys):
    _, expected = evaluate("p.jsonl", "--limit", "6")
    lines = (tmp_path / "p.jsonl").read_text().splitlines(keepends=True)
    lines[0] = "{" + "[" * 5000 + "\n"
    lines[1] = lines[1].replace('"raw_output": "', '"raw_output": 5, "x": "')
    lines[2] = '{"id": ["clip 2"], "raw_output": "x"}\n'
    (tmp_path / "p.jsonl").write_text("".join(lines[:5]) + "[1]\n" + lines[5][:40])
    capsys.readouterr()
    code, rows = evaluate("p.jsonl", "--limit", "6")
    assert (code, timeless(rows)) == (0, timeless(expected))
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning: ")]
    assert [x.split("p.jsonl:")[1][0] for x in said[:3]] == ["1", "2", "3"]
    assert said[3].startswith("warning: 2 more")


def test_predictions_of_two_kinds_do_not_mix(evaluate, toy, data, tmp_path, capsys):
    evaluate("p.jsonl", "--limit", "1")
    before = (tmp_path / "p.jsonl").read_bytes()
    for options, words in [
        (("--temperature", "0.5"), "with decoding {'max_new_tokens': 5, 'temperature': 0.0"),
        (("--encoder-attention", "full"), "encoder_attention 'chunked', now it is 'full'"),
        (("--prompt", "Write."), "clip 0 was asked 'Transcribe the audio.', now it is 'Write.'"),
    ]:
        capsys.readouterr()
        assert evaluate("p.jsonl", *options)[0] == 1
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert words in line
    assert (tmp_path / "p.jsonl").read_bytes() == before


def test_adapters_are_merged(evaluate, toy, tmp_path, capsys):
    """Compared with adapters added to the loaded parameters; the file names the adapters."""
    import jax

    model = MossAudio.load(toy, "float32")
    params = flatten(model.stacked_params())
    adapters = lora.init(jax.random.key(0), params, 4, lora.DECODER)
    keys = iter(jax.random.split(jax.random.key(1), len(adapters)))
    adapters = {path: jax.random.normal(next(keys), leaf.shape) for path, leaf in adapters.items()}
    save_adapters(tmp_path / "lora", adapters, 8.0, tiny_config())
    merged = lora.merge(params, adapters, 8.0)
    spread = MossAudio.load(toy, "float32", {"data": 2, "tensor": 2}, lora=tmp_path / "lora")
    loaded = flatten(spread.stacked_params())
    assert loaded.keys() == merged.keys()
    for path, leaf in loaded.items():
        np.testing.assert_allclose(leaf, merged[path], rtol=1e-5, atol=1e-5, err_msg=path)

    _, plain = evaluate("plain.jsonl", "--limit", "2")
    code, adapted = evaluate("adapted.jsonl", "--limit", "2", "--lora", tmp_path / "lora")
    assert code == 0
    assert adapted[0]["raw_output"] != plain[0]["raw_output"]
    assert adapted[0]["meta"]["lora"] == str(tmp_path / "lora")
    assert f"{tmp_path / 'lora'}: LoRA adapters of rank 4, scale 2, on" in capsys.readouterr().err


@pytest.mark.parametrize("mesh", ["data=1", "data=2"])
def test_two_processes(evaluate, toy, data, tmp_path, mesh):
    """Each on its own devices, or both on one mesh; results of an earlier run are used."""
    _, expected = evaluate("one.jsonl")
    lines = (tmp_path / "one.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two.jsonl.partial.jsonl").write_text("".join(lines[:4]) + lines[4][:50])
    launcher = [sys.executable, str(ROOT / "launch/local_processes.py"), "2"]
    done = subprocess.run(
        [
            *launcher,
            "--",
            sys.executable,
            "-m",
            "moss_audio_jax.evaluate",
            *command(toy, data / "good.jsonl", tmp_path / "two.jsonl", "--mesh", mesh),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert timeless(read(tmp_path / "two.jsonl")) == timeless(expected)
    assert read(tmp_path / "two.jsonl")[:4] == expected[:4]
    assert {file.name for file in tmp_path.glob("*.jsonl")} == {"one.jsonl", "two.jsonl"}


def test_the_bar_counts_sound(capsys):
    items = [Item(name, "asr", "", (), {}, {}) for name in "ab"]
    with module._Bar(items, {"a": 30.0, "b": 10.0}, shown=True) as bar:
        bar.update(items[0])
    said = capsys.readouterr().err
    assert " 75%|" in said
    assert "1/2 answers, RTFx " in said


def test_the_verb_explains_itself(capsys):
    assert main(["--help"]) == 0
    assert "example:\n  moss-audio-jax evaluate infer --benchmark" in capsys.readouterr().out
    assert main(["infer", "--help"]) == 0
    assert "example:\n  moss-audio-jax evaluate infer --benchmark" in capsys.readouterr().out
    assert main(["infra"]) == 2
    assert "no verb 'infra' of evaluate; expected one of infer, score" in capsys.readouterr().err
