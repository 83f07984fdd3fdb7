"""Whole runs in this process: they learn, stop when asked, and write what they should."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from runs import log

import moss_audio_jax as mj
from moss_audio_jax.errors import InputError
from moss_audio_jax.train import export
from moss_audio_jax.train.loop import train
from moss_audio_jax.train.setup import recipe_of
from moss_audio_jax.train.start import read_start
from moss_audio_jax.tree import flatten
from moss_audio_jax.weights.adapters import Adapters
from moss_audio_jax.weights.convert import convert, load_params
from moss_audio_jax.weights.opening import read_config


def test_it_learns_by_heart_and_the_export_says_so(run_config, corpus, tmp_path):
    config = run_config(
        "train.steps=100",
        "train.log_every=50",
        "checkpoint.every=100",
        "optimizer.learning_rate=1e-2",
        "checkpoint.export=official",
        'data.tasks=["pitch", "tone"]',
        "eval.every=100",
        "eval.samples=2",
        "data.batch=4",
        "eval.max_new_tokens=16",
    )
    config.data.eval = config.data.train
    assert train(config, tmp_path) == 0
    rows = log(tmp_path)
    last = next(row for row in reversed(rows) if "loss" in row)
    keys = {
        "step",
        "loss",
        "tokens",
        "audio_seconds",
        "grad_norm",
        "learning_rate",
        "padding",
        "loss/pitch",
        "loss/tone",
        "audio_hours_seen",
    }
    assert keys <= set().union(*rows)
    assert last["loss"] < 0.02
    assert next(row["eval_loss"] for row in rows if "eval_loss" in row) < 0.02
    samples = log(tmp_path, "samples.jsonl")
    assert [s["answer"] for s in samples] == [s["expected"] for s in samples]

    model = mj.MossAudio.load(tmp_path / "export", "float32")
    assert model.tokenizer is not None
    assert not model.random_weights
    for line in (corpus / "rows.jsonl").read_text().splitlines():
        audio, question, answer = (part["content"] for part in json.loads(line)["conversation"])
        reply = model.generate(question, [corpus / audio], max_new_tokens=16)
        assert (reply.text, reply.finish_reason) == (answer, "stop")


def test_with_echo_fewer_rows_are_made_and_all_are_learned(run_config, tmp_path):
    config = run_config(
        "train.steps=60",
        "optimizer.learning_rate=1e-2",
        "optimizer.warmup=5",
        "data.echo=4",
        "data.echo_rows=8",
        "data.batch=4",
        "train.log_every=20",
        "data.log_rows=true",
    )
    assert train(config, tmp_path) == 0
    assert log(tmp_path)[-1]["loss"] < 0.05
    made = log(tmp_path, "rows-0.jsonl")
    assert [len(step["rows"]) for step in made] == [1] * 60  # of 4 that a step takes


def test_lora_is_saved_alone_and_merged_in_the_export(run_config, corpus, tmp_path):
    config = run_config(
        "data.batch=4",
        "lora.rank=2",
        "lora.alpha=4",
        "train.steps=3",
        "optimizer.warmup=1",
        "optimizer.learning_rate=1e-2",
        "checkpoint.export=official",
    )
    config.init_from = str(corpus / "start")
    assert train(config, tmp_path) == 0
    start, merged = (
        load_params(at, dtype="float32") for at in (corpus / "start", tmp_path / "export")
    )
    before, after = flatten(start), flatten(merged)
    with Adapters(tmp_path / "lora", read_config(corpus / "start")) as adapters:
        assert len(adapters.modules) == 7
        for path, leaf in before.items():
            if path not in adapters.modules:
                assert (after[path] == leaf).all()
                continue
            assert np.abs(after[path] - leaf).max() > 0
            for number, layer in enumerate(leaf):
                a, b, scale = adapters.read(path, number)
                assert scale == 2  # alpha / rank
                np.testing.assert_allclose(after[path][number], layer + a @ b * scale, atol=1e-6)
    convert(
        corpus / "start",
        tmp_path / "again",
        "official",
        merge_lora=tmp_path / "lora",
        progress=False,
    )
    again = flatten(load_params(tmp_path / "again", dtype="float32"))
    assert all(np.abs(again[path] - after[path]).max() < 1e-6 for path in after)
    saved = tmp_path / "checkpoints" / "3" / "state"
    size = sum(f.stat().st_size for f in saved.rglob("*") if f.is_file())
    assert size < sum(leaf.nbytes for leaf in before.values())  # the base is not in it


def test_a_folder_of_something_else_is_not_trained_in(run_config, corpus, tmp_path):
    """Neither a checkpoint's config.json nor what lies in export/ or lora/ is lost."""
    config = run_config("train.steps=1", "checkpoint.export=official")
    shutil.copytree(corpus / "start", tmp_path / "model")
    with pytest.raises(InputError, match=r"model/config\.json: is not that of a run"):
        train(config, tmp_path / "model")
    assert read_config(tmp_path / "model") == read_config(corpus / "start")
    for name in ("export", "lora"):
        (tmp_path / name / name).mkdir(parents=True)
        (tmp_path / name / name / "letters.txt").write_text("dear")
        with pytest.raises(InputError, match=rf"{name}: is not a checkpoint, for it holds letters"):
            train(config, tmp_path / name)
        assert not (tmp_path / name / "config.json").exists()


