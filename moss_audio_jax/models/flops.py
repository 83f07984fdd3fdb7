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


# bfloat16 FLOP/s of one chip, by the start of jax.Device.device_kind (vendors' data sheets).
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


# Bytes/s of its memory, likewise.
BANDWIDTH = {
    "TPU v4": 1.2e12,
    "TPU v5 lite": 8.19e11,
    "TPU v5e": 8.19e11,
    "TPU v5p": 2.765e12,
    "TPU v5": 2.765e12,
    "TPU v6": 1.64e12,
    "TPU7x": 7.38e12,
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA H100": 3.35e12,
    "NVIDIA H200": 4.8e12,
}


def peak(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device, or None where it is not known (a CPU)."""
    return _of(PEAK, device_kind)


def bandwidth(device_kind: str) -> float | None:
    """Peak bytes/s of a device's memory, or None where it is not known."""
    return _of(BANDWIDTH, device_kind)


def _of(table: dict[str, float], device_kind: str) -> float | None:
    matches = [name for name in table if device_kind.startswith(name)]
    return table[max(matches, key=len)] if matches else None
