"""The very train step, of a model as wide as the released 4B with fewer layers."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np

from moss_audio_jax import devices
from moss_audio_jax.config import Compute, ModelConfig
from moss_audio_jax.data.batch import IGNORE, Shape, TrainExample, make_train_batch
from moss_audio_jax.models import flops, moss_audio
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.train.defaults import get_config
from moss_audio_jax.train.optimizer import make_optimizer, schedule
from moss_audio_jax.train.step import (
    Recipe,
    batch_shardings,
    init_state,
    make_train_step,
    state_shardings,
)
from moss_audio_jax.tree import flatten
from tools.device.measure import Clock, compiled, kernel, memory, partition, seconds, share

OPTIMIZER = get_config().optimizer
STEPS = 1000  # of the schedule
CHUNK_TEXT = 14  # tokens of text that go with a chunk's 50 of sound: 64 a chunk


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
        clock.emit(
            "train",
            parameters=moss_audio.count_params(made["trained"]),
            decoder_layers=args.decoder_layers,
            encoder_layers=args.encoder_layers,
            init_seconds=round(time.perf_counter() - start, 1),
        )
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
        device = devices.of(jax.devices()[0].device_kind)
        peak = device and device.peak * mesh.size
        return {
            "rows": kind,
            "shape": [rows, int(length), chunks],
            "remat": remat,
            "attention": implementation,
            "encoder_chunks": args.encoder_chunks,
            "compile_seconds": compile_seconds,
            "seconds": round(spent, 4),
            "tokens_per_second": round(rows * int(length) / spent),
            "labels": labels,
            "tflop": round(work / 1e12, 1),
            "mfu": share(work / spent, peak),
            "mfu_labelled": share(labelled / spent, peak),
            "loss": round(loss, 3),
            **memory(program),
        }

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
