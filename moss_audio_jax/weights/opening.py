"""Opens a checkpoint folder of either layout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from moss_audio_jax import hub
from moss_audio_jax.buckets import as_path
from moss_audio_jax.config import ModelConfig, from_official, read_config_json
from moss_audio_jax.errors import InputError
from moss_audio_jax.weights import native, safetensors
from moss_audio_jax.weights.native import NativeReader
from moss_audio_jax.weights.official import OfficialReader, table

Format = Literal["official", "native"]


def folder_format(folder: str | Path) -> Format:
    """The layout of a checkpoint folder.

    Raises:
      InputError: no such folder, no weights in it, or weights in both layouts.
    """
    folder = as_path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not ((folder / native.MARKER).exists() or (folder / native.PARAMS).is_dir()):
        safetensors.Reader(folder).close()  # raises if there are no weights
        return "official"
    if (folder / safetensors.SINGLE).exists() or (folder / safetensors.INDEX).exists():
        raise InputError(f"{folder}: holds both native and official weights; keep one of them")
    return "native"


def open_checkpoint(
    folder: str | Path, config: ModelConfig | None = None
) -> OfficialReader | NativeReader:
    """A reader of either layout, checked against `config` (default: the folder's config.json).

    The id of a model on the hub is downloaded.
    """
    folder = hub.folder_of(folder)
    if config is None:
        config = read_config(folder)
    reader = {"official": OfficialReader, "native": NativeReader}[folder_format(folder)]
    return reader(folder, table(config))


def read_config(folder: str | Path) -> ModelConfig:
    return from_official(*read_config_json(folder))
