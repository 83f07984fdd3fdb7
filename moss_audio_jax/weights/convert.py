"""Loading and converting checkpoints, official or native, one stacked leaf in memory at a time."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from moss_audio_jax import hub
from moss_audio_jax.buckets import as_path, is_remote
from moss_audio_jax.config import RELEASED, ModelConfig, ProcessorConfig
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.tree import flatten
from moss_audio_jax.weights import native
from moss_audio_jax.weights.compose import Composed, Merged
from moss_audio_jax.weights.folder import new_folder, write_side_files
from moss_audio_jax.weights.official import GATE, Entry, table, write_official
from moss_audio_jax.weights.opening import Format, open_checkpoint, read_config


def load_params(
    folder: str | Path,
    config: ModelConfig | None = None,
    dtype: Any = None,
    shardings: Any = None,
    lora: str | Path | None = None,
    then: Callable[[str, jax.Array], Any] = lambda path, leaf: leaf,
    apart: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """The parameters of a checkpoint in either layout, as a tree of jax.Arrays.

    Args:
      folder: the checkpoint.
      config: default: that of its config.json.
      dtype: cast to it while reading; None: as stored.
      shardings: a tree of Shardings like the parameters, one for all, or None (the first device).
        Each process reads the parts on its own devices.
      lora: a folder of adapters to merge, on the host.
      then, apart, progress: see `native.load_tree`.

    Raises:
      InputError: weights are missing, broken, incomplete, or do not fit the config.
    """
    config = config or read_config(folder)
    reader = open_checkpoint(folder, config)
    if lora is not None:
        reader = Merged(reader, lora, config)
    with reader:
        return native.load_tree(reader, shardings, dtype, then, apart, progress)


def load_adapted(
    folder: str | Path,
    lora: str | Path,
    config: ModelConfig,
    dtype: Any,
    shardings: Any,
    then: Callable[[str, jax.Array], Any],
    apart: str,
    before: Callable[[dict[str, list[bool]]], None],
) -> dict[str, Any]:
    """Only the leaves that adapters change, by path, merged as `load_params` merges them.

    A leaf whose path begins with `apart` is a tuple of its layers, with None for those that stay.
    `before` is called with what will change (`Merged.touched`) before any weight is read; the other
    arguments are those of `load_params`.
    """
    leaves: dict[str, Any] = {}
    by_path = flatten(shardings)
    with Merged(open_checkpoint(folder, config), lora, config) as reader:
        before(reader.touched)
        for path, touched in reader.touched.items():
            if path.startswith(apart):
                layers = reader.layers(path, by_path[path], dtype)
                leaves[path] = tuple(
                    then(path, layer) if changes else None
                    for layer, changes in zip(layers, touched, strict=True)
                )
            else:
                leaves[path] = then(path, reader.load(path, by_path[path], dtype))
    return leaves


def save_official(
    folder: str | Path,
    params: Any,
    config: ModelConfig,
    *,
    dtype: Any = None,
    files_from: str | Path | None = None,
    tokenizer_from: str | Path | None = None,
    processor: ProcessorConfig | None = None,
    new_weights: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes parameters (NumPy or JAX arrays, sharded or not) as an official checkpoint.

    Leaves are fetched from the devices one by one. With several processes all of them call this;
    the first one writes.

    Args:
      dtype: of the files; None: that of the parameters.
      files_from: a checkpoint to take config.json, processor and tokenizer files from.
      tokenizer_from: a folder to take the tokenizer's files from instead.
      processor: written if `files_from` has none.
      new_weights: the weights are not those of `files_from`; see `write_side_files`.

    Raises:
      InputError: the parameters do not fit the config, the model has gates that are not 0, the
        folder exists, or the disk is full.
    """
    leaves = flatten(params)
    dtype = np.dtype(dtype or native.check_leaves(leaves, table(config)))
    if config.inject_gate:
        config = _without_gates(config, _to_host(leaves.pop(GATE)), str(folder))
    entries = table(config)
    nbytes = native.total_bytes(entries, dtype)
    with new_folder(folder, nbytes, overwrite) as partial:
        gathered = ((path, _to_host(leaf)) for path, leaf in leaves.items())
        if jax.process_index() == 0:
            write_side_files(
                partial, config, dtype, files_from, processor, tokenizer_from, new_weights
            )
            write_official(partial, entries, gathered, dtype, max_shard_bytes)
        else:
            for _ in gathered:  # takes part in the gathering
                pass


