"""Our layers compared with those of transformers, with the same random weights."""

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from moss_audio_jax.config import Compute, DecoderConfig, EncoderConfig, ModelConfig, to_official
from moss_audio_jax.models.decoder import DecoderLayer
from moss_audio_jax.models.encoder import EncoderLayer
from moss_audio_jax.ops.attention import attention
from moss_audio_jax.ops.rotary import rotary_angles
from oracle.reference import qwen3_layer, to_numpy, whisper_layer

pytestmark = pytest.mark.oracle


def tree(weights: dict[str, np.ndarray]) -> dict:
    """Native parameters of one layer from PyTorch names."""
    native: dict = {}
    for name, value in weights.items():
        *path, leaf = name.split(".")
        norm = "norm" in path[-1]
        leaf = {"weight": "scale" if norm else "kernel"}.get(leaf, leaf)
        node = native
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = jnp.asarray(value.T if leaf == "kernel" else value)
    return native


def assert_close(found, expected):
    expected = to_numpy(expected)
    assert np.abs(np.asarray(found) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("packed", [False, True])
def test_qwen3_layer(packed):
    config = DecoderConfig(
        hidden_size=48, ffn_dim=96, layers=1, heads=6, kv_heads=2, head_dim=16, vocab_size=64
    )
    official = to_official(ModelConfig(decoder=config))["language_config"]
    _, apply, weights = qwen3_layer(official, seed=0)
    x = np.random.default_rng(0).normal(size=(2, 11, 48)).astype(np.float32)
    segments = np.array([[1] * 4 + [2] * 7, [1] * 11]) if packed else np.ones((2, 11), int)
    positions = np.array([[*range(4), *range(7)], [*range(11)]]) if packed else None
    causal = np.tril(np.ones((11, 11), bool))
    allowed = causal & (segments[:, :, None] == segments[:, None, :])
    expected = apply(x, positions, allowed)

    places = jnp.asarray(np.arange(11)[None].repeat(2, 0) if positions is None else positions)
    angles = rotary_angles(places, config.head_dim, config.rope_theta)

    def attend(query, key, value):
        ids = jnp.asarray(segments)
        return attention(query, key, value, causal=True, segment_ids=(ids, ids)), None

    found, _ = DecoderLayer(config).apply({"params": tree(weights)}, jnp.asarray(x), angles, attend)
    assert_close(found, expected)


@pytest.mark.parametrize("length", [13, 7])
def test_whisper_layer(length):
    config = EncoderConfig(d_model=48, layers=1, heads=4, ffn_dim=96, output_dim=48)
    official = to_official(ModelConfig(encoder=config))["audio_config"]
    _, apply, weights = whisper_layer(official, seed=1)
    x = np.random.default_rng(1).normal(size=(2, 13, 48)).astype(np.float32)
    valid = (np.arange(13) < np.array([[13], [length]])).astype(np.int32)
    expected = apply(x, np.broadcast_to(valid[:, None, :] > 0, (2, 13, 13)))
    layer = EncoderLayer(config, Compute(dtype="float32"))
    found = layer.apply({"params": tree(weights)}, jnp.asarray(x), jnp.asarray(valid))
    for row in range(2):
        n = valid[row].sum()
        assert_close(found[row, :n], expected[row, :n])
