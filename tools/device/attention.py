"""The device's attention kernel beside plain attention, on packed rows of the 4B's shape."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moss_audio_jax.ops.attention import attention
from tools.device.measure import Clock, compiled, failure, kernel, partition, seconds


def bench_attention(args: argparse.Namespace, clock: Clock) -> None:
    for length in clock.settings("attention", args.lengths):
        first = length == args.lengths[0]
        run = functools.partial(one_attention, args, length, compare=first)
        clock.guarded("attention", length, run)


def one_attention(args: argparse.Namespace, length: int, compare: bool) -> dict[str, Any]:
    decoder = args.whole.decoder
    rows = max(1, args.attention_tokens // length)
    rng = np.random.default_rng(0)
    segments = np.zeros((rows, length), np.int32)
    for row in segments:  # packed; the last sixteenth is padding
        sizes = partition(rng, length - length // 16, length // 4)
        row[: sum(sizes)] = np.repeat(1 + np.arange(len(sizes)), sizes)
    segments = jnp.asarray(segments)
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, cotangent = (
        jax.random.normal(k, (rows, length, heads, decoder.head_dim), jnp.bfloat16)
        for k, heads in zip(
            keys, (decoder.heads, decoder.kv_heads, decoder.kv_heads, decoder.heads), strict=True
        )
    )

    def forward(name: str, query, key, value, segments):
        ids = (segments, segments)
        return attention(query, key, value, causal=True, segment_ids=ids, implementation=name)

    def both(name: str, query, key, value, segments, cotangent):
        out, pull = jax.vjp(lambda *x: forward(name, *x, segments), query, key, value)
        return out, *pull(cotangent)

    def program(run: Callable, name: str, *inputs: Any) -> Callable:
        lowered = jax.jit(functools.partial(run, name)).lower(*inputs)
        return functools.partial(compiled(lowered, args.xla)[0], *inputs)

    result: dict[str, Any] = {"rows": rows, "length": length}
    reference = None
    if compare:  # of one row: float32 takes much memory
        one = [x[:1].astype(jnp.float32) for x in (query, key, value, cotangent)]
        try:
            reference = jax.device_get(program(both, "xla", *one[:3], segments[:1], one[3])())
        except Exception as error:
            result["reference"] = failure(error)
        del one
    # Scores below the diagonal, all segments' alike: 4 operations a score and place of a head, and
    # 2.5 times as many backward.
    work = 2.0 * rows * decoder.heads * decoder.head_dim * length**2

    def measured(name: str) -> dict[str, Any]:
        out = program(forward, name, query, key, value, segments)
        all_of_it = program(both, name, query, key, value, segments, cotangent)
        values = all_of_it()
        found: dict[str, Any] = {"finite": all(bool(jnp.isfinite(x).all()) for x in values)}
        if reference is not None:
            found["error"] = {
                what: float(np.abs(np.asarray(x[:1], np.float32) - y).max() / np.abs(y).max())
                for what, x, y in zip(
                    ("out", "d_query", "d_key", "d_value"), values, reference, strict=True
                )
            }
        del values
        here = seconds(out, 5, 4)
        there = seconds(all_of_it, 5, 4)
        return found | {
            "forward_ms": round(1e3 * here, 3),
            "both_ms": round(1e3 * there, 3),
            "forward_tflops": round(work / here / 1e12, 1),
            "both_tflops": round(3.5 * work / there / 1e12, 1),
        }

    for name in dict.fromkeys((kernel(), "xla")):
        try:
            result[name] = measured(name)
        except Exception as error:  # of the kernel, say: plain attention goes on
            result[name] = failure(error)
    if compare and kernel() == "cudnn":
        try:
            result["sees_nothing_finite"] = sees_nothing(query, key, value, segments)
        except Exception as error:
            result["sees_nothing_finite"] = failure(error)
    return result


def sees_nothing(query, key, value, segments) -> bool:
    """Are outputs and gradients finite where the last queries see no key?"""

    def total(*qkv):
        ids = (segments.at[:, -64:].set(-1), segments)
        out = attention(*qkv, causal=True, segment_ids=ids, implementation="cudnn")
        return jnp.sum(out.astype(jnp.float32) ** 2)

    found = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(query, key, value)
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))
