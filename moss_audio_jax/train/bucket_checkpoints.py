"""Checkpoints of a run whose work folder is in a bucket, which cannot rename.

Orbax writes a step in its place. It is whole when the first process has written its
checksums.json, after all else, and it is deleted by deleting that object first. The checksums are
those that the bucket lists (CRC-32C, or the ETag), so that nothing is read back.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from typing import Any

import orbax.checkpoint as ocp

from moss_audio_jax import bucket_clients, buckets, files
from moss_audio_jax.errors import InputError
from moss_audio_jax.train.checkpoints import CHECKSUMS, Checkpoints


class BucketCheckpoints(Checkpoints):
    """As `Checkpoints`; `workdir` is an epath.Path."""

    @staticmethod
    def _orbax() -> ocp.AsyncCheckpointer:
        bucket_clients.teach_orbax()
        place = ocp.path.atomicity.CommitFileTemporaryPath
        about = ocp.CompositeOptions(temporary_path_class=place)
        items = ocp.CompositeCheckpointHandler("state", "run", composite_options=about)
        return ocp.AsyncCheckpointer(items, temporary_path_class=place)

    def _finish(self, step: int, note: dict[str, Any]) -> None:
        self._checkpointer.wait_until_finished()  # on the first process: that all have written
        if not self._first:
            return
        folder = self._folder / str(step)
        note = {**note, "files": buckets.sums(folder)}
        files.write_whole(folder / CHECKSUMS, json.dumps(note))
        self._noted(step, note)

    def _steps(self) -> list[int]:
        listed = [name.split("/") for name in buckets.sums(self._folder)]
        return sorted(int(parts[0]) for parts in listed if _ends_a_step(parts))

    def _unfinished(self, step: int) -> Any:
        return self._folder / str(step)

    def _fault(self, step: int) -> str | None:
        if not self._first:  # it looks at all files at once
            return None
        try:
            note = self._read_note(step)
        except InputError:
            return f"{CHECKSUMS} is damaged"
        if not note["finite"]:
            return "its weights or moments are not finite"
        found = buckets.sums(self._folder / str(step))
        for name, expected in note["files"].items():
            if name not in found:
                return f"{name} is missing"
            if found[name] != expected:
                return f"{name} is not the file that was written"
        return None

    def _set_aside(self, step: int, fault: str) -> None:
        if not self._first:
            return
        target, again = self._aside / str(step), 1
        while target.exists():
            target, again = self._aside / f"{step}-{again}", again + 1
        buckets.move(self._folder / str(step), target)
        warnings.warn(
            f"{self._folder / str(step)}: {fault}; set aside as {target}",
            stacklevel=3,
        )

    def _delete(self, step: int) -> None:
        buckets.delete(self._folder / str(step), [CHECKSUMS])

    def _tidy(self) -> None:
        whole = set(map(str, self._steps()))
        begun = {name.split("/")[0] for name in buckets.sums(self._folder)}
        for left in sorted(begun - whole):
            if left.partition(".")[0].isdecimal():
                self._log_removed(self._folder / left)
                buckets.delete(self._folder / left)

    def _not_saved(self, step: int, error: Exception) -> InputError:
        if self._first:
            with contextlib.suppress(InputError):  # the next start removes it
                self._delete(step)
        return InputError(f"{self._folder / str(step)}: not written: {bucket_clients.told(error)}")


def _ends_a_step(parts: list[str]) -> bool:
    return len(parts) == 2 and parts[0].isdecimal() and parts[1] == CHECKSUMS
