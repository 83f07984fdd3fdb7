"""Folders of LoRA adapters, with PEFT's names for the official model."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moss_audio_jax import hub
from moss_audio_jax.config import ModelConfig
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import brief
from moss_audio_jax.weights import adapter_config, safetensors
from moss_audio_jax.weights.adapter_config import AdapterConfig
from moss_audio_jax.weights.folder import new_folder
from moss_audio_jax.weights.official import Entry, table

_PEFT = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"


class Adapter(NamedTuple):
    """The addition to one module of the official model: scale * b @ a, in official orientation."""

    a: str  # the tensor's name; [r, in]
    b: str  # [out, r]
    scale: float


class Adapters:
    """A folder of adapters (ours or PEFT's), checked against a model; only headers are read.

    `modules` maps the path of a native kernel to one Adapter for each layer, or None for a layer
    without one.

    Raises:
      InputError: a file is missing or broken, a setting of adapter_config.json cannot be obeyed, or
        tensors do not fit it or the model; each is named.
    """

    def __init__(self, folder: str | Path, config: ModelConfig):
        self.folder = hub.folder_of(folder)
        self.entries = {entry.path: entry for entry in table(config) if _is_linear(entry)}
        names = [module for entry in self.entries.values() for module in _modules(entry)]
        _check_folder(self.folder)
        self.config = AdapterConfig(self.folder, names)
        self.file = self.folder / _WEIGHTS
        self._reader = safetensors.Reader(self.file)
        try:
            self.modules = self._found()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Adapters:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()

    def __str__(self) -> str:
        """'rank 4, scale 2, on q_proj, v_proj of language_model (8 kernels)'."""
        adapters = [(path, a) for path, layers in self.modules.items() for a in layers if a]
        ranks = sorted({self._reader.tensors[a.a].shape[0] for _, a in adapters})
        scales = sorted({a.scale for _, a in adapters})
        kinds: dict[str, set[str]] = {}
        for path, _ in adapters:
            parts = path.split("/")
            kinds.setdefault(parts[0], set()).add(parts[-2])
        where = "; ".join(f"{', '.join(sorted(kinds[part]))} of {part}" for part in kinds)
        return f"rank {_span(ranks)}, scale {_span(scales)}, on {where} ({len(adapters)} kernels)"

    def read(self, path: str, layer: int) -> tuple[np.ndarray, np.ndarray, float] | None:
        """(a [in, r], b [r, out], scale) for a native kernel's layer, float32; None if not adapted.

        Raises:
          InputError: values that are not finite.
        """
        adapter = self.modules[path][layer]
        if adapter is None:
            return None
        entry = self.entries[path]
        a, b = (self._tensor(name) for name in (adapter.a, adapter.b))
        return _side(entry, a.shape[0]).to_native(a), b.T, adapter.scale

    def _tensor(self, name: str) -> np.ndarray:
        tensor = self._reader.read(name).astype(np.float32)
        if not np.isfinite(tensor).all():
            raise InputError(f"{self.file}: {name} holds values that are not finite")
        return tensor

    def _found(self) -> dict[str, list[Adapter | None]]:
        """`modules`. Raises InputError for a tensor that does not belong to any."""
        left = set(self._reader.tensors)
        found: dict[str, list[Adapter | None]] = {}
        unused = []
        for path, entry in self.entries.items():
            layers = [self._adapter(entry, module, left) for module in _modules(entry)]
            if any(layers):
                found[path] = layers
            missing = [
                module
                for module, adapter in zip(_modules(entry), layers, strict=True)
                if adapter is None and module in self.config.targets
            ]
            if missing and any(layers):
                raise InputError(
                    f"{self.file}: {_names(missing[0])[0]} is missing; {adapter_config.FILE} "
                    "says that it was adapted"
                )
            if missing and not any(layers):
                unused.append(path.removesuffix("/kernel"))
        if left:
            raise InputError(f"{self.file}: {self._why(brief(min(left)))}")
        if not found:
            raise InputError(f"{self.file}: holds no LoRA tensors")
        if unused:
            warnings.warn(
                f"{self.folder}: target_modules also names {unused[0]}"
                + (f" (and {len(unused) - 1} more)" if len(unused) > 1 else "")
                + ", but there are no tensors for it; it stays unchanged",
                stacklevel=2,
            )
        return found

    def _adapter(self, entry: Entry, module: str, left: set[str]) -> Adapter | None:
        a, b = _names(module)
        there = {a, b} & left
        if not there:
            return None
        left -= there
        if len(there) == 1:
            [missing] = {a, b} - there
            raise InputError(f"{self.file}: {missing} is missing; expected it beside {min(there)}")
        if module not in self.config.targets:
            raise InputError(
                f"{self.file}: holds {a}, though {adapter_config.FILE} does not adapt {module}"
            )
        rank, (n_out, n_in) = self.config.rank(module), entry.tensor
        for name, shape in ((a, (rank, n_in)), (b, (n_out, rank))):
            if (theirs := self._reader.tensors[name].shape) != shape:
                raise InputError(
                    f"{self.file}: {name} has shape {list(theirs)}; the model and "
                    f"{adapter_config.FILE} (rank {rank}) require {list(shape)}"
                )
        return Adapter(a, b, self.config.scale(module))

    def _why(self, name: str) -> str:
        """Why a tensor does not belong to the model's adapters."""
        module = name.removeprefix(_PEFT)
        if name.endswith((".lora_A.weight", ".lora_B.weight")):
            module = module.rsplit(".", 2)[0]
            return f"{name}: {module} is not a linear layer of the model; another base model?"
        return f"{name} is not a LoRA tensor of a linear layer; expected only lora_A and lora_B"


def save_adapters(
    folder: str | Path, adapters: Mapping[str, Any], alpha: float, config: ModelConfig
) -> None:
    """Writes adapters (by native path) as PEFT does. An older folder is replaced at the end.

    lora_A is [r, in], lora_B [out, r], one tensor for each layer.
    """
    host = {path: np.asarray(jax.device_get(leaf), np.float32) for path, leaf in adapters.items()}
    tensors: dict[str, np.ndarray] = {}
    modules: list[str] = []
    linear = [entry for entry in table(config) if _is_linear(entry)]
    for entry in linear:
        module = entry.path.removesuffix("/kernel")
        if f"{module}/lora_a" not in host:
            continue
        a, b = (host[f"{module}/{leaf}"] for leaf in ("lora_a", "lora_b"))
        if entry.stack is None:
            a, b = a[None], b[None]
        side = _side(entry, a.shape[-1])
        for official, layer_a, layer_b in zip(_modules(entry), a, b, strict=True):
            name_a, name_b = _names(official)
            tensors |= {name_a: side.to_official(layer_a), name_b: layer_b.T}
        modules += _modules(entry)
    if jax.process_index():
        return
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    with new_folder(folder, nbytes, overwrite=True) as partial:
        safetensors.write_all(partial, tensors)
        (partial / safetensors.SINGLE).rename(partial / _WEIGHTS)
        description = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": next(t.shape[0] for name, t in tensors.items() if "lora_A" in name),
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": _target_modules(modules, linear),
        }
        (partial / adapter_config.FILE).write_text(json.dumps(description, indent=2) + "\n")


