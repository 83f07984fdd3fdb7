"""The training loop: the only impure file of this room. Reads from top to bottom like a recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from jax.experimental import multihost_utils

from moss_audio_jax import files
from moss_audio_jax.config import Compute
from moss_audio_jax.data.augment import Augment
from moss_audio_jax.data.loader_config import LoaderConfig, Pick
from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.data.pipeline import HostBatch, Loader, eval_batches
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.models import flops, lora, moss_audio
from moss_audio_jax.sharding import make_mesh, param_shardings
from moss_audio_jax.train import export, samples
from moss_audio_jax.train.check import check
from moss_audio_jax.train.checkpoints import Checkpoints
from moss_audio_jax.train.echo import Echo
from moss_audio_jax.train.helpers import FROM_TAGS, FROM_WORDS, NAMES, Helpers, init_helpers
from moss_audio_jax.train.metrics import Metrics, cut_back
from moss_audio_jax.train.optimizer import factors, make_optimizer, schedule
from moss_audio_jax.train.start import Start, initial_params, read_start
from moss_audio_jax.train.step import (
    Recipe,
    batch_shardings,
    eval_step,
    init_state,
    make_train_step,
    state_shardings,
)
from moss_audio_jax.weights.checkpoint import flatten, from_all
from moss_audio_jax.weights.heads import load_heads

_log = logging.getLogger(__name__)

_TOTALS = ("tokens_seen", "audio_seconds_seen", "skipped_total")


def train(config: Any, workdir: Path) -> int:
    """Trains, or continues what `workdir` holds; returns the exit code.

    Raises:
      InputError, UsageError: before anything is compiled, naming the key or file; or InputError
        when the data or the loss turn bad, after saving, or when the disk is full.
      UsageError: another process trains in `workdir`.
    """
    # --- what is trained, on what -----------------------------------------------------------------
    start = read_start(config)
    mesh = make_mesh(**config.mesh)
    check(config, start.model, mesh)
    loader_config = loader_config_of(config, start)
    loader_config.validate(start.model.encoder, jax.process_count())
    # Data first: a missing file should not wait for weights.
    spec = tuple(config.data.train) or config.data.mixture
    mixture = Mixture(spec, config.train.seed)
    held_out = Mixture(tuple(config.data.eval)) if config.data.eval else None
    with _owner(workdir):
        return _train(config, workdir, start, mesh, loader_config, mixture, held_out)


def _train(
    config: Any, workdir: Path, start: Start, mesh: jax.sharding.Mesh,
    loader_config: LoaderConfig, mixture: Mixture, held_out: Mixture | None,
) -> int:  # fmt: skip
    if not jax.process_index():
        text = config.to_json_best_effort(indent=1) + "\n"
        files.write_whole(workdir / "config.json", text)

    recipe = recipe_of(config, start)
    abstract, factor = parameters_of(config, recipe)
    trained = {path for path, value in factor.items() if value}
    optimizer = make_optimizer(config.optimizer, config.train.steps, factor)

    # --- abstract state -> shardings -> state -----------------------------------------------------
    init = functools.partial(init_state, trained=trained, optimizer=optimizer, recipe=recipe)
    abstract_state = jax.eval_shape(init, abstract)
    shardings = state_shardings(abstract_state, start.model, mesh)
    checkpoints = Checkpoints(workdir, config.checkpoint, abstract_state)
    newest = checkpoints.newest()
    with jax.set_mesh(mesh):
        base_shardings = param_shardings(moss_audio.abstract_params(start.model), start.model, mesh)
        params = flatten(initial_params(start, base_shardings, config.train.seed))
        if config.lora.rank:
            base = {path: abstract[path] for path in params}
            params |= jax.jit(functools.partial(_adapters, config, base))()
        if recipe.helpers:
            params |= _heads(config, start, recipe.helpers)
        state = jax.jit(init, out_shardings=shardings)(params)
        del params
    totals = dict.fromkeys(_TOTALS, 0)
    saved_data = None
    if newest is not None:
        restored, run = checkpoints.restore(newest, shardings)
        state = {**state, **restored}
        totals, saved_data = run["totals"], run["data"]
        _log.info(f"continues at step {newest} of {workdir}")
    first = newest or 0
    _describe(state, start, mesh, mixture)

    # --- the step, and what goes in and out of it ------------------------------------------------
    step_fn = make_train_step(recipe, optimizer, schedule(config.optimizer, config.train.steps))
    step_fn = jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, None))
    eval_fn = jax.jit(functools.partial(eval_step, recipe=recipe))
    rows = loader_config.shape(start.model.encoder)
    work = flops.train_step(start.model, rows.rows, rows.tokens, rows.chunks, rows.frames)
    metrics = Metrics(workdir, first, config.train.steps, work)
    rows_log = workdir / f"rows-{jax.process_index()}.jsonl" if config.data.log_rows else None
    if rows_log:
        cut_back(rows_log, first)
    if not jax.process_index():
        cut_back(workdir / samples.LOG, first)
    stop = _StopSignal()
    overdue = _Overdue(60 * config.checkpoint.minutes)

    fresh_rows, echo = loader_config, None
    if config.data.echo > 1:
        masks = loader_config.augment
        unmasked = dataclasses.replace(masks, freq_masks=0, time_masks=0)
        fresh_rows = dataclasses.replace(
            loader_config, batch=loader_config.batch // config.data.echo, augment=unmasked
        )
        echo = Echo(loader_config.batch, config.data.echo_rows, config.train.seed, mesh, masks)
    loader = Loader(
        mixture, start.tokenizer, start.model.encoder, fresh_rows,
        jax.process_index(), jax.process_count(), str(workdir),
    )  # fmt: skip
    if saved_data is not None:
        loader.restore(saved_data)
    waiting: list[dict] = []  # numbers of steps, still on the device
    eval_loss = None

    def save(step: int, data: dict) -> None:
        _collect(waiting, totals, rows.rows * rows.tokens)
        run = {"totals": totals, "config": json.loads(config.to_json_best_effort())}
        checkpoints.save(step, state, run, data, eval_loss)
        overdue.saved()

    def stopped(step: int, data: dict) -> int:
        done = "no step was done yet"
        if step > first:
            save(step, data)
            done = f"saved step {step}"
        _log.info(f"asked to stop: {done}; the same command continues")
        return 0

    step = first
    try:
        with jax.set_mesh(mesh), loader:
            while step < config.train.steps:
                _profile(config.train.profile, step - first, workdir)
                data = loader.state()
                try:
                    batch = stop.next(loader)
                except _Stopped:  # data that do not come must not hold it up
                    return stopped(step, data)
                if rows_log:
                    seen = {"step": step + 1, "rows": batch.row_ids}
                    files.append(rows_log, json.dumps(seen) + "\n")
                placed = _place(batch.arrays, mesh)
                if echo:
                    placed = echo(step, placed)
                state, numbers = step_fn(state, placed)
                step += 1
                waiting.append(numbers)

                if step % config.train.log_every == 0 or step == config.train.steps:
                    values = _collect(waiting, totals, rows.rows * rows.tokens)
                    metrics.write(step, values | _task_losses(values, config.data.tasks))
                    if int(state["skipped"]) >= config.train.max_skipped:
                        save(step, loader.state())
                        raise InputError(
                            f"{int(state['skipped'])} updates in a row had a loss or gradient that "
                            f"is not finite; stopped at step {step}, saved in {workdir} (lower "
                            "optimizer.learning_rate, or look at the rows of the last steps)"
                        )
                if config.eval.every and step % config.eval.every == 0 and held_out:
                    eval_loss = _held_out_loss(eval_fn, state, held_out, start, loader_config, mesh)
                    metrics.write(step, {"eval_loss": eval_loss})
                    if config.eval.samples:
                        samples.show(
                            config.eval.samples, config.eval.max_new_tokens, state, held_out,
                            start, recipe, loader_config, mesh, workdir, step,
                        )  # fmt: skip
                late = step % config.train.log_every == 0 and overdue.now()
                if late or step % config.checkpoint.every == 0 or step == config.train.steps:
                    save(step, loader.state())
                if stop.asked(step):
                    return stopped(step, loader.state())
    finally:
        checkpoints.close()
        stop.close()
    export.write(config, start, state, recipe, workdir)
    _log.info(f"done: {step} steps in {workdir}")
    return 0


# --- parts -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _owner(workdir: Path) -> Iterator[None]:
    """This run alone writes to `workdir`: the first process holds its lock, for all of them."""
    with contextlib.ExitStack() as held:
        problem = None
        if not jax.process_index():
            try:
                held.enter_context(files.Lock(workdir, "train"))
            except (InputError, UsageError) as error:
                problem = [isinstance(error, UsageError), str(error)]
        if problem := from_all(problem)[0]:
            bad_use, message = problem
            raise (UsageError if bad_use else InputError)(message)
        yield


def parameters_of(config: Any, recipe: Recipe) -> tuple[dict, dict[str, float]]:
    """All parameters of a run by path, as ShapeDtypeStructs, and the learning-rate factor of each.

    Adapters and helper heads are among them; a factor of 0 freezes.
    """
    base = flatten(moss_audio.abstract_params(recipe.model))
    abstract = dict(base)
    if config.lora.rank:
        abstract |= jax.eval_shape(functools.partial(_adapters, config, base))
        factor = {path: float(lora.is_adapter(path)) for path in abstract}
    else:
        factor = factors(list(abstract), config.optimizer.groups)
    if recipe.helpers:
        key = jax.random.key(config.train.seed)
        heads = jax.eval_shape(lambda: init_helpers(key, recipe.model, recipe.helpers))
        abstract |= heads
        factor |= dict.fromkeys(heads, 1.0)
    return abstract, factor


def _adapters(config: Any, base: dict) -> dict:
    return lora.init(jax.random.key(config.train.seed), base, config.lora.rank, config.lora.targets)


def _heads(config: Any, start: Start, helpers: Helpers) -> dict:
    """Fresh heads, or those that lie with the checkpoint the run starts from."""
    fresh = init_helpers(jax.random.key(config.train.seed), start.model, helpers)
    found, tags = load_heads(start.whole) if start.whole else ({}, ())
    same = {path: leaf for path, leaf in found.items()
            if path in fresh and fresh[path].shape == leaf.shape}  # fmt: skip
    if tags != helpers.names:
        same = {path: leaf for path, leaf in same.items() if "tags/" not in path}
    return {**fresh, **{path: jnp.asarray(leaf, jnp.float32) for path, leaf in same.items()}}


def recipe_of(config: Any, start: Start) -> Recipe:
    t = config.train
    weights = {name: config.helpers[name] for name in NAMES}
    helpers = Helpers(**weights, names=tuple(config.helpers.names),
                      pieces=start.model.decoder.vocab_size)  # fmt: skip
    return Recipe(
        model=start.model,
        compute=Compute(t.dtype, t.attention, t.remat, t.encoder_chunks, loss_chunk=t.loss_chunk),
        accumulate=t.accumulate,
        clip_norm=t.clip_norm,
        z_loss=t.z_loss,
        ema=t.ema,
        lora_alpha=config.lora.alpha if config.lora.rank else 0.0,
        tasks=1 + len(config.data.tasks),
        decoder_loss=t.decoder_loss,
        helpers=helpers if helpers.any else None,
    )


def loader_config_of(config: Any, start: Start) -> LoaderConfig:
    d = config.data
    return LoaderConfig(
        batch=d.batch,
        length=d.length,
        chunks=math.ceil(d.length / 64) if d.chunks < 0 else d.chunks,
        frames=d.frames or None,
        packing=d.packing,
        seed=config.train.seed,
        streams=d.streams or None,
        window=d.window,
        workers=d.workers,
        max_bad_share=d.max_bad_share,
        row_seconds=d.row_seconds,
        tasks=tuple(d.tasks),
        augment=Augment(**d.augment),
        branches=d.branches,
        pick=tuple(Pick(*rule) for rule in d.pick),
        words=config.helpers.words if any(config.helpers[n] for n in FROM_WORDS) else 0,
        tags=tuple(config.helpers.names) if any(config.helpers[n] for n in FROM_TAGS) else (),
    )


def _place(arrays: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """This process's rows as its part of global arrays."""
    count = jax.process_count()
    shapes = {
        name: jax.ShapeDtypeStruct((x.shape[0] * count, *x.shape[1:]), x.dtype)
        for name, x in arrays.items()
    }
    shardings = batch_shardings(shapes, mesh)
    return {
        name: jax.make_array_from_process_local_data(shardings[name], x, shapes[name].shape)
        for name, x in arrays.items()
    }


