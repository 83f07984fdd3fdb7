"""A checkpoint that compiles in seconds, with a byte tokenizer; and sounds for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile

from moss_audio_jax.config import (
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    ProcessorConfig,
    to_official,
)
from moss_audio_jax.weights.convert import save_official
from tools.make import toy

AUDIO_ID = 261  # behind 256 bytes and five special tokens; start and end follow it
PROCESSOR = ProcessorConfig(
    audio_token_id=AUDIO_ID, audio_start_id=AUDIO_ID + 1, audio_end_id=AUDIO_ID + 2
)


def tiny_config(max_positions: int = 256) -> ModelConfig:
    return ModelConfig(
        encoder=EncoderConfig(
            d_model=16,
            layers=3,
            heads=2,
            ffn_dim=32,
            conv_channels=4,
            output_dim=24,
            tap_layers=(0, 1),
        ),
        decoder=DecoderConfig(
            hidden_size=32,
            ffn_dim=48,
            layers=3,
            heads=4,
            kv_heads=2,
            head_dim=8,
            vocab_size=384,
            max_positions=max_positions,
        ),
        adapter_dim=40,
        inject_layers=2,
    )


def write_checkpoint(folder: Path, max_positions: int = 256, tokenizer: bool = True) -> Path:
    """An official float32 checkpoint of random weights that says so in its config.json."""
    config = tiny_config(max_positions)
    files = folder.with_name(folder.name + ".files")
    files.mkdir(parents=True)
    if tokenizer:
        toy.write_byte_tokenizer(files)
    raw = to_official(config, "float32") | {"random_weights": True}
    (files / "config.json").write_text(json.dumps(raw, indent=2))
    params = toy.random_params(config, 0, "float32")
    save_official(folder, params, config, files_from=files, processor=PROCESSOR)
    return folder


def write_wav(path: Path, samples: np.ndarray, rate: int = 16_000) -> Path:
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return path


def tone(seconds: float, hertz: float = 440.0, rate: int = 16_000) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype("f4")