def convert(
    input: str | Path,
    output: str | Path,
    format: Format,
    *,
    dtype: Any = None,
    overwrite: bool = False,
    decoder: str | Path | None = None,
    merge_lora: str | Path | None = None,
    progress: bool = True,
) -> None:
    """Rewrites a checkpoint in the layout `format`, with one stacked leaf in memory at a time.

    Args:
      input: a checkpoint of either layout. With `decoder`: a folder with a config.json, or a
        released size, "4b" or "8b"; weights in the folder are ignored. This and `decoder` and
        `merge_lora` may be ids on the Hugging Face hub.
      output: the new folder.
      dtype: of the new weights; None: unchanged. Nothing else changes the weights: official ->
        native -> official gives the same bytes.
      overwrite: replace a checkpoint at `output`, once the new one is whole.
      decoder: a plain Qwen3 checkpoint. The result is a new model with this decoder and a freshly
        initialised encoder and adapters; the tokenizer files are those of the decoder.
      merge_lora: a folder of LoRA adapters (ours or PEFT's) to merge into the kernels.
      progress: show a bar on stderr.

    Raises:
      InputError: the input cannot be read, has gates that are not 0 where `format` is official, or
        the output exists or cannot be written.
      UsageError: one of input and output is inside the other.
    """
    if format not in ("official", "native"):
        raise UsageError(f"format is {format!r}; expected official or native")
    if decoder is None:
        input = hub.folder_of(input)
    else:
        decoder = hub.folder_of(decoder)
        input = input if str(input) in RELEASED else hub.folder_of(input, weights=False)
    for source in (input, decoder):
        if source is not None and _overlap(source, output):
            raise UsageError(f"{output}: input and output must be different folders ({source})")
    files_from = None if decoder is not None and str(input) in RELEASED else input
    config = RELEASED[str(input)] if files_from is None else read_config(input)
    processor = None
    if decoder is None:
        reader = open_checkpoint(input, config)
    else:
        reader, processor = Composed(config, decoder=decoder), ProcessorConfig()
    if merge_lora is not None:
        reader = Merged(reader, merge_lora, config)
    with reader:
        dtype = np.dtype(dtype or reader.dtype)
        if config.inject_gate and format == "official":
            config = _without_gates(config, reader.read(GATE, np.float32), str(output))
        entries = table(config)
        nbytes = native.total_bytes(entries, dtype)
        with (
            new_folder(output, nbytes, overwrite) as partial,
            tqdm(total=nbytes, unit="B", unit_scale=True, disable=not progress) as bar,
        ):
            write_side_files(partial, config, dtype, files_from, processor, decoder)
            leaves = _leaves(reader, entries, dtype, bar)
            if format == "official":
                write_official(partial, entries, leaves, dtype)
            else:
                native.write_native(partial, entries, leaves, dtype)


def _leaves(
    reader: Any, entries: Sequence[Entry], dtype: np.dtype, bar: tqdm
) -> Iterator[tuple[str, np.ndarray]]:
    for entry in entries:
        yield entry.path, reader.read(entry.path, dtype)
        bar.update(native.total_bytes([entry], dtype))


def _without_gates(config: ModelConfig, gates: np.ndarray, where: str) -> ModelConfig:
    """The same model without its gates, which change nothing where they are 0."""
    if np.any(gates):
        raise InputError(
            f"{where}: {GATE} is not 0, and the official layout has no gates (inject_gate); write "
            "a native checkpoint (convert --format native; for a run: checkpoint.export=native)"
        )
    return dataclasses.replace(config, inject_gate=False)


def _overlap(one: str | Path, other: str | Path) -> bool:
    one, other = (as_path(p if is_remote(p) else os.path.realpath(p)) for p in (one, other))
    return one == other or one in other.parents or other in one.parents


def _to_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)
