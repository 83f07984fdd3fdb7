"""The native checkpoint folder: stacked layers as one Orbax checkpoint.

    config.json, processor_config.json, generation_config.json, tokenizer files
    params/                  a standard Orbax PyTree checkpoint, which plain Orbax restores
    moss_audio_jax.json      version; shape and dtype of each parameter; size and CRC-32 of every
                             file of the arrays; written last

The parameters are written one by one, so that a converter holds one stacked leaf at a time, and
their metadata is joined at the end. The arrays are plain Zarr in chunks of one layer or less, so
that a process reads little beyond its own slices.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from tqdm import tqdm

from moss_audio_jax import bucket_clients, buckets, files
from moss_audio_jax.buckets import absolute, is_remote
from moss_audio_jax.config import ModelConfig, ProcessorConfig, read_json
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.models.decoder import unstack
from moss_audio_jax.runtime import from_all
from moss_audio_jax.tree import flatten, unflatten
from moss_audio_jax.weights.folder import new_folder, wait_for_all, write_json, write_side_files
from moss_audio_jax.weights.official import Entry, table

if TYPE_CHECKING:  # elsewhere Orbax is imported where it is used; official folders do without it
    import orbax.checkpoint as ocp

MARKER = "moss_audio_jax.json"
PARAMS = "params"
_METADATA, _CHECKPOINT = "_METADATA", "_CHECKPOINT_METADATA"  # files of Orbax
VERSION = 2
_ONE_BY_ONE = 1  # the version that wrote an Orbax checkpoint {"value": array} for each parameter

_CHUNK_BYTES = 16 << 20


def save_native(
    folder: str | Path,
    params: Any,
    config: ModelConfig,
    *,
    files_from: str | Path | None = None,
    tokenizer_from: str | Path | None = None,
    processor: ProcessorConfig | None = None,
    new_weights: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes parameters (NumPy or JAX arrays, sharded or not) as a native checkpoint.

    With several processes, all of them call this and see the same folder. For `files_from` and
    the others see `write_side_files`.

    Raises:
      InputError: the parameters do not fit the config, the folder exists, or the disk is full.
    """
    check_place(folder)
    leaves = flatten(params)
    dtype = check_leaves(leaves, table(config))
    nbytes = sum(leaf.nbytes for leaf in leaves.values())
    with new_folder(folder, nbytes, overwrite) as partial:
        if jax.process_index() == 0:
            write_side_files(
                partial, config, dtype, files_from, processor, tokenizer_from, new_weights
            )
        write_native(partial, table(config), leaves.items(), dtype)


def check_place(folder: str | Path) -> None:
    """Raises UsageError if these processes cannot write a native checkpoint there."""
    if is_remote(folder) and jax.process_count() > 1:
        raise UsageError(
            f"{folder}: several processes write a native checkpoint only to a folder that they "
            "share; write an official one, and convert it"
        )


def write_native(
    folder: Path, entries: Sequence[Entry], leaves: Iterable[tuple[str, Any]], dtype: Any
) -> None:
    """Writes leaves, which arrive one by one in any order, into `folder`; the marker last."""
    import orbax.checkpoint as ocp

    stacked = {entry.path: entry.stack is not None for entry in entries}
    share = jax.process_index(), jax.process_count()
    sums: dict[str, list[int]] = {}
    first = jax.process_index() == 0
    metadata: dict[str, Any] = {}
    alone = folder / f".{PARAMS}"  # Orbax writes one parameter here
    for path, leaf in leaves:
        save_args = ocp.SaveArgs(
            chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if stacked[path] else ()
        )
        with _checkpointer() as checkpointer, _named(folder / PARAMS, path):
            tree, args = unflatten({path: leaf}), unflatten({path: save_args})
            checkpointer.save(alone, args=ocp.args.PyTreeSave(tree, save_args=args))
        del leaf, tree  # before the next one is made
        here = _leaf_folder(folder, path)
        if first:
            metadata = _joined(metadata, alone, folder / PARAMS)
            (alone / here.name).rename(here)
            shutil.rmtree(alone)
        wait_for_all("moved")
        sums |= {f"{here.name}/{name}": s for name, s in files.checksums(here, share).items()}
    if first:
        write_json(folder / PARAMS / _METADATA, metadata)
        sums |= files.checksums(folder / PARAMS, names=[_METADATA])
    every = {name: s for part in from_all(sums) for name, s in part.items()}
    if jax.process_index() == 0:
        name = np.dtype(dtype).name
        parameters = {e.path: {"shape": list(e.shape), "dtype": name} for e in entries}
        write_json(
            folder / MARKER,
            {
                "format": "moss_audio_jax",
                "version": VERSION,
                "parameters": parameters,
                "files": dict(sorted(every.items())),
            },
        )


