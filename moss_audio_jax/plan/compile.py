"""Lowers and compiles the train step of a config for a TPU slice, without a TPU."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moss_audio_jax import libtpu
from moss_audio_jax.config import ModelConfig, ProcessorConfig
from moss_audio_jax.data.batch import Shape, make_train_batch
from moss_audio_jax.devices import GIB
from moss_audio_jax.errors import InputError, UsageError, extra
from moss_audio_jax.plan.hlo import Module
from moss_audio_jax.plan.topologies import Topology
from moss_audio_jax.post_train.batches import lay_out
from moss_audio_jax.post_train.scoring import scores_of
from moss_audio_jax.runtime import code_version
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.train import setup
from moss_audio_jax.train.setup import Setup
from moss_audio_jax.train.start import Start, read_start, sizes_of
from moss_audio_jax.train.step import Recipe, batch_shardings

FLAGS = "LIBTPU_INIT_ARGS"
_OUT_OF_MEMORY = (
    r"Used ([\d.]+)([KMG])i?B? of ([\d.]+)([KMG])i?B? hbm",
    r"memory required for HLO temporaries \(([\d.]+)([KMG])\) exceeds available HBM "
    r"\(([\d.]+)([KMG])\)",
)
_UNITS = {"K": 2**10, "M": 2**20, "G": GIB}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run without arrays: what the compiler needs to know about it.

    Attributes:
      model, recipe, shape: the model's sizes; the step's static part; the global batch's shape.
      mesh: of the slice's devices.
      state, batch: ShapeDtypeStructs with shardings.
      step: the jitted step, which donates its state.
    """

    model: ModelConfig
    recipe: Recipe
    shape: Shape
    mesh: Mesh
    state: dict[str, Any]
    batch: dict[str, jax.ShapeDtypeStruct]
    step: Any


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's result for one step.

    Attributes:
      seconds: compile time.
      peak: the most bytes of HBM that one device needs, by the compiler. If it refused the step,
        the number that it named.
      limit: the bytes that it allows, if it refused the step; else None.
      module: the compiled module; None if it refused.
      refusal: the compiler's message (see `refusal`); "" if the step fits.
      flags: the compiler flags of the environment (see launch/xla_flags.py).
    """

    seconds: float
    peak: int
    limit: int | None = None
    module: Module | None = None
    refusal: str = ""
    flags: str = dataclasses.field(default_factory=lambda: os.environ.get(FLAGS, ""))


def prepare_environment() -> None:
    """Sets the environment for the TPU compiler without a TPU. Call it before JAX is used.

    Raises:
      UsageError: libtpu is not installed.
    """
    if not libtpu.installed():
        raise UsageError(f"plan needs the TPU compiler: {extra('plan')}")
    libtpu.set_environment()
    jax.config.update("jax_platforms", "cpu")


def versions() -> dict[str, str]:
    """What a compiled step depends on besides its config and its slice."""
    flags = os.environ.get(FLAGS, "")
    return {
        "code": code_version(),
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "flags": flags,
    }


def slice_devices(topology: Topology) -> list[Any]:
    """The devices of a slice, from the compiler.

    Raises:
      InputError: libtpu does not know the slice, or another process holds libtpu.
    """
    from jax.experimental import topologies

    # On v4 a chip's two cores form one device, but this is not libtpu's default.
    options = {"chip_config_name": "megacore"} if topology.generation == "v4" else {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except Exception as error:  # libtpu raises errors of many types
        words = " ".join(str(error).split())[:300]
        raise InputError(
            f"topology {topology.name}: libtpu does not compile for it: {words}"
        ) from None
    return list(found.devices)


def build(config: Any, devices: list[Any]) -> Run:
    """The run of a config on these devices.

    Reads no weights. If `init_from` names a checkpoint, its tokenizer and sizes are used.

    Raises:
      UsageError, InputError: the same errors as in training, naming the key.
    """
    start = _start(config)
    model = start.model
    mesh = make_mesh(**config.mesh, devices=devices)
    if mesh.size != len(devices):
        raise UsageError(
            f"mesh {dict(mesh.shape)} uses {mesh.size} of {len(devices)} devices; set an axis to -1"
        )
    run = setup.build(_with_data(config), start, mesh)
    batch = _abstract_batch(run)
    return Run(
        model=model,
        recipe=run.recipe,
        shape=run.shape,
        mesh=mesh,
        state=placed(run.state, run.state_shardings),
        batch=placed(batch, batch_shardings(batch, mesh)),
        step=run.step(),
    )


def model_of(config: Any) -> ModelConfig:
    """The sizes of a config's model: its own, or those of the checkpoint that it names."""
    return _start(config).model


