"""Gates on what DeepStack adds: exact in every form of running, in checkpoints, and in training."""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import paged
import pytest
from runs import write_corpus
from tiny_model import tiny_config

import moss_audio_jax as mj
from moss_audio_jax.config import Compute, from_official, read_json, to_official
from moss_audio_jax.data.batch import Example, Shape, TrainExample, make_batch, make_train_batch
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.models import moss_audio
from moss_audio_jax.models.adapter import GATE, init_mergers
from moss_audio_jax.models.cache import init_cache
from moss_audio_jax.sharding import make_mesh, param_shardings
from moss_audio_jax.train import loop
from moss_audio_jax.train.__main__ import load_config
from moss_audio_jax.train.check import check
from moss_audio_jax.train.defaults import sizes
from moss_audio_jax.train.start import initial_params, read_start
from moss_audio_jax.train.step import Recipe, gradients
from moss_audio_jax.tree import flatten
from moss_audio_jax.weights.convert import convert, load_params, save_official
from moss_audio_jax.weights.native import save_native
from moss_audio_jax.weights.opening import read_config

OWN = Path(__file__).parents[1] / "golden" / "tiny" / "a"
CONFIGS = Path(__file__).parents[2] / "configs"
PLAIN = read_config(OWN)
GATED = dataclasses.replace(PLAIN, inject_gate=True)
AUDIO_ID = 445


@pytest.fixture(scope="module")
def prompts():
    golden = np.load(OWN / "golden.npz")
    made = []
    for i in range(7):
        clips = np.cumsum(golden[f"s{i}_clips"])[:-1]
        made.append((golden[f"s{i}_ids"], np.split(golden[f"s{i}_mel"], clips, axis=1)))
    return [*made, (golden["text_ids"], [])]


