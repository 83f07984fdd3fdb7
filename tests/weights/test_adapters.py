"""LoRA adapters in PEFT's layout: merged as PEFT merges them, or refused by name.

Not covered: training of adapters (see tests/train), and adapters of the released models.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings

import jax
import numpy as np
import pytest
from tiny_checkpoint import random_tensors, write_checkpoint

from moss_audio_jax.errors import InputError
from moss_audio_jax.models import lora
from moss_audio_jax.tree import flatten
from moss_audio_jax.weights import safetensors
from moss_audio_jax.weights.adapters import Adapters, describe, save_adapters
from moss_audio_jax.weights.compose import Merged
from moss_audio_jax.weights.convert import convert, load_params
from moss_audio_jax.weights.opening import open_checkpoint

DECODER = "language_model.layers.{}.self_attn.{}_proj"
SIZES = {"q": 32, "v": 16}  # of the tiny checkpoint; all read 64
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
QUERY = "language_model/layers/self_attn/q_proj/kernel"


@pytest.fixture
def base(tmp_path, config):
    write_checkpoint(tmp_path / "base", config, "float32")
    return tmp_path / "base"


def write_adapter(folder, description, ranks, change=lambda tensors: None):
    """An adapter of the decoder, random: ranks maps (layer, "q" or "v") to a rank."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(5)
    tensors = {}
    for (layer, letter), rank in ranks.items():
        for side, shape in (("A", (rank, 64)), ("B", (SIZES[letter], rank))):
            name = f"base_model.model.{DECODER.format(layer, letter)}.lora_{side}.weight"
            tensors[name] = rng.standard_normal(shape, np.float32)
    change(tensors)
    safetensors.write_all(folder, tensors)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(description))
    return tensors


def merged(base, adapter, config, path=QUERY):
    with (
        warnings.catch_warnings(action="ignore"),
        Merged(open_checkpoint(base), adapter, config) as reader,
    ):
        return reader.read(path, np.float32)


ALL = {(layer, "q"): 4 for layer in range(4)}
SCALED = {
    # settings, ranks, scale of each layer (0: not adapted); scales as PEFT has them
    "plain": ({}, ALL, [2, 2, 2, 2]),
    "rslora": ({"use_rslora": True}, ALL, [4, 4, 4, 4]),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 32}}, ALL, [8, 8, 8, 8]),
    "alpha of one": ({"alpha_pattern": {"layers.1.self_attn.q_proj": 1}}, ALL, [2, 0.25, 2, 2]),
    "the first": ({"alpha_pattern": {r".*\.3\..*": 0, "q_proj": 4}}, ALL, [1, 1, 1, 0]),
    "rank_pattern": (
        {"rank_pattern": {r"layers\.[02]\..*": 2}, "use_rslora": True},
        ALL | {(0, "q"): 2, (2, "q"): 2},
        [8 / math.sqrt(2), 4, 8 / math.sqrt(2), 4],
    ),
    "some layers": ({"layers_to_transform": [0]}, {(0, "q"): 4}, [2, 0, 0, 0]),
    "one layer": (
        {"layers_to_transform": 2, "layers_pattern": "layers"},
        {(2, "q"): 4},
        [0, 0, 2, 0],
    ),
    "expression": (
        {"target_modules": r"language_model\..*\.[13]\..*q_proj"},
        {(1, "q"): 4, (3, "q"): 4},
        [0, 2, 0, 2],
    ),
    "excluded": (
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {key: 4 for key in ALL if key[0]},
        [0, 2, 2, 2],
    ),
    "of no effect": (
        {
            "fan_in_fan_out": True,
            "lora_dropout": 0.1,
            "init_lora_weights": "gaussian",
            "bias": "none",
            "new_in_2027": None,
            "use_dora": False,
            "modules_to_save": [],
        },
        ALL,
        [2, 2, 2, 2],
    ),
}


@pytest.mark.parametrize("case", SCALED)
def test_settings_are_obeyed(tmp_path, base, config, case):
    settings, ranks, scales = SCALED[case]
    tensors = write_adapter(tmp_path / "lora", PLAIN | settings, ranks)
    expected = flatten(load_params(base))[QUERY].copy()
    plain = np.array(expected)
    for layer, scale in enumerate(scales):
        if scale:
            name = f"base_model.model.{DECODER.format(layer, 'q')}.lora_"
            product = tensors[f"{name}B.weight"] @ tensors[f"{name}A.weight"]
            plain[layer] += scale * product.T
    np.testing.assert_allclose(merged(base, tmp_path / "lora", config), plain, rtol=1e-5, atol=1e-5)


