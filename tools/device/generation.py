"""Decoding and prefill by the engine's own programs, of the released 4B."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moss_audio_jax.config import Compute, ModelConfig, ProcessorConfig
from moss_audio_jax.data.batch import Example, Shape, bucket_shape, make_batch, size_of
from moss_audio_jax.data.packing import strips_of
from moss_audio_jax.generate import decode_state
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.generate.vocabulary import Vocabulary, vocabulary
from moss_audio_jax.models import decoder, flops, moss_audio
from moss_audio_jax.models.cache import pages_for
from moss_audio_jax.models.quantize import held
from moss_audio_jax.sharding import as_mesh
from tools.device.measure import Sizes, bandwidth, compiled, memory, peak, seconds, share


def released(model: ModelConfig, how: str = "none") -> Any:
    """Random bfloat16 weights, or int8, made on the device in the form that `MossAudio` holds."""

    def init(key: jax.Array) -> Any:
        params = moss_audio.init_params(key, model, "bfloat16")
        return decoder.unrolled(held(params, how))

    return jax.block_until_ready(jax.jit(init)(jax.random.key(0)))


def static_of(model: ModelConfig, how: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """The static arguments of the engine's programs."""
    vocab: Vocabulary = vocabulary(model, None, ProcessorConfig())
    vocab = dataclasses.replace(vocab, stop=())  # no answer ends before its time
    return {"config": model, "compute": Compute(dtype, quantize=how), "vocab": vocab}


def running_state(
    static: dict[str, Any], count: int, size: int, room: int
) -> decode_state.DecodeState:
    """A state of `count` answers in the making, whose caches of `size` tokens are half full."""
    pages = count * pages_for(size)
    state = decode_state.empty_state(**static, count=count, room=room, pages=pages)
    answers = state.answers
    return state._replace(
        answers=answers._replace(
            state=jnp.full_like(answers.state, decode_state.RUNNING),
            position=jnp.full_like(answers.position, size // 2),
            limit=jnp.full_like(answers.limit, room),
        )
    )


def tables_of(count: int, size: int) -> jax.Array:
    """The pages of `count` answers with `size` tokens each, int32 [count, pages]."""
    return jnp.arange(count * pages_for(size), dtype=jnp.int32).reshape(count, -1)


def measure_decode(setting: str, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """The engine's loop over tokens: seconds a step, and what a step must read over seconds: the
    weights of layers and head once, and the cache.

    Args:
      setting: "QUANTIZE:BATCH", such as "none:1" and "weights+cache:64".
    """
    how, _, count = setting.partition(":")
    model, size, steps = sizes.model, sizes.positions, sizes.steps
    calls = sizes.repeats + 1
    with jax.set_mesh(as_mesh(None)):
        params = released(model, "none" if how == "none" else "weights")
        static = static_of(model, how)
        state = running_state(static, int(count), size, (calls + 1) * steps)
        numbers = jnp.int32(steps), jnp.int32(1)
        tables = tables_of(int(count), size)
        lowered = decode_state.decode_until.lower(params, state, tables, *numbers, **static)
        program, compile_seconds = compiled(lowered)
        held = {"state": state}
        del state

        def call() -> Any:
            held["state"] = program(params, held["state"], tables, *numbers)
            return held["state"].answers.count

        spent = seconds(call, sizes.repeats) / steps
    done = int(held["state"].answers.count.min())
    if done != calls * steps:
        raise RuntimeError(f"{done} tokens in {calls * steps} steps: answers have ended")
    # Of the embedding only a row for each answer is read.
    read = {"layers": params["language_model"]["layers"], "head": params["lm_head"]}
    weight_bytes = sum(x.nbytes for x in jax.tree.leaves(read))
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(held["state"].cache))
    total = weight_bytes + cache_bytes
    yield {
        "quantize": how,
        "batch": int(count),
        "positions": size,
        "compile_seconds": compile_seconds,
        "ms_per_step": round(1e3 * spent, 3),
        "tokens_per_second": round(int(count) / spent, 1),
        "weight_gb": round(weight_bytes / 1e9, 3),
        "cache_gb": round(cache_bytes / 1e9, 3),
        "gb_per_second": round(total / spent / 1e9, 1),
        "of_bandwidth": share(total / spent, bandwidth()),
        **memory(program),
    }


def measure_prefill(setting: str, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Prompts with sound, by the attention that `setting` names ("auto": the device's kernel)."""
    model, rows = sizes.model, sizes.prompts
    rng = np.random.default_rng(0)
    frames, static = round(100 * sizes.prompt_seconds), static_of(model, "none")
    placeholder = static["vocab"].audio_token_id % model.decoder.vocab_size
    mel = rng.standard_normal((model.encoder.mel_bins, frames), np.float32)
    ids = rng.integers(0, placeholder, sizes.prompt_tokens).astype(np.int32)
    ids[8 : 8 + -(-frames // 8)] = placeholder
    examples = [Example(ids, (mel,))] * rows
    shape = bucket_shape(examples, model.encoder, rows)
    pieces = rows * size_of((mel,), model.encoder)
    strips = strips_of(pieces, shape.room())
    row = Shape(1, rows * shape.tokens, strips, shape.frames)  # packed as by the engine
    batch = make_batch([examples], row, model.encoder, placeholder)
    sound = batch.pop("mels"), batch.pop("frames")
    requests = [(e, Sampling(64)) for e in examples]
    fresh = decode_state.new_answers(requests, [64] * rows, 64, static["vocab"])
    tables = tables_of(rows, shape.tokens)[None]
    static["compute"] = dataclasses.replace(static["compute"], attention=setting)
    heard = {"config": model.encoder, "compute": static["compute"]}
    with jax.set_mesh(as_mesh(None)):
        pages = rows * pages_for(shape.tokens)
        state = decode_state.empty_state(**static, count=rows, room=64, pages=pages)
        held = {"state": state}
        batch, fresh, sound = jax.device_put((batch, fresh, sound))
        params = released(model)
        encode, _ = compiled(decode_state.encode.lower(params["audio_encoder"], *sound, **heard))
        audio = encode(params["audio_encoder"], *sound)
        given = batch, tables, fresh, jnp.arange(rows)
        program, compile_seconds = compiled(
            decode_state.prefill.lower(params, state, *given, audio=audio, **static)
        )
        del state

        def call() -> Any:
            audio = encode(params["audio_encoder"], *sound)
            held["state"] = program(params, held["state"], *given, audio=audio)
            return held["state"].answers.count

        spent = seconds(call, sizes.repeats)
    tokens = rows * shape.tokens
    # The head works for each prompt's last token alone.
    headless = dataclasses.replace(model.decoder, vocab_size=0)
    work = (
        flops.decoder_forward(headless, tokens, shape.tokens)
        + flops.encoder_forward(model.encoder, rows * shape.chunks, shape.frames)
        + flops.adapter_forward(model, rows * shape.chunks * shape.frames // 8)
    )
    yield {
        "shape": [rows, shape.tokens, shape.chunks],
        "attention": setting,
        "compile_seconds": compile_seconds,
        "seconds": round(spent, 4),
        "tokens_per_second": round(rows * sizes.prompt_tokens / spent),
        "audio_seconds_per_second": round(rows * sizes.prompt_seconds / spent),
        "tflop": round(work / 1e12, 2),
        "mfu": share(work / spent, peak()),
        **memory(program),
    }
