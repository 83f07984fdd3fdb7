"""The very train step, of a model as wide as the released 4B with fewer layers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

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
from tools.device.attention import check_packed
from tools.device.measure import GIB, MOST, Sizes, compiled, memory, partition, peak, seconds, share

OPTIMIZER = get_config().optimizer
STEPS = 1000  # of the schedule
CHUNK_TEXT = 14  # tokens of text that go with a chunk's 50 of sound: 64 a chunk
REMAT, CHUNKS = "projections", 32


def measure(setting: str, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Seconds a step and MFU: float32 master and AdamW of every weight, bfloat16 compute.

    `mfu` counts as models/flops.py, and so the training log, does: the head for every token.
    `mfu_labelled` counts the head where labels are, as the loss computes it.

    Args:
      setting: "audio:mask", "audio:packed" (cuDNN's packed layout), "text:mask", "text:packed".
    """
    kind, _, layout = setting.partition(":")
    checked = {"beside_mask": check_packed(sizes)} if layout == "packed" else {}
    model = shallow(sizes.model, sizes.decoder_layers, sizes.encoder_layers)
    mesh = make_mesh(fsdp=-1)
    stats = jax.local_devices()[0].memory_stats() or {}
    room = stats.get("bytes_limit", 0) > 100 * GIB or jax.default_backend() == "cpu"
    rows = max(1, sizes.train_tokens // sizes.train_length // (1 if room else 2))
    rows = -(-rows // mesh.size) * mesh.size
    length = sizes.train_length
    with jax.set_mesh(mesh):
        state, init_seconds = fresh_state(model, mesh)
        batch = train_batch(model, rows, length, kind == "audio")
        most = MOST if layout == "packed" else 0
        compute = Compute("bfloat16", "auto", REMAT, CHUNKS, most_segments=most)
        optimizer = make_optimizer(OPTIMIZER, STEPS, _ones(model))
        step = make_train_step(Recipe(model, compute), optimizer, schedule(OPTIMIZER, STEPS))
        shardings = state_shardings(state, model, mesh)
        step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        placed = jax.device_put(batch, batch_shardings(batch, mesh))
        program, compile_seconds = compiled(step.lower(state, placed))
        held = {"state": state}
        losses = []

        def call() -> Any:
            held["state"], metrics = program(held["state"], placed)
            losses.append(metrics["mean_loss"])
            return metrics

        spent = seconds(call, sizes.repeats)
    chunks, frames = batch["mels"].shape[1:3]
    work = flops.train_step(model, rows, length, chunks, frames)
    labels = int((batch["labels"] != IGNORE).sum())
    idle = rows * length - labels
    labelled = work - 6.0 * model.decoder.hidden_size * model.decoder.vocab_size * idle
    most_flops = peak() and peak() * mesh.size
    yield {
        "parameters": moss_audio.count_params(moss_audio.abstract_params(model)),
        "layers": [sizes.decoder_layers, sizes.encoder_layers],
        "shape": [rows, length, chunks],
        "remat": REMAT,
        "encoder_chunks": CHUNKS,
        "most_segments": most,
        "segments": [int(row.max()) for row in batch["segment_ids"]],
        **checked,
        "init_seconds": init_seconds,
        "compile_seconds": compile_seconds,
        "seconds": round(spent, 4),
        "tokens_per_second": round(rows * length / spent),
        "labels": labels,
        "tflop": round(work / 1e12, 1),
        "mfu": share(work / spent, most_flops),
        "mfu_labelled": share(labelled / spent, most_flops),
        "first_loss": round(float(losses[0]), 4),
        "loss": round(float(losses[-1]), 4),
        **memory(program),
    }


def fresh_state(model: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[dict[str, Any], float]:
    """A train state of random weights, and the seconds that it took."""
    optimizer, recipe = make_optimizer(OPTIMIZER, STEPS, _ones(model)), Recipe(model, Compute())

    def init(key: jax.Array) -> dict[str, Any]:
        params = flatten(moss_audio.init_params(key, model))
        return init_state(params, set(params), optimizer, recipe)

    shardings = state_shardings(jax.eval_shape(init, jax.random.key(0)), model, mesh)
    start = time.perf_counter()
    made = jax.block_until_ready(jax.jit(init, out_shardings=shardings)(jax.random.key(0)))
    return made, round(time.perf_counter() - start, 1)


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
    most = min(32, chunks // 4) if audio else length // 4
    packed = [
        [example(units) for units in partition(rng, chunks or length, most)] for _ in range(rows)
    ]
    shape = Shape(rows, length, chunks, encoder.chunk_frames)
    return make_train_batch(packed, shape, encoder, placeholder, "bfloat16")
