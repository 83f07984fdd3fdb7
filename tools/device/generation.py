"""Decoding and prefill by the engine's own programs, of the released 4B."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moss_audio_jax import devices
from moss_audio_jax.config import Compute, ModelConfig, ProcessorConfig
from moss_audio_jax.data.batch import Example, bucket_shape, make_batch, packed_shape
from moss_audio_jax.generate import decode_state
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.generate.vocabulary import Vocabulary, vocabulary
from moss_audio_jax.models import decoder, flops, moss_audio
from moss_audio_jax.models.quantize import quantize
from moss_audio_jax.sharding import as_mesh
from tools.device.measure import Clock, compiled, kernel, memory, seconds, share


@functools.cache
def released(model: ModelConfig, how: str = "none") -> Any:
    """Random bfloat16 weights, or int8, made on the device in the form that `MossAudio` holds."""

    def init(key: jax.Array) -> Any:
        params = moss_audio.init_params(key, model, "bfloat16")
        return decoder.unrolled(params if how == "none" else quantize(params, model))

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
    state = decode_state.empty_state(**static, count=count, room=room, size=size)
    answers = state.answers
    return state._replace(
        answers=answers._replace(
            state=jnp.full_like(answers.state, decode_state.RUNNING),
            position=jnp.full_like(answers.position, size // 2),
            limit=jnp.full_like(answers.limit, room),
        )
    )


def bench_decode(args: argparse.Namespace, clock: Clock) -> None:
    model = args.whole

    def one(setting: str) -> dict[str, Any]:
        how, _, count = setting.partition(":")
        params = released(model, "none" if how == "none" else "weights")
        static = static_of(model, how)
        size, steps = args.positions, args.decode_steps
        room = 16 * steps
        state = running_state(static, int(count), size, room)
        numbers = jnp.int32(steps), jnp.int32(1)
        lowered = decode_state.decode_until.lower(params, state, *numbers, reach=size, **static)
        program, compile_seconds = compiled(lowered, args.decode_xla)
        held = {"state": state}
        del state

        def call() -> Any:
            held["state"] = program(params, held["state"], *numbers)
            return held["state"].answers.count

        spent = seconds(call, 5) / steps
        done = int(held["state"].answers.count.min())
        if done != 6 * steps:
            raise RuntimeError(f"{done} tokens in {6 * steps} steps: answers have ended")
        # Every weight of layers, norm and head once; of the embedding a row an answer.
        read = {"layers": params["language_model"]["layers"], "head": params["lm_head"]}
        weight_bytes = sum(x.nbytes for x in jax.tree.leaves(read))
        cache_bytes = sum(x.nbytes for x in jax.tree.leaves(held["state"].cache))
        total = weight_bytes + cache_bytes
        device = devices.of(jax.devices()[0].device_kind)
        most = device and device.hbm_bandwidth
        return {
            "quantize": how,
            "batch": int(count),
            "positions": size,
            "compile_seconds": compile_seconds,
            "ms_per_step": round(1e3 * spent, 3),
            "tokens_per_second": round(int(count) / spent, 1),
            "weight_gb": round(weight_bytes / 1e9, 3),
            "cache_gb": round(cache_bytes / 1e9, 3),
            "gb_per_second": round(total / spent / 1e9, 1),
            "of_bandwidth": share(total / spent, most),
            **memory(program),
        }

    with jax.set_mesh(as_mesh(None)):
        for setting in clock.settings("decode", args.decode):
            clock.guarded("decode", setting, functools.partial(one, setting))


def bench_prefill(args: argparse.Namespace, clock: Clock) -> None:
    model, rows = args.whole, args.prefill_rows
    rng = np.random.default_rng(0)
    frames, static = round(100 * args.prefill_seconds), static_of(model, "none")
    placeholder = static["vocab"].audio_token_id % model.decoder.vocab_size

    def one(implementation: str) -> dict[str, Any]:
        compute = dataclasses.replace(static["compute"], attention=implementation)
        mel = rng.standard_normal((model.encoder.mel_bins, frames), np.float32)
        ids = rng.integers(0, placeholder, args.prefill_tokens).astype(np.int32)
        ids[8 : 8 + -(-frames // 8)] = placeholder
        examples = [Example(ids, (mel,))] * rows
        shape = bucket_shape(examples, model.encoder, rows)
        row = packed_shape([examples], model.encoder, rows)  # as the engine lays them out
        batch = make_batch([examples], row, model.encoder, placeholder)
        requests = [(e, Sampling(64)) for e in examples]
        fresh = decode_state.new_answers(requests, [64] * rows, 64, rows, static["vocab"])
        batch, fresh = jax.device_put((batch, fresh))
        params = released(model)
        lowered = decode_state.prefill.lower(
            params, batch, fresh, length=shape.tokens, **static | {"compute": compute}
        )
        program, compile_seconds = compiled(lowered, args.xla)
        spent = seconds(lambda: program(params, batch, fresh), args.steps)
        tokens = rows * shape.tokens
        # The head works for each prompt's last token alone.
        headless = dataclasses.replace(model.decoder, vocab_size=0)
        work = (
            flops.decoder_forward(headless, tokens, shape.tokens)
            + flops.encoder_forward(model.encoder, rows * shape.chunks, shape.frames)
            + flops.adapter_forward(model, rows * shape.chunks * shape.frames // 8)
        )
        device = devices.of(jax.devices()[0].device_kind)
        return {
            "shape": [rows, shape.tokens, shape.chunks],
            "attention": implementation,
            "compile_seconds": compile_seconds,
            "seconds": round(spent, 4),
            "tokens_per_second": round(rows * args.prefill_tokens / spent),
            "audio_seconds_per_second": round(rows * args.prefill_seconds / spent),
            "tflop": round(work / 1e12, 2),
            "mfu": share(work / spent, device and device.peak),
            **memory(program),
        }

    with jax.set_mesh(as_mesh(None)):
        for name in clock.settings("prefill", list(dict.fromkeys((kernel(), "xla")))):
            clock.guarded("prefill", name, functools.partial(one, name))