def _collect(waiting: list, totals: dict[str, Any], room: int) -> dict[str, Any]:
    """Fetches the numbers of all steps since the last time; returns those of the newest.

    `room`: tokens of a batch, padding included.
    """
    values: dict[str, Any] = {}
    for numbers in waiting:
        n = jax.device_get(numbers)
        seconds = float(n["audio_frames"]) / 100
        totals["tokens_seen"] += int(n["tokens"])
        totals["audio_seconds_seen"] += seconds
        totals["skipped_total"] += int(not n["finite"])
        values = {
            "loss": float(n["mean_loss"]),
            "grad_norm": float(n["grad_norm"]),
            "learning_rate": float(n["learning_rate"]),
            "tokens": int(n["tokens"]),
            "label_tokens": int(n["labels"]),
            "audio_seconds": seconds,
            "padding": 1 - int(n["tokens"]) / room,
            "tokens_seen": totals["tokens_seen"],
            "audio_hours_seen": totals["audio_seconds_seen"] / 3600,
            "skipped": totals["skipped_total"],
            "helper_losses": {name: float(value) for name, value in n["helper_losses"].items()},
            "task_loss": n["task_loss"],
            "task_weight": n["task_weight"],
        }
    waiting.clear()
    return values


def _task_losses(values: dict[str, Any], tasks: tuple[str, ...]) -> dict[str, float]:
    """{"loss/asr": ...} for the tasks that the newest step saw, and {"helper/ctc": ...}."""
    helpers = {f"helper/{name}": v for name, v in values.pop("helper_losses").items()}
    losses, weights = values.pop("task_loss"), values.pop("task_weight")
    return helpers | {
        f"loss/{name}": float(losses[k] / weights[k])
        for k, name in enumerate(("other", *tasks))
        if tasks and weights[k] > 0
    }


