"""Safetensors files: a lazy reader and a sharded writer.

A file is an 8-byte little-endian header length, a JSON header {name: dtype, shape, data_offsets},
and the tensors' bytes. The reader parses headers and then reads the byte ranges that the
caller needs. It uses no memory map, so resident memory is only what the caller holds. The writer
takes tensors in any order and writes the header last, so that an interrupted file never loads.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import math
import os
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from moss_audio_jax import buckets
from moss_audio_jax.buckets import as_path, is_remote
from moss_audio_jax.config import read_json
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import brief, open_regular, parse_json, quoted, reason, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_QUANTIZED = ("I8", "U8", "I16", "U16", "I32", "U32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")
_MAX_HEADER = 100_000_000
_MAX_AXES, _MAX_SIZE = 8, 1 << 48
_SHARDS = "model-*-of-*.safetensors"
_MAX_SHARD = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The place of a tensor: file, dtype, shape, and first byte in the file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class Reader:
    """The tensors of a .safetensors file, or of a folder with one file or an index and shards.

    Threads may share a Reader. `tensors` maps names to Tensors. If a folder has both, the single
    file is read, as in transformers, with a warning.

    Raises:
      InputError: there are no weights or only pickle files, a file is broken or truncated, a tensor
        is repeated or missing from its shard, or a dtype is not bfloat16, float16 or float32.
    """

    def __init__(self, path: str | Path):
        path = as_path(path)
        self.path = path
        self.tensors: dict[str, Tensor] = {}
        self._files: dict[Path, BinaryIO] = {}
        self._lock = threading.Lock()
        if not (path.exists() if is_remote(path) else os.path.lexists(path)):
            raise InputError(f"{shown(path)}: no such file or folder")
        if not path.is_dir():
            self.tensors = _read_header(path)
        elif (path / SINGLE).exists():
            self.tensors = _read_header(path / SINGLE)
            if (path / INDEX).exists():
                warnings.warn(
                    f"{path}: holds both {SINGLE} and {INDEX}; {SINGLE} is read, as transformers "
                    "does; remove the one that is out of date",
                    stacklevel=2,
                )
        elif (path / INDEX).exists():
            self.tensors = _read_shards(path)
        else:
            raise InputError(_no_weights(path))

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or a part of it; only the bytes of the first axis' slice are read.

        Args:
          name: a key of `tensors`.
          index: slices (step 1) of the leading axes.
        """
        tensor = self.tensors[name]
        start, stop, _ = index[0].indices(tensor.shape[0]) if index else (0, None, 1)
        shape = ((stop - start), *tensor.shape[1:]) if index else tensor.shape
        row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        # Read as plain bytes, because extension dtypes have no writable buffer in NumPy.
        raw = np.empty(math.prod(shape) * tensor.dtype.itemsize, np.uint8)
        offset = tensor.offset + start * row
        if is_remote(tensor.file):
            buckets.read_into(tensor.file, memoryview(raw), offset)
        else:
            _read_into(self._open(tensor.file), raw, offset, tensor.file, name)
        return raw.view(tensor.dtype).reshape(shape)[(slice(None), *index[1:]) if index else ...]

    def _open(self, file: Path) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = open_regular(file, "a safetensors file")
            return self._files[file].fileno()


class Writer:
    """Writes tensors of known shape into a folder, in any order, from any number of threads.

    Args:
      folder: an existing folder without weights.
      tensors: name -> (shape, dtype). Their order is their order in the files.
      max_shard_bytes: the largest file, unless a single tensor is larger.

    Leaving the `with` block normally finishes the files (ValueError if a tensor is incomplete);
    after an exception the files stay such that no reader accepts them.
    """

    def __init__(
        self,
        folder: str | Path,
        tensors: Mapping[str, tuple[tuple[int, ...], Any]],
        max_shard_bytes: int = _MAX_SHARD,
    ):
        self.folder = Path(folder)
        self._missing: dict[str, int] = {}
        self._places: dict[str, tuple[int, int, np.dtype]] = {}  # name -> file, offset, dtype
        self._lock = threading.Lock()
        shards: list[dict[str, tuple[tuple[int, ...], np.dtype]]] = [{}]
        size = 0
        for name, (shape, dtype) in tensors.items():
            dtype = np.dtype(dtype)
            self._missing[name] = nbytes = math.prod(shape) * dtype.itemsize
            if shards[-1] and size + nbytes > max_shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = (tuple(shape), dtype)
            size += nbytes
        self.total_bytes = sum(self._missing.values())

        count = len(shards)
        self._shards = []  # file name, descriptor, header bytes, tensor names
        for i, shard in enumerate(shards, 1):
            file = SINGLE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
            header = _header(shard)
            fd = os.open(self.folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._shards.append((file, fd, header, list(shard)))
            offset = len(header)
            for name, (shape, dtype) in shard.items():
                self._places[name] = (fd, offset, dtype)
                offset += math.prod(shape) * dtype.itemsize

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for _, fd, _, _ in self._shards:
                os.close(fd)

    def write(self, name: str, rows: np.ndarray, start: int = 0) -> None:
        """Writes a tensor, or the part of it that begins with row `start` of its first axis."""
        fd, offset, dtype = self._places[name]
        if rows.dtype != dtype:
            raise ValueError(f"{name}: {rows.dtype} given, {dtype} announced")
        rows = np.ascontiguousarray(rows)
        row_bytes = rows.nbytes // rows.shape[0] if start else 0
        buffer = memoryview(rows.reshape(-1).view(np.uint8))
        position = offset + start * row_bytes
        while buffer:
            written = os.pwrite(fd, buffer, position)
            position += written
            buffer = buffer[written:]
        with self._lock:
            self._missing[name] -= rows.nbytes

    def _finish(self) -> None:
        if unfinished := [name for name, missing in self._missing.items() if missing]:
            raise ValueError(f"{self.folder}: tensor {unfinished[0]} was not written completely")
        for _, fd, header, _ in self._shards:
            if os.pwrite(fd, header, 0) != len(header):
                raise OSError(f"{self.folder}: header was not written completely")
            os.fsync(fd)
        if len(self._shards) > 1:
            weight_map = {name: file for file, _, _, names in self._shards for name in names}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.folder / INDEX).write_text(text, encoding="utf-8")