def compile_step(run: Run) -> Compiled:
    """Lowers and compiles the step. A step that does not fit is a result, not an error."""
    with jax.set_mesh(run.mesh):
        lowered = run.step.lower(run.state, run.batch)
    return compile_lowered(lowered, held_bytes(run.state) + held_bytes(run.batch), run.mesh.size)


def compile_lowered(lowered: Any, given: int, devices: int) -> Compiled:
    """Compiles a program whose arguments take `given` bytes on each of the devices."""
    begun = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = out_of_memory(str(error))
        if found is None:
            raise
        peak, limit = found
        # This message counts only temporaries, without the arguments of the step.
        if "HLO temporaries" in str(error):
            peak += given
        return Compiled(time.perf_counter() - begun, peak, limit, refusal=refusal(str(error)))
    seconds = time.perf_counter() - begun
    memory = compiled.memory_analysis()
    peak = getattr(memory, "peak_memory_in_bytes", 0) or (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    return Compiled(seconds, peak, module=Module(compiled.as_text(), devices))


def held_bytes(tree: Any) -> int:
    """Bytes of a tree of ShapeDtypeStructs on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def out_of_memory(message: str) -> tuple[int, int] | None:
    """(bytes needed, bytes allowed) from the compiler's refusal; None for other errors."""
    for pattern in _OUT_OF_MEMORY:
        if found := re.search(pattern, message):
            needed, unit, allowed, allowed_unit = found.groups()
            return int(float(needed) * _UNITS[unit]), int(float(allowed) * _UNITS[allowed_unit])
    return None


def refusal(message: str) -> str:
    """The compiler's message in short: the reason, then a line for each of the five largest arrays
    that it lists (size, shape, the operation that made it)."""
    why, *entries = re.split(r"\n\s+\d+\. Size: ", message)
    lines = [" ".join(why.split())[:300]]
    for entry in entries[:5]:
        size, *_ = entry.split(maxsplit=1)
        found = [
            re.search(pattern, entry) for pattern in (r"Shape: (\w+\[.*?\])", r'op_name="(.*?)"')
        ]
        lines.append(" ".join(["   ", size, *(match[1] for match in found if match)]))
    return "\n".join(lines)


def _start(config: Any) -> Start:
    if config.init_from:
        return read_start(config)
    model = sizes_of(config.model)
    if config.encoder_attention:
        model = model.with_attention(config.encoder_attention)
    return Start(model.validate(), None)


def _with_data(config: Any) -> Any:
    """Fills in data.train for `check`, because a plan needs no rows."""
    if config.data.train or config.data.mixture:
        return config
    config = config.copy_and_resolve_references()
    config.data.train = ("planned",)
    return config


def _abstract_batch(run: Setup) -> dict[str, Any]:
    """The shapes of a batch; one row is made, and its shapes are used for all rows."""
    shape, encoder = dataclasses.replace(run.shape, rows=1), run.start.model.encoder
    if run.recipe.objective:
        scores = scores_of(run.config.policy)
        row, _ = lay_out([], shape, 1, encoder, ProcessorConfig(), scores)
    else:
        row = make_train_batch(
            [],
            shape,
            encoder,
            0,
            "bfloat16",
            branched=run.loader.branches > 1,
            targets=run.loader.targets(),
        )
    return {
        name: jax.ShapeDtypeStruct((run.shape.rows, *x.shape[1:]), x.dtype)
        for name, x in row.items()
    }


def placed(tree: Any, shardings: Any) -> Any:
    """Shapes with shardings, leaf by leaf."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings,
    )
