"""The released sizes, built without computing anything, and the placement of their parameters."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from tiny_model import tiny_config

from moss_audio_jax.config import RELEASED, Compute, DecoderConfig, EncoderConfig, ModelConfig
from moss_audio_jax.models import decoder
from moss_audio_jax.models.encoder import encode_rows, init_encoder
from moss_audio_jax.models.moss_audio import abstract_params, count_params, hidden_states
from moss_audio_jax.sharding import make_mesh, param_specs, serving_mesh
from moss_audio_jax.weights.official import table

COUNTS = {"4b": (5_222_820_736, 41_943_040), "8b": (9_052_463_488, 54_525_952)}


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts(size):
    params = abstract_params(RELEASED[size], "bfloat16")
    total, gated_mlp = COUNTS[size]
    assert count_params(params) == total
    assert count_params(params["audio_encoder"]) == 643_624_320
    assert count_params(params["audio_adapter"]) == gated_mlp
    assert count_params(params["mergers"]) == 3 * gated_mlp
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("size", COUNTS)
def test_every_parameter_has_its_official_name(size):
    params = abstract_params(RELEASED[size])
    flat = {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert flat == {entry.path: entry.shape for entry in table(RELEASED[size])}


def test_large_parameters_are_split_over_fsdp_and_tensor():
    config = RELEASED["8b"]
    params = abstract_params(config, "bfloat16")
    mesh = make_mesh(fsdp=2, tensor=4)
    specs = param_specs(params, config, mesh)
    assert specs["lm_head"]["kernel"] == P("fsdp", "tensor")
    assert specs["language_model"]["layers"]["mlp"]["down_proj"]["kernel"] == P(
        None, "tensor", "fsdp"
    )
    leaves, flat = (
        jax.tree.leaves(params),
        jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P)),
    )
    whole = [leaf.size for leaf, spec in zip(leaves, flat, strict=True) if not any(spec)]
    assert sum(whole) < 0.002 * count_params(params)  # norms, biases and convolutions


def test_encoder_attention_is_tensor_split_only_where_heads_divide():
    config = RELEASED["4b"]  # 20 heads
    params = abstract_params(config)

    def query(tensor):
        specs = param_specs(params, config, make_mesh(tensor=tensor))
        return specs["audio_encoder"]["layers"]["self_attn"]["q_proj"]["kernel"]

    assert query(4) == P(None, None, "tensor")
    assert not any(query(8))


def test_serving_mesh_adds_fsdp_to_tensor():
    mesh = serving_mesh(make_mesh(data=2, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 4, "sequence": 1}


def test_the_program_does_not_grow_with_depth():
    def lines(layers):
        config = ModelConfig(
            EncoderConfig(layers=layers, tap_layers=(0, 1, 2)), DecoderConfig(layers=layers)
        )
        batch = {
            name: jax.ShapeDtypeStruct((1, 128), jnp.int32)
            for name in ("tokens", "positions", "segment_ids", "audio_index")
        }
        batch["frames"] = jax.ShapeDtypeStruct((1, 2, 50), jnp.int32)
        batch["mels"] = jax.ShapeDtypeStruct((1, 2, 400, 128), jnp.float32)
        run = functools.partial(hidden_states, config=config, compute=Compute())
        lowered = jax.jit(lambda params, batch: run(params, batch=batch)).lower(
            abstract_params(config, "bfloat16"), batch
        )
        return lowered.as_text().count("\n")

    assert lines(36) < 1.1 * lines(4)  # tools/bench/compile.py measures the compiler's time


def test_an_hour_of_sound_takes_the_memory_of_ten_minutes():
    """Not counting the log-mel input and the output features."""
    config = EncoderConfig(
        d_model=128,
        layers=3,
        heads=2,
        ffn_dim=512,
        conv_channels=32,
        output_dim=128,
        tap_layers=(0, 1),
    )
    params = jax.eval_shape(functools.partial(init_encoder, config=config), jax.random.key(0))
    encode = jax.jit(functools.partial(encode_rows, config=config, compute=Compute("float32")))

    def temporary(minutes: int) -> int:
        chunks = minutes * 15
        mels = jax.ShapeDtypeStruct((1, chunks, 400, 128), jnp.float32)
        frames = jax.ShapeDtypeStruct((1, chunks, 50), jnp.int32)
        lowered = encode.lower(params, mels=mels, frames=frames)
        # Compiled as users' programs are: the emitters of other tests keep more for longer.
        compiled = lowered.compile(compiler_options={"xla_cpu_use_fusion_emitters": True})
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(60) <= 1.2 * temporary(10)


def test_a_profile_reads_like_the_model():
    """Operations have the names of their blocks; inside a loop the names start again."""
    config = tiny_config()
    params = abstract_params(config)
    chunk = config.encoder.chunk_frames
    batch = {
        "tokens": jax.ShapeDtypeStruct((1, 128), "int32"),
        "positions": jax.ShapeDtypeStruct((1, 128), "int32"),
        "segment_ids": jax.ShapeDtypeStruct((1, 128), "int32"),
        "audio_index": jax.ShapeDtypeStruct((1, 128), "int32"),
        "mels": jax.ShapeDtypeStruct((1, 2, chunk, 128), "float32"),
        "frames": jax.ShapeDtypeStruct((1, 2, chunk // 8), "int32"),
    }

    def run(params, batch):
        hidden = hidden_states(params, config, Compute("float32"), batch)
        return decoder.logits(params, hidden)

    text = jax.jit(run).lower(params, batch).as_text(debug_info=True)
    for scope in (
        "audio_encoder/stem/Stem/conv1",
        "EncoderLayer/self_attn/q_proj",
        "adapter/GatedMLP/gate_proj",
        "mergers",
        "language_model",
        "DecoderLayer/self_attn/o_proj",
        "DecoderLayer/mlp/up_proj",
        "deepstack",
        "embed_tokens",
        "lm_head",
    ):
        assert scope in text, scope
