"""Analytic FLOPs of a batch: what a step must compute, nothing a rematerialisation adds."""

from __future__ import annotations

from moss_audio_jax.config import DecoderConfig, EncoderConfig, ModelConfig


def decoder_forward(config: DecoderConfig, tokens: int, length: int) -> float:
    """Layers and head over `tokens` tokens in rows of `length`; causal attention counts half."""
    d, h = config.hidden_size, config.head_dim
    weights = d * h * (2 * config.heads + 2 * config.kv_heads) + 3 * d * config.ffn_dim
    attention = 4 * config.heads * h * length / 2
    return tokens * (config.layers * (2 * weights + attention) + 2 * d * config.vocab_size)


def encoder_forward(config: EncoderConfig, chunks: int, frames: int) -> float:
    """Stem and layers over `chunks` chunks of `frames` mel frames."""
    tokens, d, c = frames // 8, config.d_model, config.conv_channels
    stem, side, channels = 0.0, frames * config.mel_bins, 1
    for _ in range(3):
        side /= 4
        stem += 2 * 9 * side * channels * c
        channels = c
    stem += 2 * tokens * (config.mel_bins // 8) * c * d
    seen = tokens if config.attention != "sliding" else min(tokens, config.window)
    layer = 2 * (4 * d * d + 2 * d * config.ffn_dim) + 4 * d * seen
    return chunks * (stem + tokens * config.layers * layer)


def adapter_forward(config: ModelConfig, audio_tokens: int) -> float:
    """The adapter and the mergers."""
    mlp = config.adapter_dim * (2 * config.encoder.output_dim + config.decoder.hidden_size)
    return 2.0 * audio_tokens * mlp * (1 + config.inject_layers)


def train_step(config: ModelConfig, rows: int, length: int, chunks: int, frames: int) -> float:
    """Forward and backward (twice the forward) of a full batch: every place counts as used."""
    audio_tokens = rows * chunks * frames // 8
    return 3 * (
        decoder_forward(config.decoder, rows * length, length)
        + encoder_forward(config.encoder, rows * chunks, frames)
        + adapter_forward(config, audio_tokens)
    )
