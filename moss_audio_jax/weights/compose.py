"""Builds a model from parts: encoder and decoder of other checkpoints, fresh parameters, adapters.

`Composed` and `Merged` have the interface of a checkpoint's reader: `convert` reads one leaf after
another on the host, training and generation read every leaf onto its devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moss_audio_jax import hub
from moss_audio_jax.config import (
    DecoderConfig,
    ModelConfig,
    decoder_from_qwen3,
    read_config_json,
)
from moss_audio_jax.errors import InputError
from moss_audio_jax.models import moss_audio
from moss_audio_jax.sharding import of_a_layer
from moss_audio_jax.tree import flatten, unflatten
from moss_audio_jax.weights.adapters import Adapters
from moss_audio_jax.weights.official import OfficialReader, check_float16, qwen3_table, table
from moss_audio_jax.weights.opening import open_checkpoint

_INIT_ALONE = 20_000_000  # values; larger parameters are initialised one by one, to save memory
_ENCODER = "audio_encoder/"


class Composed:
    """A new model whose encoder and decoder may come from other checkpoints.

    Args:
      config: the composed model.
      encoder: a checkpoint of either layout that provides the encoder; None for a fresh one.
      decoder: a plain Qwen3 checkpoint; None for a fresh decoder.
      seed: of the fresh parameters.

    Raises:
      InputError: a folder cannot be read, or the decoder's sizes differ from the config's.
    """

    def __init__(
        self,
        config: ModelConfig,
        encoder: str | Path | None = None,
        decoder: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        self.entries = {entry.path: entry for entry in table(config)}
        self.dtype = np.dtype("float32")
        self._config, self._seed = config, seed
        self._readers: dict[str, Any] = {}  # by path; a parameter without a reader is fresh
        with contextlib.ExitStack() as opened:
            if encoder:
                reader = opened.enter_context(open_checkpoint(encoder))
                paths = [path for path in self.entries if path.startswith(_ENCODER)]
                self._readers |= dict.fromkeys(paths, reader)
            if decoder:
                raw, file = read_config_json(decoder)
                theirs = decoder_from_qwen3(raw, file)
                _check_decoder(theirs, config.decoder, file)
                names = qwen3_table(config, theirs.tie_embeddings)
                reader = opened.enter_context(OfficialReader(hub.folder_of(decoder), names))
                self._readers |= dict.fromkeys(reader.entries, reader)
                self.dtype = reader.dtype
            self._opened = opened.pop_all()

    def __enter__(self) -> Composed:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def read(self, path: str, dtype: Any) -> np.ndarray:
        """A whole leaf on the host."""
        if path in self._readers:
            return self._readers[path].read(path, dtype)
        if math.prod(self.entries[path].shape) > _INIT_ALONE:
            return np.asarray(self._init({path})[path].astype(dtype))
        return np.asarray(self._small[path].astype(dtype))

    def tree(self, shardings: Any) -> Any:
        """All parameters on devices: parts in their stored dtypes, fresh ones in float32.

        Args:
          shardings: a tree of Shardings like the parameters.
        """

        def init() -> Any:
            return moss_audio.init_params(jax.random.key(self._seed), self._config)

        by_path = flatten(shardings)
        leaves = flatten(jax.jit(init, out_shardings=shardings)())
        for path, reader in self._readers.items():
            leaves[path] = reader.load(path, by_path[path])
        return unflatten(leaves)

    @functools.cached_property
    def _small(self) -> dict[str, jax.Array]:
        sizes = {path: math.prod(entry.shape) for path, entry in self.entries.items()}
        small = {path for path, size in sizes.items() if size <= _INIT_ALONE}
        return self._init(small - self._readers.keys())

    def _init(self, paths: set[str]) -> dict[str, jax.Array]:
        @jax.jit  # the compiler drops every parameter that is not returned
        def init(key: jax.Array) -> dict[str, jax.Array]:
            leaves = flatten(moss_audio.init_params(key, self._config, self.dtype.name))
            return {path: leaves[path] for path in paths}

        return init(jax.random.key(self._seed))


class Merged:
    """A checkpoint with LoRA adapters merged into its kernels, one stacked leaf at a time.

    Args:
      reader: of the base checkpoint; it is closed with this one.
      folder: the adapters.
      config: the model's.

    Raises:
      InputError: the adapters cannot be read or do not fit the model.
    """

    def __init__(self, reader: Any, folder: str | Path, config: ModelConfig) -> None:
        self._reader = reader
        self.entries = reader.entries
        try:
            self._adapters = Adapters(folder, config)
        except BaseException:
            reader.__exit__(None, None, None)
            raise

    def __enter__(self) -> Merged:
        return self

    def __exit__(self, *_: object) -> None:
        self._adapters.close()
        self._reader.__exit__(None, None, None)

    @property
    def dtype(self) -> np.dtype:
        return self._reader.dtype

    @property
    def touched(self) -> dict[str, list[bool]]:
        """Of each leaf that the adapters change: which of its layers."""
        modules = self._adapters.modules
        return {path: [each is not None for each in layers] for path, layers in modules.items()}

    def read(self, path: str, dtype: Any) -> np.ndarray:
        """A whole leaf on the host; the sum of kernel and adapters is computed in float32."""
        if path not in self._adapters.modules:
            return self._reader.read(path, dtype)
        kernel = self._reader.read(path, np.float32)
        layers = kernel if kernel.ndim == 3 else kernel[None]
        for number, layer in enumerate(layers):
            if (found := self._adapters.read(path, number)) is not None:
                a, b, scale = found
                layer += a @ b * np.float32(scale)
        merged = np.empty_like(kernel, np.dtype(dtype))
        with np.errstate(over="ignore"):
            np.copyto(merged, kernel, casting="unsafe")
        if merged.dtype == np.float16:
            check_float16(merged, f"{self._adapters.folder}: {path}")
        return merged

    def load(self, path: str, sharding: jax.sharding.Sharding, dtype: Any = None) -> jax.Array:
        """A leaf on devices. Each process merges all of an adapted kernel on its host."""
        if path not in self._adapters.modules:
            return self._reader.load(path, sharding, dtype)
        return _placed(self.read(path, dtype or self.dtype), sharding)

    def layers(
        self, path: str, sharding: jax.sharding.Sharding, dtype: Any = None
    ) -> Iterator[jax.Array]:
        """The layers of a stacked leaf; an adapted one is merged as a whole."""
        if path not in self._adapters.modules:
            yield from self._reader.layers(path, sharding, dtype)
            return
        for layer in self.read(path, dtype or self.dtype):
            yield _placed(layer, of_a_layer(sharding))


def _placed(host: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    leaf = jax.make_array_from_callback(host.shape, sharding, host.__getitem__)
    return leaf.block_until_ready()


def _check_decoder(theirs: DecoderConfig, ours: DecoderConfig, where: str) -> None:
    for field in dataclasses.fields(DecoderConfig):
        found, expected = getattr(theirs, field.name), getattr(ours, field.name)
        if field.name == "max_positions":  # a limit on prompts; no weight depends on it
            continue
        if field.name == "tie_embeddings" and not expected:  # the embedding becomes the head
            continue
        if found != expected:
            raise InputError(f"{where}: {field.name} is {found}; the new model has {expected}")
