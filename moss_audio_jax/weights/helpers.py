"""The parameters of helper losses, in the folder `helpers` of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moss_audio_jax import hub
from moss_audio_jax.config import read_json
from moss_audio_jax.errors import InputError
from moss_audio_jax.weights import safetensors
from moss_audio_jax.weights.folder import new_folder

FOLDER = "helpers"
PREFIX = "helpers/"  # every path of these parameters begins with it


def save_helpers(checkpoint: Path, params: Mapping[str, Any], tags: Sequence[str]) -> None:
    """Writes CHECKPOINT/helpers: model.safetensors and the names of the tags (helpers.json).

    With several processes all of them call this; the first one writes.
    """
    arrays = {path.removeprefix(PREFIX): np.asarray(leaf) for path, leaf in params.items()}
    if jax.process_index():
        return
    nbytes = sum(array.nbytes for array in arrays.values())
    with new_folder(checkpoint / FOLDER, nbytes, overwrite=True) as partial:
        safetensors.write_all(partial, arrays)
        (partial / "helpers.json").write_text(json.dumps({"tags": list(tags)}, indent=1) + "\n")


def load_helpers(checkpoint: str | Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """{path: array} of a checkpoint's helpers, and the names of the tags; ({}, ()) if it has none.

    Raises:
      InputError: the folder is incomplete or broken.
    """
    folder = hub.folder_of(checkpoint) / FOLDER
    if not folder.is_dir():
        return {}, ()
    tags = read_json(folder / "helpers.json").get("tags")
    if not isinstance(tags, list) or any(not isinstance(tag, str) for tag in tags):
        raise InputError(f'{folder / "helpers.json"}: no "tags"; expected a list of names')
    with safetensors.Reader(folder) as reader:
        return {PREFIX + name: reader.read(name) for name in reader.tensors}, tuple(tags)
