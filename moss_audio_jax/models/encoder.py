"""Audio encoder: convolutions and Whisper layers over independent chunks of log-mel.

Letters: N chunks, F mel frames of a chunk, M mel bins, S = F / 8 tokens, D width, K taps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moss_audio_jax.audio.lengths import conv_length
from moss_audio_jax.config import Compute, EncoderConfig
from moss_audio_jax.models.blocks import (
    LayerNorm,
    Linear,
    as_dtype,
    init_residual_stack,
    rematerialised,
)
from moss_audio_jax.ops.attention import attention
from moss_audio_jax.ops.conv import conv3x3_stride2
from moss_audio_jax.ops.gelu import gelu
from moss_audio_jax.ops.linear import Bits
from moss_audio_jax.ops.rotary import sinusoids
from moss_audio_jax.sharding import constrain, platform, ways

_LAYER_EPS = 1e-5  # Whisper's; config's norm_eps is that of the final norm alone
_LANES = 128  # of a TPU
# Of its first convolution's output at a time: 12 MB a chunk, as released.
_STEM_BYTES = 2**29
_STEM_BYTES_FRUGAL = 2**26


class Conv(nn.Module):
    """Kernel 3, stride 2, padding 1, exact GELU: [N, T, F, in] -> [N, T/2, F/2, channels]."""

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (3, 3, x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        return gelu(conv3x3_stride2(x, kernel, bias))


class Stem(nn.Module):
    """Log-mel [N, F, M], padded frames [N] -> tokens [N, F / 8, D]."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, mels: jax.Array, padded: jax.Array) -> jax.Array:
        x, length = mels[..., None], padded
        for index in (1, 2, 3):
            x = Conv(self.config.conv_channels, name=f"conv{index}")(x)
            # In a prompt of its own the array would end at its padded length P. Here it goes on,
            # and the next convolution must find zeros there, not what the bias made of them.
            length = conv_length(length)
            x = jnp.where((jnp.arange(x.shape[1]) < length[:, None])[..., None, None], x, 0)
        x = x.reshape(*x.shape[:2], -1)
        return Linear(self.config.d_model, use_bias=True, name="stem_proj")(x)


