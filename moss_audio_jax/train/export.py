"""What a run exports: a whole checkpoint; LoRA adapters and helper projections separately."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from moss_audio_jax.errors import InputError
from moss_audio_jax.models import lora
from moss_audio_jax.models.blocks import as_dtype
from moss_audio_jax.train.start import Start
from moss_audio_jax.train.step import Flat, Recipe, all_finite
from moss_audio_jax.tree import unflatten
from moss_audio_jax.weights.adapters import save_adapters
from moss_audio_jax.weights.convert import save_official
from moss_audio_jax.weights.helpers import PREFIX, load_helpers, save_helpers
from moss_audio_jax.weights.native import save_native


def merged_params(state: dict[str, Any], recipe: Recipe) -> Any:
    """The model's tree in the compute dtype, with averaged weights if any, LoRA merged."""
    return whole_model(state.get("ema", state["trained"]), state["frozen"], recipe=recipe)


@functools.partial(jax.jit, static_argnames="recipe")
def whole_model(trained: Flat, frozen: Flat, *, recipe: Recipe) -> Any:
    """The model's tree in the compute dtype from the leaves of a train state, LoRA merged."""
    dtype = as_dtype(recipe.compute)
    if recipe.lora_alpha:
        return unflatten(lora.merge(frozen, trained, recipe.lora_alpha))
    rounded = {
        path: leaf.astype(dtype) for path, leaf in trained.items() if not path.startswith(PREFIX)
    }
    return unflatten({**frozen, **rounded})


def write(config: Any, start: Start, state: dict, recipe: Recipe, workdir: Path) -> None:
    """Writes WORKDIR/export (official or native, LoRA merged), WORKDIR/lora (the adapters alone),
    and the projections of the helper losses beside the weights of an export.

    Raises:
      InputError: the last updates were skipped, or the weights are not finite; nothing is written.
    """
    if not recipe.lora_alpha and config.checkpoint.export == "none":
        return
    if skipped := int(state["skipped"]):
        raise InputError(
            f"{workdir}: nothing is exported: the last {skipped} updates had a loss or gradient "
            "that is not finite; the state is saved (lower optimizer.learning_rate, or look at the "
            "rows of the last steps; the same command with more train.steps continues)"
        )
    if not all_finite({key: state[key] for key in ("trained", "ema") if key in state}):
        raise InputError(
            f"{workdir}: nothing is exported: weights are not finite (lower "
            "optimizer.learning_rate; the same command continues from the last finite checkpoint)"
        )
    if recipe.lora_alpha:
        adapters = state.get("ema", state["trained"])
        save_adapters(workdir / "lora", adapters, config.lora.alpha, start.model)
    if config.checkpoint.export == "none":
        return
    save = {"official": save_official, "native": save_native}[config.checkpoint.export]
    save(
        workdir / "export",
        merged_params(state, recipe),
        start.model,
        files_from=start.files_from,
        tokenizer_from=start.tokenizer.files[0].parent,
        processor=dataclasses.replace(
            start.tokenizer.processor, time_markers=config.data.time_markers
        ),
        new_weights=True,
        overwrite=True,
    )
    weights = state.get("ema", state["trained"])
    helpers = {path: leaf for path, leaf in weights.items() if path.startswith(PREFIX)}
    if not helpers and start.whole:  # the encoder's projections stay with it
        helpers, names = load_helpers(start.whole)
    else:
        names = config.helpers.names
    if helpers:
        save_helpers(workdir / "export", helpers, names)
