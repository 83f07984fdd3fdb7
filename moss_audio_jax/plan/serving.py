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
from moss_audio_jax.data.batch import Shape, bucket, make_batch, pieces_of
from moss_audio_jax.errors import UsageError
from moss_audio_jax.generate import decode_state
from moss_audio_jax.generate.families import PREFILL_TOKENS
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
    ways,
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

    def prefill(self, model: ModelConfig) -> Shape:
        """The shape of the batch of prompts that the engine prefills together."""
        frames = round(100 * self.audio_seconds)
        tokens = bucket(self.prompt_tokens, 128)
        chunked = model.encoder.attention == "chunked"
        size = model.encoder.chunk_frames
        return Shape(
            rows=bucket(min(self.batch, max(1, PREFILL_TOKENS // tokens))),
            tokens=min(tokens, model.decoder.max_positions),
            chunks=bucket(len(pieces_of([frames] if frames else [], model.encoder))),
            frames=size if chunked else size * bucket(-(-frames // size)),
        )


@dataclasses.dataclass(frozen=True)
class Serving:
    """Generation without arrays: what the compiler needs to know about it.

    Attributes:
      params: ShapeDtypeStructs with shardings; quantised if `compute` says so.
      state: decode state of the answers, also as ShapeDtypeStructs with shardings.
    """

    model: ModelConfig
    compute: Compute
    mesh: Mesh
    load: Load
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
    serving = Serving(model, compute, placed_on, load, None, None)
    params = moss_audio.abstract_params(model, compute.dtype)
    with jax.set_mesh(placed_on):
        params = jax.eval_shape(functools.partial(held, quantize=compute.quantize), params)
    params = placed(params, param_shardings(params, model, placed_on))
    layer = jax.tree.map(_of_one_layer, params["language_model"]["layers"])
    return dataclasses.replace(
        serving,
        params=decoder.with_layers(params, (layer,) * model.decoder.layers),
        state=_state(serving, count),
    )


def compile_prefill(serving: Serving) -> Compiled:
    """Compiles `prefill` of as many prompts as the engine prefills together.

    The peak is that of this program; the device also holds the decode state.
    """
    shape = serving.load.prefill(serving.model)
    with jax.set_mesh(serving.mesh):
        rows = ways((shape.rows,), "batch")
    prompts = shape.rows // rows  # packed in a row
    row = Shape(1, prompts * shape.tokens, prompts * shape.chunks, shape.frames)
    batch = {
        name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)
        for name, x in make_batch([], row, serving.model.encoder, 0).items()
    }
    compute = dataclasses.replace(
        serving.compute, quantize="none"
    )  # its cache is not int8, as in the engine
    answers = _state(serving, shape.rows).answers
    with jax.set_mesh(serving.mesh):
        lowered = decode_state.prefill.lower(
            serving.params,
            batch,
            answers,
            length=shape.tokens,
            **serving.static | {"compute": compute},
        )
    given = held_bytes([serving.params, answers])
    return compile_lowered(lowered, given, serving.mesh.size)


def compile_decode(serving: Serving) -> Compiled:
    """Compiles `decode_until`, a loop whose turns decode one token of every answer, cache full.

    The peak is that of this program; the device also holds the weights of encoder and adapters.
    """
    number = jax.ShapeDtypeStruct((), "int32", sharding=NamedSharding(serving.mesh, P()))
    with jax.set_mesh(serving.mesh):
        lowered = decode_state.decode_until.lower(
            serving.params,
            serving.state,
            number,
            number,
            **serving.static,
            reach=cache.length_of(serving.state.cache),
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
    """The decode state, with its shardings, as the engine makes it."""
    made = jax.eval_shape(
        functools.partial(
            decode_state.empty_state,
            **serving.static,
            count=count,
            room=bucket(serving.load.new_tokens, 64),
            size=serving.load.cache_positions,
        )
    )

    def place(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        dimensions = [ACTIVATIONS[name] for name in cache.DIMENSIONS[: leaf.ndim]]
        return NamedSharding(serving.mesh, fit(leaf.shape, dimensions, serving.mesh))

    everywhere = jax.tree.map(lambda _: NamedSharding(serving.mesh, P()), made.answers)
    return placed(made, decode_state.DecodeState(everywhere, jax.tree.map(place, made.cache)))
