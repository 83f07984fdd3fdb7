"""The table of names and rearrangements, and reading through it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoint import random_tensors, read_tensors, write_checkpoint

from moss_audio_jax.config import (
    RELEASED,
    from_official,
    processor_from_official,
    read_json,
    to_official,
)
from moss_audio_jax.errors import InputError
from moss_audio_jax.models.moss_audio import abstract_params
from moss_audio_jax.tree import flatten
from moss_audio_jax.weights import safetensors
from moss_audio_jax.weights.convert import convert, load_params
from moss_audio_jax.weights.official import OfficialReader, read_leaf, table
from moss_audio_jax.weights.opening import open_checkpoint

TESTS = Path(__file__).parents[1]
OFFICIAL = (  # written by the official code
    TESTS / "golden" / "tiny" / "a",
    TESTS / "golden" / "tiny" / "b",
    TESTS.parents[1] / "shared" / "golden" / "tiny" / "checkpoint",
)


def tied(config):
    return dataclasses.replace(
        config, decoder=dataclasses.replace(config.decoder, tie_embeddings=True)
    )


def test_table_is_the_model(config):
    for model in (
        *RELEASED.values(),
        config,
        tied(config),
        dataclasses.replace(config, inject_layers=0),
    ):
        shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(model)).items()}
        entries = table(model)
        assert {entry.path: entry.shape for entry in entries} == shapes
        names = [name for entry in entries for name in entry.names]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("checkpoint", OFFICIAL, ids=lambda path: path.name)
def test_official_names(checkpoint):
    if not checkpoint.is_dir():
        pytest.skip(f"{checkpoint} does not exist")
    entries = table(from_official(read_json(checkpoint / "config.json")))
    with safetensors.Reader(checkpoint) as reader:
        found = {name: tensor.shape for name, tensor in reader.tensors.items()}
    found.pop("audio_encoder.embed_positions.inv_timescales", None)  # some files carry it
    assert {name: entry.tensor for entry in entries for name in entry.names} == found


def test_rearrangements_mean_the_same(folder, config):
    """Native kernels compute the same as PyTorch's linear, convolution and flattening."""
    params = flatten(load_params(folder, config, dtype="float32"))
    official = {name: t.astype(np.float32) for name, t in read_tensors(folder).items()}
    rng = np.random.default_rng(1)

    hidden = rng.standard_normal(64, np.float32)
    for layer in range(config.decoder.layers):
        weight = official[f"language_model.layers.{layer}.mlp.up_proj.weight"]
        kernel = params["language_model/layers/mlp/up_proj/kernel"][layer]
        np.testing.assert_allclose(hidden @ np.asarray(kernel), weight @ hidden, rtol=1e-4)

    window = rng.standard_normal((4, 3, 3), np.float32)  # channel, freq, time
    weight = official["audio_encoder.conv2.weight"]
    kernel = np.asarray(params["audio_encoder/stem/conv2/kernel"])
    np.testing.assert_allclose(
        np.einsum("ift,tfic->c", window, kernel),
        np.einsum("ift,cift->c", window, weight),
        rtol=1e-4,
    )

    image = rng.standard_normal((4, 4), np.float32)  # channel, freq
    weight = official["audio_encoder.stem_proj.weight"]
    kernel = np.asarray(params["audio_encoder/stem/stem_proj/kernel"])
    np.testing.assert_allclose(
        image.T.reshape(-1) @ kernel, weight @ image.reshape(-1), rtol=1e-4, atol=1e-5
    )

    embedding = official["language_model.embed_tokens.weight"]
    np.testing.assert_array_equal(params["language_model/embed_tokens/embedding"], embedding)
    last = official["deepstack_audio_merger_list.1.gate_proj.weight"]
    np.testing.assert_array_equal(params["mergers/gate_proj/kernel"][1], last.T)


def test_any_part_of_any_leaf(folder, config):
    rng = np.random.default_rng(2)
    with safetensors.Reader(folder) as tensors:
        for entry in table(config):
            whole = read_leaf(tensors, entry)
            assert whole.shape == entry.shape
            for layer, name in enumerate(entry.names):
                native = whole if entry.stack is None else whole[layer]
                assert entry.to_official(native).tobytes() == tensors.read(name).tobytes()
            for _ in range(3):
                cuts = [sorted(rng.choice(size + 1, 2, replace=False)) for size in entry.shape]
                index = tuple(slice(int(start), int(stop)) for start, stop in cuts)
                part = read_leaf(tensors, entry, index, "float32")
                np.testing.assert_array_equal(part, whole[index].astype(np.float32), entry.path)


def test_only_needed_slices_are_read(folder, config, bytes_read):
    entry = next(e for e in table(config) if e.path == "language_model/layers/mlp/up_proj/kernel")
    with safetensors.Reader(folder) as tensors:
        read_leaf(tensors, entry, (slice(1, 3), slice(None), slice(12, 24)))
    assert sum(bytes_read) == 2 * 12 * 64 * 2  # two layers, 12 official rows of 64, bfloat16


def break_checkpoint(folder, config, change):
    tensors = random_tensors(config, "bfloat16")
    change(tensors)
    for file in folder.glob("model*"):
        file.unlink()
    safetensors.write_all(folder, tensors)