def write_all(
    folder: str | Path, arrays: Mapping[str, np.ndarray], max_shard_bytes: int = _MAX_SHARD
) -> None:
    """Writes arrays that are in memory; see `Writer`."""
    shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    with Writer(folder, shapes, max_shard_bytes) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


def _header(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    """Length and JSON of a file's header, padded so that the data are 8-byte aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _no_weights(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    shards = [name for name in names if fnmatch.fnmatch(name, _SHARDS)]
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickles and not shards:
        return (
            f"{folder / pickles[0]}: pickle files are not read (they can run code); convert the "
            "weights to safetensors first"
        )
    more = f", without which {shards[0]} cannot be read" if shards else ""
    return f"{folder}: no weights; expected {SINGLE} or {INDEX}{more}"


def _exists(file: Path) -> bool:
    return file.exists() if is_remote(file) else os.path.exists(file)  # also if it is too long


def _read_shards(folder: Path) -> dict[str, Tensor]:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map is missing; expected tensor names and their files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(
                f"{index}: shard {quoted(file)} of {brief(name)} is not a plain file name"
            )
    tensors: dict[str, Tensor] = {}
    files = set(weight_map.values())
    for file in sorted(files):
        if not _exists(folder / file):
            raise InputError(f"{folder}: no such file {quoted(file)}, though {INDEX} names it")
        for name, tensor in _read_header(folder / file).items():
            if name in tensors:
                raise InputError(
                    f"{folder}: tensor {brief(name)} is in both {tensors[name].file.name} and "
                    f"{shown(file)}"
                )
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise InputError(
                f"{folder / file}: no tensor {brief(name)}, though {INDEX} puts it there"
            )
    if unlisted := tensors.keys() - weight_map.keys():
        name = min(unlisted)
        raise InputError(
            f"{index}: tensor {brief(name)} of {tensors[name].file.name} is not listed"
        )
    if more := sorted({shard.name for shard in folder.glob(_SHARDS)} - files):
        warnings.warn(
            f"{folder / more[0]}: is not in {INDEX} and is not read"
            + (f" (nor {len(more) - 1} more)" if len(more) > 1 else ""),
            stacklevel=3,
        )
    return tensors


def _read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file; InputError unless they fill its data exactly."""
    with open_regular(file, "a safetensors file") as f:
        try:
            size = f.seek(0, os.SEEK_END)
            f.seek(0)
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or not 2 <= length <= _MAX_HEADER:
                raise InputError(f"{file}: not a safetensors file, or an unfinished one")
            if length > size - 8:
                raise InputError(
                    f"{file}: truncated: the header alone takes {length + 8:,} bytes, the file has "
                    f"{size:,}; copy it again"
                )
            text = f.read(length)
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({reason(error)})") from None
    header = parse_json(text, f"{file}: broken header", functools.partial(_unique_keys, file))
    if not isinstance(header, dict):
        raise InputError(f"{file}: broken header (expected an object)")
    header.pop("__metadata__", None)

    tensors = {}
    spans = []
    for name, entry in header.items():
        where = f"{file}: tensor {brief(name)}"
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= _MAX_AXES
            whole &= all(type(n) is int and 0 <= n < _MAX_SIZE for n in (*shape, start, end))
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise InputError(f"{where}: broken header entry {quoted(entry)}")
        if dtype not in DTYPES:
            quantized = dtype in _QUANTIZED
            raise InputError(
                f"{where} has dtype {brief(dtype, 20)}; expected BF16, F16 or F32"
                + (
                    "; quantised weights are not read: take the unquantised checkpoint"
                    if quantized
                    else ""
                )
            )
        expected = math.prod(shape) * DTYPES[dtype].itemsize
        if end - start != expected:
            raise InputError(
                f"{where}: offsets {start}..{end} do not hold {expected:,} bytes ({dtype} {shape})"
            )
        spans.append((start, end, name))
        tensors[name] = Tensor(file, DTYPES[dtype], tuple(shape), 8 + length + start)
    position = 0
    for start, end, name in sorted(spans):
        if start != position:
            fault = (
                "overlaps the tensor before it" if start < position else "leaves a gap before it"
            )
            raise InputError(f"{file}: tensor {brief(name)}: its data {fault} (offset {start})")
        if 8 + length + end > size:
            raise InputError(
                f"{file}: truncated: tensor {brief(name)} ends at byte {8 + length + end:,}, the "
                f"file has {size:,}; copy it again"
            )
        position = end
    if 8 + length + position != size:
        raise InputError(f"{file}: {size - 8 - length - position:,} bytes after the last tensor")
    return tensors


def _unique_keys(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in pairs:
        if key in keys:
            raise InputError(f"{file}: broken header ({brief(key)} is repeated)")
        keys[key] = value
    return keys


def _read_into(fd: int, buffer: np.ndarray, offset: int, file: Path, name: str) -> None:
    view = memoryview(buffer)
    while view:
        try:
            count = os.preadv(fd, [view], offset)
        except OSError as error:
            raise InputError(f"{file}: tensor {name}: cannot be read ({reason(error)})") from None
        if count == 0:
            raise InputError(f"{file}: the file ended while tensor {name} was read")
        view = view[count:]
        offset += count
