"""The needs of generation: arithmetic on shapes, and the real TPU compiler on a small model."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from moss_audio_jax import cli, libtpu
from moss_audio_jax.config import Compute, DecoderConfig, EncoderConfig, ModelConfig
from moss_audio_jax.errors import UsageError
from moss_audio_jax.plan import compile as compiling
from moss_audio_jax.plan import serving, serving_report, topologies
from moss_audio_jax.plan.compile import Compiled, held_bytes

CONFIG = str(Path(__file__).parents[2] / "configs" / "tiny.py")
MODEL = ModelConfig(
    EncoderConfig(
        d_model=64, layers=2, heads=4, ffn_dim=128, conv_channels=8, output_dim=64, tap_layers=(0,)
    ),
    DecoderConfig(
        hidden_size=512,
        ffn_dim=1024,
        layers=3,
        heads=8,
        kv_heads=4,
        head_dim=128,
        vocab_size=4096,
        max_positions=4096,
    ),
    adapter_dim=128,
    inject_layers=1,
)
LOAD = serving.Load(batch=16, prompt_tokens=128, audio_seconds=8, new_tokens=100)
# Each layer's cache is 128 MiB on a device of four, as much as a core's own memory; int8, half.
LONG = serving.Load(batch=64, prompt_tokens=3000, audio_seconds=8, new_tokens=512)
NATIVE, INT8 = (Compute(quantize=how) for how in ("none", "weights+cache"))


def test_sizes_are_the_engines():
    assert serving.Load().cache_positions == 3072
    assert serving.Load().prefill() == (1, 2048)
    assert LOAD.prefill() == (8, 128)
    assert dataclasses.replace(LOAD, batch=3).prefill() == (3, 128)
    assert LONG.prefill() == (1, 2048)  # a piece of 3,000 tokens


@pytest.mark.parametrize(
    ("load", "mesh", "words"),
    [
        (LOAD, {"tensor": 2}, "must fill"),
        (dataclasses.replace(LOAD, batch=3), {"data": 2, "tensor": 2}, "must fill"),
        (dataclasses.replace(LOAD, audio_seconds=60), None, "750 tokens, more than the 128"),
        (dataclasses.replace(LOAD, new_tokens=4000), None, "4096 positions"),
    ],
)
def test_what_cannot_be_is_named(load, mesh, words):
    with pytest.raises(UsageError, match=words):
        serving.build(MODEL, NATIVE, load, jax.devices()[:4], mesh)


def test_a_step_reads_the_decoder_and_the_cache_once():
    made = {
        compute.quantize: serving.build(MODEL, compute, LOAD, jax.devices())
        for compute in (NATIVE, INT8)
    }
    compiled = Compiled(1.0, peak=2**20)
    topology = topologies.parse("v5e:2x4")
    native, int8 = (
        serving_report.assess(one, compiled, compiled, topology) for one in made.values()
    )
    assert dict(made["none"].mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 4, "sequence": 1}
    decoder = MODEL.decoder
    width = decoder.hidden_size
    kernels = width * 128 * (2 * 8 + 2 * 4) + 3 * width * decoder.ffn_dim
    matrices = decoder.layers * kernels + width * decoder.vocab_size
    norms = decoder.layers * (2 * width + 2 * 128) + width
    assert native.weights_read == 2 * (matrices // 4 + norms)
    both = 2  # keys and values
    cache = decoder.layers * LOAD.batch * LOAD.cache_positions * decoder.kv_heads * both
    assert native.cache_read == native.cache == cache * 128 * 2 / 8
    assert int8.cache_read == cache * (128 + 2) / 8
    scales = decoder.layers * (128 * (8 + 2 * 4) + 2 * decoder.ffn_dim) + decoder.vocab_size
    uncut = decoder.layers * 2 * width  # of o_proj and down_proj, whose outputs are not split
    assert int8.weights_read == matrices // 4 + 2 * norms + 4 * (scales // 4 + uncut)
    assert native.floor == (native.weights_read + native.cache_read) / 8.19e11
    assert not native.fits  # no module: the compiler refused
    assert native.prefill.peak == 2**20 + held_bytes(made["none"].state)
    written = json.loads(json.dumps(serving_report.as_json(int8)))
    assert written["decode"]["floor_tokens_per_second"] == LOAD.batch / int8.floor
    assert written["quantize"] == "weights+cache"
    assert "DOES NOT FIT" in serving_report.table(int8)


def test_options_that_do_not_agree(capsys):
    base = ["plan", "--config", CONFIG, "--topology", "v5e:2x2"]
    for options, words in (
        (["--batch", "8"], "--batch is an option of --generate"),
        (["--generate", "--sweep"], "none of --budget, --sweep"),
        (["--generate", "--quantize", "int4"], "int4"),
    ):
        assert cli.main([*base, *options]) == 2
        assert words in capsys.readouterr().err


# --- with the compiler ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plans():
    if not libtpu.installed():
        pytest.skip("libtpu is not installed: pip install -e '.[plan]'")
    compiling.prepare_environment()
    topology = topologies.parse("v5e:2x2")
    devices = compiling.slice_devices(topology)
    found = {}
    for compute in (NATIVE, INT8):
        # Two heads on each device, because a layout that suits only one head would be copied.
        one = serving.build(MODEL, compute, LONG, devices, {"data": 2, "tensor": 2})
        # The prefill takes as long to compile as the rest, and hardly differs from it.
        prefill = serving.compile_prefill(one) if compute == INT8 else Compiled(0.0, peak=0)
        found[compute.quantize] = serving_report.assess(
            one, prefill, serving.compile_decode(one), topology
        )
    return found


def test_generation_is_compiled_for_the_slice(plans):
    for plan in plans.values():
        assert plan.decode.fits, plan.decode.refusal
        assert plan.weights + plan.cache < plan.decode.peak
        assert plan.floor < plan.decode.estimate.seconds
    native, int8 = plans.values()
    assert int8.fits, int8.prefill.refusal
    assert int8.decode.peak < 0.7 * native.decode.peak
    assert int8.decode.estimate.seconds < 2 * native.decode.estimate.seconds


def test_a_step_copies_neither_weights_nor_cache(plans):
    for plan in plans.values():
        cache = plan.cache // 2
        # What fits into the core's own memory may be written there and brought back: no weight, and
        # of keys and values of three layers not all.
        assert all(made.bytes > cache // 4 for made in plan.copies)
        assert sum(made.bytes for made in plan.copies) < plan.cache * 2 // 3
        assert all(made.bytes < cache for made in plan.copies_once)
        # Two products per layer leave partial sums; a layer exchanges nothing else.
        layers = [c for c in plan.decode.collectives if "DecoderLayer" in c.source]
        assert {c.times for c in layers} == {1}  # they are unrolled
        expected = ["down_proj", "o_proj"] * MODEL.decoder.layers
        assert sorted(c.source.rsplit("/", 2)[-2] for c in layers) == sorted(expected)