def _target_modules(modules: Sequence[str], linear: Sequence[Entry]) -> list[str]:
    """The modules' last names if these match no other module, else the whole names."""
    short = {module.rpartition(".")[2] for module in modules}
    everywhere = [module for entry in linear for module in _modules(entry)]
    meant = {module for module in everywhere if module.rpartition(".")[2] in short}
    return sorted(short if meant == set(modules) else modules)


def describe(folder: str | Path, config: ModelConfig) -> str:
    """One line about a folder of adapters: rank, scale, and what it adapts; see `Adapters`."""
    with Adapters(folder, config) as adapters:
        return f"{folder}: LoRA adapters of {adapters}"


def _is_linear(entry: Entry) -> bool:
    return entry.path.endswith("/kernel") and len(entry.tensor) == 2


def _modules(entry: Entry) -> list[str]:
    """The official modules of an entry, in order of layers."""
    return [name.removesuffix(".weight") for name in entry.names]


def _names(module: str) -> tuple[str, str]:
    """The tensors of a module's lora_A [r, in] and lora_B [out, r]."""
    a, b = (f"{_PEFT}{module}.{side}.weight" for side in ("lora_A", "lora_B"))
    return a, b


def _side(entry: Entry, rank: int) -> Entry:
    """The entry of lora_A [r, in], whose columns are in the order of the kernel's."""
    split = entry.split and (rank, *entry.split[1:])
    return dataclasses.replace(entry, tensor=(rank, entry.tensor[1]), stack=None, split=split)


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _check_folder(folder: Path) -> None:
    if (folder / adapter_config.FILE).exists():
        if not (folder / _WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
            raise InputError(
                f"{folder / 'adapter_model.bin'}: pickle files are not read (they can run code); "
                "save the adapter as safetensors first"
            )
        return
    inside = folder / "lora"
    hint = f"; did you mean {inside}?" if (inside / adapter_config.FILE).is_file() else ""
    raise InputError(f"{folder}: not a folder of LoRA adapters (no {adapter_config.FILE}){hint}")
