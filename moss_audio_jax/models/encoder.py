"""Audio encoder: convolutions and Whisper layers over independent pieces of log-mel.

A strip of F mel frames holds one or more pieces (`models.moss_audio`). `frames` says how many mel
frames stand behind each of its S tokens; a run of tokens with frames is a piece.

Letters: N strips, F mel frames of a strip, M mel bins, S = F / 8 tokens, D width, K taps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moss_audio_jax.audio.lengths import conv_length
from moss_audio_jax.config import Compute, EncoderConfig
from moss_audio_jax.models.blocks import (
    LayerNorm,
    Linear,
    as_dtype,
    init_residual_stack,
    param,
    rematerialised,
)
from moss_audio_jax.ops.activations import gelu
from moss_audio_jax.ops.attention import attention
from moss_audio_jax.ops.conv import conv3x3_stride2
from moss_audio_jax.ops.linear import Bits
from moss_audio_jax.ops.rotary import sinusoids
from moss_audio_jax.sharding import constrain, platform, ways

_LAYER_EPS = 1e-5  # Whisper's; config's norm_eps is that of the final norm alone
_LANES = 128  # of a TPU
# Of the first convolution's output at a time: 12 MB a strip of 4 s, as released.
_STEM_BYTES = 2**29
_STEM_BYTES_FRUGAL = 2**26


class Conv(nn.Module):
    """Kernel 3, stride 2, padding 1, exact GELU: [N, T, F, in] -> [N, T/2, F/2, channels]."""

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (3, 3, x.shape[-1], self.channels)
        kernel = param(self, "kernel", nn.initializers.he_normal(), shape)
        bias = param(self, "bias", nn.initializers.zeros, (self.channels,))
        return gelu(conv3x3_stride2(x, kernel, bias))


class Stem(nn.Module):
    """Log-mel [N, F, M], frames [N, S] -> tokens [N, S, D]."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, mels: jax.Array, frames: jax.Array) -> jax.Array:
        x, left = mels[..., None], frames
        for index in (1, 2, 3):
            x = Conv(self.config.conv_channels, name=f"conv{index}")(x)
            # The official code pads a piece with zeros before each convolution. Here its neighbours
            # must be zeros too, not what the bias makes of empty frames.
            left = conv_length(left)
            inside = jnp.arange(8 >> index) < left[..., None]  # [N, S, positions of a token]
            x = jnp.where(inside.reshape(*x.shape[:2], 1, 1), x, 0)
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
        "stem": Stem(config).init(stem_key, mels, jnp.array([[8]]))["params"],
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
) -> tuple[jax.Array, jax.Array]:
    """Encodes strips of independent pieces.

    Args:
      params: as `init_encoder` makes them.
      mels: log-mel [N, F, M], zeros where there is no sound; F a multiple of 8.
      frames: int [N, F / 8], mel frames behind each token, 0 = none. All tokens of a piece have 8
        but the last, which may have less.

    Returns:
      features [N, F / 8, output_dim] and taps [K, N, F / 8, output_dim], in compute's dtype. Tokens
      without frames are meaningless.
    """
    x = _convolve(params, config, compute, mels, frames)
    return _attend(params, config, compute, x, frames)


