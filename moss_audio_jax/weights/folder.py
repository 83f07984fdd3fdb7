"""Writes checkpoint folders completely or not at all, and the files beside the weights."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moss_audio_jax import buckets, files, hub
from moss_audio_jax.buckets import as_path, is_remote
from moss_audio_jax.config import (
    ModelConfig,
    ProcessorConfig,
    from_official,
    processor_to_official,
    read_json,
    to_official,
)
from moss_audio_jax.errors import InputError

_EXISTS = "{}: already exists; choose another folder or overwrite it"
# Each makes a folder one of ours; a reader asks for it first.
_OURS = ("config.json", "adapter_config.json", "helpers.json")

# A checkpoint's files besides weights and config.json: those of the model and of the tokenizer.
MODEL_FILES = ("generation_config.json", "processor_config.json", "preprocessor_config.json")
EXTRA_FILES = (
    *MODEL_FILES,
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "chat_template.*",
)
# What else a checkpoint's folder may hold, whoever made it.
_PARTS = (
    *("*.safetensors", "*.json", "params", "helpers"),
    *("*.md", "LICENSE*", "*.py", ".gitattributes", ".cache", ".DS_Store"),
    buckets.UNFINISHED,
)


@contextlib.contextmanager
def new_folder(folder: str | Path, nbytes: int, overwrite: bool = False) -> Iterator[Path]:
    """Makes a checkpoint folder that is either complete or does not exist.

    Yields a sibling folder to write into. It takes the name `folder` when the block ends, and is
    removed when the block raises. With several processes all of them enter and leave together;
    the first one makes and renames the folder.

    What goes to a bucket is written to this machine's disk ($TMPDIR) and then copied there by the
    first process, the files that make it a checkpoint (config.json or its like) last.

    Args:
      nbytes: the size of what will be written, so that a disk that is too small is noticed at once.
      overwrite: replace an existing checkpoint, once the new one is complete.

    Raises:
      InputError: the folder exists, is not a checkpoint, or the disk is full.
      UsageError: another process is writing it.
    """
    if is_remote(folder):
        with _new_in_bucket(as_path(folder), nbytes, overwrite) as partial:
            yield partial
        return
    folder = Path(os.path.realpath(folder))  # through links, which stay
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    first = jax.process_index() == 0
    with files.Lock(folder.parent, "a writer", folder.name) if first else contextlib.nullcontext():
        try:
            if first and old.exists() and not folder.exists():  # killed between two renames
                old.rename(folder)
            if folder.exists():
                if not overwrite:
                    raise InputError(_EXISTS.format(folder))
                check_replaceable(folder)
            wait_for_all("looked")
            if first:
                if partial.exists():  # left by a process that was killed
                    shutil.rmtree(partial)
                partial.mkdir()
                if shutil.disk_usage(partial).free < nbytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            wait_for_all("made")
            yield partial
            wait_for_all("written")
            if first:
                if folder.exists():
                    shutil.rmtree(old, ignore_errors=True)
                    folder.rename(old)
                partial.rename(folder)
                shutil.rmtree(old, ignore_errors=True)
            wait_for_all("renamed")
        except BaseException as error:
            if first:
                if old.exists() and not folder.exists():
                    old.rename(folder)
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise files.not_written(folder, error, nbytes) from error
            raise


@contextlib.contextmanager
def _new_in_bucket(folder: Any, nbytes: int, overwrite: bool) -> Iterator[Path]:
    """`new_folder` in a bucket, which cannot rename."""
    first = jax.process_index() == 0
    with (
        tempfile.TemporaryDirectory(prefix="checkpoint-") as staged,
        files.Lock(folder.parent, "a writer", folder.name) if first else contextlib.nullcontext(),
    ):
        if first and folder.exists():
            begun = (folder / buckets.UNFINISHED).exists()
            if begun and not any((folder / name).exists() for name in _OURS):
                buckets.delete(folder)  # left by a process that was killed
            elif not overwrite:
                raise InputError(_EXISTS.format(folder))
            else:
                check_replaceable(folder)
        partial = Path(staged) / folder.name
        try:
            partial.mkdir()
            if first and shutil.disk_usage(partial).free < nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield partial
        except OSError as error:
            raise files.not_written(partial, error, nbytes) from error
        wait_for_all("written")
        if first:
            buckets.delete(folder, _OURS)
            buckets.upload(partial, folder, _OURS)
        wait_for_all("copied")


def check_replaceable(folder: Path) -> None:
    """Raises InputError if a folder holds what no checkpoint has: it would be lost with it."""
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a checkpoint; it is not overwritten")
    names = sorted(entry.name for entry in folder.iterdir())
    known = (*_OURS, *EXTRA_FILES, *_PARTS)
    for name in names:
        if not any(fnmatch.fnmatch(name, pattern) for pattern in known):
            raise InputError(
                f"{folder}: is not a checkpoint, for it holds {files.shown(name)}; it is not "
                "overwritten"
            )
    if names and not any(name in names for name in (*_OURS, buckets.UNFINISHED)):
        raise InputError(f"{folder}: is not a checkpoint; it is not overwritten")


def write_side_files(
    folder: Path,
    config: ModelConfig,
    dtype: Any,
    files_from: str | Path | None = None,
    processor: ProcessorConfig | None = None,
    tokenizer_from: str | Path | None = None,
    new_weights: bool = False,
) -> None:
    """Writes config.json and the files of EXTRA_FILES into a new checkpoint.

    Args:
      folder: the new checkpoint.
      config: the model's.
      dtype: of the weights.
      files_from: a checkpoint folder to copy from. Its config.json is copied unchanged if it
        describes the same model and dtype.
      processor: written as processor_config.json unless one was copied.
      tokenizer_from: the folder of the tokenizer's files; default `files_from`.
      new_weights: the weights are not those of `files_from`, so the mark "random_weights" of its
        config.json is dropped.
    """
    if files_from is not None:
        files_from = hub.folder_of(files_from, weights=False)
    if tokenizer_from is not None:
        copy_files(tokenizer_from, folder)
    raw, verbatim = to_official(config, np.dtype(dtype).name), False
    if files_from is not None:
        copy_files(files_from, folder, EXTRA_FILES if tokenizer_from is None else MODEL_FILES)
        source = files_from / "config.json"
        if source.is_file():
            theirs = read_json(source)
            if _describes(theirs, config):
                verbatim = not _set_dtype(theirs, np.dtype(dtype).name)
                if new_weights and theirs.pop("random_weights", None):
                    verbatim = False
                raw = theirs
    if verbatim:
        _copy_file(source, folder / "config.json")
    else:
        write_json(folder / "config.json", raw)
    if processor is not None and not (folder / "processor_config.json").exists():
        write_json(folder / "processor_config.json", processor_to_official(processor))


def copy_files(
    source: str | Path, folder: str | Path, patterns: Sequence[str] = EXTRA_FILES
) -> None:
    """Copies the files of a checkpoint or tokenizer folder that match `patterns`."""
    for pattern in patterns:
        for file in sorted(as_path(source).glob(pattern)):
            _copy_file(file, Path(folder) / file.name)


def _copy_file(source: Path, target: Path) -> None:
    with files.open_regular(source) as found, open(target, "wb") as copy:
        shutil.copyfileobj(found, copy)


def _describes(raw: dict[str, Any], config: ModelConfig) -> bool:
    """Whether a config.json describes this model; its encoder attention does not count."""
    if raw.get("model_type") != "moss_audio":  # files_from may be of another model
        return False
    plain = config.with_attention("chunked")
    try:
        return to_official(from_official(raw)) == to_official(plain)
    except InputError:
        return False


def _set_dtype(raw: dict[str, Any], dtype: str) -> bool:
    """Replaces every dtype that a config.json names by `dtype`; True if that changed anything."""
    changed = False
    for part in (raw, raw["audio_config"], raw["language_config"]):
        for key in ("dtype", "torch_dtype"):
            if key in part and part[key] != dtype:
                part[key] = dtype
                changed = True
    return changed


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def wait_for_all(step: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"checkpoint {step}")
