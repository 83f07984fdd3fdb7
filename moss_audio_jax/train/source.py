"""Where a run's batches come from, if not from rows alone: a module named by `train.source`.

The loop, its checkpoints, meshes, optimizers and logs stay the same. `post_train.run` is one such
module: its batches are answers of the model in training, with what they earned.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ml_collections import ConfigDict

from moss_audio_jax.data.examples import ExampleMaker
from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.data.pipeline import HostBatch
from moss_audio_jax.data.survey import Asks
from moss_audio_jax.errors import UsageError
from moss_audio_jax.train.step import Objective, State

if TYPE_CHECKING:
    from moss_audio_jax.train.setup import Setup


class Batches(Protocol):
    """An endless iterator of batches, and a context manager. `data.pipeline.Loader` is one."""

    def __next__(self) -> HostBatch: ...

    def state(self) -> dict[str, Any]:
        """Where it stands after the batch that was given last: a small JSON object."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken. Raises InputError if it is of another run."""

    def flush(self) -> None:
        """Writes its logs to the end: a checkpoint follows that will not write them again."""

    def held_out(self, mixture: Mixture, step: int) -> dict[str, float]:
        """What metrics.jsonl reports of held-out rows, besides their loss."""


class Source(Protocol):
    """What the module has."""

    def get_config(self) -> ConfigDict:
        """Its keys, with their defaults: `config.policy`."""

    def check(self, config: ConfigDict) -> None:
        """Raises UsageError naming a key that cannot be."""

    def check_rows(self, run: Setup, mixture: Mixture, held_out: Mixture | None) -> None:
        """Raises InputError, before weights are read, for rows that the run could not use."""

    def asks(self, config: ConfigDict, make: ExampleMaker) -> Asks:
        """How it takes rows, for `--check-data`; it is sent to worker processes."""

    def objective(self, config: ConfigDict) -> Objective: ...

    def batches(
        self, run: Setup, mixture: Mixture, workdir: Path, state: Callable[[], State]
    ) -> Batches:
        """Args:
        mixture: of the run's rows.
        state: gives the train state as it is now.
        """


def source_of(config: ConfigDict) -> Source | None:
    """The module of `train.source`; None for the usual rows."""
    name = config.train.source
    if not name:
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"train.source {name!r} cannot be imported ({error})") from None
