"""Lowers and compiles the programs of generation for a TPU slice, without a TPU."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moss_audio_jax.audio.lengths import audio_tokens
from moss_audio_jax.config import Compute, ModelConfig, ProcessorConfig
from moss_audio_jax.data.batch import bucket
from moss_audio_jax.errors import UsageError
from moss_audio_jax.generate import decode_state
from moss_audio_jax.generate.engine import Size, piece_tokens
from moss_audio_jax.generate.shapes import TOGETHER
from moss_audio_jax.generate.vocabulary import vocabulary
from moss_audio_jax.models import cache, decoder, moss_audio
from moss_audio_jax.models.quantize import held
from moss_audio_jax.plan.compile import Compiled, compile_lowered, held_bytes, placed
from moss_audio_jax.sharding import (
    ACTIVATIONS,
    fit,
    make_mesh,
    param_shardings,
    serving_mesh,
)


@dataclasses.dataclass(frozen=True)
class Load:
    """What is served: `batch` answers at a time, each of at most `new_tokens`.

    Each prompt has `prompt_tokens`, including those of `audio_seconds` of audio.
    """

    batch: int = 64
    prompt_tokens: int = 2048
    audio_seconds: float = 120.0
    new_tokens: int = 512

    @property
    def cache_positions(self) -> int:
        """Positions of the cache; rounded as in the engine, like the other sizes here."""
        return bucket(self.prompt_tokens + self.new_tokens, 128)

    def prefill(self) -> tuple[int, int]:
        """What the engine prefills at once in each group of devices: so many prompts, and so many
        tokens of each. Of a long prompt it is the last piece."""
        piece = piece_tokens("tpu")
        tokens = min(self.prompt_tokens, piece)
        return max(1, min(TOGETHER, piece // tokens, self.batch)), tokens


@dataclasses.dataclass(frozen=True)
class Serving:
    """Generation without arrays: what the compiler needs to know about it.

    Attributes:
      size: what the decode state is made for.
      params: ShapeDtypeStructs with shardings; quantised if `compute` says so.
      state: decode state of the answers, also as ShapeDtypeStructs with shardings.
    """

    model: ModelConfig
    compute: Compute
    mesh: Mesh
    load: Load
    size: Size
    params: Any
    state: decode_state.DecodeState

    @property
    def static(self) -> dict[str, Any]:
        vocab = vocabulary(self.model, None, ProcessorConfig())
        return {"config": self.model, "compute": self.compute, "vocab": vocab}


def build(
    model: ModelConfig,
    compute: Compute,
    load: Load,
    devices: Sequence[Any],
    mesh: Mapping[str, int] | None = None,
) -> Serving:
    """Generation with a model on these devices; `mesh` is as in `MossAudio.load`.

    Without a mesh, `tensor` is as large as the key/value heads allow, so that a token reads the
    fewest weights, and `data` takes the rest.

    Raises:
      UsageError: the mesh does not fill the devices or divide the batch, or the load is impossible.
    """
    if mesh is None:
        tensor = math.gcd(len(devices), model.decoder.kv_heads)
        mesh = {"data": len(devices) // tensor, "tensor": tensor}
    placed_on = serving_mesh(make_mesh(**mesh, devices=devices))
    count = bucket(load.batch)
    if placed_on.size != len(devices) or count % placed_on.shape["data"]:
        raise UsageError(
            f"mesh {dict(mesh)} on {len(devices)} devices: its sizes must fill them, and data must "
            f"divide the {count} slots of --batch {load.batch}"
        )
    frames = round(100 * load.audio_seconds)
    if audio_tokens(frames) > load.prompt_tokens:
        raise UsageError(
            f"{load.audio_seconds:g} s of audio are {audio_tokens(frames)} tokens, more than the "
            f"{load.prompt_tokens} of --prompt-tokens"
        )
    if load.prompt_tokens + load.new_tokens > model.decoder.max_positions:
        raise UsageError(
            f"--prompt-tokens {load.prompt_tokens} and --new-tokens {load.new_tokens} exceed the "
            f"model's {model.decoder.max_positions} positions"
        )
    pages = count // placed_on.shape["data"] * cache.pages_for(load.cache_positions)
    size = Size(count, pages, bucket(load.new_tokens, 64), logprobs=False)
    return on_mesh(model, compute, load, size, placed_on)


def on_mesh(model: ModelConfig, compute: Compute, load: Load, size: Size, mesh: Mesh) -> Serving:
    """Generation with a decode state of this size on a `sharding.serving_mesh`."""
    serving = Serving(model, compute, mesh, load, size, None, None)
    params = moss_audio.abstract_params(model, compute.dtype)
    with jax.set_mesh(mesh):
        params = jax.eval_shape(functools.partial(held, quantize=compute.quantize), params)
    params = placed(params, param_shardings(params, model, mesh))
    layer = jax.tree.map(_of_one_layer, params["language_model"]["layers"])
    return dataclasses.replace(
        serving,
        params=decoder.with_layers(params, (layer,) * model.decoder.layers),
        state=_state(serving, size.slots),
    )


def compile_prefill(serving: Serving) -> Compiled:
    """Compiles what the engine prefills at once: whole prompts, or the last piece of a long one.

    The encoder, a program of its own, is not in it. The peak is that of this program; the device
    also holds the decode state.
    """
    prompts, tokens = serving.load.prefill()
    groups = cache.groups_of(serving.state.cache)
    whole = tokens == serving.load.prompt_tokens
    rows, width = (groups, prompts * tokens) if whole else (groups * prompts, tokens)
    encoder, dtype = serving.model.encoder, serving.compute.dtype
    integers = jax.ShapeDtypeStruct((rows, width), "int32")
    features = (rows, width, encoder.output_dim)
    audio = (
        jax.ShapeDtypeStruct(features, dtype),
        jax.ShapeDtypeStruct((len(encoder.tap_layers), *features), dtype),
    )
    batch = dict.fromkeys(("tokens", "segment_ids", "audio_index"), integers)
    answers = _state(serving, groups * prompts).answers
    slots = jax.ShapeDtypeStruct((groups * prompts,), "int32")
    if whole:
        program, start = decode_state.prefill, ()
        batch["positions"] = integers
        tables = jax.ShapeDtypeStruct((groups, prompts, cache.pages_for(width)), "int32")
    else:
        program, start = decode_state.extend, (slots,)
        pages = cache.pages_for(serving.load.cache_positions)
        tables = jax.ShapeDtypeStruct((rows, pages), "int32")
    given = serving.params, serving.state
    with jax.set_mesh(serving.mesh):
        lowered = program.lower(
            *given, batch, tables, answers, slots, *start, audio, **serving.static
        )
    return compile_lowered(lowered, held_bytes(given), serving.mesh.size)


def compile_decode(serving: Serving) -> Compiled:
    """Compiles `decode_until`, a loop whose turns decode one token of every answer, cache full.

    The peak is that of this program; the device also holds the weights of encoder and adapters.
    """
    everywhere = NamedSharding(serving.mesh, P())
    number = jax.ShapeDtypeStruct((), "int32", sharding=everywhere)
    shape = serving.size.slots, cache.pages_for(serving.load.cache_positions)
    tables = jax.ShapeDtypeStruct(shape, "int32", sharding=everywhere)
    with jax.set_mesh(serving.mesh):
        lowered = decode_state.decode_until.lower(
            serving.params,
            serving.state,
            tables,
            number,
            number,
            **serving.static,
        )
    given = held_bytes([decoder_params(serving), serving.state])
    return compile_lowered(lowered, given, serving.mesh.size)


def decoder_params(serving: Serving) -> dict[str, Any]:
    """The parameters that a decode step reads."""
    names = ("language_model", "lm_head")
    return {name: serving.params[name] for name in names if name in serving.params}


def _of_one_layer(stacked: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    where = NamedSharding(stacked.sharding.mesh, P(*stacked.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype, sharding=where)


def _state(serving: Serving, count: int) -> decode_state.DecodeState:
    """The decode state of so many answers, with its shardings, as the engine makes it."""
    size = serving.size
    with jax.set_mesh(serving.mesh):
        made = jax.eval_shape(
            functools.partial(
                decode_state.empty_state,
                **serving.static,
                count=count,
                room=size.room,
                pages=size.pages,
                logprobs=size.logprobs,
            )
        )

    def place(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        dimensions = [ACTIVATIONS[name] for name in cache.DIMENSIONS[: leaf.ndim]]
        return NamedSharding(serving.mesh, fit(leaf.shape, dimensions, serving.mesh))

    everywhere = jax.tree.map(lambda _: NamedSharding(serving.mesh, P()), made.answers)
    return placed(made, decode_state.DecodeState(everywhere, jax.tree.map(place, made.cache)))
