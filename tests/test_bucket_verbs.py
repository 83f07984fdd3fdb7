"""Verbs that read and write in a bucket give what they give on a disk, and resume there.

Not covered: several processes, and pages of reports.
"""

import json

import annotate_runs
import loopback
import numpy as np
import pytest
from tiny_model import tone, write_checkpoint, write_wav

from moss_audio_jax import buckets, command
from moss_audio_jax import journal as journals
from moss_audio_jax.annotate.annotator import Annotator
from moss_audio_jax.buckets import as_path
from moss_audio_jax.evaluate import __main__ as evaluate
from moss_audio_jax.evaluate.predictions import merge


def test_evaluate_infer_resumes_in_a_bucket(proxy, root, tmp_path, monkeypatch):
    monkeypatch.setattr(journals, "_SYNC_SECONDS", 0.0)
    write_checkpoint(tmp_path / "toy")
    (tmp_path / "data").mkdir()
    rows = []
    for number in range(6):
        write_wav(tmp_path / "data" / f"{number}.wav", tone(0.2 * number + 0.2, 200 + 50 * number))
        rows.append({"id": f"clip {number}", "audio": f"{number}.wav", "text": "x"})
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    loopback.fill(tmp_path, root)

    def run(data, toy, output) -> int:
        words = ["infer", "--benchmark", "asr", "--data", f"{data}/rows.jsonl", "--checkpoint"]
        words += [str(toy), "--output", str(output), "--max-new-tokens", "5", "--batch-size", "2"]
        return command.run(evaluate.main, words)

    assert run(tmp_path / "data", tmp_path / "toy", tmp_path / "p.jsonl") == 0
    proxy.share, count = 0.02, 0
    real = journals.Journal.write

    def write(journal, row):
        nonlocal count
        real(journal, row)
        count += 1
        if count == 3:
            journal.sync()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journals.Journal, "write", write)
        patch.setattr(journals.Journal, "__exit__", lambda *_: None)
        assert run(f"{root}/data", f"{root}/toy", f"{root}/p.jsonl") == 130
    begun = loopback.objects(root)["p.jsonl.partial.jsonl"].splitlines()
    assert 0 < len(begun) < 6
    assert run(f"{root}/data", f"{root}/toy", f"{root}/p.jsonl") == 0
    proxy.share = 0.0
    objects = loopback.objects(root)
    assert not [name for name in objects if name.startswith(("p.jsonl.", ".p.jsonl"))]
    found, expected = (
        [json.loads(line) for line in text.splitlines()]
        for text in (objects["p.jsonl"], (tmp_path / "p.jsonl").read_bytes())
    )
    assert set(map(bytes, begun)) <= set(objects["p.jsonl"].splitlines()), "asked again"
    for key in ("id", "raw_output", "answer", "n_prompt_tokens", "audio_seconds"):
        assert [row[key] for row in found] == [row[key] for row in expected], key


def test_predictions_are_merged_though_the_answer_to_a_deletion_is_lost(proxy, root, monkeypatch):
    buckets.write(f"{root}/p.jsonl.partial.jsonl", b'{"id": "a", "raw_output": "x"}\n')
    system = buckets.file_system(root)
    remove, asked = system.rm_file, []

    def lost(path):
        asked.append(path)
        remove(path)
        if len(asked) == 1:
            raise ConnectionResetError

    monkeypatch.setattr(system, "rm_file", lost)
    merge(as_path(f"{root}/p.jsonl"), [])
    assert len(asked) == 2
    assert set(loopback.objects(root)) == {"p.jsonl"}


def test_annotate_resumes_in_a_bucket(proxy, root, tmp_path, monkeypatch):
    for number in range(3):
        annotate_runs.write_clip(tmp_path / "in", f"clip{number}", seed=number)
    loopback.fill(tmp_path / "in", f"{root}/in")
    annotate_runs.run(tmp_path / "in", tmp_path / "out")
    made, real = [], Annotator._make

    def make(self, source, *args):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(source.id)
        return real(self, source, *args)

    out = as_path(f"{root}/out")
    proxy.share = 0.02
    with monkeypatch.context() as patch:
        patch.setattr(Annotator, "_make", make)
        with pytest.raises(KeyboardInterrupt):
            annotate_runs.run(f"{root}/in", out)
        assert sum(name.endswith(".json") for name in loopback.objects(f"{root}/out/records")) == 2
        made[:] = made[:1]  # one more may be made: the third
        annotate_runs.run(f"{root}/in", out)
    proxy.share = 0.0
    found = loopback.objects(f"{root}/out")
    expected = annotate_runs.files(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name in ("rows.jsonl", "segments.jsonl"):
        here = str(tmp_path / "in")
        there = found[name].decode().replace(f"{root}/in", here)
        assert there == expected[name].decode(), name
    for name in expected:
        if name.endswith(".flac"):
            np.testing.assert_array_equal(
                np.frombuffer(found[name], np.uint8), np.frombuffer(expected[name], np.uint8)
            )