def _joined(metadata: dict[str, Any], alone: Path, whole: Path) -> dict[str, Any]:
    """Orbax's metadata of the parameters so far and of the one in `alone`."""
    if not metadata:
        whole.mkdir()
        shutil.copyfile(alone / _CHECKPOINT, whole / _CHECKPOINT)
    found = read_json(alone / _METADATA)
    for leaf in found["tree_metadata"].values():  # the devices are chosen when it is restored
        leaf["value_metadata"]["value_type"] = "np.ndarray"
    known = metadata.get("tree_metadata", {})
    return found | {"tree_metadata": known | found["tree_metadata"]}


class NativeReader:
    """A native checkpoint, checked against the model that it should hold; reads leaf by leaf.

    Raises:
      InputError: the folder is incomplete, or has another version or model. When a parameter is
        read: its files are damaged.
    """

    def __init__(self, folder: str | Path, entries: Sequence[Entry]):
        self.folder = absolute(folder)
        self.entries = {entry.path: entry for entry in entries}
        marker = self.folder / MARKER
        if not marker.is_file():
            raise InputError(f"{folder}: incomplete: no {MARKER}; write the checkpoint again")
        raw = read_json(marker)
        self._version = raw.get("version")
        known = self._version in (_ONE_BY_ONE, VERSION)
        if not known or not isinstance(raw.get("parameters"), dict):
            raise InputError(f"{marker}: version {self._version!r}; expected {VERSION}")
        try:
            leaves = {
                path: jax.ShapeDtypeStruct(tuple(leaf["shape"]), np.dtype(leaf["dtype"]))
                for path, leaf in raw["parameters"].items()
            }
            self._sums: dict[str, dict[str, list[int]]] = {}
            for name, (size, crc) in raw.get("files", {}).items():
                self._sums.setdefault(name.partition("/")[0], {})[name] = [size, crc]
        except (TypeError, ValueError, KeyError, AttributeError):
            raise InputError(f"{marker}: damaged; write the checkpoint again") from None
        if "files" not in raw:
            warnings.warn(
                f"{folder}: an older version wrote it, without checksums: damage would "
                "not be noticed",
                stacklevel=2,
            )
        self.dtype = check_leaves(leaves, entries, str(marker))
        for path in leaves:
            if not is_remote(self.folder) and not _leaf_folder(self.folder, path).is_dir():
                raise InputError(f"{_leaf_folder(self.folder, path)}: incomplete: no such folder")
        if fault := self._fault(_METADATA):
            raise InputError(f"{self.folder / PARAMS}: {fault}; write the checkpoint again")

    def __enter__(self) -> NativeReader:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, path: str, dtype: Any = None) -> np.ndarray:
        """A whole leaf."""
        return self._restore(path, dtype)

    def load(self, path: str, sharding: jax.sharding.Sharding, dtype: Any = None) -> jax.Array:
        """A leaf on devices; each process reads the chunks that its own devices need."""
        return self._restore(path, dtype, sharding)

    def layers(
        self, path: str, sharding: jax.sharding.Sharding, dtype: Any = None
    ) -> Iterator[jax.Array]:
        """The layers of a stacked leaf, which is read as a whole."""
        yield from unstack(self.load(path, sharding, dtype))

    @functools.cached_property
    def _listed(self) -> dict[str, list[Any]]:
        return buckets.sums(self.folder / PARAMS)

    def _fault(self, name: str) -> str | None:
        """What is wrong with the files of a leaf, which are looked at once."""
        expected = self._sums.pop(name, {})
        if not is_remote(self.folder):
            share = jax.process_index(), jax.process_count()  # each looks at some of the files
            return files.damage(self.folder / PARAMS, expected, share)
        for file, (size, _) in expected.items():  # a bucket guards its bytes by its own checksums
            if self._listed.get(file, [None])[0] != size:
                return f"{file} is missing or not of {size} bytes"
        return None

    def _restore(self, path: str, dtype: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
        import orbax.checkpoint as ocp

        dtype, shape = np.dtype(dtype or self.dtype), self.entries[path].shape
        if is_remote(self.folder):
            return self._fetch(path, dtype, shape, sharding)
        args = ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
        if sharding is not None:
            args = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape, dtype=dtype)
        here = _leaf_folder(self.folder, path)
        if fault := self._fault(here.name):
            raise InputError(
                f"{self.folder / PARAMS}: parameter {path}: {fault}; write the checkpoint again"
            )
        source, name = self.folder / PARAMS, path
        if self._version == _ONE_BY_ONE:
            source, name = here, "value"
        with _checkpointer() as checkpointer, _named(self.folder / PARAMS, path):
            tree = checkpointer.restore(
                source,
                args=ocp.args.PyTreeRestore(
                    item=unflatten({name: 0}),
                    restore_args=unflatten({name: args}),
                    partial_restore=True,
                ),
            )
        value = flatten(tree)[name]
        if value.shape != shape:
            raise InputError(
                f"{_leaf_folder(self.folder, path)}: shape {list(value.shape)}; {MARKER} says "
                f"{list(shape)}"
            )
        return value

    def _fetch(self, path: str, dtype: np.dtype, shape: tuple[int, ...], sharding: Any) -> Any:
        """A leaf from a bucket. Orbax would look at forty other objects for each."""
        import tensorstore as ts
        from jax.experimental.array_serialization.serialization import run_deserialization

        here = _leaf_folder(self.folder, path)
        if fault := self._fault(here.name):
            raise InputError(f"{here}: {fault}; write the checkpoint again")
        place = here / "value" if self._version == _ONE_BY_ONE else here
        spec = {"driver": "zarr", "kvstore": bucket_clients.kvstore(f"{place}/")}
        spec |= {"context": {"cache_pool": {}}}  # of its own: nothing is read twice
        with _named(self.folder / PARAMS, path):
            if sharding is None:
                return ts.open(spec, open=True).result().read().result().astype(dtype)
            return run_deserialization([sharding], [spec], [shape], [dtype])[0]


