"""LoRA adapters in a folder of their own, named as PEFT names those of the official model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moss_audio_jax.config import ModelConfig
from moss_audio_jax.errors import InputError
from moss_audio_jax.weights import safetensors
from moss_audio_jax.weights.checkpoint import new_folder
from moss_audio_jax.weights.official import table

_PEFT = "base_model.model."
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapters(
    folder: str | Path, adapters: Mapping[str, Any], alpha: float, config: ModelConfig
) -> None:
    """Writes adapters (by native path) as PEFT does, over an older folder once this one is whole.

    lora_A is [r, in], lora_B [out, r], one tensor a layer.
    """
    host = {path: np.asarray(jax.device_get(leaf), np.float32) for path, leaf in adapters.items()}
    tensors: dict[str, np.ndarray] = {}
    for entry in table(config):
        module = entry.path.removesuffix("/kernel")
        for leaf, name in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            if (stack := host.get(f"{module}/{leaf}")) is None:
                continue
            layers = stack if entry.stack is not None else stack[None]
            for official, layer in zip(entry.names, layers, strict=True):
                key = f"{_PEFT}{official.removesuffix('.weight')}.{name}.weight"
                tensors[key] = np.ascontiguousarray(layer.T)
    if jax.process_index():
        return
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    with new_folder(folder, nbytes, overwrite=True) as partial:
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        with safetensors.Writer(partial, shapes) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        (partial / "model.safetensors").rename(partial / _WEIGHTS)
        description = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": min(min(tensor.shape) for tensor in tensors.values()),
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({n.split(".lora_")[0].rsplit(".", 1)[1] for n in tensors}),
        }
        (partial / _CONFIG).write_text(json.dumps(description, indent=2) + "\n")


def load_adapters(folder: str | Path, config: ModelConfig) -> tuple[dict[str, np.ndarray], float]:
    """What `save_adapters` (or PEFT) wrote: adapters by native path, and alpha.

    Raises:
      InputError: files that are missing, or tensors that fit no kernel of the model.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / _CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / _CONFIG}: cannot be read ({error})") from None
    adapters: dict[str, np.ndarray] = {}
    with safetensors.Reader(folder / _WEIGHTS) as reader:
        left = set(reader.tensors)
        for entry in table(config):
            for leaf, name in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                keys = [
                    f"{_PEFT}{official.removesuffix('.weight')}.{name}.weight"
                    for official in entry.names
                ]
                found = [key for key in keys if key in left]
                if not found:
                    continue
                if found != keys:
                    missing = next(key for key in keys if key not in left)
                    raise InputError(f"{folder / _WEIGHTS}: {missing} is missing")
                layers = [reader.read(key).T.astype(np.float32) for key in keys]
                stacked = np.stack(layers) if entry.stack is not None else layers[0]
                adapters[f"{entry.path.removesuffix('/kernel')}/{leaf}"] = stacked
                left -= set(keys)
    if left:
        raise InputError(f"{folder / _WEIGHTS}: {min(left)} belongs to no kernel of the model")
    if not adapters:
        raise InputError(f"{folder / _WEIGHTS}: holds no LoRA tensors")
    return adapters, float(description.get("lora_alpha", description["r"]))


class Merged:
    """A checkpoint reader whose kernels come with their adapters folded in."""

    def __init__(self, reader: Any, folder: str | Path, config: ModelConfig):
        """Raises InputError if the adapters cannot be read or do not fit the model."""
        self._reader = reader
        self.entries, self.dtype = reader.entries, reader.dtype
        self._adapters, alpha = load_adapters(folder, config)
        for path, a in self._adapters.items():
            module, _, leaf = path.rpartition("/")
            kernel = self.entries[f"{module}/kernel"].shape
            expected = kernel[:-1] if leaf == "lora_a" else (*kernel[:-2], kernel[-1])
            found = a.shape[:-1] if leaf == "lora_a" else (*a.shape[:-2], a.shape[-1])
            if found != expected:
                raise InputError(
                    f"{folder}: the adapter of {module} is for {list(found)}; "
                    f"the model has {list(expected)}"
                )
        self._alpha = alpha

    def __enter__(self) -> Merged:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.__exit__(None, None, None)

    def read(self, path: str, dtype: Any) -> np.ndarray:
        module = path.removesuffix("/kernel")
        if (a := self._adapters.get(f"{module}/lora_a")) is None:
            return self._reader.read(path, dtype)
        b = self._adapters[f"{module}/lora_b"]
        kernel = self._reader.read(path, np.float32)
        for layer in range(len(kernel)) if kernel.ndim == 3 else (...,):
            kernel[layer] += a[layer] @ b[layer] * (self._alpha / a.shape[-1])
        return kernel.astype(dtype)
