"""The placement of all arrays: the mesh, a table for parameters, a table for activations.

Mesh axes: `data` (replicas), `fsdp` (parameters and batch split), `tensor` (heads, hidden units
and vocabulary split), `sequence` (tokens of a row split).
"""

from __future__ import annotations

import collections
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from moss_audio_jax.config import ModelConfig
from moss_audio_jax.errors import UsageError
from moss_audio_jax.tree import path_name

AXES = ("data", "fsdp", "tensor", "sequence")

# CPU devices share a few threads. Two running programs, each waiting in a collective for a thread
# that the other holds, would wait for ever. This only takes effect before JAX's first use.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# Path of a parameter -> mesh axes of its dimensions. First match wins; no match = replicated.
# The layer axis of stacked layers comes first and is never split, because a scan runs along it.
PARAMETERS = (
    (r"language_model/embed_tokens/embedding", ("tensor", "fsdp")),
    (r"lm_head/kernel", ("fsdp", "tensor")),
    (r"layers/(self_attn|mlp)/(q|k|v|gate|up)_proj/kernel", (None, "fsdp", "tensor")),
    (r"layers/(self_attn|mlp)/(o|out|down)_proj/kernel", (None, "tensor", "fsdp")),
    (r"layers/self_attn/[qv]_proj/bias", (None, "tensor")),
    (r"layers/fc1/kernel", (None, "fsdp", "tensor")),
    (r"layers/fc1/bias", (None, "tensor")),
    (r"layers/fc2/kernel", (None, "tensor", "fsdp")),
    (r"stem/stem_proj/kernel", ("fsdp", None)),
    (r"audio_adapter/(gate|up)_proj/kernel", ("fsdp", "tensor")),
    (r"audio_adapter/down_proj/kernel", ("tensor", "fsdp")),
    (r"mergers/(gate|up)_proj/kernel", (None, "fsdp", "tensor")),
    (r"mergers/down_proj/kernel", (None, "tensor", "fsdp")),
)

# Dimension of an activation -> mesh axes.
ACTIVATIONS = {
    "batch": ("data", "fsdp"),
    "replica": ("data",),  # rows and width of looked-up embeddings
    "width": ("fsdp",),
    "tokens": ("sequence",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "vocab": ("tensor",),
    None: (),
}


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of the given axis sizes; one of them may be -1 (all remaining devices).

    Args:
      data, fsdp, tensor, sequence: axis sizes.
      devices: default all; only as many as the sizes need are used.

    Raises:
      UsageError: the devices cannot fill the sizes.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor, sequence), strict=True))
    unknown = [axis for axis, size in sizes.items() if size == -1]
    if len(unknown) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UsageError(f"mesh {sizes}: sizes are positive, at most one is -1 (the rest)")
    known = math.prod(size for size in sizes.values() if size != -1)
    if unknown:
        sizes[unknown[0]] = len(devices) // known
    total = math.prod(sizes.values())
    if total > len(devices) or (unknown and total != len(devices)):
        raise UsageError(f"mesh {sizes} does not fit {len(devices)} device(s)")
    if total < len(devices):
        laid_out = np.asarray(devices[:total]).reshape(*sizes.values())
    else:
        laid_out = lay_out(sizes, devices)
    return Mesh(laid_out, AXES, axis_types=(AxisType.Auto,) * 4)


