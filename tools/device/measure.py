"""What every part of tools/device/run.py measures with, and the sizes that it measures."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moss_audio_jax import devices
from moss_audio_jax.config import RELEASED, DecoderConfig, EncoderConfig, ModelConfig

GIB = 2**30
MOST = 16  # segments of a packed row, where it is told how many there are


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Attributes:
    model: whose widths are measured.
    decoder_layers, encoder_layers: of the train step, whose weights have float32 moments beside
      them.
    train_length, train_tokens: of a row, and of a step; half of it on a small device.
    attention_length, attention_tokens: of a row, and of all.
    positions, steps: of the cache, and those that one call decodes.
    prompts, prompt_tokens, prompt_seconds: of the prefill.
    copied: bytes of the array whose copying gives the memory's bandwidth.
    repeats: of each measurement, beside one that does not count.
    """

    model: ModelConfig = RELEASED["4b"]
    decoder_layers: int = 12
    encoder_layers: int = 8
    train_length: int = 8192
    train_tokens: int = 32768
    attention_length: int = 8192
    attention_tokens: int = 16384
    positions: int = 2048
    steps: int = 32
    prompts: int = 8
    prompt_tokens: int = 2048
    prompt_seconds: float = 120.0
    copied: int = GIB
    repeats: int = 5


TINY = Sizes(
    ModelConfig(
        EncoderConfig(
            d_model=64,
            layers=2,
            heads=4,
            ffn_dim=128,
            conv_channels=16,
            output_dim=64,
            tap_layers=(0,),
        ),
        DecoderConfig(
            hidden_size=64,
            ffn_dim=128,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=16,
            vocab_size=512,
            max_positions=4096,
        ),
        adapter_dim=128,
        inject_layers=1,
    ),
    decoder_layers=2,
    encoder_layers=2,
    train_length=512,
    train_tokens=1024,
    attention_length=256,
    attention_tokens=512,
    positions=128,
    steps=4,
    prompts=2,
    prompt_tokens=128,
    prompt_seconds=4.0,
    copied=2**20,
    repeats=2,
)


def describe(sizes: Sizes) -> dict[str, Any]:
    """The device, and how fast it copies: bytes read and written a second."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    source = jnp.zeros(sizes.copied // 4, jnp.float32)
    spent = seconds(lambda: _copy(source), sizes.repeats)
    return {
        "device": device.device_kind,
        "count": jax.device_count(),
        "jax": jax.__version__,
        "kernel": kernel(),
        "memory_gib": round(stats.get("bytes_limit", 0) / GIB, 1),
        "copy_gb_per_second": round(2 * source.nbytes / spent / 1e9, 1),
        "copy_of_bandwidth": share(2 * source.nbytes / spent, bandwidth()),
    }


@jax.jit
def _copy(x: jax.Array) -> jax.Array:
    return x + 1


def seconds(call: Callable[[], Any], repeats: int, together: int = 1) -> float:
    """Median of `repeats` times of `call`, after one that does not count; `together` in a row."""
    jax.block_until_ready(call())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(together):
            out = call()
        jax.block_until_ready(out)
        found.append((time.perf_counter() - start) / together)
    return statistics.median(found)


def compiled(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
    """The program, and the seconds it took to compile."""
    start = time.perf_counter()
    program = lowered.compile()
    return program, round(time.perf_counter() - start, 1)


def memory(program: jax.stages.Compiled) -> dict[str, float]:
    """GiB that the compiler has planned for a program, and the most the process has held."""
    found = program.memory_analysis()
    if found is None:
        return {}
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "program_gib": round((held + found.temp_size_in_bytes) / GIB, 2),
        "peak_gib": round(stats.get("peak_bytes_in_use", 0) / GIB, 2),
    }


def kernel() -> str:
    """The attention kernel of the device at hand."""
    return {"gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend(), "xla")


def peak() -> float | None:
    """bfloat16 FLOP/s of the device at hand; None where it is not in the table."""
    device = devices.of(jax.devices()[0].device_kind)
    return device and device.peak


def bandwidth() -> float | None:
    """Bytes/s of its memory, likewise."""
    device = devices.of(jax.devices()[0].device_kind)
    return device and device.hbm_bandwidth


def share(value: float, most: float | None) -> float | None:
    return most and round(value / most, 4)


def difference(found: Any, expected: Any) -> float:
    """The largest difference of two arrays, as a share of the largest expected value."""
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def partition(rng: np.random.Generator, total: int, most: int) -> list[int]:
    """Fewer than MOST sizes of 1 to `most` that make up `total`: segments of a row, and padding."""
    while True:
        ends = np.cumsum(rng.integers(1, most + 1, MOST - 1))
        if ends[-1] >= total:
            ends = np.minimum(ends[: 1 + np.argmax(ends >= total)], total)
            return np.diff(ends, prepend=0).tolist()