def encode_rows(
    params: Any,
    config: EncoderConfig,
    compute: Compute,
    mels: jax.Array,
    frames: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`encode` for a batch of rows with C strips each, `compute.encoder_chunks` at a time.

    The bound holds for each device: rows split over devices count once.

    Args:
      mels: [B, C, F, M].
      frames: int [B, C, F / 8].

    Returns:
      features [B, C * F / 8, output_dim], taps [K, B, C * F / 8, output_dim].
    """
    batch = len(frames)
    on_device = batch // ways((batch,), "batch")
    _, _, length, bins = mels.shape
    a_strip = (length // 2) * (bins // 2) * config.conv_channels * as_dtype(compute).itemsize
    convolve = _of_rows(functools.partial(_convolve, params, config, compute))
    attend = _of_rows(functools.partial(_attend, params, config, compute))

    def block(mels: jax.Array, frames: jax.Array) -> tuple[jax.Array, jax.Array]:
        most = _STEM_BYTES_FRUGAL if _frugal(params) else _STEM_BYTES
        x = _in_parts(convolve, most // a_strip // on_device, mels, frames)
        return attend(x, frames)

    features, taps = _in_parts(block, compute.encoder_chunks // on_device, mels, frames)
    shape = batch, -1, features.shape[-1]
    return features.reshape(shape), taps.reshape(taps.shape[0], *shape)


def _convolve(
    params: Any, config: EncoderConfig, compute: Compute, mels: jax.Array, frames: jax.Array
) -> jax.Array:
    """Log-mel [N, F, M], frames [N, S] -> tokens with their positions [N, S, D]."""

    def stem(params: Any, mels: jax.Array) -> jax.Array:
        return Stem(config).apply({"params": params}, mels.astype(as_dtype(compute)), frames)

    if compute.remat != "none":  # its first convolution's output is the largest array of all
        stem = jax.checkpoint(stem)
    with jax.named_scope("stem"):
        x = stem(params["stem"], mels)
        table = sinusoids(x.shape[1], config.d_model).astype(x.dtype)
        x = x + jnp.take(table, piece_positions(frames), axis=0)
        return constrain(x, "batch", None, None)


def _attend(
    params: Any, config: EncoderConfig, compute: Compute, x: jax.Array, frames: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Tokens [N, S, D], frames [N, S] -> features [N, S, O] and taps [K, N, S, O], O output_dim."""
    strips, length, _ = x.shape
    together = _together(config, strips, length)
    # Pieces are numbered by the empty tokens before them, those of the next strip further on.
    empty = frames == 0
    number = 1 + jnp.cumsum(empty, axis=1) + (length + 1) * (jnp.arange(strips)[:, None] % together)
    segments = jnp.where(empty, -number, number).reshape(-1, together * length)
    x = constrain(x.reshape(*segments.shape, -1), "batch", None, None)
    layer = EncoderLayer(config, compute)

    count = len(config.tap_layers)
    places = np.full(config.layers, count)  # of each layer's output among the taps, if it is tapped
    places[list(config.tap_layers)] = np.arange(count)

    def body(carry: tuple[jax.Array, jax.Array], xs: tuple[Any, jax.Array]) -> tuple[tuple, None]:
        (x, taps), (layer_params, place) = carry, xs
        x = constrain(layer.apply({"params": layer_params}, x, segments), "batch", None, None)
        return (x, taps.at[place].set(x, mode="drop")), None

    taps = jnp.zeros((count, *x.shape), x.dtype)
    xs = params["layers"], places
    (x, taps), _ = jax.lax.scan(rematerialised(body, compute), (x, taps), xs)

    features = LayerNorm(config.norm_eps).apply({"params": params["layer_norm"]}, x)
    if "out_proj" in params:
        project = Linear(config.output_dim)
        features, taps = (
            project.apply({"params": params["out_proj"]}, y) for y in (features, taps)
        )
    return tuple(y.reshape(*y.shape[:-3], strips, length, -1) for y in (features, taps))


def piece_positions(frames: jax.Array) -> jax.Array:
    """int [..., S]: each token's position in its piece, for `frames` [..., S] as `encode` takes
    them."""
    place = jnp.arange(frames.shape[-1])
    start = jax.lax.cummax(jnp.where(frames == 0, place + 1, 0), axis=frames.ndim - 1)
    return jnp.maximum(place - start, 0)


def _together(config: EncoderConfig, strips: int, length: int) -> int:
    """How many strips share a row of the layers, their pieces as segments.

    On a TPU two strips of 50 tokens, because one strip's keys and two strips' keys are both padded
    to the same number of lanes. Elsewhere one: a CPU takes a tenth longer for two.
    """
    if config.attention != "chunked" or platform() != "tpu":
        return 1
    return _divisor(strips // ways((strips,), "batch"), max(1, _LANES // length))


def _of_rows(function: Callable) -> Callable:
    """Turns a function of strips, [N, ...] -> [..., N, S, D], into one of rows of c strips each,
    [B, c, ...] -> [..., B, c, S, D]."""

    def of_rows(*arrays: jax.Array) -> Any:
        rows = arrays[0].shape[:2]
        made = function(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
        return jax.tree.map(lambda y: y.reshape(*y.shape[:-3], *rows, *y.shape[-2:]), made)

    return of_rows


def _in_parts(function: Callable, at_most: int, *arrays: jax.Array) -> Any:
    """Applies a function of rows, [B, c, ...] -> [..., B, c, S, D], to some strips a row at a time.

    Each piece is cut out where it is needed, because a loop over pieces would first copy them all.
    It is cut along the strips, so that the batch axis keeps its sharding.
    """
    strips = arrays[0].shape[1]
    size = _divisor(strips, max(1, at_most))
    if size == strips:
        return function(*arrays)

    def piece(number: jax.Array) -> Any:
        return function(
            *(jax.lax.dynamic_slice_in_dim(x, number * size, size, axis=1) for x in arrays)
        )

    def joined(pieces: jax.Array) -> jax.Array:  # [P, ..., B, c, S, D]
        x = jnp.moveaxis(pieces, 0, -4)
        return x.reshape(*x.shape[:-4], strips, *x.shape[-2:])

    return jax.tree.map(joined, jax.lax.map(piece, jnp.arange(strips // size)))


def _frugal(params: Any) -> bool:
    """Are the encoder's weights kept as bits, because a CPU's memory is to be saved?"""
    return isinstance(params["stem"]["stem_proj"]["kernel"], Bits)


def _divisor(n: int, at_most: int) -> int:
    """The largest divisor of n that is <= at_most."""
    return next(d for d in range(min(n, at_most), 0, -1) if n % d == 0)