class SelfAttention(nn.Module):
    config: EncoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, segments: jax.Array) -> jax.Array:
        cfg = self.config

        def heads(name: str, use_bias: bool) -> jax.Array:
            y = Linear((cfg.heads, cfg.d_model // cfg.heads), use_bias, name=name)(x)
            return constrain(y, "batch", None, "heads", None)

        causal, window = False, None
        if cfg.attention == "sliding":
            causal = cfg.causal_window
            left = cfg.window - 1 if causal else cfg.window // 2
            window = (left, cfg.window - 1 - left)
        out = attention(
            heads("q_proj", True),
            heads("k_proj", False),
            heads("v_proj", True),
            causal=causal,
            window=window,
            segment_ids=(segments, segments),
            # A chunk's 50 tokens are too few for a kernel.
            implementation="xla" if cfg.attention == "chunked" else self.compute.attention,
        )
        return Linear(cfg.d_model, use_bias=True, axes=2, name="out_proj")(out)


class EncoderLayer(nn.Module):
    """Pre-LN Whisper layer: x [N, S, D], segments int [N, S] -> [N, S, D]."""

    config: EncoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, segments: jax.Array) -> jax.Array:
        cfg = self.config
        y = LayerNorm(_LAYER_EPS, name="self_attn_layer_norm")(x)
        x = x + SelfAttention(cfg, self.compute, name="self_attn")(y, segments)
        y = LayerNorm(_LAYER_EPS, name="final_layer_norm")(x)
        y = constrain(Linear(cfg.ffn_dim, use_bias=True, name="fc1")(y), "batch", None, "hidden")
        return x + Linear(cfg.d_model, use_bias=True, name="fc2")(gelu(y))


def init_encoder(key: jax.Array, config: EncoderConfig) -> Any:
    """Parameter tree, float32, layers stacked on axis 0."""
    stem_key, layer_key, out_key = jax.random.split(key, 3)
    mels = jnp.zeros((1, 8, config.mel_bins))
    x, segments = jnp.zeros((1, 1, config.d_model)), jnp.ones((1, 1), jnp.int32)
    layer = EncoderLayer(config, Compute(dtype="float32"))
    params = {
        "stem": Stem(config).init(stem_key, mels, jnp.array([8]))["params"],
        "layers": init_residual_stack(layer, layer_key, config.layers, x, segments),
        "layer_norm": LayerNorm(config.norm_eps).init(out_key, x)["params"],
    }
    if config.output_dim != config.d_model:
        params["out_proj"] = Linear(config.output_dim).init(out_key, x)["params"]
    return params


def encode(
    params: Any,
    config: EncoderConfig,
    compute: Compute,
    mels: jax.Array,
    frames: jax.Array,
    padded: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Encodes independent chunks.

    Args:
      params: as `init_encoder` makes them.
      mels: log-mel [N, F, M], zeros beyond each chunk's frames; F a multiple of 8.
      frames: int [N], each chunk's own frames (0 = an empty place).
      padded: int [N], the length P its prompt pads chunks to (`lengths.padded_frames`).

    Returns:
      features [N, F / 8, output_dim] and taps [K, N, F / 8, output_dim], in compute's dtype. Rows
      beyond ceil(frames / 8) are meaningless.
    """
    x = _convolve(params, config, compute, mels, padded)
    return _attend(params, config, compute, x, frames)


def encode_rows(
    params: Any,
    config: EncoderConfig,
    compute: Compute,
    mels: jax.Array,
    frames: jax.Array,
    padded: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`encode` for a batch of rows with C chunks each, `compute.encoder_chunks` at a time.

    The bound holds for each device: rows split over devices count once.

    Args:
      mels: [B, C, F, M].
      frames, padded: int [B, C].

    Returns:
      features [B, C * F / 8, output_dim], taps [K, B, C * F / 8, output_dim].
    """
    batch = len(frames)
    on_device = batch // ways((batch,), "batch")
    _, _, length, bins = mels.shape
    a_chunk = (length // 2) * (bins // 2) * config.conv_channels * as_dtype(compute).itemsize
    convolve = _of_rows(functools.partial(_convolve, params, config, compute))
    attend = _of_rows(functools.partial(_attend, params, config, compute))

    def block(mels: jax.Array, frames: jax.Array, padded: jax.Array) -> tuple[jax.Array, jax.Array]:
        most = _STEM_BYTES_FRUGAL if _frugal(params) else _STEM_BYTES
        x = _in_pieces(convolve, most // a_chunk // on_device, mels, padded)
        return attend(x, frames)

    features, taps = _in_pieces(block, compute.encoder_chunks // on_device, mels, frames, padded)
    shape = batch, -1, features.shape[-1]
    return features.reshape(shape), taps.reshape(taps.shape[0], *shape)


def _convolve(
    params: Any, config: EncoderConfig, compute: Compute, mels: jax.Array, padded: jax.Array
) -> jax.Array:
    """Log-mel [N, F, M], padded [N] -> tokens with their places [N, S, D]."""

    def stem(params: Any, mels: jax.Array) -> jax.Array:
        return Stem(config).apply({"params": params}, mels.astype(as_dtype(compute)), padded)

    if compute.remat != "none":  # its first convolution's output is the largest array of all
        stem = jax.checkpoint(stem)
    with jax.named_scope("stem"):
        x = stem(params["stem"], mels)
        x = x + sinusoids(x.shape[1], config.d_model).astype(x.dtype)
        return constrain(x, "batch", None, None)


def _attend(
    params: Any, config: EncoderConfig, compute: Compute, x: jax.Array, frames: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Tokens [N, S, D], frames [N] -> features [N, S, output_dim], taps [K, N, S, output_dim]."""
    chunks, length, _ = x.shape
    together = _together(config, chunks, length)
    valid = 8 * jnp.arange(length) < frames[:, None]
    number = 1 + jnp.arange(chunks)[:, None] % together
    segments = jnp.where(valid, number, -number).reshape(-1, together * length)
    x = constrain(x.reshape(*segments.shape, -1), "batch", None, None)
    layer = EncoderLayer(config, compute)

    def body(x: jax.Array, layer_params: Any) -> tuple[jax.Array, None]:
        x = layer.apply({"params": layer_params}, x, segments)
        return constrain(x, "batch", None, None), None

    body = rematerialised(body, compute)
    taps, start = [], 0
    for tap in config.tap_layers:  # one scan up to and with each tapped layer
        x = _through(body, params["layers"], start, tap + 1, x)
        taps.append(x)
        start = tap + 1
    if start < config.layers:
        x = _through(body, params["layers"], start, config.layers, x)

    features = LayerNorm(config.norm_eps).apply({"params": params["layer_norm"]}, x)
    taps = jnp.stack(taps) if taps else jnp.zeros((0, *x.shape), x.dtype)
    if "out_proj" in params:
        project = Linear(config.output_dim)
        features, taps = (
            project.apply({"params": params["out_proj"]}, y) for y in (features, taps)
        )
    return tuple(y.reshape(*y.shape[:-3], chunks, length, -1) for y in (features, taps))


def _together(config: EncoderConfig, chunks: int, length: int) -> int:
    """How many chunks share a row of the layers, each as its own segment.

    On a TPU two chunks of 50 tokens, because one chunk's keys and two chunks' keys are both padded
    to the same number of lanes. Elsewhere one: a CPU takes a tenth longer for two.
    """
    if config.attention != "chunked" or platform() != "tpu":
        return 1
    return _divisor(chunks // ways((chunks,), "batch"), max(1, _LANES // length))


def _of_rows(function: Callable) -> Callable:
    """Turns a function of chunks, [N, ...] -> [..., N, S, D], into one of rows of c chunks each,
    [B, c, ...] -> [..., B, c, S, D]."""

    def of_rows(*arrays: jax.Array) -> Any:
        rows = arrays[0].shape[:2]
        made = function(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
        return jax.tree.map(lambda y: y.reshape(*y.shape[:-3], *rows, *y.shape[-2:]), made)

    return of_rows


def _in_pieces(function: Callable, at_most: int, *arrays: jax.Array) -> Any:
    """Applies a function of rows, [B, c, ...] -> [..., B, c, S, D], to some chunks a row at a time.

    Each piece is cut out where it is needed, because a loop over pieces would first copy them all.
    It is cut along the chunks, so that the batch axis keeps its sharding.
    """
    chunks = arrays[0].shape[1]
    size = _divisor(chunks, max(1, at_most))
    if size == chunks:
        return function(*arrays)

    def piece(number: jax.Array) -> Any:
        return function(
            *(jax.lax.dynamic_slice_in_dim(x, number * size, size, axis=1) for x in arrays)
        )

    def joined(pieces: jax.Array) -> jax.Array:  # [P, ..., B, c, S, D]
        x = jnp.moveaxis(pieces, 0, -4)
        return x.reshape(*x.shape[:-4], chunks, *x.shape[-2:])

    return jax.tree.map(joined, jax.lax.map(piece, jnp.arange(chunks // size)))


def _frugal(params: Any) -> bool:
    """Are the encoder's weights kept as bits, because a CPU's memory is to be saved?"""
    return isinstance(params["stem"]["stem_proj"]["kernel"], Bits)


def _through(body: Callable, layers: Any, start: int, stop: int, x: jax.Array) -> jax.Array:
    """x after some of the stacked layers.

    A scan over a part of the stack copies that part. Bits are taken out of the whole stack layer by
    layer. The gradient of that would be as large as the stack at each layer, but bits have none.
    """
    if not isinstance(layers["fc1"]["kernel"], Bits):
        return jax.lax.scan(body, x, jax.tree.map(lambda p: p[start:stop], layers))[0]

    def indexed(x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        return body(x, jax.tree.map(lambda p: p[index], layers))

    return jax.lax.scan(indexed, x, jnp.arange(start, stop))[0]


def _divisor(n: int, at_most: int) -> int:
    """The largest divisor of n that is <= at_most."""
    return next(d for d in range(min(n, at_most), 0, -1) if n % d == 0)
