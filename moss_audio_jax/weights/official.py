"""Official tensors and native parameters: one table, used to read and to write.

Native parameters are a nested dict with official module names. Layers are stacked on axis 0 and
kernels are [in, out]; an official tensor is one layer, [out, in]. Every rearrangement in the table
is one rule: native layer = official.reshape(split).T, reshaped. Only the embedding stays unchanged.

    linear     [out, in]                      -> [in, out]
    conv       [C, in, 3 freq, 3 time]        -> [3 time, 3 freq, in, C]
    stem_proj  [D, C * F], columns c * F + f  -> [F * C, D], rows f * C + c
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moss_audio_jax.config import ModelConfig
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import brief
from moss_audio_jax.sharding import of_a_layer
from moss_audio_jax.tree import unflatten
from moss_audio_jax.weights import safetensors

Index = tuple[slice, ...]

GATE = "mergers/inject_gate"  # not among the released models' (ModelConfig.inject_gate)
_DROPPED = {"audio_encoder.embed_positions.inv_timescales"}  # a buffer; computed here
_BLOCK_BYTES = 8 << 20  # bytes that one thread holds at a time
_THREADS = 4
_ALIGNMENT = 64
_TILE = 128  # rows that are transposed together; the fastest of the measured sizes


@dataclasses.dataclass(frozen=True)
class Entry:
    """One native leaf and the official tensors that it is made of."""

    path: str  # 'language_model/layers/mlp/up_proj/kernel'
    name: str  # 'language_model.layers.{n}.mlp.up_proj.weight'
    tensor: tuple[int, ...]  # shape of one official tensor
    stack: int | None = None  # layers on axis 0 of the leaf; None: a single tensor
    split: tuple[int, ...] | None = None  # the tensor is reshaped to it, then reversed
    transposed: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the native leaf."""
        layer = self.tensor[::-1] if self.transposed else self.tensor
        return layer if self.stack is None else (self.stack, *layer)

    @property
    def names(self) -> list[str]:
        """The official names, in order of layers."""
        return [self.name.format(n=n) for n in range(1 if self.stack is None else self.stack)]

    def to_native(self, tensor: np.ndarray) -> np.ndarray:
        """One official tensor as the native layer (a view if possible)."""
        if not self.transposed:
            return tensor
        return tensor.reshape(self.split or tensor.shape).T.reshape(self.tensor[::-1])

    def to_official(self, layer: np.ndarray) -> np.ndarray:
        """The inverse of `to_native`."""
        if not self.transposed:
            return layer
        return layer.reshape((self.split or self.tensor)[::-1]).T.reshape(self.tensor)


def table(config: ModelConfig) -> list[Entry]:
    """Every parameter of the model, encoder first."""
    enc, dec = config.encoder, config.decoder
    width, mid, channels, freq = enc.d_model, enc.ffn_dim, enc.conv_channels, enc.mel_bins // 8
    entries: list[Entry] = []

    def add(path: str, *tensor: int, stack: int | None = None, **how: Any) -> None:
        entries.append(Entry(path, _official_name(path), tensor, stack, **how))

    encoder, layers = "audio_encoder", "audio_encoder/layers"
    for i, in_channels in enumerate((1, channels, channels), 1):
        add(f"{encoder}/stem/conv{i}/kernel", channels, in_channels, 3, 3)
        add(f"{encoder}/stem/conv{i}/bias", channels)
    split = (width, channels, freq)
    add(f"{encoder}/stem/stem_proj/kernel", width, channels * freq, split=split)
    add(f"{encoder}/stem/stem_proj/bias", width)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        add(f"{layers}/self_attn/{name}/kernel", width, width, stack=enc.layers)
        if name != "k_proj":
            add(f"{layers}/self_attn/{name}/bias", width, stack=enc.layers)
    for name, (rows, columns) in {"fc1": (mid, width), "fc2": (width, mid)}.items():
        add(f"{layers}/{name}/kernel", rows, columns, stack=enc.layers)
        add(f"{layers}/{name}/bias", rows, stack=enc.layers)
    for name in ("self_attn_layer_norm", "final_layer_norm"):
        add(f"{layers}/{name}/scale", width, stack=enc.layers)
        add(f"{layers}/{name}/bias", width, stack=enc.layers)
    add(f"{encoder}/layer_norm/scale", width)
    add(f"{encoder}/layer_norm/bias", width)
    if enc.output_dim != width:
        add(f"{encoder}/out_proj/kernel", enc.output_dim, width)

    adapters = {"audio_adapter": None}
    if config.inject_layers:
        adapters["mergers"] = config.inject_layers
    for module, stack in adapters.items():
        add(f"{module}/gate_proj/kernel", config.adapter_dim, enc.output_dim, stack=stack)
        add(f"{module}/up_proj/kernel", config.adapter_dim, enc.output_dim, stack=stack)
        add(f"{module}/down_proj/kernel", dec.hidden_size, config.adapter_dim, stack=stack)
    if config.inject_gate:
        add(GATE, dec.hidden_size, stack=config.inject_layers)

    decoder, layers, width = "language_model", "language_model/layers", dec.hidden_size
    queries, keys = dec.heads * dec.head_dim, dec.kv_heads * dec.head_dim
    add(f"{decoder}/embed_tokens/embedding", dec.vocab_size, width, transposed=False)
    add(f"{layers}/input_layernorm/scale", width, stack=dec.layers)
    for name, rows in {"q_proj": queries, "k_proj": keys, "v_proj": keys}.items():
        add(f"{layers}/self_attn/{name}/kernel", rows, width, stack=dec.layers)
    add(f"{layers}/self_attn/o_proj/kernel", width, queries, stack=dec.layers)
    add(f"{layers}/self_attn/q_norm/scale", dec.head_dim, stack=dec.layers)
    add(f"{layers}/self_attn/k_norm/scale", dec.head_dim, stack=dec.layers)
    add(f"{layers}/post_attention_layernorm/scale", width, stack=dec.layers)
    add(f"{layers}/mlp/gate_proj/kernel", dec.ffn_dim, width, stack=dec.layers)
    add(f"{layers}/mlp/up_proj/kernel", dec.ffn_dim, width, stack=dec.layers)
    add(f"{layers}/mlp/down_proj/kernel", width, dec.ffn_dim, stack=dec.layers)
    add(f"{decoder}/norm/scale", width)
    if not dec.tie_embeddings:
        add("lm_head/kernel", dec.vocab_size, width)
    return entries


