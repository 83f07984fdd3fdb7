"""Whether a model fits into memory, and the default form in which a CPU holds it."""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Iterable

import jax
from jax.sharding import Mesh

from moss_audio_jax import devices
from moss_audio_jax.config import ModelConfig, Quantize
from moss_audio_jax.errors import InputError
from moss_audio_jax.models import moss_audio
from moss_audio_jax.models.quantize import held
from moss_audio_jax.sharding import param_shardings
from moss_audio_jax.weights.official import shapes

_log = logging.getLogger(__name__)

Form = tuple[str, Quantize]  # dtype, and what is int8

_SMALL = 1_000_000_000  # parameters up to which a CPU takes float32
# What answering takes beside the weights on a CPU: JAX itself; programs, caches and activations,
# which grow with the model, up to what one clip of a minute takes (docs/use_a_checkpoint.md).
_BESIDE, _BESIDE_SHARE, _BESIDE_MOST = 200_000_000, 0.2, 1_200_000_000


def choose(
    where: str, config: ModelConfig, dtype: str | None, quantize: Quantize | None, mesh: Mesh
) -> Form:
    """The form in which to hold a model; a given `dtype` or `quantize` is kept.

    The default is bfloat16 on accelerators. On CPUs it is float32 for small models and bfloat16 for
    others, or int8 weights if only those fit; a message says which.

    Args:
      where: the checkpoint, for messages.

    Raises:
      InputError: the model does not fit into the memory that is free.
    """
    device = mesh.local_devices[0]
    count = moss_audio.count_params(shapes(config, "float32"))
    large = device.platform != "cpu" or count > _SMALL
    first: Form = dtype or ("bfloat16" if large else "float32"), quantize or "none"
    free = _free(device)
    if free is None or needed(config, first, mesh) <= free:
        if dtype is None and large and device.platform == "cpu":
            _log.info("%s: %s", where, _fit(first, config, mesh, free))
        return first
    smaller: list[Form] = [("bfloat16", quantize or "none"), ("bfloat16", quantize or "weights")]
    fits = next((form for form in smaller if needed(config, form, mesh) <= free), None)
    if fits and dtype is None and device.platform == "cpu" and jax.process_count() == 1:
        warnings.warn(
            f"{where}: {_fit(fits, config, mesh, free)}, because {_named(first)} would take "
            f"{_gb(needed(config, first, mesh))}; answers may differ",
            stacklevel=3,
        )
        return fits
    asked = first if fits or dtype else smaller[-1]
    advice = "close other programs, or take a machine with more memory"
    if fits:
        advice = f"{_named(fits)} would take {_gb(needed(config, fits, mesh))}"
    elif device.platform != "cpu":
        advice = "split it over more devices (a larger mesh)"
    raise InputError(
        f"{where}: {count / 1e9:.1f} billion parameters in {_named(asked)} take "
        f"{_gb(needed(config, asked, mesh))} of memory, and {_gb(free)} are free; {advice}"
    )


def needed(config: ModelConfig, form: Form, mesh: Mesh) -> int:
    """The bytes that a model takes: on an accelerator the weights of one device, on a CPU the
    weights and what answers need besides."""
    dtype, quantize = form
    with jax.set_mesh(mesh):
        params = jax.eval_shape(functools.partial(held, quantize=quantize), shapes(config, dtype))
    if mesh.local_devices[0].platform == "cpu":  # all of its devices share the host's memory
        weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
        return weights + _BESIDE + min(int(_BESIDE_SHARE * weights), _BESIDE_MOST)
    shardings = jax.tree.leaves(param_shardings(params, config, mesh))
    return sum(
        math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x, sharding in zip(jax.tree.leaves(params), shardings, strict=True)
    )


def check_more(where: str, arrays: Iterable[jax.Array], mesh: Mesh) -> None:
    """Raises InputError if memory has no room for copies of these arrays."""
    device = mesh.local_devices[0]
    on_host = device.platform == "cpu"  # all of its devices share the host's memory
    more = sum(
        math.prod(x.shape if on_host else x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in arrays
    )
    free = _free(device)
    if free is not None and more > free:
        raise InputError(
            f"{where}: the weights that it changes take {_gb(more)} of memory, and {_gb(free)} are "
            "free; serve fewer adapters, or take a machine with more memory"
        )


def _free(device: jax.Device) -> int | None:
    """The bytes of free memory; None if they are not known."""
    if device.platform == "cpu":
        return devices.host_memory()
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None


def _fit(form: Form, config: ModelConfig, mesh: Mesh, free: int | None) -> str:
    known = "" if free is None else f" of {_gb(free)} that are free"
    return f"{_named(form)}, about {_gb(needed(config, form, mesh))} of memory{known}"


def _named(form: Form) -> str:
    dtype, quantize = form
    return dtype if quantize == "none" else f"{dtype} with int8 {quantize}"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