def load_tree(
    reader: Any,
    shardings: Any = None,
    dtype: Any = None,
    then: Callable[[str, jax.Array], Any] = lambda path, leaf: leaf,
    apart: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Every leaf of a NativeReader or OfficialReader, leaf by leaf, as jax.Arrays.

    Args:
      shardings: a tree like the parameters, one Sharding for all, or None (the first device).
      dtype: cast to it while reading; None: as stored.
      then: (path, leaf) -> what replaces the leaf, called before the next one is read.
      apart: of the paths that begin like this, each leaf becomes a tuple of its layers, and `then`
        gets layer by layer.
      progress: show a bar on stderr, if loading takes more than a second.
    """
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        by_path = dict.fromkeys(reader.entries, shardings)
    else:
        by_path = flatten(shardings)
    leaves: dict[str, Any] = dict.fromkeys(reader.entries)  # their order stays

    def is_apart(path: str) -> bool:
        return apart is not None and path.startswith(apart)

    total = total_bytes(reader.entries.values(), dtype or reader.dtype)
    with tqdm(
        desc="loading", total=total, unit="B", unit_scale=True, delay=1, disable=not progress
    ) as bar:

        def taken(path: str, leaf: jax.Array) -> Any:
            bar.update(leaf.nbytes)
            return then(path, leaf)

        def at_once(path: str) -> int:
            values = math.prod(reader.entries[path].shape)
            return values // reader.entries[path].stack if is_apart(path) else values

        # What is large first: it is in memory twice or more while it is taken.
        for path in sorted(reader.entries, key=at_once, reverse=True):
            if is_apart(path):
                layers = reader.layers(path, by_path[path], dtype)
                leaves[path] = tuple(taken(path, layer) for layer in layers)
            else:
                leaves[path] = taken(path, reader.load(path, by_path[path], dtype))
    return unflatten(leaves)


def check_leaves(
    leaves: Mapping[str, Any], entries: Sequence[Entry], where: str = "parameters"
) -> np.dtype:
    """The dtype of all leaves. Raises InputError unless they are exactly those of `entries`."""
    shapes = {entry.path: entry.shape for entry in entries}
    for path, shape in shapes.items():
        if path not in leaves:
            raise InputError(f"{where}: {path} is missing")
        if tuple(leaves[path].shape) != shape:
            raise InputError(
                f"{where}: {path} has shape {files.quoted(list(leaves[path].shape))}; "
                f"config.json requires {list(shape)}"
            )
    if extra := sorted(leaves.keys() - shapes.keys()):
        raise InputError(
            f"{where}: unexpected {files.brief(extra[0])}; config.json has no place for it"
        )
    dtypes = {np.dtype(leaf.dtype): path for path, leaf in leaves.items()}
    if len(dtypes) > 1:
        (one, path), (other, second) = list(dtypes.items())[:2]
        raise InputError(f"{where}: mixed dtypes: {path} is {one}, {second} is {other}")
    return next(iter(dtypes))


def total_bytes(entries: Iterable[Entry], dtype: Any) -> int:
    return sum(math.prod(entry.shape) for entry in entries) * np.dtype(dtype).itemsize


def _leaf_folder(folder: Path, path: str) -> Path:
    return folder / PARAMS / path.replace("/", ".")


@contextlib.contextmanager
def _checkpointer() -> Iterator[ocp.Checkpointer]:
    import orbax.checkpoint as ocp

    # Uncompressed: bfloat16 weights do not shrink. Without OCDBT, saving takes a third less memory.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    log = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return (
            "Skipping merge of OCDBT" not in record.getMessage()
        )  # OCDBT is switched off on purpose

    log.addFilter(keep)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            yield checkpointer
    finally:
        log.removeFilter(keep)


@contextlib.contextmanager
def _named(folder: Path, path: str) -> Iterator[None]:
    """Turns an error of Orbax or TensorStore into one line that names the parameter."""
    try:
        yield
    except Exception as error:
        if files.disk_is_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{folder}: parameter {path}: {lines[0][:300]}") from error