KEY = "language_model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), rf"tensor {KEY} is missing"),
        (lambda t: t.update({KEY: t[KEY].T}), rf"{KEY} has shape \[64, 48\].*requires \[48, 64\]"),
        (
            lambda t: t.update({"language_model.layers.4.mlp.up_proj.weight": t[KEY]}),
            "unexpected tensor language_model.layers.4.mlp.up_proj.weight",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(folder, config, change, message):
    break_checkpoint(folder, config, change)
    with pytest.raises(InputError, match=message) as caught:
        load_params(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mixed_dtypes_load(folder, config, tmp_path):
    """Norms in float32, the rest in half precision; without a given dtype, most bytes decide."""
    tensors = random_tensors(config, "float32")
    kept = {name: "float32" if "norm" in name else "float16" for name in tensors}
    mixed = {name: tensor.astype(kept[name]) for name, tensor in tensors.items()}
    break_checkpoint(folder, config, lambda t: t.update(mixed))
    norm = "language_model.norm.weight"
    loaded = load_params(folder, dtype="float32")
    np.testing.assert_array_equal(loaded["language_model"]["norm"]["scale"], mixed[norm])
    head = loaded["lm_head"]["kernel"]
    np.testing.assert_array_equal(head, mixed["lm_head.weight"].T.astype(np.float32))
    for layout in ("native", "official"):
        out = tmp_path / f"new_{layout}"
        with pytest.warns(UserWarning, match="most weights are float16, but .* is float32; all"):
            convert(folder, out, layout, progress=False)
        with open_checkpoint(out) as reader:
            assert reader.dtype == "float16"
            scale = reader.read("language_model/norm/scale")
            np.testing.assert_array_equal(scale, mixed[norm].astype(np.float16))
    assert load_params(folder, dtype="bfloat16")["lm_head"]["kernel"].dtype == "bfloat16"

    mixed[norm] = mixed[norm] * 1e6
    break_checkpoint(folder, config, lambda t: t.update(mixed))
    with (
        pytest.warns(UserWarning, match="mixed"),
        pytest.raises(InputError, match=f"{norm}: values beyond float16's largest"),
    ):
        convert(folder, tmp_path / "over", "official", progress=False)


ODD = [
    # part of config.json (or another file), key, value, what is said
    ("audio_config", "encoder_layers", True, "encoder_layers is True; expected int"),
    ("audio_config", "encoder_layers", 10**9, "encoder.layers is 1000000000; expected at most"),
    ("audio_config", "d_model", 10**4000, "encoder.d_model is 1000.*expected at most"),
    ("audio_config", "d_model", 1.5, "d_model is 1.5; expected int"),
    ("audio_config", "layer_norm_eps", float("nan"), "layer_norm_eps is nan; expected a number"),
    ("audio_config", "deepstack_encoder_layer_indexes", {"0": 1}, "layer_indexes is .*list"),
    ("audio_config", "activation_function", ["gelu"] * 99, "activation_function is .*only knows"),
    ("language_config", "rope_theta", 10**400, "rope_theta is 1000.*expected a number above 0"),
    ("language_config", "rope_theta", -1.0, "rope_theta is -1.0"),
    ("language_config", "rope_parameters", {"rope_type": [1]}, r"rope_type is \[1\]"),
    ("language_config", "tie_word_embeddings", "no", "tie_word_embeddings is 'no'; expected true"),
    (None, "tie_word_embeddings", 0, "tie_word_embeddings is 0; expected true or false"),
    (None, "audio_config", [], "audio_config is missing; expected an object"),
    (None, "model_type", [[]], r"model_type is \[\[\]\]"),
    (None, "quantization_config", {"quant_method": "gptq"}, "weights are quantised .'gptq'."),
    (None, "quantization_config", 8, "weights are quantised"),
    ("language_config", "quantization_config", {"quant_method": "fp8"}, "quantised .'fp8'."),
    ("processor", "audio_token_id", 2**40, "audio_token_id is 1099511627776; expected a token id"),
    ("processor", "audio_token_id", True, "audio_token_id is True"),
    ("processor", "enable_time_marker", "false", "enable_time_marker is 'false'; expected true"),
    ("processor", "mel_dtype", {"a": 1}, "mel_dtype is"),
    ("processor", "mel_sr", [16000], r"mel_sr is \[16000\]; expected 16000"),
]


@pytest.mark.parametrize(("part", "key", "value", "message"), ODD)
def test_odd_values_are_named(config, part, key, value, message):
    raw = {} if part == "processor" else to_official(config)
    (raw if part in (None, "processor") else raw[part])[key] = value
    read = processor_from_official if part == "processor" else from_official
    with pytest.raises(InputError, match=message) as caught:
        read(raw)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_the_config_of_a_run_is_told_from_a_checkpoints():
    with pytest.raises(InputError, match=r"RUN/config.json: is of a training run.*RUN/export"):
        from_official({"optimizer": {"name": "adamw"}}, "RUN/config.json")


def test_buffer_is_dropped(folder, config):
    name = "audio_encoder.embed_positions.inv_timescales"
    break_checkpoint(folder, config, lambda t: t.update({name: np.ones(8, np.float32)}))
    OfficialReader(folder, table(config)).close()


def test_tied_head_must_repeat_the_embedding(tmp_path, config):
    model = tied(config)
    write_checkpoint(tmp_path / "tied", model)
    assert "lm_head" not in load_params(tmp_path / "tied")

    embedding = "language_model.embed_tokens.weight"
    repeat = {"lm_head.weight": random_tensors(model, "bfloat16")[embedding]}
    break_checkpoint(tmp_path / "tied", model, lambda t: t.update(repeat))
    assert "lm_head" not in load_params(tmp_path / "tied")

    exact = {"lm_head.weight": repeat["lm_head.weight"].astype(np.float32)}  # in another dtype
    break_checkpoint(tmp_path / "tied", model, lambda t: t.update(exact))
    assert "lm_head" not in load_params(tmp_path / "tied")

    repeat["lm_head.weight"][-1, -1] += 1
    break_checkpoint(tmp_path / "tied", model, lambda t: t.update(repeat))
    with pytest.raises(InputError, match="differs from language_model"):
        load_params(tmp_path / "tied")