def test_rows_of_text_alone_are_learned_without_the_encoder(run_config, corpus, tmp_path):
    rows = [
        {
            "conversation": [
                {"role": "user", "message_type": "text", "content": f"What follows {i}?"},
                {"role": "assistant", "message_type": "text", "content": str(i + 1)},
            ]
        }
        for i in range(6)
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = run_config(
        "data.batch=4",
        "data.chunks=0",
        "train.steps=20",
        "checkpoint.export=native",
        "optimizer.learning_rate=1e-2",
        "optimizer.weight_decay=0",
    )
    config.data.train = (str(file),)
    config.init_from = str(corpus / "start")
    assert train(config, tmp_path / "run") == 0
    losses = [row["loss"] for row in log(tmp_path / "run")]
    assert losses[-1] < losses[0] / 2
    before = flatten(load_params(corpus / "start", dtype="float32"))
    after = flatten(load_params(tmp_path / "run" / "export", dtype="float32"))
    moved = {path for path in before if (before[path] != after[path]).any()}
    assert moved
    assert {path.split("/")[0] for path in moved} <= {"language_model", "lm_head"}


def test_a_run_that_diverges_stops_with_a_saved_state(run_config, tmp_path):
    config = run_config(
        "data.batch=4",
        "optimizer.learning_rate=1e30",
        "optimizer.warmup=0",
        "train.steps=50",
        "train.max_skipped=3",
        "train.clip_norm=0",
    )
    with pytest.raises(InputError, match=r"3 updates in a row .* saved in"):
        train(config, tmp_path)
    assert (tmp_path / "checkpoints").is_dir()
    assert log(tmp_path)[-1]["skipped"] == 3


def test_what_is_not_finite_is_not_exported(run_config, tmp_path):
    config = run_config("checkpoint.export=native")
    start = read_start(config)
    recipe = recipe_of(config, start)
    weights = {"trained": {"a": jnp.ones(3), "b": jnp.ones(2)}, "frozen": {}}
    skipped = {**weights, "skipped": jnp.array(2)}
    infinite = {**weights, "ema": {"a": jnp.array([1, jnp.inf])}, "skipped": jnp.array(0)}
    for state, why in ((skipped, "the last 2 updates had"), (infinite, "weights are not finite")):
        with pytest.raises(InputError, match=f"nothing is exported: {why}"):
            export.write(config, start, state, recipe, tmp_path)
        assert not list(tmp_path.iterdir())


def test_a_run_continues_on_another_mesh(run_config, tmp_path):
    options = ("data.batch=4", "train.steps=4", "checkpoint.every=2", "optimizer.schedule=constant")
    train(run_config(*options), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "4")  # it stopped behind step 2
    config = run_config(*options, "mesh.data=2", "mesh.tensor=2", "mesh.sequence=2")
    train(config, tmp_path / "moved")
    assert (tmp_path / "moved" / "checkpoints" / "4").is_dir()
    found, expected = ([row["loss"] for row in log(tmp_path / name)] for name in ("moved", "whole"))
    assert len(found) == 4
    np.testing.assert_allclose(found, expected, rtol=1e-5)
