"""How fast training and generation are on the accelerator at hand: one JSON line a measurement.

    python tools/device/bench.py [--parts attention,train,decode,prefill] [--budget 110]
    python tools/device/bench.py --tiny        # the same code in small, on any machine

  attention  the device's kernel (cuDNN, splash) beside plain attention, on packed rows of the 4B
             decoder's shape: worst error of output and gradients over the largest value of a
             float32 reference, and milliseconds forward and forward + backward
  train      the train step (train/step.py; float32 master and AdamW of every weight, bfloat16
             compute) of a model as wide as the released 4B with fewer layers: seconds a step, MFU.
             `mfu` counts as models/flops.py, and so the training log, does: the head for every
             token. `mfu_labelled` counts the head where labels are, as the loss computes it.
  decode     the engine's loop over tokens with the released 4B: seconds a step, bytes that a step
             must read (weights, and the cache as far as it is read) over seconds
  prefill    8 prompts of 2,048 tokens with 120 s of sound each

Weights are random. Compiling is not part of a time (`compile_seconds` is apart). One part's failure
is a line with "error", and the next goes on. After --budget seconds nothing new begins, and parts
that go before leave their share to those behind. `program_gib` is what the compiler has planned for
the program, `peak_gib` the most the process has held since it began.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")  # before JAX: 0.75 by itself

import jax

from moss_audio_jax.config import RELEASED, DecoderConfig, EncoderConfig, ModelConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.device.attention import bench_attention
from tools.device.generation import bench_decode, bench_prefill
from tools.device.measure import GIB, Clock, kernel
from tools.device.training import bench_train

# kind:length:remat:attention; auto is the device's kernel.
TRAIN = "audio:8192:projections:auto,text:8192:projections:auto,audio:8192:projections:xla"
DECODE = "none:1,none:64,weights:1,weights+cache:64,none:16,weights:64,weights+cache:1"
TINY = ModelConfig(
    EncoderConfig(
        d_model=64, layers=2, heads=4, ffn_dim=128, conv_channels=16, output_dim=64, tap_layers=(0,)
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
)

PARTS = {
    "attention": bench_attention,
    "train": bench_train,
    "decode": bench_decode,
    "prefill": bench_prefill,
}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = functools.partial(str.split, sep=",")
    parser.add_argument("--parts", type=names, default=list(PARTS))
    parser.add_argument("--budget", type=float, default=110, help="seconds")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--decoder-layers", type=int, default=12)
    parser.add_argument("--encoder-layers", type=int, default=8)
    parser.add_argument("--encoder-chunks", type=int, default=32, help="taken at a time")
    parser.add_argument(
        "--tokens", type=int, default=0, help="of a step; default 32768, half of it below 100 GiB"
    )
    parser.add_argument("--train", type=names, default=TRAIN, help="kind:length:remat:attention,..")
    parser.add_argument("--decode", type=names, default=DECODE, help="quantize:batch,..")
    parser.add_argument(
        "--steps", type=int, default=4, help="that are timed, after one that is not"
    )
    parser.add_argument(
        "--xla",
        type=names,
        default=None,
        metavar="KEY=VALUE,..",
        help="compiler options of all but decode; '' for none; default on a GPU "
        "xla_gpu_enable_triton_gemm=false: fewer to try",
    )
    parser.add_argument("--decode-xla", type=names, default=[], metavar="KEY=VALUE,..")
    args = parser.parse_args()
    if wrong := set(args.parts) - set(PARTS):
        parser.error(f"--parts: {sorted(wrong)[0]!r}; expected some of {', '.join(PARTS)}")
    args.parts = [part for part in PARTS if part in args.parts]
    if args.xla is None:
        args.xla = ["xla_gpu_enable_triton_gemm=false"] if kernel() == "cudnn" else []
    args.xla, args.decode_xla = _options(args.xla), _options(args.decode_xla)
    stats = jax.local_devices()[0].memory_stats() or {}
    args.tokens = args.tokens or (32768 if stats.get("bytes_limit", 0) > 100 * GIB else 16384)
    args.whole, args.lengths, args.attention_tokens = RELEASED["4b"], [4096, 8192], 16384
    args.positions, args.decode_steps = 2048, 32
    args.prefill_rows, args.prefill_tokens, args.prefill_seconds = 8, 2048, 120.0
    if args.tiny:
        args.whole, args.lengths, args.attention_tokens = TINY, [256], 512
        args.decoder_layers = args.encoder_layers = 2
        args.tokens, args.positions, args.decode_steps, args.steps = 256, 128, 4, 2
        args.prefill_rows, args.prefill_tokens, args.prefill_seconds = 2, 128, 4.0
        args.train = [setting.replace("8192", "128") for setting in args.train[:2]]
        args.decode = args.decode[:1] + args.decode[3:4]
        if jax.default_backend() == "cpu":  # as in the tests: compile fast, never mind the result
            args.xla |= {"xla_backend_optimization_level": 0}
            args.xla |= {"xla_llvm_disable_expensive_passes": True}
    return args


def _options(words: list[str]) -> dict[str, Any]:
    """{key: value} of KEY=VALUE; as JSON where it is: XLA takes no "false" for a truth value."""
    pairs = (word.split("=", 1) for word in words if word)
    return {key: _value(text) for key, text in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main() -> None:
    args = parsed()
    clock = Clock(args.budget, args.parts)
    device = jax.devices()[0]
    stats = device.memory_stats()
    clock.emit(
        "device",
        kind=device.device_kind,
        count=jax.device_count(),
        jax=jax.__version__,
        kernel=kernel(),
        xla=args.xla,
        decode_xla=args.decode_xla,
        memory=stats and round(stats.get("bytes_limit", 0) / GIB, 1),
    )
    for part in args.parts:
        clock.guarded(part, None, functools.partial(PARTS[part], args, clock))
        gc.collect()


if __name__ == "__main__":
    main()
