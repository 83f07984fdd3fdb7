"""The training loop: the only impure file of this room. Reads from top to bottom like a recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from jax.experimental import multihost_utils

from moss_audio_jax import files
from moss_audio_jax.buckets import is_remote
from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.data.pipeline import HostBatch, Loader, eval_batches
from moss_audio_jax.data.reports import COUNTS
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.journal import Log
from moss_audio_jax.models import flops, moss_audio
from moss_audio_jax.runtime import from_all
from moss_audio_jax.sharding import make_mesh, param_shardings
from moss_audio_jax.train import export, samples, setup
from moss_audio_jax.train.bucket_checkpoints import BucketCheckpoints
from moss_audio_jax.train.checkpoints import Checkpoints
from moss_audio_jax.train.clock import Clock
from moss_audio_jax.train.echo import Echo
from moss_audio_jax.train.helpers import Helpers, init_helpers
from moss_audio_jax.train.local_checkpoints import LocalCheckpoints
from moss_audio_jax.train.metrics import Metrics, cut_back
from moss_audio_jax.train.setup import Setup
from moss_audio_jax.train.source import Batches, source_of
from moss_audio_jax.train.start import Start, initial_params, read_start
from moss_audio_jax.train.step import State, batch_shardings, eval_step
from moss_audio_jax.tree import flatten
from moss_audio_jax.weights.folder import check_replaceable
from moss_audio_jax.weights.helpers import load_helpers
from moss_audio_jax.weights.native import check_place

_log = logging.getLogger(__name__)

_TOTALS = ("tokens_seen", "audio_seconds_seen", "skipped_total")


def train(config: Any, workdir: Path) -> int:
    """Trains, or continues what `workdir` holds; returns the exit code.

    Raises:
      InputError, UsageError: before anything is compiled, naming the key or file; or InputError
        when the data or the loss turn bad, after saving, or when the disk is full.
      UsageError: another process trains in `workdir`.
    """
    run = setup.build(config, read_start(config), make_mesh(**config.mesh))
    # Data first: a missing file should not wait for weights.
    spec = tuple(config.data.train) or config.data.mixture
    mixture = Mixture(spec, config.train.seed)
    held_out = Mixture(tuple(config.data.eval)) if config.data.eval else None
    if source := source_of(config):
        source.check_rows(run, mixture, held_out)
    if config.checkpoint.export == "native":
        check_place(workdir)
    with _owner(workdir) as lock:
        return _train(run, workdir, lock, mixture, held_out)


def _check_free(workdir: Path) -> None:
    """Raises InputError if what this run writes would take the place of something else."""
    file = workdir / "config.json"
    if file.exists() and not {"train", "optimizer"} <= files.read_json(file).keys():
        raise InputError(
            f"{file}: is not that of a run; give the run a folder of its own (--workdir)"
        )
    for name in ("export", "lora"):
        if (workdir / name).exists():
            check_replaceable(workdir / name)


def _train(
    run: Setup, workdir: Path, lock: files.Lock | None, mixture: Mixture, held_out: Mixture | None
) -> int:
    config, mesh = run.config, run.mesh
    clock = Clock()
    _check_free(workdir)

    # --- restore ----------------------------------------------------------------------------------
    kind = BucketCheckpoints if is_remote(workdir) else Checkpoints
    checkpoints = kind(workdir, config.checkpoint, run.state)
    newest, local, nearer = checkpoints.newest(), None, None
    if config.checkpoint.local.folder:
        shardings = run.state_shardings
        local = LocalCheckpoints(config.checkpoint.local.folder, workdir, run.state, shardings)
        nearer = local.newest(after=newest or 0)
    with jax.set_mesh(mesh):
        state = _first_state(run)
    totals, saved_data = dict.fromkeys(_TOTALS, 0), None
    evaluated = True  # False while the newest step is still to be
    if newest is not None or nearer is not None:
        if nearer is None:
            restored, saved = checkpoints.restore(newest, run.state_shardings)
        else:
            newest = nearer
            restored, saved = local.restore(nearer)
        state = {**state, **restored}
        totals, saved_data = saved["totals"], saved["data"]
        evaluated = saved.get("evaluated", True) or not held_out
        clock.restore(saved.get("clock"))
        tier = f", from {config.checkpoint.local.folder}" if nearer is not None else ""
        _log.info(f"continues at step {newest} of {workdir}{tier}")
    first = step = newest or 0
    _describe(state, run, mixture)
    loader, echo = _rows(run, mixture, workdir, lambda: state)
    if saved_data is not None:
        loader.restore(saved_data)
    if not jax.process_index():  # only once the saved run may be continued so
        text = config.to_json_best_effort(indent=1) + "\n"
        files.write_whole(workdir / "config.json", text)

    # --- the step, and what goes in and out of it -------------------------------------------------
    step_fn = clock.steps(run.step())
    rows_alone = dataclasses.replace(run.recipe, objective=None)
    eval_fn = jax.jit(functools.partial(eval_step, recipe=rows_alone))
    work = flops.train_step(
        run.start.model, run.shape.rows, run.shape.tokens, run.shape.chunks, run.shape.frames
    )
    metrics = Metrics(workdir, first, config.train.steps, work)
    rows_log = None
    if config.data.log_rows:
        # There may have been more processes than now.
        for number in itertools.count(jax.process_index(), jax.process_count()):
            if not (file := workdir / f"rows-{number}.jsonl").exists():
                break
            cut_back(file, first)
        rows_log = Log(workdir / f"rows-{jax.process_index()}.jsonl")
    if not jax.process_index():
        cut_back(workdir / samples.LOG, first if evaluated else first - 1)
    stop = _StopSignal()
    overdue = _Overdue(60 * config.checkpoint.minutes)
    waiting: list[dict] = []  # numbers of steps, still on the device
    told: dict[str, list[float]] = {}  # what batches say of themselves
    counted: dict[str, float] = {}  # rows, since the run began
    warned = False  # that some are left out
    eval_loss = None

    def placed(batch: HostBatch) -> dict[str, jax.Array]:
        for name, value in batch.told.items():
            told.setdefault(name, []).append(value)
        counted.update(batch.stats)
        if rows_log:
            seen = {"step": step + 1, "rows": batch.row_ids}
            rows_log.append(json.dumps(seen) + "\n")
        arrays = _place(batch.arrays, mesh)
        return echo(step, arrays) if echo else arrays

    def say(warning: str) -> None:
        if not jax.process_index():
            _log.warning(warning)

    def log() -> None:
        nonlocal warned
        values = _collect(waiting, totals)
        rows = _row_counts(counted)
        values |= {f"rows_{name}": rows[name] for name in rows}
        if not warned and (left_out := _left_out(rows, workdir)):
            warned = True
            say(f"so far, {left_out}")
        said = {name: float(np.mean(values)) for name, values in told.items()}
        told.clear()
        metrics.write(step, values | _task_losses(values, config.data.tasks) | said | clock.line())
        if int(state["skipped"]) >= config.train.max_skipped:
            save(loader.state())
            raise InputError(
                f"{int(state['skipped'])} updates in a row had a loss or gradient that "
                f"is not finite; stopped at step {step}, saved in {workdir} (lower "
                "optimizer.learning_rate, or look at the rows of the last steps)"
            )

    @clock.during("eval")
    def evaluate() -> bool:
        """False if SIGTERM broke it off: the same command then begins with it."""
        nonlocal eval_loss, evaluated
        try:
            with stop.waiting():
                loss, rows = _held_out_loss(eval_fn, state, held_out, run, workdir, stop)
                used = rows["seen"] - rows["bad"] - rows["overlong"]
                values = {"eval_loss": loss, "eval_rows": used}
                if config.eval.samples:
                    samples.show(run, state, held_out, workdir, step)
                if source_of(config):
                    values |= loader.held_out(held_out, step)
        except _Stopped:
            return False
        metrics.write(step, values)
        if eval_loss is None and (left_out := _left_out(rows, workdir, "eval_")):
            say(f"data.eval: {left_out}")
        eval_loss, evaluated = loss, True
        return True

    def save(data: dict, into: Checkpoints | LocalCheckpoints = checkpoints) -> None:
        _collect(waiting, totals)
        if lock:
            lock.check()
        metrics.log.flush()  # first: a run that continues from this step does not log it again
        loader.flush()
        if rows_log:
            rows_log.flush()
        about = {
            "totals": totals,
            "config": json.loads(config.to_json_best_effort()),
            "evaluated": evaluated,
        }
        with clock.during("save"):
            about["clock"] = clock.state()
            if into is local:
                local.save(step, state, about, data)
            else:
                checkpoints.save(step, state, about, data, eval_loss)
                overdue.saved()

    def stopped(data: dict) -> int:
        done = "no step was done yet"
        if step > first:
            save(data)
            done = f"saved step {step}"
        _log.info(f"asked to stop: {done}; the same command continues")
        return 0

    def every(count: int) -> bool:
        return bool(count) and step % count == 0

    try:
        with jax.set_mesh(mesh), loader, clock:
            if not evaluated and not evaluate():
                return stopped(loader.state())
            while step < config.train.steps:
                _profile(config.train.profile, step - first, workdir)
                data = loader.state()
                try:
                    with clock.during("data"), stop.waiting():
                        batch = next(loader)
                except _Stopped:  # data that do not come must not hold it up
                    return stopped(data)
                state, numbers = step_fn(state, placed(batch))
                step += 1
                waiting.append(numbers)
                last = step == config.train.steps
                if every(config.train.log_every) or last:
                    log()
                evaluated = not (every(config.eval.every) and held_out)
                if not evaluated and not evaluate():
                    return stopped(loader.state())
                late = every(config.train.log_every) and overdue.now()
                if late or every(config.checkpoint.every) or last:
                    save(loader.state())
                elif local and every(config.checkpoint.local.every):
                    save(loader.state(), local)
                if stop.asked():
                    return stopped(loader.state())
    finally:
        checkpoints.close()
        if local:
            local.close()
        metrics.close()
        if rows_log:
            rows_log.flush()
        stop.close()
    export.write(config, run.start, state, run.recipe, workdir)
    left_out = _left_out(_row_counts(counted), workdir)
    _log.info(f"done: {step} steps in {workdir}" + (f"; {left_out}" if left_out else ""))
    return 0


# --- parts -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _owner(workdir: Path) -> Iterator[files.Lock | None]:
    """This run alone writes to `workdir`: the first process holds its lock, for all of them."""
    with contextlib.ExitStack() as held:
        problem = lock = None
        if not jax.process_index():
            try:
                lock = held.enter_context(files.Lock(workdir, "train"))
            except (InputError, UsageError) as error:
                problem = [isinstance(error, UsageError), str(error)]
        if problem := from_all(problem)[0]:
            bad_use, message = problem
            raise (UsageError if bad_use else InputError)(message)
        yield lock


def _first_state(run: Setup) -> State:
    """The state before the first step: weights of the start, fresh adapters, helper projections."""
    config, start = run.config, run.start
    shardings = param_shardings(moss_audio.abstract_params(start.model), start.model, run.mesh)
    params = flatten(initial_params(start, shardings, config.train.seed))
    if config.lora.rank:
        base = {path: run.params[path] for path in params}
        params |= jax.jit(functools.partial(setup.adapters_of, config, base))()
    if run.recipe.helpers:
        params |= _projections(config, start, run.recipe.helpers)
    return run.init_state()(params)


def _projections(config: Any, start: Start, helpers: Helpers) -> dict:
    """Projections of the helper losses: those of the checkpoint to start from, else fresh ones."""
    fresh = init_helpers(jax.random.key(config.train.seed), start.model, helpers)
    found, tags = load_helpers(start.whole) if start.whole else ({}, ())
    same = {
        path: leaf
        for path, leaf in found.items()
        if path in fresh and fresh[path].shape == leaf.shape
    }
    if tags != helpers.names:
        same = {path: leaf for path, leaf in same.items() if "tags/" not in path}
    return {**fresh, **{path: jnp.asarray(leaf, jnp.float32) for path, leaf in same.items()}}


def _rows(
    run: Setup, mixture: Mixture, workdir: Path, state: Callable[[], State]
) -> tuple[Batches, Echo | None]:
    """What gives the batch of each step, and what repeats its rows (data.echo)."""
    config, rows, echo = run.config.data, run.loader, None
    if source := source_of(run.config):
        return source.batches(run, mixture, workdir, state), None
    if config.echo > 1:
        masks = rows.augment
        unmasked = dataclasses.replace(masks, freq_masks=0, time_masks=0)
        rows = dataclasses.replace(rows, batch=rows.batch // config.echo, augment=unmasked)
        seed = run.config.train.seed
        echo = Echo(run.loader.batch, config.echo_rows, seed, run.mesh, masks)
    loader = Loader(
        mixture,
        run.start.tokenizer,
        run.start.model.encoder,
        rows,
        jax.process_index(),
        jax.process_count(),
        str(workdir),
    )
    return loader, echo


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


def _collect(waiting: list, totals: dict[str, Any]) -> dict[str, Any]:
    """Fetches the numbers of all steps since the last time; returns those of the newest."""
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
            "padding": 1 - int(n["tokens"]) / float(n["room"]),
            "tokens_seen": totals["tokens_seen"],
            "audio_hours_seen": totals["audio_seconds_seen"] / 3600,
            "skipped": totals["skipped_total"],
            **{f"policy/{name}": float(value) for name, value in n["objective"].items()},
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


def _held_out_loss(
    eval_fn: Any, state: State, held_out: Mixture, run: Setup, workdir: Path, stop: _StopSignal
) -> tuple[float, dict[str, int]]:
    """The loss, and the counts of rows. Raises _Stopped if SIGTERM came."""
    loss = weight = 0.0
    counted: dict[str, float] = {}
    weights = state.get("ema", state["trained"])
    for batch in eval_batches(
        held_out,
        run.start.tokenizer,
        run.start.model.encoder,
        run.loader,
        jax.process_index(),
        jax.process_count(),
        str(workdir),
    ):
        if stop.asked():
            raise _Stopped
        counted = batch.stats
        sums = jax.device_get(eval_fn(weights, state["frozen"], _place(batch.arrays, run.mesh)))
        loss, weight = loss + float(sums["loss"]), weight + float(sums["weight"])
    rows = _row_counts(counted)
    if not weight:
        raise InputError(f"data.eval: no row could be used; {_left_out(rows, workdir, 'eval_')}")
    return loss / weight, rows


def _row_counts(counted: Mapping[str, float]) -> dict[str, int]:
    """Rows that were seen, bad and over-long, of all processes, which must all call it; {} if
    what makes the batches does not count them."""
    own = {name: int(counted[name]) for name in COUNTS if name in counted}
    of_all = from_all(own)
    return {name: sum(each[name] for each in of_all) for name in own}


def _left_out(rows: Mapping[str, int], workdir: Path, prefix: str = "") -> str:
    """How many rows were left out, and where they are listed; "" if none was."""
    parts = [
        f"{rows[name]} {word} ({prefix}{name}_rows.jsonl)"
        for name, word in (("bad", "bad"), ("overlong", "over-long"))
        if rows.get(name)
    ]
    if not parts:
        return ""
    return f"of {rows['seen']} rows these are left out: {', '.join(parts)} in {workdir}"


def _describe(state: State, run: Setup, mixture: Mixture) -> None:
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
        f"{dict(run.mesh.shape)}; {mixture.rows:,} rows"
    )


def _profile(span: tuple[int, int], done: int, workdir: Path) -> None:
    first, count = span
    # A profiler writes to disks alone.
    folder = Path(tempfile.gettempdir()) if is_remote(workdir) else workdir
    if count and done == first:
        jax.profiler.start_trace(str(folder / "profile"))
    if count and done == first + count:
        jax.profiler.stop_trace()
        _log.info(f"profiled {count} steps in {folder / 'profile'}")


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
    """SIGTERM came while the run waited for data, or evaluated."""


class _StopSignal:
    """SIGTERM asks to save and stop. With several processes all of them learn it at one step."""

    def __init__(self) -> None:
        self._asked = self._waits = False
        self._calls = 0
        self._before: Any = None
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True
        if self._waits:
            raise _Stopped

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Raises _Stopped where SIGTERM comes in this context, or if it came before."""
        self._waits = True
        try:
            if self._asked:
                raise _Stopped
            yield
        finally:
            self._waits = False

    def close(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def asked(self) -> bool:
        """Whether it came. All processes must call it equally often."""
        self._calls += 1
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._calls)
        return self._asked
