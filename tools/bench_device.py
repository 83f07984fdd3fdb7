"""How fast training and generation are on the accelerator at hand: one JSON line a measurement.

    python tools/bench_device.py [--parts attention,train,decode,prefill] [--budget 110]
    python tools/bench_device.py --tiny        # the same code in small, on any machine

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

# ruff: noqa: E402  what is set up before JAX has to be
from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.util
import json
import os
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")  # before JAX: 0.75 by itself
# Readers of audio files, of which nothing is used here: a GPU machine may lack them.
for _name in ("soundfile", "soxr"):
    if importlib.util.find_spec(_name) is None:
        sys.modules[_name] = types.ModuleType(_name)

import jax
import jax.numpy as jnp
import numpy as np

from moss_audio_jax.config import (
    RELEASED,
    Compute,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    ProcessorConfig,
)
from moss_audio_jax.data.batch import (
    IGNORE,
    Example,
    Shape,
    TrainExample,
    bucket_shape,
    make_batch,
    make_train_batch,
)
from moss_audio_jax.generate import slots as serving
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.generate.vocabulary import Vocabulary, vocabulary
from moss_audio_jax.models import flops, moss_audio
from moss_audio_jax.models.quantize import quantize
from moss_audio_jax.ops.attention import attention
from moss_audio_jax.sharding import as_mesh, make_mesh
from moss_audio_jax.train.optimizer import make_optimizer, schedule
from moss_audio_jax.train.step import (
    Recipe,
    batch_shardings,
    init_state,
    make_train_step,
    state_shardings,
)
from moss_audio_jax.weights.checkpoint import flatten

GIB = 2**30
# Of --budget, where all parts are asked for.
SHARES = {"attention": 0.15, "train": 0.5, "decode": 0.25, "prefill": 0.1}
# kind:length:remat:attention; auto is the device's kernel.
TRAIN = "audio:8192:projections:auto,text:8192:projections:auto,audio:8192:projections:xla"
DECODE = "none:1,none:64,weights:1,weights+cache:64,none:16,weights:64,weights+cache:1"
# As the defaults of a run (train/defaults.py, which needs packages that a GPU machine may lack).
OPTIMIZER = types.SimpleNamespace(
    name="adamw", learning_rate=1e-5, schedule="cosine", warmup=100, final=0.1, decay=0.2,
    b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, moment_dtype="float32",
)  # fmt: skip
STEPS = 1000  # of the schedule
TINY = ModelConfig(
    EncoderConfig(d_model=64, layers=2, heads=4, ffn_dim=128, conv_channels=16, output_dim=64,
                  tap_layers=(0,)),
    DecoderConfig(hidden_size=64, ffn_dim=128, layers=2, heads=4, kv_heads=2, head_dim=16,
                  vocab_size=512, max_positions=4096),
    adapter_dim=128, inject_layers=1,
)  # fmt: skip
CHUNK_TEXT = 14  # tokens of text that go with a chunk's 50 of sound: 64 a chunk


# --- measuring ------------------------------------------------------------------------------------


class Clock:
    """What is printed, and whether there is time left for more."""

    def __init__(self, budget: float, parts: list[str]) -> None:
        self._start, self._budget = time.perf_counter(), budget
        total = sum(SHARES[part] for part in parts)
        self._until, share = {}, 0.0
        for part in parts:
            share += SHARES[part] / total
            self._until[part] = share * budget

    def emit(self, part: str, **fields: Any) -> None:
        line = {"part": part} | fields | {"at": round(time.perf_counter() - self._start, 1)}
        print(json.dumps(line, default=str), flush=True)

    def settings(self, part: str, wanted: list) -> Iterator[Any]:
        """Those of `wanted` that there is time to begin; the first if there is any time at all."""
        for number, setting in enumerate(wanted):
            spent = time.perf_counter() - self._start
            if spent > (self._until[part] if number else self._budget):
                self.emit(part, left_out=wanted[number:])
                return
            yield setting

    def guarded(self, part: str, what: Any, measure: Callable[[], dict[str, Any] | None]) -> None:
        try:
            if found := measure():
                self.emit(part, **found)
        except Exception as error:  # whatever it is, the others go on
            self.emit(part, setting=what, **failure(error))
        gc.collect()


def failure(error: Exception) -> dict[str, str]:
    return {"error": f"{type(error).__name__}: {str(error)[:600]}"}


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


def compiled(
    lowered: jax.stages.Lowered, options: dict[str, Any] | None = None
) -> tuple[jax.stages.Compiled, float]:
    """The program, and the seconds it took to compile."""
    start = time.perf_counter()
    program = lowered.compile(compiler_options=options or None)
    return program, round(time.perf_counter() - start, 1)


def memory(program: jax.stages.Compiled) -> dict[str, float]:
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
    return {"gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend(), "xla")


def share(value: float, most: float | None) -> float | None:
    return most and round(value / most, 4)


def partition(rng: np.random.Generator, total: int, most: int) -> list[int]:
    """Sizes of 1 to `most` that make up `total`."""
    sizes: list[int] = []
    while total:
        sizes.append(min(total, int(rng.integers(1, most + 1))))
        total -= sizes[-1]
    return sizes


# --- attention ------------------------------------------------------------------------------------


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


# --- training -------------------------------------------------------------------------------------


def bench_train(args: argparse.Namespace, clock: Clock) -> None:
    model = shallow(args.whole, args.decoder_layers, args.encoder_layers)
    mesh = make_mesh(fsdp=-1)
    state: dict[str, Any] = {}

    def fresh() -> dict[str, Any]:
        optimizer = make_optimizer(OPTIMIZER, STEPS, _ones(model))
        recipe = Recipe(model, Compute())

        def init(key: jax.Array) -> dict[str, Any]:
            params = flatten(moss_audio.init_params(key, model))
            return init_state(params, set(params), optimizer, recipe)

        shardings = state_shardings(jax.eval_shape(init, jax.random.key(0)), model, mesh)
        start = time.perf_counter()
        made = jax.block_until_ready(jax.jit(init, out_shardings=shardings)(jax.random.key(0)))
        clock.emit("train", parameters=moss_audio.count_params(made["trained"]),
                   decoder_layers=args.decoder_layers, encoder_layers=args.encoder_layers,
                   init_seconds=round(time.perf_counter() - start, 1))  # fmt: skip
        return made

    def one(setting: str) -> dict[str, Any]:
        # A step that failed may have taken its state with it.
        if not state or any(x.is_deleted() for x in jax.tree.leaves(state)):
            state.clear()
            state.update(fresh())
        kind, length, remat, implementation = setting.split(":")
        implementation = kernel() if implementation == "auto" else implementation
        rows = max(1, args.tokens // int(length))
        rows = -(-rows // mesh.size) * mesh.size
        batch = train_batch(model, rows, int(length), kind == "audio")
        recipe = Recipe(model, Compute("bfloat16", implementation, remat, args.encoder_chunks))
        optimizer = make_optimizer(OPTIMIZER, STEPS, _ones(model))
        step = make_train_step(recipe, optimizer, schedule(OPTIMIZER, STEPS))
        shardings = state_shardings(state, model, mesh)
        step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        placed = jax.device_put(batch, batch_shardings(batch, mesh))
        program, compile_seconds = compiled(step.lower(state, placed), args.xla)

        def call() -> Any:
            new, metrics = program(state, placed)
            state.update(new)
            return metrics

        spent = seconds(call, args.steps)
        loss = float(call()["mean_loss"])
        chunks, frames = batch["mels"].shape[1:3]
        work = flops.train_step(model, rows, int(length), chunks, frames)
        labels = int((batch["labels"] != IGNORE).sum())
        idle = rows * int(length) - labels
        labelled = work - 6.0 * model.decoder.hidden_size * model.decoder.vocab_size * idle
        peak = flops.peak(jax.devices()[0].device_kind)
        peak = peak and peak * mesh.size
        return {
            "rows": kind, "shape": [rows, int(length), chunks], "remat": remat,
            "attention": implementation, "encoder_chunks": args.encoder_chunks,
            "compile_seconds": compile_seconds,
            "seconds": round(spent, 4), "tokens_per_second": round(rows * int(length) / spent),
            "labels": labels, "tflop": round(work / 1e12, 1), "mfu": share(work / spent, peak),
            "mfu_labelled": share(labelled / spent, peak), "loss": round(loss, 3),
            **memory(program),
        }  # fmt: skip

    with jax.set_mesh(mesh):
        for setting in clock.settings("train", args.train):
            clock.guarded("train", setting, functools.partial(one, setting))


def shallow(model: ModelConfig, decoder_layers: int, encoder_layers: int) -> ModelConfig:
    """The same widths with fewer layers, as many taps."""
    taps = len(model.encoder.tap_layers)
    encoder = dataclasses.replace(
        model.encoder,
        layers=encoder_layers,
        tap_layers=tuple((i + 1) * encoder_layers // (taps + 1) for i in range(taps)),
    )
    decoder = dataclasses.replace(model.decoder, layers=decoder_layers)
    return dataclasses.replace(model, encoder=encoder, decoder=decoder).validate()


def _ones(model: ModelConfig) -> dict[str, float]:
    return dict.fromkeys(flatten(moss_audio.abstract_params(model)), 1.0)


def train_batch(model: ModelConfig, rows: int, length: int, audio: bool) -> dict[str, np.ndarray]:
    """Full rows: of clips with the text about them, labels on the text behind a clip; or of text
    alone, all of it labelled."""
    rng = np.random.default_rng(0)
    encoder, placeholder = model.encoder, model.decoder.vocab_size - 1
    chunk_tokens = encoder.chunk_frames // 8
    unit = chunk_tokens + CHUNK_TEXT if audio else 1
    noise = rng.standard_normal((encoder.mel_bins, 32 * encoder.chunk_frames), np.float32)

    def example(units: int) -> TrainExample:
        count = units * unit
        ids = rng.integers(0, placeholder, count).astype(np.int32)
        labels, mels = ids.copy(), ()
        if audio:
            sound = slice(units, units + units * chunk_tokens)
            ids[sound] = placeholder
            labels = np.where(np.arange(count) < sound.stop, IGNORE, ids)
            mels = (noise[:, : units * encoder.chunk_frames],)
        return TrainExample(
            ids=ids, mels=mels, labels=labels, weights=1.0, tasks=0, row_id="", index=0, seconds=0.0
        )

    chunks = length // unit if audio else 0
    most = 32 if audio else length // 4
    packed = [
        [example(units) for units in partition(rng, chunks or length, most)] for _ in range(rows)
    ]
    shape = Shape(rows, length, chunks, encoder.chunk_frames)
    return make_train_batch(packed, shape, encoder, placeholder, "bfloat16")


# --- generation -----------------------------------------------------------------------------------


@functools.cache
def released(model: ModelConfig) -> Any:
    """Random bfloat16 weights, made on the device."""
    init = jax.jit(lambda key: moss_audio.init_params(key, model, "bfloat16"))
    return jax.block_until_ready(init(jax.random.key(0)))


def _static(model: ModelConfig, how: str) -> dict[str, Any]:
    vocab: Vocabulary = vocabulary(model, None, ProcessorConfig())
    vocab = dataclasses.replace(vocab, stop=())  # no answer ends before its time
    return {"config": model, "compute": Compute("bfloat16", quantize=how), "vocab": vocab}


def bench_decode(args: argparse.Namespace, clock: Clock) -> None:
    model, quantised = args.whole, {}

    def weights(how: str) -> Any:
        if how == "none":
            return released(model)
        if not quantised:
            make = jax.jit(functools.partial(quantize, config=model))
            quantised.update(jax.block_until_ready(make(released(model))))
        return quantised

    def one(setting: str) -> dict[str, Any]:
        how, _, count = setting.partition(":")
        params, static = weights(how), _static(model, how)
        size, steps = args.slots, args.decode_steps
        room = 16 * steps
        slots = serving.empty_slots(**static, count=int(count), room=room, size=size)
        full = jnp.full((int(count),), size // 2)
        slots = slots._replace(
            rows=slots.rows._replace(
                state=jnp.full_like(slots.rows.state, serving.RUNNING),
                position=full.astype(slots.rows.position.dtype),
                limit=jnp.full_like(slots.rows.limit, room),
            )
        )
        numbers = jnp.int32(steps), jnp.int32(1)
        lowered = serving.decode_until.lower(params, slots, *numbers, reach=size, **static)
        program, compile_seconds = compiled(lowered)
        held = {"slots": slots}
        del slots

        def call() -> Any:
            held["slots"] = program(params, held["slots"], *numbers)
            return held["slots"].rows.count

        spent = seconds(call, 5) / steps
        done = int(held["slots"].rows.count.min())
        if done != 6 * steps:
            raise RuntimeError(f"{done} tokens in {6 * steps} steps: answers have ended")
        # Every weight of layers, norm and head once; of the embedding a row an answer.
        read = {"layers": params["language_model"]["layers"], "head": params["lm_head"]}
        weight_bytes = sum(x.nbytes for x in jax.tree.leaves(read))
        cache_bytes = sum(x.nbytes for x in jax.tree.leaves(held["slots"].cache))
        total = weight_bytes + cache_bytes
        most = flops.bandwidth(jax.devices()[0].device_kind)
        return {
            "quantize": how, "batch": int(count), "slots": size,
            "compile_seconds": compile_seconds, "ms_per_step": round(1e3 * spent, 3),
            "tokens_per_second": round(int(count) / spent, 1),
            "weight_gb": round(weight_bytes / 1e9, 3), "cache_gb": round(cache_bytes / 1e9, 3),
            "gb_per_second": round(total / spent / 1e9, 1),
            "of_bandwidth": share(total / spent, most), **memory(program),
        }  # fmt: skip

    with jax.set_mesh(as_mesh(None)):
        for setting in clock.settings("decode", args.decode):
            clock.guarded("decode", setting, functools.partial(one, setting))


def bench_prefill(args: argparse.Namespace, clock: Clock) -> None:
    model, rows = args.whole, args.prefill_rows
    rng = np.random.default_rng(0)
    frames, static = round(100 * args.prefill_seconds), _static(model, "none")
    placeholder = static["vocab"].audio_token_id % model.decoder.vocab_size

    def one(implementation: str) -> dict[str, Any]:
        compute = dataclasses.replace(static["compute"], attention=implementation)
        mel = rng.standard_normal((model.encoder.mel_bins, frames), np.float32)
        ids = rng.integers(0, placeholder, args.prefill_tokens).astype(np.int32)
        ids[8 : 8 + -(-frames // 8)] = placeholder
        examples = [Example(ids, (mel,))] * rows
        shape = bucket_shape(examples, model.encoder, rows)
        batch = make_batch([[e] for e in examples], shape, model.encoder, placeholder)
        requests = [(e, Sampling(64)) for e in examples]
        fresh = serving.new_rows(requests, [64] * rows, 64, rows, static["vocab"])
        batch, fresh = jax.device_put((batch, fresh))
        params = released(model)
        lowered = serving.start.lower(params, batch, fresh, **static | {"compute": compute})
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
        return {
            "shape": [rows, shape.tokens, shape.chunks], "attention": implementation,
            "compile_seconds": compile_seconds, "seconds": round(spent, 4),
            "tokens_per_second": round(rows * args.prefill_tokens / spent),
            "audio_seconds_per_second": round(rows * args.prefill_seconds / spent),
            "tflop": round(work / 1e12, 2),
            "mfu": share(work / spent, flops.peak(jax.devices()[0].device_kind)),
            **memory(program),
        }  # fmt: skip

    with jax.set_mesh(as_mesh(None)):
        for name in clock.settings("prefill", list(dict.fromkeys((kernel(), "xla")))):
            clock.guarded("prefill", name, functools.partial(one, name))


# --- the command ----------------------------------------------------------------------------------

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
    parser.add_argument("--tokens", type=int, default=0,
                        help="of a step; default 32768, half of it below 100 GiB")  # fmt: skip
    parser.add_argument("--train", type=names, default=TRAIN, help="kind:length:remat:attention,..")
    parser.add_argument("--decode", type=names, default=DECODE, help="quantize:batch,..")
    parser.add_argument(
        "--steps", type=int, default=4, help="that are timed, after one that is not"
    )
    parser.add_argument("--xla", type=names, default=None, metavar="KEY=VALUE,..",
                        help="compiler options of all but decode; '' for none; default on a GPU "
                        "xla_gpu_enable_triton_gemm=false: fewer to try")  # fmt: skip
    args = parser.parse_args()
    if wrong := set(args.parts) - set(PARTS):
        parser.error(f"--parts: {sorted(wrong)[0]!r}; expected some of {', '.join(PARTS)}")
    args.parts = [part for part in PARTS if part in args.parts]
    if args.xla is None:
        args.xla = ["xla_gpu_enable_triton_gemm=false"] if kernel() == "cudnn" else []
    options = dict(option.split("=", 1) for option in args.xla if option)
    # As JSON where it is JSON: XLA takes no "false" for a truth value.
    args.xla = {key: _value(text) for key, text in options.items()}
    stats = jax.local_devices()[0].memory_stats() or {}
    args.tokens = args.tokens or (32768 if stats.get("bytes_limit", 0) > 100 * GIB else 16384)
    args.whole, args.lengths, args.attention_tokens = RELEASED["4b"], [4096, 8192], 16384
    args.slots, args.decode_steps = 2048, 32
    args.prefill_rows, args.prefill_tokens, args.prefill_seconds = 8, 2048, 120.0
    if args.tiny:
        args.whole, args.lengths, args.attention_tokens = TINY, [256], 512
        args.decoder_layers = args.encoder_layers = 2
        args.tokens, args.slots, args.decode_steps, args.steps = 256, 128, 4, 2
        args.prefill_rows, args.prefill_tokens, args.prefill_seconds = 2, 128, 4.0
        args.train = [setting.replace("8192", "128") for setting in args.train[:2]]
        args.decode = args.decode[:1] + args.decode[3:4]
        if jax.default_backend() == "cpu":  # as in the tests: compile fast, never mind the result
            args.xla |= {"xla_backend_optimization_level": 0}
            args.xla |= {"xla_llvm_disable_expensive_passes": True}
    return args


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main() -> None:
    args = parsed()
    clock = Clock(args.budget, args.parts)
    device = jax.devices()[0]
    clock.emit("device", kind=device.device_kind, count=jax.device_count(), jax=jax.__version__,
               kernel=kernel(), xla=args.xla, memory=device.memory_stats() and round(
                   device.memory_stats().get("bytes_limit", 0) / GIB, 1))  # fmt: skip
    for part in args.parts:
        clock.guarded(part, None, functools.partial(PARTS[part], args, clock))
        gc.collect()


if __name__ == "__main__":
    main()