def gated(scale):
    params = load_params(OWN, PLAIN, "float32")
    shape = PLAIN.inject_layers, PLAIN.decoder.hidden_size
    gates = scale * jax.random.normal(jax.random.key(0), shape)
    return params | {"mergers": params["mergers"] | {GATE: gates}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Native checkpoints with gates: of zero, and of any value."""
    folder = tmp_path_factory.mktemp("gates")
    for name, scale in (("zero", 0.0), ("any", 0.1)):
        save_native(folder / name, gated(scale), GATED, files_from=OWN)
    return folder


def test_gates_of_zero_are_the_same_model(folders, prompts):
    plain, zero, other = (
        mj.MossAudio.load(path, "float32") for path in (OWN, folders / "zero", folders / "any")
    )
    for ids, mels in prompts[:3]:
        np.testing.assert_array_equal(zero.logits(ids, mels), plain.logits(ids, mels))
        assert np.abs(other.logits(ids, mels) - plain.logits(ids, mels)).max() > 1e-2


def test_no_form_of_running_changes_a_gated_model(folders, prompts):
    """One by one, in a batch, with a cache, in pieces, beside others, on a mesh."""
    model, prompts = mj.MossAudio.load(folders / "any", "float32"), prompts[:3]
    alone = [model.logits(ids, mels) for ids, mels in prompts]
    answers = [model.generate_ids(ids, mels, max_new_tokens=8) for ids, mels in prompts]
    for (ids, mels), answer in zip(prompts, answers, strict=True):
        again = model.logits(np.r_[ids, answer], mels)[len(ids) - 1 : -1]
        assert np.argmax(again[:, :AUDIO_ID], axis=-1).tolist() == answer
    # Twice the same questions, which share what was prefilled.
    examples = [model._example(ids, mels) for ids, mels in [*prompts, *prompts]]
    with model._engine(4) as engine:
        way = Sampling(max_new_tokens=8, loop_guard=False)
        outputs = engine.run([(example, way) for example in examples])
    assert [output.ids for output in outputs] == answers * 2
    other = mj.MossAudio.load(folders / "any", "float32", mesh=(2, 2, 2, 1))
    for found, expected in zip(other.logits_batch(prompts), alone, strict=True):
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_prompt_in_pieces_is_the_prompt(prompts):
    params, compute = gated(0.1), Compute("float32")
    unrolled = moss_audio.decoder.unrolled(params)
    ids, mels = max(prompts, key=lambda prompt: len(prompt[0]))
    shape = Shape(1, len(ids), 4, GATED.encoder.chunk_frames)
    batch = make_batch([[Example(ids, tuple(mels))]], shape, GATED.encoder, AUDIO_ID)
    hidden_states = jax.jit(moss_audio.hidden_states, static_argnums=(1, 2))
    hidden = hidden_states(params, GATED, compute, batch)
    expected = moss_audio.decoder.logits(params, hidden[:, -1])
    whole, _ = paged.run(unrolled, GATED, compute, batch, len(ids), 1)
    np.testing.assert_allclose(whole, expected, atol=1e-5)

    audio = jax.jit(moss_audio.encode_audio, static_argnums=(1, 2))(params, GATED, compute, batch)
    where = paged.tables(1, 1, len(ids))[0]
    kv = init_cache(GATED.decoder, 1, where.shape[1], compute)
    inside = np.flatnonzero(batch["audio_index"][0] >= 0)
    cuts = [0, 5, int(inside[len(inside) // 2]), len(ids)]  # one within a clip
    extend = jax.jit(moss_audio.extend, static_argnums=(1, 2))
    for first, end in itertools.pairwise(cuts):
        names = ("tokens", "segment_ids", "audio_index")
        part = {name: jnp.asarray(batch[name][:, first:end]) for name in names}
        start = jnp.array([first])
        found, kv = extend(unrolled, GATED, compute, part, kv, where, start, audio)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_packing_changes_neither_loss_nor_gradient(prompts):
    made = [
        TrainExample(
            ids,
            tuple(mels),
            labels=np.where(np.arange(len(ids)) > np.flatnonzero(ids == AUDIO_ID)[-1], ids, -100),
            weights=1.0,
            tasks=0,
            row_id=str(i),
            index=i,
            seconds=1.0,
        )
        for i, (ids, mels) in enumerate(prompts[:4])
    ]
    run = jax.jit(functools.partial(gradients, recipe=Recipe(GATED, Compute("float32"))))

    def of(rows):
        batch = make_train_batch(
            rows, Shape(4, 192, 4, GATED.encoder.chunk_frames), GATED.encoder, AUDIO_ID
        )
        return run(flatten(gated(0.1)), {}, batch=batch)

    apart, sums = of([[e] for e in made])
    packed, other = of([[made[3], made[0]], [made[2], made[1]]])
    np.testing.assert_allclose(other["loss"], sums["loss"], rtol=1e-5)
    for path, gradient in apart.items():
        assert np.abs(packed[path] - gradient).max() <= 1e-5 * np.abs(gradient).max(), path
    assert np.abs(apart[f"mergers/{GATE}"]).max() > 0


def test_an_official_export_has_no_gates(folders, tmp_path):
    assert from_official(to_official(GATED)) == GATED
    assert "inject_gate" not in to_official(PLAIN)
    message = r"mergers/inject_gate is not 0.*native"
    with pytest.raises(InputError, match=message):
        convert(folders / "any", tmp_path / "no", "official")
    with pytest.raises(InputError, match=message):
        save_official(tmp_path / "no", gated(0.1), GATED, files_from=OWN)
    assert not (tmp_path / "no").exists()

    convert(folders / "zero", tmp_path / "converted", "official")
    save_official(tmp_path / "saved", gated(0.0), GATED, files_from=OWN)
    for name in ("converted", "saved"):
        assert read_config(tmp_path / name) == PLAIN
        found = flatten(load_params(tmp_path / name, dtype="float32"))
        for path, leaf in flatten(load_params(OWN, PLAIN, "float32")).items():
            np.testing.assert_array_equal(found[path], leaf)
        assert f"mergers/{GATE}" not in found
    convert(folders / "any", tmp_path / "native", "native")
    found = load_params(tmp_path / "native")["mergers"][GATE]
    np.testing.assert_array_equal(found, gated(0.1)["mergers"][GATE])


def run_of(corpus, *words):
    config = load_config(str(CONFIGS / "tiny.py"), [f"--config.{word}" for word in words])
    config.data.train = (str(corpus / "rows.jsonl"),)
    config.data.length, config.data.chunks, config.data.batch = 128, 2, 8
    config.train.steps, config.train.log_every = 1, 1
    config.checkpoint.export, config.mesh.fsdp = "native", 1
    return config


def test_a_run_adds_gates_to_a_checkpoint_and_moves_them(tmp_path):
    write_corpus(tmp_path)

    def started(folder, **of_model):
        """What a run starts from, by path."""
        config = load_config(str(CONFIGS / "tiny.py"), [f"--config.init_from={folder}"])
        config.tokenizer = str(tmp_path / "start")
        config.model.update(of_model)
        start = read_start(config)
        mesh = make_mesh(devices=jax.devices()[:2], fsdp=2)
        shapes = moss_audio.abstract_params(start.model)
        return flatten(initial_params(start, param_shardings(shapes, start.model, mesh), 0))

    plain = started(tmp_path / "start")
    with_gates = started(tmp_path / "start", inject_gate=True)
    assert not np.any(with_gates.pop(f"mergers/{GATE}"))
    for path, leaf in plain.items():
        np.testing.assert_array_equal(with_gates.pop(path), leaf)
    assert not with_gates

    config = run_of(tmp_path, f"init_from={tmp_path / 'start'}", "model.inject_gate=True")
    config.tokenizer = ""
    assert loop.train(config, tmp_path / "run") == 0
    moved = started(tmp_path / "run" / "export")[f"mergers/{GATE}"]  # it keeps its gates
    assert np.abs(moved).max(axis=1).min() > 0  # of each merger


def test_a_fresh_model_has_gates_of_zero_and_impossible_configs_are_named(tmp_path):
    model = dataclasses.replace(tiny_config(512), inject_gate=True)
    assert not np.any(init_mergers(jax.random.key(0), model)[GATE])
    config = load_config(str(CONFIGS / "tiny.py"))
    config.data.train = ("rows.jsonl",)
    config.checkpoint.export = "official"
    with pytest.raises(UsageError, match=r"checkpoint\.export is 'official'"):
        check(config, model, make_mesh(devices=jax.devices()[:1]))
    assert sizes(model).inject_gate
    with pytest.raises(InputError, match="inject_gate is true and inject_layers 0"):
        dataclasses.replace(model, inject_layers=0).validate()
    raw = read_json(OWN / "config.json") | {"inject_gate": "yes"}
    with pytest.raises(InputError, match="inject_gate is 'yes'"):
        from_official(raw)
