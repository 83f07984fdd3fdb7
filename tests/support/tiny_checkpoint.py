"""A tiny official checkpoint, made here: random weights, and sizes that differ where possible."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from moss_audio_jax.config import DecoderConfig, EncoderConfig, ModelConfig, to_official
from moss_audio_jax.weights import safetensors
from moss_audio_jax.weights.official import table
from moss_audio_jax.weights.safetensors import write_all

CONFIG = ModelConfig(
    encoder=EncoderConfig(
        d_model=16,
        layers=3,
        heads=2,
        ffn_dim=24,
        conv_channels=4,
        output_dim=40,
        mel_bins=32,
        tap_layers=(0, 2),
    ),
    decoder=DecoderConfig(
        hidden_size=64,
        ffn_dim=48,
        layers=4,
        heads=4,
        kv_heads=2,
        head_dim=8,
        vocab_size=640,
    ),
    adapter_dim=56,
    inject_layers=2,
)


def random_tensors(config: ModelConfig, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(entry.tensor, np.float32).astype(np.dtype(dtype))
        for entry in table(config)
        for name in entry.names
    }


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    with safetensors.Reader(folder) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def write_checkpoint(folder: Path, config: ModelConfig, dtype: str = "bfloat16", **how) -> None:
    folder.mkdir()
    # Not as this project would print it: a copy must be verbatim.
    raw = {"note": "kept"} | to_official(config, dtype)
    (folder / "config.json").write_text(json.dumps(raw, indent=3))
    (folder / "processor_config.json").write_text('{"audio_token_id":  5}')
    (folder / "generation_config.json").write_text('{"top_k":  50}')
    (folder / "vocab.json").write_text('{"a":  0}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "tokenizer.model").write_bytes(b"\0\1")
    (folder / "README.md").write_text("not copied")
    write_all(folder, random_tensors(config, dtype), **how)
