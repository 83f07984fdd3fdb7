"""Folders of LoRA adapters that change what a model says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax

from moss_audio_jax.config import ModelConfig
from moss_audio_jax.models import lora
from moss_audio_jax.tree import flatten
from moss_audio_jax.weights import safetensors
from moss_audio_jax.weights.adapters import save_adapters
from moss_audio_jax.weights.official import shapes


def write_adapters(
    folder: Path,
    config: ModelConfig,
    targets: str = lora.DECODER,
    layers: Sequence[int] | None = None,
    size: float = 0.3,
) -> Path:
    """Random adapters of kernels whose path matches; of all layers, or of some."""
    adapters = lora.init(jax.random.key(1), flatten(shapes(config, "float32")), 2, targets)
    for number, path in enumerate(path for path in adapters if path.endswith("lora_b")):
        adapters[path] = size * jax.random.normal(jax.random.key(number), adapters[path].shape)
    save_adapters(folder, adapters, 2.0, config)
    if layers is not None:
        _keep_layers(folder, layers)
    return folder


def _keep_layers(folder: Path, layers: Sequence[int]) -> None:
    """Drops the tensors of all other layers."""
    file = folder / "adapter_model.safetensors"
    with safetensors.Reader(file) as reader:
        tensors = {name: reader.read(name) for name in reader.tensors}
    kept = {n: t for n, t in tensors.items() if any(f".layers.{i}." in n for i in layers)}
    safetensors.write_all(folder, kept)
    (folder / safetensors.SINGLE).rename(file)
    config = folder / "adapter_config.json"
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in kept}
    described = json.loads(config.read_text()) | {"target_modules": sorted(modules)}
    config.write_text(json.dumps(described))
