"""The nearer of two tiers of checkpoints: each host's own disk, often; the work folder, seldom.

    FOLDER/RUN/PROCESS/STEP/pieces.npz    what the process's devices hold of the state, byte by byte
    FOLDER/RUN/PROCESS/STEP/run.json      as in the work folder's checkpoints
    WORKDIR/run_id                        RUN: a new one for each work folder

A process writes a step under another name and renames it. The newest step is restored of which the
hosts together have every piece that the run's mesh needs, and only if the work folder has no newer
one. A host without its own copy, for example a new one, gets its pieces from those that hold the
same: with mesh.data above 1 each piece is on several. A step of another mesh has other pieces and
is not used.
"""

from __future__ import annotations

import concurrent.futures
import copy
import json
import logging
import shutil
import uuid
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moss_audio_jax import files
from moss_audio_jax.data.pipeline import merge_states
from moss_audio_jax.errors import InputError
from moss_audio_jax.runtime import from_all
from moss_audio_jax.train.checkpoints import UNFINISHED, State, kept
from moss_audio_jax.train.step import all_finite

_log = logging.getLogger(__name__)

_KEEP = 2  # the last may be whole on some hosts only


class LocalCheckpoints:
    """Saves (in the background) and restores a run's steps under `folder` of each host."""

    def __init__(self, folder: Path, workdir: Path, abstract: State, shardings: State):
        """Args:
        abstract, shardings: of the state on this run's mesh.
        """
        self._run = Path(folder).expanduser().absolute() / _run_id(workdir)
        self._own = self._run / str(jax.process_index())
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(kept(abstract))
        self._leaves = [
            (jax.tree_util.keystr(path), leaf, sharding)
            for (path, leaf), sharding in zip(leaves, jax.tree.leaves(kept(shardings)), strict=True)
        ]
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "local-checkpoint")
        self._pending: tuple[int, concurrent.futures.Future] | None = None
        try:
            self._own.mkdir(parents=True, exist_ok=True)
            for left in self._own.glob(f"*{UNFINISHED}"):
                shutil.rmtree(left)
        except OSError as error:
            raise files.not_written(self._own, error) from None

    def newest(self, after: int) -> int | None:
        """The newest step beyond `after` whose pieces are all on some host; None if there is none.

        Steps beyond the one that the run goes on from are deleted. All processes must call it.
        """
        found = None
        needed = {
            _piece(name, index, leaf.shape)
            for name, leaf, sharding in self._leaves
            for index in sharding.devices_indices_map(leaf.shape).values()
        }
        steps = {int(step) for own in from_all(sorted(self._steps())) for step in own}
        for step in sorted((step for step in steps if step > after), reverse=True):
            has = from_all(sorted(self._read(step)[0]))
            there = {piece for own in has for piece in own}
            if needed <= there:
                found = step
                break
            _log.info(
                f"local checkpoint {step}: {len(needed - there)} of {len(needed)} pieces are on no "
                "host, or it is of another mesh; not used"
            )
        for step, folders in self._steps().items():
            if step > (found or after):
                for folder in folders:
                    shutil.rmtree(folder, ignore_errors=True)
        return found

    def save(self, step: int, state: State, run: dict[str, Any], data: dict[str, Any]) -> None:
        """Starts writing one step, unless it is not finite; arguments as in `Checkpoints.save`.

        Raises:
          InputError: the last step could not be written.
        """
        self.wait()
        run = copy.deepcopy({**run, "data": merge_states(from_all(data))})
        if not bool(all_finite(kept(state))):
            return
        pieces = {}
        for (name, leaf, _), array in zip(self._leaves, jax.tree.leaves(kept(state)), strict=True):
            for shard in array.addressable_shards:
                piece = _piece(name, shard.index, leaf.shape)
                if piece not in pieces:
                    pieces[piece] = _bytes(np.array(shard.data))
        self._pending = step, self._writer.submit(self._write, step, pieces, run)

    def restore(self, step: int) -> tuple[State, dict]:
        """The state without "frozen", and the run's JSON. All processes must call it."""
        pieces, run = self._read(step)
        has = from_all(sorted(pieces))
        mine = [
            {
                _piece(name, sharding.devices_indices_map(leaf.shape)[device], leaf.shape)
                for name, leaf, sharding in self._leaves
                for device in sharding.mesh.devices.flat
                if device.process_index == process
            }
            for process in range(jax.process_count())
        ]
        for piece in sorted(
            set().union(*(need - {*own} for need, own in zip(mine, has, strict=True)))
        ):
            owner = next(process for process, own in enumerate(has) if piece in own)
            source = jax.process_index() == owner
            size = max(from_all(len(pieces[piece]) if source else 0))
            value = pieces[piece] if source else np.zeros(size, np.uint8)
            pieces[piece] = np.asarray(multihost_utils.broadcast_one_to_all(value, source))
        run = next(each for each in from_all(run) if each is not None)

        def array(name: str, leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
            def part(index: tuple) -> np.ndarray:
                value = pieces[_piece(name, index, leaf.shape)]
                return value.view(leaf.dtype).reshape(sharding.shard_shape(leaf.shape))

            return jax.make_array_from_callback(leaf.shape, sharding, part)

        arrays = [array(*each) for each in self._leaves]
        return jax.tree_util.tree_unflatten(self._tree, arrays), run

    def wait(self) -> None:
        """Waits for the step that is being written. Raises InputError if that failed."""
        if self._pending is None:
            return
        (step, pending), self._pending = self._pending, None
        try:
            pending.result()
        except Exception as error:
            raise files.not_written(self._own / str(step), error) from error

    def close(self) -> None:
        """Like `wait`, and ends the thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    # --- parts ------------------------------------------------------------------------------------

    def _write(self, step: int, pieces: dict[str, np.ndarray], run: dict[str, Any]) -> None:
        folder = self._own / f"{step}{UNFINISHED}"
        folder.mkdir()
        with open(folder / "pieces.npz", "wb") as file:
            np.savez(file, **pieces)
            files.sync(file.fileno())
        files.write_whole(folder / "run.json", json.dumps(run))
        files.sync(folder)
        folder.rename(self._own / str(step))
        files.sync(self._own)
        for old in sorted(int(f.name) for f in self._own.iterdir() if f.name.isdecimal())[:-_KEEP]:
            shutil.rmtree(self._own / str(old), ignore_errors=True)

    def _steps(self) -> dict[int, list[Path]]:
        """The folders of each step on this host: processes may have had other numbers."""
        found: dict[int, list[Path]] = {}
        for folder in sorted(self._run.glob("*/*")):
            if folder.name.isdecimal():
                found.setdefault(int(folder.name), []).append(folder)
        return found

    def _read(self, step: int) -> tuple[dict[str, np.ndarray], dict | None]:
        """This host's pieces of a step, and its JSON; files that are damaged are named."""
        pieces, run = {}, None
        for folder in self._steps().get(step, ()):
            try:
                told = files.read_json(folder / "run.json")
                with np.load(folder / "pieces.npz") as file:  # it checks their CRC-32
                    pieces |= {piece: file[piece] for piece in file.files}
                run = told
            except (InputError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
                _log.warning(f"{files.shown(folder)}: damaged, not used ({files.brief(error)})")
        return pieces, run


def _run_id(workdir: Path) -> str:
    """What tells the run of a work folder from others whose steps are on the same disks."""
    found = None
    if not jax.process_index():
        file = workdir / "run_id"
        if file.exists():
            found = files.read_text(file).strip()
        else:
            files.write_whole(file, f"{(found := uuid.uuid4().hex)}\n")
    return from_all(found)[0]


def _piece(name: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """The name of the part of an array that a device holds: "['trained']['a'] 0:4,8:16"."""
    spans = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    return f"{name} {','.join(f'{begin}:{end}' for begin, end in spans)}"


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
