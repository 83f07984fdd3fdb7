"""Runs with damaged checkpoints, in folders of other runs, and with data that do not arrive."""

import os
import shutil
import signal
import threading

import pytest
from runs import log
from test_checkpoints import flipped_within_the_largest

from moss_audio_jax import files
from moss_audio_jax.data.pipeline import Loader
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.train import loop
from moss_audio_jax.train.loop import train
from moss_audio_jax.train.metrics import cut_back


def test_a_damaged_newest_step_changes_nothing_nor_do_data_that_hang(
    run_config, tmp_path, monkeypatch
):
    config = run_config(
        "data.batch=4",
        "train.steps=5",
        "checkpoint.every=2",
        "data.log_rows=true",
        "optimizer.learning_rate=1e-2",
        "checkpoint.export=official",
        "data.window=3",
    )
    whole, hurt, hung = (tmp_path / name for name in ("whole", "hurt", "hung"))
    train(config, whole)

    def same(workdir):
        for key in ("step", "loss", "grad_norm", "tokens_seen"):
            found, expected = ([row[key] for row in log(root)] for root in (workdir, whole))
            assert found == expected, key
        assert log(workdir, "rows-0.jsonl") == log(whole, "rows-0.jsonl")
        weights = "export/model.safetensors"
        assert (workdir / weights).read_bytes() == (whole / weights).read_bytes()

    # The newest step (5) is damaged, and so is the end of its log.
    shutil.copytree(whole, hurt)
    flipped_within_the_largest(hurt / "checkpoints" / "5")
    shutil.rmtree(hurt / "export")
    with (hurt / "metrics.jsonl").open("ab") as file:
        file.write(b'[6]\n\xff\xfe\n{"step": "6"}\n{"step": 6, "lo')
    with pytest.warns(UserWarning, match=r"checkpoints/5: state/.*its checksum differs"):
        assert train(config, hurt) == 0
    same(hurt)
    assert (hurt / "damaged_checkpoints" / "5").is_dir()

    # SIGTERM where the fourth batch does not come.
    given, deliver = [], Loader.__next__

    def hang(loader):
        given.append(1)
        if len(given) == 4:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            assert not threading.Event().wait(100)
            pytest.fail("SIGTERM did not end the wait")
        return deliver(loader)

    with monkeypatch.context() as patched:
        patched.setattr(Loader, "__next__", hang)
        assert train(config, hung) == 0
    assert [row["step"] for row in log(hung)] == [1, 2, 3]
    assert not (hung / "export").exists()
    assert train(config, hung) == 0
    same(hung)

    # A run that ended is not begun anew where all its steps are damaged.
    for step in (hurt / "checkpoints").iterdir():
        flipped_within_the_largest(step)
    before = (hurt / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="none of its checkpoints can be used"):
        train(config, hurt)
    assert (hurt / "metrics.jsonl").read_bytes() == before


def test_sigterm_in_an_evaluation_saves_and_the_next_start_evaluates(
    run_config, corpus, tmp_path, monkeypatch
):
    config = run_config("train.steps=4", "eval.every=2", "eval.samples=1", "checkpoint.every=4")
    config.data.eval = (str(corpus / "rows.jsonl"),)
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    train(config, whole)

    def hang(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        assert not threading.Event().wait(100)
        pytest.fail("SIGTERM did not end the evaluation")
        yield

    with monkeypatch.context() as patched:
        patched.setattr(loop, "eval_batches", hang)
        assert train(config, hurt) == 0
    assert [row["step"] for row in log(hurt)] == [1, 2]
    assert [path.name for path in (hurt / "checkpoints").iterdir()] == ["2"]
    assert train(config, hurt) == 0
    for key in ("step", "loss", "eval_loss", "eval_rows"):
        found, expected = ([row.get(key) for row in log(root)] for root in (hurt, whole))
        assert found == expected
    assert log(hurt, "samples.jsonl") == log(whole, "samples.jsonl")


def test_rows_that_are_left_out_are_told(run_config, corpus, tmp_path, caplog):
    """Also in a file of few rows, and of those of data.eval."""
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    rows = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join([*rows, *3 * ['{"conversation": "x"}']]))
    (folder / "held.jsonl").write_text("\n".join([*rows[:4], '{"conversation": "x"}']))
    config = run_config("train.steps=20", "eval.every=10", "data.max_bad_share=0.9")
    config.data.train = (str(folder / "rows.jsonl"),)
    config.data.eval = (str(folder / "held.jsonl"),)
    run = tmp_path / "run"
    with caplog.at_level("INFO", "moss_audio_jax"):
        train(config, run)
    said = [record.getMessage() for record in caplog.records]
    assert sum(line.startswith("so far, of ") for line in said) == 1
    assert any(
        line.startswith("data.eval: of 5 rows these are left out: 1 bad (eval_bad_rows.jsonl)")
        for line in said
    )
    last = [row for row in log(run) if "loss" in row][-1]
    assert 3 <= last["rows_bad"] < last["rows_seen"]
    assert said[-1].startswith(f"done: 20 steps in {run}; of ")
    assert f"{last['rows_bad']} bad (bad_rows.jsonl)" in said[-1]
    assert {row.get("eval_rows") for row in log(run)} == {None, 4}
    assert [row["line"] for row in log(run, "eval_bad_rows.jsonl")] == [5]
    config.data.max_bad_share = 0.02
    with pytest.raises(InputError, match=r"of \d+ rows .* are bad, data.max_bad_share allows 2.0%"):
        train(config, tmp_path / "other")


def test_a_second_run_in_a_folder_is_told_so(run_config, tmp_path):
    config = run_config()
    with files.Lock(tmp_path / "run", "train"):
        with pytest.raises(UsageError, match=rf"in use by train \(process {os.getpid()} on ") as e:
            train(config, tmp_path / "run")
        assert "\n" not in str(e.value)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="is not a folder") as e:
            train(config, workdir)
        assert "\n" not in str(e.value)


def test_logs_are_cut_back_whatever_they_hold(tmp_path):
    file = tmp_path / "metrics.jsonl"
    cut_back(file, 3)
    assert not file.exists()
    good = b'{"step": 1, "a": "\xe2\x80\xa8"}\n{"step": 3}\n'
    bad = (
        b"",
        b"\xff\xff",
        b"[3]",
        b'"3"',
        b'{"step": null}',
        b'{"a": 1}',
        b"[" * 100_000,
        b'{"step": ' + b"9" * 5000 + b"}",
        b'{"step": 4}',
        b'{"step": 2',
    )
    file.write_bytes(b"\n".join(bad[:-1]) + b"\n" + good + bad[-1])
    cut_back(file, 3)
    assert file.read_bytes() == good
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="is a directory"):
        cut_back(tmp_path / "folder", 3)
