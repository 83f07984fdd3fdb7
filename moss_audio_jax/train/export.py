"""What a run leaves behind: a whole checkpoint, and LoRA adapters by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moss_audio_jax.errors import InputError
from moss_audio_jax.models import lora
from moss_audio_jax.models.blocks import as_dtype
from moss_audio_jax.train.start import Start
from moss_audio_jax.train.step import Recipe
from moss_audio_jax.weights import safetensors
from moss_audio_jax.weights.checkpoint import new_folder, save_native, unflatten
from moss_audio_jax.weights.convert import save_official
from moss_audio_jax.weights.official import table

# The names that PEFT gives to adapters of the official PyTorch model.
_PEFT = "base_model.model."
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def merged_params(state: dict[str, Any], recipe: Recipe) -> Any:
    """The model's tree in the compute dtype, averaged weights if there are, LoRA folded in."""
    trained = state.get("ema", state["trained"])
    dtype = as_dtype(recipe.compute)

    def merge(trained: dict, frozen: dict) -> Any:
        if recipe.lora_alpha:
            return unflatten(lora.merge(frozen, trained, recipe.lora_alpha))
        rounded = {path: leaf.astype(dtype) for path, leaf in trained.items()}
        return unflatten({**frozen, **rounded})

    return jax.jit(merge)(trained, state["frozen"])


def write(config: Any, start: Start, state: dict, recipe: Recipe, workdir: Path) -> None:
    """WORKDIR/export (official or native, LoRA merged) and WORKDIR/lora (the adapters alone)."""
    if recipe.lora_alpha:
        save_adapters(workdir / "lora", state.get("ema", state["trained"]), config.lora, start)
    if config.checkpoint.export == "none":
        return
    save = {"official": save_official, "native": save_native}[config.checkpoint.export]
    save(
        workdir / "export",
        merged_params(state, recipe),
        start.model,
        files_from=start.files_from,
        tokenizer_from=start.tokenizer.files[0].parent,
        processor=start.tokenizer.processor,
        new_weights=True,
        overwrite=True,
    )


def save_adapters(folder: Path, adapters: dict[str, Any], config: Any, start: Start) -> None:
    """Adapters as PEFT lays them out: lora_A [r, in], lora_B [out, r], one tensor a layer."""
    host = {path: np.asarray(jax.device_get(leaf), np.float32) for path, leaf in adapters.items()}
    tensors: dict[str, np.ndarray] = {}
    for entry in table(start.model):
        module = entry.path.removesuffix("/kernel")
        for leaf, name in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            if (stack := host.get(f"{module}/{leaf}")) is None:
                continue
            layers = stack if entry.stack is not None else stack[None]
            for official, layer in zip(entry.names(), layers, strict=True):
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
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({n.split(".lora_")[0].rsplit(".", 1)[1] for n in tensors}),
        }
        (partial / _CONFIG).write_text(json.dumps(description, indent=2) + "\n")


def load_adapters(folder: str | Path, start_model: Any) -> tuple[dict[str, jnp.ndarray], float]:
    """What `save_adapters` (or PEFT) wrote: adapters by native path, and alpha.

    Raises:
      InputError: files that are missing, or tensors that fit no kernel of the model.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / _CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / _CONFIG}: cannot be read ({error})") from None
    adapters: dict[str, jnp.ndarray] = {}
    with safetensors.Reader(folder / _WEIGHTS) as reader:
        left = set(reader.tensors)
        for entry in table(start_model):
            for leaf, name in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                keys = [
                    f"{_PEFT}{official.removesuffix('.weight')}.{name}.weight"
                    for official in entry.names()
                ]
                found = [key for key in keys if key in left]
                if not found:
                    continue
                if found != keys:
                    missing = next(key for key in keys if key not in left)
                    raise InputError(f"{folder / _WEIGHTS}: {missing} is missing")
                layers = [reader.read(key).T for key in keys]
                stacked = np.stack(layers) if entry.stack is not None else layers[0]
                adapters[f"{entry.path.removesuffix('/kernel')}/{leaf}"] = jnp.asarray(stacked)
                left -= set(keys)
    if left:
        raise InputError(f"{folder / _WEIGHTS}: {min(left)} belongs to no kernel of the model")
    if not adapters:
        raise InputError(f"{folder / _WEIGHTS}: holds no LoRA tensors")
    return adapters, float(description.get("lora_alpha", description["r"]))
