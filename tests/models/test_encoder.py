"""Chunks are independent: how many the encoder processes together or per row changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_audio_jax.config import Compute, EncoderConfig
from moss_audio_jax.models import encoder
from moss_audio_jax.models.encoder import encode, encode_rows, init_encoder

CONFIG = EncoderConfig(
    d_model=16, layers=2, heads=2, ffn_dim=32, conv_channels=4, output_dim=16, tap_layers=(0,)
)
ROWS, CHUNKS = 2, 72
STEM_BYTES = ROWS * 12 * (8 * 64 * 4 * 4)  # frames, bins, channels, float32
# 36 chunks of each row at a time; of those the stem, as patched here, takes 12.
IN_PIECES = Compute("float32", remat="full", encoder_chunks=ROWS * 36)


@pytest.fixture(autouse=True)
def small_pieces_and_shared_rows(monkeypatch):
    monkeypatch.setattr(encoder, "_STEM_BYTES", STEM_BYTES)
    monkeypatch.setattr(encoder, "platform", lambda: "tpu")  # chunks share rows of the layers


@pytest.fixture(scope="module")
def inputs():
    params = init_encoder(jax.random.key(0), CONFIG)
    frames = jax.random.randint(jax.random.key(1), (ROWS, CHUNKS), 0, 17)
    mels = jax.random.normal(jax.random.key(2), (ROWS, CHUNKS, 16, CONFIG.mel_bins))
    mels = jnp.where(jnp.arange(16)[:, None] < frames[..., None, None], mels, 0)
    return params, mels, (frames[..., None] - jnp.array([0, 8])).clip(0, 8)


def test_pieces_of_rows_give_what_single_chunks_give(inputs):
    params, *arrays = inputs
    alone = [x.reshape(-1, 1, *x.shape[2:]) for x in arrays]

    @jax.jit
    def one_by_one(params, arrays):
        return jax.lax.map(lambda chunk: encode(params, CONFIG, Compute("float32"), *chunk), arrays)

    features, taps = one_by_one(params, alone)
    pieces = jax.jit(encode_rows, static_argnums=(1, 2))(params, CONFIG, IN_PIECES, *arrays)
    heard = arrays[-1].reshape(ROWS, -1) > 0
    for found, expected in zip(pieces, (features, taps), strict=True):
        expected = expected.reshape(found.shape)
        np.testing.assert_allclose(
            found[..., heard, :], expected[..., heard, :], rtol=1e-4, atol=1e-5
        )


def test_gradients_do_not_depend_on_the_pieces(inputs):
    params, *arrays = inputs
    heard = arrays[-1].reshape(ROWS, -1, 1) > 0

    def loss(params, compute):
        features, taps = encode_rows(params, CONFIG, compute, *arrays)
        return sum(jnp.square(x).mean(where=heard) for x in (features, taps))

    gradients = jax.jit(jax.grad(loss), static_argnums=1)
    whole = gradients(params, dataclasses.replace(IN_PIECES, encoder_chunks=10_000))

    def close(found, expected):
        largest = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6 + 1e-4 * largest)

    jax.tree.map(close, gradients(params, IN_PIECES), whole)