def lay_out(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """All devices as an array of these axis sizes; neighbours in it are neighbours in hardware.

    If there are several slices of TPUs, or hosts with GPUs, `data` spans them, because its
    gradients cross the slow network only once per step. `fsdp` spans them only if necessary; the
    other axes stay within one.

    Raises:
      UsageError: the axes cannot be divided among the slices.
    """
    slice_of = slices(devices)
    sizes_of = collections.Counter(slice_of)
    left, across = len(sizes_of), []
    for axis, size in sizes.items():
        across.append(math.gcd(size, left) if axis in ("data", "fsdp") else 1)
        left //= across[-1]
    if left > 1 or len(set(sizes_of.values())) > 1:
        raise UsageError(
            f"mesh {dict(sizes)} does not fit {len(sizes_of)} slices of "
            f"{sorted(sizes_of.values())} devices: mesh.data * mesh.fsdp must be a multiple of "
            "their number"
        )
    within = [size // n for size, n in zip(sizes.values(), across, strict=True)]
    # On v5e more logical axes may share the two physical ones; for others JAX advises against it.
    split = {"allow_split_physical_axes": devices[0].device_kind in ("TPU v5 lite", "TPU v5e")}
    whole = np.empty(len(sizes_of), object)
    for place, number in enumerate(sorted(sizes_of)):
        own = [device for device, of in zip(devices, slice_of, strict=True) if of == number]
        whole[place] = mesh_utils.create_device_mesh(within, own, **split)
    return np.block(whole.reshape(across).tolist())


def slices(devices: Sequence[Any]) -> list[int]:
    """The slice of each device.

    CPU devices are in one, unless MOSS_AUDIO_JAX_SLICES=N in the environment deals them, in their
    order, to N slices (launch/supervise.py rehearses with it).
    """
    count = int(os.environ.get("MOSS_AUDIO_JAX_SLICES", 1))
    if count == 1 or devices[0].platform != "cpu":
        return [getattr(device, "slice_index", 0) for device in devices]
    order = sorted(device.id for device in devices)
    return [order.index(device.id) * count // len(order) for device in devices]


def as_mesh(mesh: Mesh | Mapping[str, int] | Sequence[int] | None) -> Mesh:
    """A Mesh from a user's value: a Mesh, {"tensor": 4}, (2, 2, 2, 1) or None (one device)."""
    if mesh is None:
        return make_mesh(devices=jax.local_devices()[:1])
    if isinstance(mesh, Mesh):
        if mesh.axis_names != AXES:
            raise UsageError(f"mesh axes are {mesh.axis_names}; expected {AXES}")
        return mesh
    if isinstance(mesh, Mapping):
        if wrong := set(mesh) - set(AXES):
            raise UsageError(f"mesh axis {sorted(wrong)[0]!r}: expected some of {AXES}")
        return make_mesh(**mesh)
    return make_mesh(*mesh)


def serving_mesh(mesh: Mesh) -> Mesh:
    """A mesh of the same devices in which `tensor` also takes the devices of `fsdp`.

    In decoding, weights that are split along a contracted axis would be gathered at every token;
    weights that are split along heads and hidden units stay where they are.
    """
    data, fsdp, tensor, sequence = mesh.devices.shape
    return Mesh(
        mesh.devices.reshape(data, 1, fsdp * tensor, sequence),
        AXES,
        axis_types=(AxisType.Auto,) * 4,
    )


def param_specs(params: Any, config: ModelConfig, mesh: Mesh) -> Any:
    """A PartitionSpec for each leaf of a parameter tree (arrays or ShapeDtypeStructs).

    An axis that does not divide its dimension is left out, and the encoder's attention is split
    over `tensor` only if that divides its heads.
    """
    whole_heads = config.encoder.heads % mesh.shape["tensor"] == 0

    def spec(path: tuple, leaf: Any) -> P:
        name = path_name(path)
        axes = next((axes for rule, axes in PARAMETERS if re.search(rule, name)), ())
        if name.startswith("audio_encoder/layers/self_attn") and not whole_heads:
            axes = tuple(None if axis == "tensor" else axis for axis in axes)
        return fit(leaf.shape, axes, mesh)

    return jax.tree_util.tree_map_with_path(spec, params)


def param_shardings(params: Any, config: ModelConfig, mesh: Mesh) -> Any:
    """`param_specs` as NamedShardings on `mesh`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(params, config, mesh))


def of_a_layer(sharding: Sharding) -> Sharding:
    """The sharding of one layer of a stacked parameter, whose layer axis is never split."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, P(*sharding.spec[1:]))


def fit(shape: Sequence[int], axes: Sequence[Any], mesh: Any) -> P:
    """The PartitionSpec of `axes` without those that do not divide `shape`'s dimensions."""
    fitted = []
    for size, axis in zip(shape, axes, strict=False):
        names = (axis,) if isinstance(axis, str) else tuple(axis or ())
        names = tuple(name for name in names if mesh.shape[name] > 1)
        ways = math.prod(mesh.shape[name] for name in names)
        whole = names and size % ways == 0
        fitted.append((names[0] if len(names) == 1 else names) if whole else None)
    return P(*fitted)


def constrain(x: jax.Array, *dimensions: str | None) -> jax.Array:
    """Pins an activation to the mesh in context (`jax.set_mesh`); without one it does nothing.

    `dimensions` are keys of ACTIVATIONS, one for each axis of x.
    """
    if alone():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    spec = fit(x.shape, [ACTIVATIONS[name] for name in dimensions], mesh)
    return jax.lax.with_sharding_constraint(x, spec)


def on_each(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, *dimensions: str | None
) -> jax.Array:
    """`constrain`, and calls `function` on each device with its part of x.

    For what the compiler would gather, such as a constraint on the layout in memory if there are
    several slices.
    """
    if alone():
        return function(x)
    mesh = jax.sharding.get_abstract_mesh()
    spec = fit(x.shape, [ACTIVATIONS[name] for name in dimensions], mesh)
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(x)


def splits_whole(query: jax.Array, key: jax.Array) -> bool:
    """Whether the mesh in context gives each device whole rows and whole groups of heads.

    query [B, T, N, H] and key [B, S, KV, H] are those of attention.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return True
    tensor = mesh.shape["tensor"]
    heads = query.shape[2] % tensor == 0 and key.shape[2] % tensor == 0
    return heads and mesh.shape["sequence"] == 1


def on_each_device(
    attend: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *of_rows: jax.Array,
) -> jax.Array:
    """Calls attend(query, key, value, *of_rows) on each device with its rows and heads.

    For kernels that the compiler cannot split. `of_rows` are arrays [B, ...].
    """
    if alone():
        return attend(query, key, value, *of_rows)
    mesh = jax.sharding.get_abstract_mesh()
    axes = ACTIVATIONS["batch"], (), ACTIVATIONS["heads"]
    specs = [fit(x.shape, axes, mesh) for x in (query, key, value)]
    return jax.shard_map(
        attend,
        in_specs=(*specs, *[P(*specs[0][:1]) for _ in of_rows]),
        out_specs=specs[0],
        check_vma=False,  # kernels do not say along which axes they vary
    )(query, key, value, *of_rows)


def platform() -> str:
    """The platform of compilation, "tpu", "gpu" or "cpu"; that of the mesh in context, if any."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def alone() -> bool:
    """Is a program compiled for a single device, by the mesh in context?"""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def ways(shape: Sequence[int], *dimensions: str | None) -> int:
    """The number of devices over which `constrain` would split an array of this shape."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    spec = fit(shape, [ACTIVATIONS[name] for name in dimensions], mesh)
    names = jax.tree.leaves(tuple(spec))
    return math.prod(mesh.shape[name] for name in names)


def replicate(tree: Any) -> Any:
    """Pins every array of a tree to a copy on each device of the mesh in context."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), tree)
