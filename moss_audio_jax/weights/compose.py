"""A model from parts: encoder and decoder of other checkpoints, and fresh parameters.

This is the one place where a model is grafted: `convert --decoder` reads from here leaf by leaf on
the host, and training starts from here with every leaf on its devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moss_audio_jax.config import (
    DecoderConfig,
    ModelConfig,
    decoder_from_qwen3,
    read_config_json,
)
from moss_audio_jax.errors import InputError
from moss_audio_jax.models import moss_audio
from moss_audio_jax.tree import flatten, unflatten
from moss_audio_jax.weights.official import OfficialReader, qwen3_table, table
from moss_audio_jax.weights.opening import open_checkpoint

_INIT_ALONE = 20_000_000  # larger parameters are initialised one by one, for the memory it takes
_ENCODER = "audio_encoder/"


class Composed:
    """Reads like a checkpoint's reader.

    Args:
      config: the composed model.
      encoder: a checkpoint of either layout, whose encoder is taken; None for a fresh one.
      decoder: a plain Qwen3 checkpoint; None for a fresh decoder.
      seed: of the fresh parameters.

    Raises:
      InputError: a folder that cannot be read, or a decoder of other sizes than the config's.
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
        self._readers: dict[str, Any] = {}  # path -> what has it; the others are fresh
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
                reader = opened.enter_context(OfficialReader(decoder, names))
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
        """All parameters on devices: parts in the dtypes as stored, fresh ones in float32.

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
        @jax.jit  # the compiler leaves out what is not asked for, the decoder above all
        def init(key: jax.Array) -> dict[str, jax.Array]:
            leaves = flatten(moss_audio.init_params(key, self._config, self.dtype.name))
            return {path: leaves[path] for path in paths}

        return init(jax.random.key(self._seed))


def _check_decoder(theirs: DecoderConfig, ours: DecoderConfig, where: str) -> None:
    for field in dataclasses.fields(DecoderConfig):
        found, expected = getattr(theirs, field.name), getattr(ours, field.name)
        if field.name == "max_positions":  # a limit on prompts; no weight depends on it
            continue
        if field.name == "tie_embeddings" and not expected:  # the embedding becomes the head
            continue
        if found != expected:
            raise InputError(f"{where}: {field.name} is {found}; the new model has {expected}")