REFUSED = {
    "rank": ({"r": True}, "r is True; expected a whole number above 0"),
    "no rank": ({"r": None}, "r is None"),
    "another rank": ({"r": 8}, r"_A.weight has shape \[4, 64\]; .*\(rank 8\) require \[8, 64\]"),
    "alpha": ({"lora_alpha": None}, "lora_alpha is None; expected a number"),
    "alpha text": ({"lora_alpha": "8"}, "lora_alpha is '8'; expected a number"),
    "alpha nan": ({"lora_alpha": math.nan}, "lora_alpha is nan; expected a number"),
    "rslora": ({"use_rslora": "yes"}, "use_rslora is 'yes'; expected true or false"),
    "pattern": ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is .* expected an object"),
    "pattern value": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj is 0"),
    "expression": ({"target_modules": "(q_proj"}, "target_modules is .*not a usable regular expr"),
    "targets": ({"target_modules": [1]}, "target_modules is .*expected a list of module names"),
    "no targets": ({"target_modules": None}, "target_modules is None"),
    "other targets": ({"target_modules": ["v_proj"]}, "does not adapt language_model.layers.0"),
    "layers": ({"layers_to_transform": [0, 1]}, "does not adapt language_model.layers.2"),
    "more layers": ({"layers_to_transform": ["0"]}, "layers_to_transform is .* layer numbers"),
    "layers and expression": (
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        "null if target_modules",
    ),
    "layers_pattern": ({"layers_pattern": "h"}, "null if layers_to_transform is not set"),
    "kind": ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
    "pissa": ({"init_lora_weights": "pissa"}, "changes the base weights.*path_initial_model"),
    "pissa_niter_4": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    "init": ({"init_lora_weights": [1]}, r"init_lora_weights is \[1\]"),
    "dora": ({"use_dora": True}, "use_dora is True: DoRA .*merge_and_unload"),
    "bias": ({"bias": "lora_only"}, "bias is 'lora_only': .*replaces biases"),
    "lora_bias": ({"lora_bias": True}, "lora_bias is True"),
    "saved": ({"modules_to_save": ["lm_head"]}, "modules_to_save is .*whole modules"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "parameters": ({"target_parameters": ["experts"]}, "target_parameters"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "unknown": ({"use_new_lora": 3}, "use_new_lora is 3: this setting is unknown"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_are_refused_by_name(tmp_path, config, case):
    settings, message = REFUSED[case]
    write_adapter(tmp_path / "lora", PLAIN | settings, ALL)
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(InputError, match=message) as caught,
    ):
        Adapters(tmp_path / "lora", config)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "lora") in str(caught.value)


def test_an_expression_that_never_ends_is_stopped(tmp_path, config, monkeypatch):
    monkeypatch.setattr("moss_audio_jax.weights.adapter_config._SECONDS", 1)
    write_adapter(tmp_path / "lora", PLAIN | {"target_modules": "(?:[a-z_.0-9]+)*!"}, ALL)
    with pytest.raises(InputError, match=r"target_modules is .*it takes more than 1 s"):
        Adapters(tmp_path / "lora", config)


def changed(old, new=None, value=None):
    """A change of tensors: a key is dropped, renamed, or given another value."""

    def change(tensors):
        key = next(name for name in tensors if name.endswith(old))
        tensor = tensors.pop(key)
        if new is not None:
            tensors[key.removesuffix(old) + new] = tensor if value is None else value(tensor)

    return change


A, B = "0.self_attn.q_proj.lora_A.weight", "0.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(B), f"{B} is missing; expected it beside .*{A}"),
        (lambda t: [t.pop(k) for k in list(t) if k.endswith(".lora_B.weight")], "_B.weight is m"),
        (lambda t: (changed(A)(t), changed(B)(t)), f"{A} is missing; adapter_config.json says"),
        (changed(A, A, lambda a: a.T), r"lora_A.weight has shape \[64, 4\]; .* require \[4, 64\]"),
        (changed(B, B, lambda b: b * np.nan), f"{B} holds values that are not finite"),
        (
            lambda t: t.update(
                {
                    f"base_model.model.{DECODER.format(9, 'q')}.lora_A.weight": np.ones(
                        (4, 64), np.float32
                    )
                }
            ),
            "layers.9.* is not a linear layer",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.bias": np.ones(2, np.float32)}),
            "lm_head.bias is not a LoRA tensor",
        ),
        (lambda t: (t.clear(), t.update({"x": np.ones(2, np.float32)})), "x is not a LoRA tensor"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, base, config, change, message):
    write_adapter(tmp_path / "lora", PLAIN, ALL, change)
    with pytest.raises(InputError, match=message):
        merged(base, tmp_path / "lora", config)


def test_folders_that_are_no_adapters(tmp_path, base, config):
    with pytest.raises(InputError, match="not a folder of LoRA adapters"):
        describe(base, config)
    write_adapter(tmp_path / "lora", PLAIN, ALL)
    with pytest.raises(InputError, match=f"did you mean {tmp_path / 'lora'}"):
        describe(tmp_path, config)  # a run's work folder
    (tmp_path / "lora" / "adapter_model.safetensors").rename(tmp_path / "lora/adapter_model.bin")
    with pytest.raises(InputError, match="pickle files are not read"):
        describe(tmp_path / "lora", config)


def test_an_adapter_is_described(tmp_path, config):
    ranks = ALL | {(layer, "v"): 2 for layer in range(4)}
    settings = PLAIN | {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}
    write_adapter(tmp_path / "lora", settings, ranks)
    with pytest.warns(UserWarning, match="also names audio_encoder/.*/q_proj .*1 more"):
        found = describe(tmp_path / "lora", config)
    assert found == (
        f"{tmp_path / 'lora'}: LoRA adapters of rank 2 to 4, scale 2 to 4, on q_proj, v_proj of "
        "language_model (8 kernels)"
    )


@pytest.mark.parametrize(
    ("targets", "rank"),
    [
        (lora.DECODER, 3),
        (lora.DECODER, 200),  # more than kernels have rows or columns
        (f"{lora.DECODER}|{lora.ENCODER}", 3),
        (".", 3),
    ],
)
def test_ours_round_trip(tmp_path, base, config, targets, rank):
    """Saved, read, merged on the host and while loading; written twice over each other."""
    params = {path: np.array(leaf) for path, leaf in flatten(load_params(base)).items()}
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, rank, targets))
    adapters = {path: rng.standard_normal(leaf.shape, np.float32) for path, leaf in shapes.items()}
    assert not any("conv" in path for path in adapters)
    assert targets != "." or "audio_encoder/stem/stem_proj/lora_a" in adapters
    save_adapters(tmp_path / "lora", adapters, 2.0, config)
    save_adapters(tmp_path / "lora", adapters, 4.0, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # exactly the stated modules are adapted
        with Adapters(tmp_path / "lora", config) as found:
            assert len(found.modules) == len(adapters) / 2
            for path, layers in found.modules.items():
                module = path.removesuffix("/kernel")
                a, b = (adapters[f"{module}/lora_{side}"] for side in "ab")
                for layer in range(len(layers)):
                    at = layer if a.ndim == 3 else ...
                    *read, scale = found.read(path, layer)
                    assert scale == pytest.approx(4 / rank)
                    np.testing.assert_array_equal(read[0], a[at])
                    np.testing.assert_array_equal(read[1], b[at])
    for path, a in adapters.items():
        if path.endswith("lora_a"):
            module = path.removesuffix("/lora_a")
            params[f"{module}/kernel"] += a @ adapters[f"{module}/lora_b"] * np.float32(4 / rank)
    convert(base, tmp_path / "out", "official", merge_lora=tmp_path / "lora", progress=False)
    loaded = flatten(load_params(base, lora=tmp_path / "lora"))
    for path, leaf in flatten(load_params(tmp_path / "out")).items():
        np.testing.assert_allclose(leaf, params[path], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(loaded[path], leaf)


SHARED_CASES = {
    "rslora": [4, 4, 4, 4],
    "alpha_pattern": [8, 8, 8, 8],
    "some_layers": [2, 0, 0, 0],
    "pissa": "init_lora_weights is 'pissa'",
    "olora": "init_lora_weights is 'olora'",
    "no_b": "lora_B.weight is missing",
    "alpha_null": "lora_alpha is None",
}


@pytest.mark.parametrize("case", SHARED_CASES)
def test_shared_cases(shared, config, case):
    folder = shared / "cases" / "lora" / case
    if not folder.is_dir():
        pytest.skip("no shared cases")
    decoder = dataclasses.replace(config.decoder, hidden_size=120, heads=4, head_dim=36)
    model = dataclasses.replace(config, decoder=decoder)
    right = SHARED_CASES[case]
    with warnings.catch_warnings(action="ignore"):
        if isinstance(right, str):
            with pytest.raises(InputError, match=right):
                Adapters(folder, model)
            return
        found = Adapters(folder, model)
    with found, safetensors.Reader(folder / "adapter_model.safetensors") as reader:
        for layer, scale in enumerate(right):
            if not scale:
                assert found.read(QUERY, layer) is None
                continue
            a, b, factor = found.read(QUERY, layer)
            name = f"base_model.model.{DECODER.format(layer, 'q')}.lora_"
            product = reader.read(f"{name}B.weight") @ reader.read(f"{name}A.weight")
            np.testing.assert_allclose(a @ b * factor, scale * product.T, rtol=1e-5, atol=1e-6)


# --- beside PEFT itself --------------------------------------------------------------------------

PEFT = {
    "plain": {"target_modules": ["q_proj", "fc1"]},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "alpha": {
        "target_modules": ["q_proj", "k_proj"],
        "alpha_pattern": {"1.self_attn.q_proj": 7, r"language_model\..*k_proj": 3},
    },
    "ranks": {
        "target_modules": ["up_proj"],
        "use_rslora": True,
        "rank_pattern": {r"layers\.\d.mlp.up_proj": 6, "up_proj": 2},
    },
    "same key twice": {
        "target_modules": ["o_proj"],
        "rank_pattern": {"o_proj": 5},
        "alpha_pattern": {"^language_model.layers.3.*": 9},
    },
    "layers": {"target_modules": ["v_proj", "gate_proj"], "layers_to_transform": [0, 2]},
    "layers by name": {
        "target_modules": ["v_proj", "gate_proj"],
        "layers_to_transform": 1,
        "layers_pattern": ["layers", "deepstack_audio_merger_list"],
    },
    "whole name and layers": {
        "target_modules": ["language_model.layers.3.mlp.up_proj", "q_proj"],
        "layers_to_transform": [1],
    },
    "expression": {"target_modules": r".*audio.*\.(q|k|gate)_proj"},
    "excluded": {"target_modules": ["q_proj"], "exclude_modules": r"audio_encoder\..*"},
    "excluded list": {"target_modules": ["q_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["lm_head"]},
    "head": {"target_modules": ["lm_head", "stem_proj", "out_proj"]},
    "no effect": {
        "target_modules": ["q_proj"],
        "fan_in_fan_out": True,
        "lora_dropout": 0.5,
        "init_lora_weights": "gaussian",
    },
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "pissa": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "olora": {"target_modules": ["q_proj"], "init_lora_weights": "olora"},
}
CHANGES_THE_BASE = ("pissa", "olora")


def torch_model(torch, tensors):
    """The official model's tree of modules, with nothing in them but weights."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *parents, leaf = name.split(".")
        node = root
        for depth, part in enumerate(parents):
            if not hasattr(node, part):
                last = depth == len(parents) - 1
                shape = tensors.get(".".join([*parents, "weight"]), tensor).shape
                linear = last and len(shape) == 2 and "embed_tokens" not in name
                child = torch.nn.Linear(*shape[::-1], bias=False) if linear else torch.nn.Module()
                node.add_module(part, child)
            node = getattr(node, part)
        node.register_parameter(leaf, torch.nn.Parameter(torch.from_numpy(tensor.copy())))
    return root


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", PEFT)
def test_merged_as_peft_merges(tmp_path, base, config, case):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft", reason="the extra `oracle`")
    torch.manual_seed(0)
    model = torch_model(torch, random_tensors(config, "float32"))
    start = copy.deepcopy(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **PEFT[case]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "lora")
    if case in CHANGES_THE_BASE:
        with pytest.raises(InputError, match="init_lora_weights"):
            merged(base, tmp_path / "lora", config)
        adapted.peft_config["default"].init_lora_weights = True  # as PEFT asks for
        # It needs the adapter from the start of training, to subtract it.
        fresh = peft.get_peft_model(
            copy.deepcopy(start), peft.LoraConfig(r=4, lora_alpha=6, **PEFT[case])
        )
        fresh.peft_config["default"].init_lora_weights = True
        fresh.save_pretrained(tmp_path / "first")
        adapted.peft_config["default"].init_lora_weights = PEFT[case]["init_lora_weights"]
        adapted.save_pretrained(
            tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "first")
        )
    theirs = peft.PeftModel.from_pretrained(start, str(tmp_path / "lora")).merge_and_unload()
    expected = {name: value.numpy() for name, value in theirs.state_dict().items()}
    with Merged(open_checkpoint(base), tmp_path / "lora", config) as reader:
        for path, entry in reader.entries.items():
            leaf = reader.read(path, np.float32)
            layers = leaf[None] if entry.stack is None else leaf
            for name, layer in zip(entry.names, layers, strict=True):
                np.testing.assert_allclose(
                    entry.to_official(layer), expected[name], rtol=1e-5, atol=2e-5, err_msg=name
                )
