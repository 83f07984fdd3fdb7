"""Checkpoints of a run: its state and its position in the data, in one folder for each step.

    WORKDIR/checkpoints/STEP/state            trained weights, optimizer, EMA, step (sharded arrays)
    WORKDIR/checkpoints/STEP/run              JSON: data streams of all processes, totals, config
    WORKDIR/checkpoints/STEP/checksums.json   size and CRC-32 of every file, written last
    WORKDIR/damaged_checkpoints/STEP          damaged steps, set aside; delete them yourself

Frozen weights are left out, because `init_from` provides them (so LoRA checkpoints are small).

Orbax writes a step under another name, in the background. Then each process reads its share of the
files back, the first one writes the checksums, and the folder is renamed to its final name. Older
steps are deleted only after that.

Order of restoring: (1) config and `init_from` give shapes, shardings and frozen weights; (2) the
newest step whose files match their checksums and whose values are finite gives the state, placed on
whatever mesh the run has now; newer ones are set aside; (3) its data state is dealt to the current
processes; (4) logs are cut back to that step.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import json
import logging
import math
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from moss_audio_jax import files
from moss_audio_jax.buckets import absolute
from moss_audio_jax.data.pipeline import merge_states
from moss_audio_jax.errors import InputError
from moss_audio_jax.runtime import from_all
from moss_audio_jax.train.step import all_finite

_log = logging.getLogger(__name__)

State = dict[str, Any]

CHECKSUMS = "checksums.json"
UNFINISHED = ".partial"  # ends the name of a step that is being written or deleted
_PATIENCE = 600  # seconds that the first process waits for the checksums of the others


class Checkpoints:
    """Saves (in the background) and restores a run's steps under `workdir`."""

    def __init__(self, workdir: Path, config: Any, abstract: State):
        """Args:
        config: how many steps to keep; see config.checkpoint.
        abstract: the state as ShapeDtypeStructs.
        """
        workdir = absolute(workdir)
        self._folder, self._aside = workdir / "checkpoints", workdir / "damaged_checkpoints"
        self._config = config
        self._abstract = kept(abstract)
        self._need = sum(
            math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(self._abstract)
        )
        self._first = jax.process_index() == 0
        self._share = jax.process_index(), jax.process_count()
        self._newest: int | None = None
        self._notes: dict[int, dict] = {}  # what the first process knows of the existing steps
        self._finisher = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, concurrent.futures.Future] | None = None
        _log_no_traceback()
        self._checkpointer = self._orbax()
        if self._first:
            self._tidy()

    def newest(self) -> int | None:
        """The newest step that is intact and finite; None if there is no step at all.

        Newer ones, which are damaged or not finite, are named and set aside.

        Raises:
          InputError: there are steps but none can be used; a run must not start anew over them.
        """
        faults: dict[int, str] = {}
        good = None
        # The first process decides which steps exist: all must take the same step.
        for step in reversed(from_all(self._steps())[0]):
            found = from_all({"fault": self._fault(step)})
            fault = next((each["fault"] for each in found if each["fault"]), None)
            if fault is None:
                good = step
                break
            faults[step] = fault
        if faults and good is None:
            told = "; ".join(f"step {step}: {fault}" for step, fault in faults.items())
            raise InputError(
                f"{files.shown(self._folder)}: none of its checkpoints can be used ({told}); put "
                "whole ones there, or name another --workdir to start anew"
            )
        for step, fault in faults.items():
            self._set_aside(step, f"{fault}; the run goes on from step {good}")
        self._newest = good
        if self._first:
            for step in self._steps():
                with contextlib.suppress(InputError):
                    self._notes[step] = self._read_note(step)
        return good

    def save(
        self,
        step: int,
        state: State,
        run: dict[str, Any],
        data: dict[str, Any],
        eval_loss: float | None = None,
    ) -> None:
        """Starts writing one step; the arrays are copied before this returns.

        Args:
          run: JSON that is the same on every process.
          data: this process's data state; those of all processes are merged.

        Raises:
          InputError: this or the last step could not be written, for example on a full disk.
        """
        if self._newest == step:
            return
        self.wait()
        # A copy: Orbax writes it in the background, while the run's totals grow.
        run = copy.deepcopy({**run, "data": merge_states(from_all(data))})
        saved = kept(state)
        note = {
            "version": 1,
            "step": step,
            "finite": bool(all_finite(saved)),
            "eval_loss": eval_loss,
        }
        try:
            self._checkpointer.save(
                self._unfinished(step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(saved), run=ocp.args.JsonSave(run)
                ),
                force=True,
            )
        except Exception as error:
            raise self._not_saved(step, error) from error
        self._pending = step, self._finisher.submit(self._finish, step, note)
        self._newest = step

    def restore(self, step: int, shardings: State) -> tuple[State, dict]:
        """State (without "frozen") on `shardings`, and the run's JSON.

        Raises:
          InputError: the state belongs to another model, optimizer or set of trained weights.
        """
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self._abstract,
            kept(shardings),
        )
        try:
            restored = self._checkpointer.restore(
                self._folder / str(step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target), run=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:
            raise InputError(
                f"{files.shown(self._folder / str(step))}: is of another model, optimizer, LoRA or "
                f"EMA than this config's, and cannot be continued with it ({files.brief(error)})"
            ) from error
        return restored["state"], restored["run"]

    def wait(self) -> None:
        """Waits for the step that is being written. Raises InputError if that failed."""
        if self._pending is None:
            return
        (step, pending), self._pending = self._pending, None
        try:
            pending.result()
        except Exception as error:
            raise self._not_saved(step, error) from error

    def close(self) -> None:
        """Like `wait`, and ends the thread."""
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            self._checkpointer.close()

    @staticmethod
    def _orbax() -> ocp.AsyncCheckpointer:
        return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler("state", "run"))

    # --- in the background ------------------------------------------------------------------------

    def _finish(self, step: int, note: dict[str, Any]) -> None:
        """After Orbax has written a step: adds checksums, renames it, deletes old steps."""
        self._checkpointer.wait_until_finished()
        folder = self._unfinished(step)
        sums = files.checksums(folder, self._share)
        if not self._first:
            files.write_whole(_part(folder, self._share[0]), json.dumps(sums))
            return
        for index in range(1, self._share[1]):
            sums |= _take(_part(folder, index))
        # Files that another process did not see or had no time for.
        names = [name for name in _names(folder) if name not in sums]
        note = {**note, "files": sums | files.checksums(folder, names=names)}
        files.write_whole(folder / CHECKSUMS, json.dumps(note))
        for inner in (folder, *(f for f in folder.rglob("*") if f.is_dir())):
            files.sync(inner)
        folder.rename(self._folder / str(step))
        files.sync(self._folder)
        self._noted(step, note)

    def _noted(self, step: int, note: dict[str, Any]) -> None:
        """A step is whole: deletes those that are not to be kept."""
        self._notes[step] = note
        for old in self._notes.keys() - _to_keep(self._notes, self._config):
            del self._notes[old]
            self._delete(old)

    # --- parts ------------------------------------------------------------------------------------

    def _steps(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        return sorted(int(f.name) for f in self._folder.iterdir() if f.name.isdecimal())

    def _unfinished(self, step: int) -> Path:
        return self._folder / f"{step}{UNFINISHED}"

    def _read_note(self, step: int) -> dict[str, Any]:
        file = self._folder / str(step) / CHECKSUMS
        note = files.read_json(file)
        if not _is_note(note, step):
            raise InputError(f"{file}: not the checksums of step {step}")
        return note

    def _fault(self, step: int) -> str | None:
        """What is wrong with this process's share of a step; None: nothing."""
        folder = self._folder / str(step)
        if not (folder / CHECKSUMS).is_file():
            return f"it has no {CHECKSUMS}: it was not written to its end, or by an older version"
        try:
            note = self._read_note(step)
        except InputError:
            return f"{CHECKSUMS} is damaged"
        if not note["finite"]:
            return "its weights or moments are not finite"
        return files.damage(folder, note["files"], self._share)

    def _set_aside(self, step: int, fault: str) -> None:
        if not self._first:
            return
        target, again = self._aside / str(step), 1
        while target.exists():
            target, again = self._aside / f"{step}-{again}", again + 1
        try:
            self._aside.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(target)
        except OSError as error:
            raise InputError(
                f"{files.shown(self._folder / str(step))}: {fault}; it cannot be moved to "
                f"{files.shown(target)} ({files.reason(error)}): move it away"
            ) from None
        warnings.warn(
            f"{files.shown(self._folder / str(step))}: {fault}; set aside as {files.shown(target)}",
            stacklevel=3,
        )

    def _delete(self, step: int) -> None:
        gone = self._unfinished(step)  # half deleted, it must not look like a step
        (self._folder / str(step)).rename(gone)
        _remove(gone)

    def _tidy(self) -> None:
        """Makes the folder, and removes what a killed run was writing or deleting."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for left in self._folder.glob(f"*{UNFINISHED}*"):
                if left.name.partition(".")[0].isdecimal():
                    self._log_removed(left)
                    _remove(left)
            free = shutil.disk_usage(self._folder).free
        except OSError as error:
            raise files.not_written(self._folder, error) from None
        if free < self._need:
            warnings.warn(
                f"{files.shown(self._folder)}: a checkpoint takes up to "
                f"{files.megabytes(self._need)}, {files.megabytes(free)} are free: saving may fail",
                stacklevel=3,
            )

    @staticmethod
    def _log_removed(left: Path) -> None:
        _log.info(f"{files.shown(left)}: not written to its end; removed")

    def _not_saved(self, step: int, error: Exception) -> InputError:
        told = files.not_written(self._folder / str(step), error, self._need)
        if self._first:
            for left in self._folder.glob(f"{step}{UNFINISHED}*"):
                with contextlib.suppress(OSError):
                    _remove(left)
        return told


def kept(state: State) -> State:
    """What of a state is saved: frozen weights are not."""
    return {key: value for key, value in state.items() if key != "frozen"}


def _to_keep(notes: dict[int, dict], config: Any) -> set[int]:
    """The steps to keep: the newest, and those of `config`. Non-finite steps do not count."""
    finite = sorted(step for step, note in notes.items() if note["finite"])
    keep = {max(notes), *finite[-config.keep_last :]}
    if config.keep_every:
        keep |= {step for step in finite if step % config.keep_every == 0}
    if config.keep_best:
        judged = [step for step in finite if math.isfinite(notes[step]["eval_loss"] or math.inf)]
        judged.sort(key=lambda step: notes[step]["eval_loss"])
        keep |= set(judged[: config.keep_best])
    return keep


def _is_note(note: Any, step: int) -> bool:
    if not isinstance(note, dict) or (note.get("version"), note.get("step")) != (1, step):
        return False
    loss, sums = note.get("eval_loss"), note.get("files")
    return (
        isinstance(note.get("finite"), bool)
        and (loss is None or isinstance(loss, float))
        and isinstance(sums, dict)
        and all(
            isinstance(pair, list) and [type(x) for x in pair] in ([int, int], [int, str])
            for pair in sums.values()
        )
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _names(folder: Path) -> list[str]:
    return [str(f.relative_to(folder)) for f in sorted(folder.rglob("*")) if f.is_file()]


def _part(folder: Path, process: int) -> Path:
    return folder.with_name(f"{folder.name}.checksums-{process}")


def _take(part: Path) -> dict[str, list[int]]:
    """The checksums that another process leaves there; none if it takes too long."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        if part.exists():
            sums = files.read_json(part)
            part.unlink()
            return sums
        time.sleep(0.02)
    return {}


def _log_no_traceback() -> None:
    """Silences tracebacks of Orbax's threads, because `wait` raises their errors."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_raised)
    if sys.unraisablehook is not _report_unraisable:
        _report_unraisable.others = sys.unraisablehook
        sys.unraisablehook = _report_unraisable


def _is_not_raised(record: logging.LogRecord) -> bool:
    words = ("_SignalingThread", "background save thread", "orbax")
    return not (record.exc_info and any(word in record.getMessage() for word in words))


def _report_unraisable(unraisable: Any) -> None:
    # TensorStore reports to Orbax's event loop, which a failed save has closed.
    if str(unraisable.exc_value) != "Event loop is closed":
        _report_unraisable.others(unraisable)
