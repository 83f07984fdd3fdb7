"""A step of decoding: milliseconds, bytes it must read, memory that its program takes.

    python tools/bench/decode.py [--size 4b] [--layers 6] [--batch 1] [--positions 512]
        [--tokens 1] [--dtype float32] [--quantize none] [--rounds 5]

The engine's loop over tokens (`generate.decode_state.decode_until`), 8 steps a round, of a released
size's width with fewer layers and an eighth of its vocabulary, random weights, caches half full.
With `--tokens 8`, that over drafts of 7 (`draft_until`), which cost the same right or wrong.
Prints one JSON line: median milliseconds of processor time a step on a CPU, elsewhere of the clock,
their range, seconds to compile, `read_gb`, what a step must read, and `temporaries_gb` of the
program.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moss_audio_jax.config import QUANTIZE, RELEASED
from moss_audio_jax.generate import decode_state
from moss_audio_jax.models import decoder as decoder_module
from moss_audio_jax.models import moss_audio
from moss_audio_jax.models.quantize import held
from moss_audio_jax.sharding import as_mesh, platform
from tools.device.generation import running_state, static_of, tables_of
from tools.device.measure import compiled

STEPS = 8


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=RELEASED, default="4b")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--positions", type=int, default=512, help="of the cache, all of them read")
    parser.add_argument("--tokens", type=int, default=1, help="of an answer in a step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantize", choices=QUANTIZE, default="none")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    args = parsed()
    model = RELEASED[args.size]
    decoder = dataclasses.replace(
        model.decoder, layers=args.layers, vocab_size=model.decoder.vocab_size // 8
    )
    inject = min(model.inject_layers, args.layers)
    model = dataclasses.replace(model, decoder=decoder, inject_layers=inject)
    static = static_of(model, args.quantize, args.dtype)

    @jax.jit
    def init(key: jax.Array) -> Any:
        params = moss_audio.init_params(key, model, args.dtype)
        params = {name: params[name] for name in ("language_model", "lm_head")}
        return held(params, args.quantize)

    times = []
    clock = time.process_time if platform() == "cpu" else time.perf_counter
    with jax.set_mesh(as_mesh(None)):
        params = decoder_module.unrolled(init(jax.random.key(0)))
        room = STEPS * (args.rounds + 2) * args.tokens
        number = jnp.int32(STEPS), jnp.int32(1)
        state = running_state(static, args.batch, args.positions, room)
        tables = tables_of(args.batch, args.positions)
        if args.tokens == 1:
            lowered = decode_state.decode_until.lower(params, state, tables, *number, **static)
        else:
            static["width"] = args.tokens
            lowered = decode_state.draft_until.lower(params, state, tables, *number, **static)
        program, compile_seconds = compiled(lowered)
        read = params["language_model"]["layers"], params["lm_head"], state.cache
        read_bytes = sum(x.nbytes for x in jax.tree.leaves(read))
        for turn in range(args.rounds + 1):
            begun = clock()
            made = program(params, state, tables, *number)
            state = made if args.tokens == 1 else made[0]
            jax.block_until_ready(state)
            if turn:  # the first does not count
                times.append(1e3 * (clock() - begun) / STEPS)
    line = {
        "device": jax.devices()[0].device_kind,
        "read_gb": round(read_bytes / 1e9, 3),
        "ms": round(statistics.median(times), 2),
        "ms_range": [round(min(times), 2), round(max(times), 2)],
        "compile_seconds": compile_seconds,
        "temporaries_gb": round(program.memory_analysis().temp_size_in_bytes / 1e9, 3),
    }
    print(json.dumps(vars(args) | line))


if __name__ == "__main__":
    main()