def shapes(config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """The tree of parameters as ShapeDtypeStructs, like `moss_audio.abstract_params` but at once:
    that traces how they are initialised."""
    return unflatten(
        {entry.path: jax.ShapeDtypeStruct(entry.shape, np.dtype(dtype)) for entry in table(config)}
    )


def qwen3_table(config: ModelConfig, tied: bool) -> list[Entry]:
    """The decoder's entries with the names of a plain Qwen3 checkpoint.

    Args:
      tied: the Qwen3 checkpoint ties its output layer to the embedding. An untied model's
        `lm_head` then starts as the transposed embedding.
    """
    entries = []
    for entry in table(config):
        if entry.path.startswith("language_model/"):
            name = entry.name.replace("language_model.", "model.", 1)
            entries.append(dataclasses.replace(entry, name=name))
        elif entry.path == "lm_head/kernel":
            name = "model.embed_tokens.weight" if tied else entry.name
            entries.append(dataclasses.replace(entry, name=name))
    return entries


def _official_name(path: str) -> str:
    name = re.sub(r"(kernel|scale|embedding)$", "weight", path).replace("/", ".")
    name = name.replace(".layers.", ".layers.{n}.").replace(".stem.", ".")
    return re.sub(r"^mergers", "deepstack_audio_merger_list.{n}", name)


class OfficialReader:
    """An official checkpoint (or a plain Qwen3 one) seen as native leaves.

    Opening it reads only headers and checks them against the table. Tensors may have different
    dtypes: a leaf is read in the dtype that the caller names, otherwise in `dtype`.

    Args:
      folder: a folder or a .safetensors file.
      entries: `table(config)` or `qwen3_table(config, tied)`.

    Raises:
      InputError: a missing, unexpected or misshapen tensor.
    """

    def __init__(self, folder: str | Path, entries: Sequence[Entry]):
        self.entries = {entry.path: entry for entry in entries}
        self._tensors = safetensors.Reader(folder)
        try:
            _validate(self._tensors, entries)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> OfficialReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._tensors.close()

    @functools.cached_property
    def dtype(self) -> np.dtype:
        """The dtype of all tensors; if they differ, that of most bytes, with a warning."""
        found: dict[np.dtype, tuple[int, str]] = {}
        for name in (name for entry in self.entries.values() for name in entry.names):
            tensor = self._tensors.tensors[name]
            nbytes, first = found.get(tensor.dtype, (0, name))
            found[tensor.dtype] = nbytes + math.prod(tensor.shape) * tensor.dtype.itemsize, first
        most, *others = sorted(found, key=lambda dtype: -found[dtype][0])
        if others:
            also = ", ".join(f"{found[dtype][1]} is {dtype}" for dtype in others)
            warnings.warn(
                f"{self._tensors.path}: mixed dtypes: most weights are {most}, but {also}; all "
                f"become {most} (name a dtype if that loses too much)",
                stacklevel=2,
            )
        return most

    def read(self, path: str, dtype: Any = None, index: Index | None = None) -> np.ndarray:
        """A native leaf, or the part of it that `index` (slices of its axes, step 1) selects."""
        return read_leaf(self._tensors, self.entries[path], index, dtype or self.dtype)

    def load(self, path: str, sharding: jax.sharding.Sharding, dtype: Any = None) -> jax.Array:
        """A native leaf on devices; each process reads once what its own devices need."""
        return self._load(path, sharding, dtype)

    def layers(
        self, path: str, sharding: jax.sharding.Sharding, dtype: Any = None
    ) -> Iterator[jax.Array]:
        """The layers of a stacked leaf, read one by one."""
        for layer in range(self.entries[path].stack):
            yield self._load(path, of_a_layer(sharding), dtype, (slice(layer, layer + 1),))

    def _load(
        self, path: str, sharding: jax.sharding.Sharding, dtype: Any, layer: Index = ()
    ) -> jax.Array:
        shape = self.entries[path].shape[len(layer) :]
        local = sharding.addressable_devices_indices_map(shape).values()
        spans = [
            [part.indices(size) for part, size in zip(index, shape, strict=True)] for index in local
        ]
        starts = [min(axis[0] for axis in axes) for axes in zip(*spans, strict=True)]
        stops = [max(axis[1] for axis in axes) for axes in zip(*spans, strict=True)]
        block = self.read(path, dtype, (*layer, *map(slice, starts, stops)))
        block = block[0] if layer else block

        def shard(index: Index) -> np.ndarray:
            spans = [part.indices(size) for part, size in zip(index, shape, strict=True)]
            return block[
                tuple(slice(a - at, b - at) for (a, b, _), at in zip(spans, starts, strict=True))
            ]

        return jax.make_array_from_callback(shape, sharding, shard).block_until_ready()


def read_leaf(
    tensors: safetensors.Reader, entry: Entry, index: Index | None = None, dtype: Any = None
) -> np.ndarray:
    """Reads a native leaf from official tensors, a few blocks of rows at a time.

    Args:
      index: slices (step 1) of the leaf's axes; None: all of it. Neither layers nor rows of
        official tensors (output columns of a kernel) outside it are read.
      dtype: the result's; None: the first tensor's.

    Raises:
      InputError: the bytes cannot be read, or a value is too large for `dtype`.
    """
    spans = [
        (slice(None) if index is None else index[axis]).indices(size)[:2]
        for axis, size in enumerate(entry.shape)
    ]
    layers = range(1) if entry.stack is None else range(*spans.pop(0))
    names = entry.names
    dtype = tensors.tensors[names[0]].dtype if dtype is None else np.dtype(dtype)
    leaf = _aligned((len(layers), *(stop - start for start, stop in spans)), dtype)
    inner = tuple(slice(*span) for span in spans)

    def read_whole(layer: int) -> None:
        part = entry.to_native(tensors.read(names[layer]))
        _copy(leaf[layer - layers.start], part[inner])

    def read_rows(layer: int, start: int, stop: int) -> None:
        out, rows = leaf[layer - layers.start], tensors.read(names[layer], (slice(start, stop),))
        if entry.transposed:
            start, stop = start - spans[1][0], stop - spans[1][0]
            _copy(out[:, start:stop], rows[:, inner[0]].T)
        else:
            _copy(out[start - spans[0][0] : stop - spans[0][0]], rows[:, inner[1]])

    tasks: list[tuple] = []
    if _is_matrix(entry):
        rows = spans[1] if entry.transposed else spans[0]
        tasks = [(read_rows, layer, *block) for layer in layers for block in _blocks(entry, *rows)]
    else:
        tasks = [(read_whole, layer) for layer in layers]
    _run(tasks)
    if leaf.dtype == np.float16 and any(tensors.tensors[n].dtype != np.float16 for n in names):
        check_float16(leaf, f"{tensors.path}: {names[0]}")
    return leaf[0] if entry.stack is None else leaf


def write_leaf(tensors: safetensors.Writer, entry: Entry, leaf: np.ndarray, dtype: Any) -> None:
    """Writes a native leaf as its official tensors, cast to `dtype`."""
    layers = leaf[None] if entry.stack is None else leaf
    names = entry.names

    def write_whole(layer: int) -> None:
        tensors.write(names[layer], entry.to_official(layers[layer]).astype(dtype))

    def write_rows(layer: int, start: int, stop: int) -> None:
        part = layers[layer][:, start:stop].T if entry.transposed else layers[layer][start:stop]
        rows = np.empty((stop - start, entry.tensor[1]), dtype)
        _copy(rows, part)
        tensors.write(names[layer], rows, start)

    count = range(len(names))
    if _is_matrix(entry):
        blocks = list(_blocks(entry, 0, entry.tensor[0]))
        _run([(write_rows, layer, *block) for layer in count for block in blocks])
    else:
        _run([(write_whole, layer) for layer in count])


def write_official(
    folder: Path,
    entries: Sequence[Entry],
    leaves: Iterable[tuple[str, Any]],
    dtype: Any,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes leaves, which arrive one by one in any order, as safetensors files into `folder`."""
    dtype = np.dtype(dtype)
    shapes = {name: (entry.tensor, dtype) for entry in entries for name in entry.names}
    by_path = {entry.path: entry for entry in entries}
    with safetensors.Writer(folder, shapes, max_shard_bytes) as writer:
        for path, leaf in leaves:
            write_leaf(writer, by_path[path], np.asarray(leaf), dtype)
            del leaf  # before the next one is made


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that begins where JAX wants it, so that a CPU takes it over without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def check_float16(leaf: np.ndarray, where: str) -> None:
    """Raises InputError if a value became infinite in float16."""
    if not np.isfinite(leaf).all():
        raise InputError(f"{where}: values beyond float16's largest, 65,504; choose another dtype")


def _validate(reader: safetensors.Reader, entries: Sequence[Entry]) -> None:
    where, found = reader.path, reader.tensors
    expected = {name: entry.tensor for entry in entries for name in entry.names}
    if missing := [name for name in expected if name not in found]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"{where}: tensor {missing[0]}{more} is missing; config.json requires it")
    embedding = next(e.name for e in entries if e.path == "language_model/embed_tokens/embedding")
    for name in sorted(found.keys() - expected.keys() - _DROPPED):
        if name == "lm_head.weight":
            # Files of tied models often repeat the embedding. Another head is an error.
            _check_tied(reader, name, embedding)
            continue
        raise InputError(
            f"{where}: unexpected tensor {brief(name)}; config.json has no place for it"
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise InputError(
                f"{found[name].file}: tensor {name} has shape {list(found[name].shape)}; "
                f"config.json requires {list(shape)}"
            )


def _check_tied(reader: safetensors.Reader, head: str, embedding: str) -> None:
    one, other = reader.tensors[head], reader.tensors[embedding]
    same = one.shape == other.shape
    step = max(1, _BLOCK_BYTES // max(1, math.prod(one.shape[1:]) * one.dtype.itemsize))
    for start in range(0, one.shape[0], step) if same else ():
        rows = (slice(start, start + step),)
        ours, theirs = (reader.read(name, rows).astype(np.float32) for name in (head, embedding))
        if not np.array_equal(ours, theirs, equal_nan=True):
            same = False
            break
    if not same:
        raise InputError(
            f"{one.file}: {head} differs from {embedding}, though config.json ties them "
            "(tie_word_embeddings)"
        )


def _is_matrix(entry: Entry) -> bool:
    return len(entry.tensor) == 2 and entry.split is None


def _blocks(entry: Entry, start: int, stop: int) -> Iterator[tuple[int, int]]:
    step = max(_TILE, _BLOCK_BYTES // (4 * entry.tensor[1]))
    for at in range(start, stop, step):
        yield at, min(stop, at + step)


def _copy(out: np.ndarray, part: np.ndarray) -> None:
    """out[...] = part, tile by tile if `part` is a transposed matrix; casts if dtypes differ."""
    if out.dtype == part.dtype:  # plain integers copy faster than extension dtypes
        out, part = (x.view(f"u{x.dtype.itemsize}") for x in (out, part))
    if out.ndim == 2 and part.strides[0] < part.strides[1]:
        # Tiles along the fast axis of the source, so that whole cache lines are used.
        tiles = [(slice(None), slice(at, at + _TILE)) for at in range(0, part.shape[1], _TILE)]
    else:
        tiles = [...]
    with np.errstate(over="ignore"):  # see check_float16
        for tile in tiles:
            np.copyto(out[tile], part[tile], casting="unsafe")


def _run(tasks: list[tuple]) -> None:
    if len(tasks) == 1:
        tasks[0][0](*tasks[0][1:])
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(*task) for task in tasks]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