def _held_out_loss(eval_fn, state, held_out, start, loader_config, mesh) -> float:
    loss = weight = 0.0
    weights = state.get("ema", state["trained"])
    for batch in eval_batches(
        held_out, start.tokenizer, start.model.encoder, loader_config,
        jax.process_index(), jax.process_count(),
    ):  # fmt: skip
        sums = jax.device_get(eval_fn(weights, state["frozen"], _place(batch.arrays, mesh)))
        loss, weight = loss + float(sums["loss"]), weight + float(sums["weight"])
    if not weight:
        raise InputError("data.eval: no row could be used")
    return loss / weight


def _describe(state: dict, start: Start, mesh: jax.sharding.Mesh, mixture: Mixture) -> None:
    if jax.process_index():
        return
    count = moss_audio.count_params
    table = {**state["trained"], **state["frozen"]}
    _log.info(
        parameter_overview.get_parameter_overview(
            {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in sorted(table.items())},
            include_stats=False,
        )
    )
    _log.info(
        f"{count(state['trained']):,} of {count(table):,} parameters train; mesh "
        f"{dict(mesh.shape)}; {mixture.rows:,} rows"
    )


def _profile(span: tuple[int, int], done: int, workdir: Path) -> None:
    first, count = span
    if count and done == first:
        jax.profiler.start_trace(str(workdir / "profile"))
    if count and done == first + count:
        jax.profiler.stop_trace()


class _Overdue:
    """Whether the last save is more than so many seconds old (0: never), by process 0's clock."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.saved()

    def saved(self) -> None:
        self._at = time.monotonic()

    def now(self) -> bool:
        if not self._seconds:
            return False
        late = time.monotonic() - self._at > self._seconds
        if jax.process_count() > 1:
            late = bool(multihost_utils.broadcast_one_to_all(np.int32(late)))
        return late


class _Stopped(Exception):
    """SIGTERM came while the run waited for data."""


class _StopSignal:
    """SIGTERM asks to save and stop. With several processes all of them learn it at one step."""

    def __init__(self) -> None:
        self._asked = self._waits = False
        self._before: Any = None
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True
        if self._waits:
            raise _Stopped

    def next(self, loader: Loader) -> HostBatch:
        """The next batch. Raises _Stopped where SIGTERM comes, or came, before it."""
        self._waits = True
        try:
            if self._asked:
                raise _Stopped
            return next(loader)
        finally:
            self._waits = False

    def close(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def asked(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
