"""Searches rows per device, length, remat policy and mesh for the best step that fits."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moss_audio_jax import files
from moss_audio_jax.errors import InputError
from moss_audio_jax.journal import Journal
from moss_audio_jax.plan.estimate import Estimate, Memory, Plan
from moss_audio_jax.plan.hlo import Collective
from moss_audio_jax.plan.slices import Crossing
from moss_audio_jax.plan.topologies import Topology


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a sweep: rows per device, row length, remat policy, mesh axis `tensor`.

    The mesh axis `fsdp` takes the rest of the devices.
    """

    rows: int
    length: int
    remat: str
    tensor: int

    def apply(self, config: Any, devices: int) -> Any:
        """The config with this setting, for a number of devices."""
        config = config.copy_and_resolve_references()
        config.mesh.update(data=1, fsdp=-1, tensor=self.tensor, sequence=1)
        config.data.batch = self.rows * (devices // self.tensor) * config.train.accumulate
        config.data.length = self.length
        config.train.remat = self.remat
        return config


def settings(
    rows: Sequence[int],
    lengths: Sequence[int],
    remats: Sequence[str],
    tensors: Sequence[int],
    devices: int,
    heads: int,
) -> Iterator[list[Setting]]:
    """Series of settings; those of a series differ only in rows, and the fewest come first.

    Meshes that do not divide the devices or the key/value heads are left out.
    """
    for length, remat, tensor in itertools.product(lengths, remats, tensors):
        if devices % tensor == 0 and heads % tensor == 0:
            yield [Setting(n, length, remat, tensor) for n in sorted(rows)]


def search(
    series: Iterator[list[Setting]], evaluate: Callable[[Setting], Plan]
) -> list[tuple[Setting, Plan]]:
    """The plans of all settings; a series ends with the first setting that does not fit."""
    found = []
    for group in series:
        for setting in group:
            plan = evaluate(setting)
            found.append((setting, plan))
            if not plan.fits:
                break
    return found


def best(found: Sequence[tuple[Setting, Plan]]) -> tuple[Setting, Plan] | None:
    """Of the settings that fit, the one with the highest modelled MFU; None if none fits."""
    fitting = [pair for pair in found if pair[1].fits]
    return max(fitting, key=lambda pair: pair[1].estimate.mfu, default=None)


class Kept:
    """Keeps plans in a file beside the sweep's output, so that a killed sweep continues with them.

    Without an output nothing is kept.
    """

    def __init__(self, output: Path | None) -> None:
        self._path = output and output.with_name(f"{output.name}.partial.jsonl")
        self._found: dict[str, Plan] = {}
        if self._path is None or not self._path.exists():
            return
        # A line without an end was left by a killed process.
        for line in files.read_bytes(self._path).decode(errors="replace").splitlines(keepends=True):
            if line.endswith("\n"):
                try:
                    row = files.parse_json(line, str(self._path))
                    self._found[row["question"]] = _plan(row["plan"])
                except (ValueError, TypeError, KeyError):
                    raise InputError(f"{self._path}: not the plans of a sweep; remove it") from None

    def plan(self, question: Mapping[str, Any], make: Callable[[], Plan]) -> Plan:
        """The plan for a question (everything that a plan depends on): a kept one, or a new one,
        which is then kept."""
        words = json.dumps(question, sort_keys=True, default=str)
        digest = hashlib.sha256(words.encode()).hexdigest()
        if digest not in self._found:
            self._found[digest] = plan = make()
            with Journal(self._path) as journal:
                journal.write({"question": digest, "plan": dataclasses.asdict(plan)})
        return self._found[digest]

    def drop(self) -> None:
        """Removes the file; call it when the output is written."""
        if self._path:
            self._path.unlink(missing_ok=True)


def _plan(row: dict[str, Any]) -> Plan:
    """The plan from its JSON, the reverse of `dataclasses.asdict`."""
    return Plan(
        **row
        | {
            "topology": Topology(**row["topology"]),
            "memory": Memory(**row["memory"]),
            "collectives": tuple(Collective(**entry) for entry in row["collectives"]),
            "across": tuple(Crossing(**entry) for entry in row["across"]),
            "warnings": tuple(row["warnings"]),
            "estimate": row["estimate"] and Estimate(**row["estimate"]),
        }
    )
