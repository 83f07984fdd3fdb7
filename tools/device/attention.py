"""The device's attention kernel beside plain attention, on packed rows of the 4B's shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moss_audio_jax.ops.attention import attention
from tools.device.measure import MOST, Sizes, difference, kernel, memory, partition, seconds

# The most that outputs and gradients of the packed layout may differ from those under a mask, as a
# share of the largest value: some rounding of bfloat16.
TOLERANCE = 0.02
_RESULTS = ("out", "d_query", "d_key", "d_value")


def measure(setting: str, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """The kernel with packing as a mask, in its packed layout, and plain attention.

    For each the worst error of output and gradients, as a share of the largest value of a float32
    reference (of the first row), and milliseconds forward, and forward and backward. The packed
    layout is timed only if it agrees with the mask.
    """
    arrays = _arrays(sizes, sizes.attention_tokens // sizes.attention_length)
    query, key, value, _, segments = arrays
    rows, length, heads, dim = query.shape
    one = [x[:1].astype(jnp.float32) for x in arrays[:4]]
    reference = jax.device_get(_both("xla", 0)(*one, segments[:1]))
    # Scores below the diagonal, all segments' alike: 4 operations a score and place of a head, and
    # 2.5 times as many backward.
    work = 2.0 * rows * heads * dim * length**2
    masked = None
    for name, most in dict.fromkeys(((kernel(), 0), (kernel(), MOST), ("xla", 0))):
        program = _both(name, most).lower(*arrays).compile()
        values = program(*arrays)
        found: dict[str, Any] = {
            "attention": name,
            "most_segments": most,
            "shape": [rows, length, heads, dim],
            "finite": all(bool(jnp.isfinite(x).all()) for x in values),
            "error": _errors([x[:1] for x in values], reference),
        }
        if most:
            found["beside_mask"] = _errors(values, masked)
            found["agrees"] = max(found["beside_mask"].values()) <= TOLERANCE
        masked = values if masked is None else masked
        if found.get("agrees", True):
            forward = jax.jit(functools.partial(_forward, name, most))
            here = seconds(lambda: forward(query, key, value, segments), sizes.repeats, 4)  # noqa: B023
            there = seconds(lambda: program(*arrays), sizes.repeats, 4)  # noqa: B023
            found |= {
                "forward_ms": round(1e3 * here, 3),
                "both_ms": round(1e3 * there, 3),
                "forward_tflops": round(work / here / 1e12, 1),
                "both_tflops": round(3.5 * work / there / 1e12, 1),
                **memory(program),
            }
        yield found


def check_packed(sizes: Sizes) -> dict[str, float]:
    """How far the packed layout is from the mask, on rows as the train step has them.

    Raises:
      RuntimeError: too far.
    """
    arrays = _arrays(sizes, 2)
    errors = _errors(_both(kernel(), MOST)(*arrays), _both(kernel(), 0)(*arrays))
    if not max(errors.values()) <= TOLERANCE:  # NaN too
        raise RuntimeError(f"the packed layout is wrong: beside the mask it differs by {errors}")
    return errors


def _arrays(sizes: Sizes, rows: int) -> tuple[jax.Array, ...]:
    """Query, key, value, a cotangent of the output, and segments; a sixteenth is padding."""
    decoder, length = sizes.model.decoder, sizes.attention_length
    rng = np.random.default_rng(0)
    segments = np.zeros((rows, length), np.int32)
    for row in segments:
        parts = partition(rng, length - length // 16, length // 4)
        row[: sum(parts)] = np.repeat(1 + np.arange(len(parts)), parts)
    heads = (decoder.heads, decoder.kv_heads, decoder.kv_heads, decoder.heads)
    return (
        *(
            jax.random.normal(key, (rows, length, count, decoder.head_dim), jnp.bfloat16)
            for key, count in zip(jax.random.split(jax.random.key(0), 4), heads, strict=True)
        ),
        jnp.asarray(segments),
    )


def _forward(name: str, most: int, query, key, value, segments) -> jax.Array:
    ids = (segments, segments)
    return attention(
        query, key, value, causal=True, segment_ids=ids, most_segments=most, implementation=name
    )


def _both(name: str, most: int) -> Callable:
    """The output, and the gradients of query, key and value."""

    @jax.jit
    def both(query, key, value, cotangent, segments):
        run = functools.partial(_forward, name, most, segments=segments)
        out, pull = jax.vjp(run, query, key, value)
        return out, *pull(cotangent)

    return both


def _errors(found: Any, expected: Any) -> dict[str, float]:
    return {name: difference(x, y) for name, x, y in zip(_RESULTS, found, expected, strict=True)}
