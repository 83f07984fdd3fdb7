"""Checkpoints of a run: state and everything else that says where it stands, in one Orbax step.

    WORKDIR/checkpoints/STEP/state    trained weights, optimizer, EMA, step (sharded arrays)
    WORKDIR/checkpoints/STEP/run      JSON: data streams of all processes, totals, the config

Frozen weights are not in it: they come from `init_from` again (LoRA checkpoints are small).

Order of restoring: (1) config and `init_from` give shapes, shardings and frozen weights; (2) the
newest whole step in WORKDIR gives the state, placed on whatever mesh the run has now; (3) its data
state is dealt to whatever processes there are; (4) logs are cut back to that step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from moss_audio_jax.data.pipeline import merge_states

State = dict[str, Any]


class Checkpoints:
    """Saves (in the background) and restores a run's steps under `workdir`."""

    def __init__(self, workdir: Path, config: Any):
        keep: list[Any] = [policies.LatestN(config.keep_last)]
        if config.keep_every:
            keep.append(policies.EveryNSteps(config.keep_every))
        if config.keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["eval_loss"],
                    reverse=True,  # the lower the better
                    n=config.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            item_names=("state", "run"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                enable_async_checkpointing=True,
            ),
        )

    def latest(self) -> int | None:
        """The newest whole step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: State, run: dict[str, Any], data: dict[str, Any],
             eval_loss: float | None = None) -> None:  # fmt: skip
        """Starts writing one step; the arrays are copied before this returns.

        Args:
          run: JSON that is the same on every process.
          data: this process's data state; those of all processes are merged.
        """
        if self._manager.latest_step() == step:
            return
        run = {**run, "data": merge_states(_from_all(data))}
        kept = {key: value for key, value in state.items() if key != "frozen"}
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(kept), run=ocp.args.JsonSave(run)),
            metrics=None if eval_loss is None else {"eval_loss": eval_loss},
            force=True,
        )

    def restore(self, step: int, abstract: State, shardings: State) -> tuple[State, dict]:
        """State (without "frozen") on `shardings`, and the run's JSON."""
        target = {
            key: jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                value,
                shardings[key],
            )
            for key, value in abstract.items()
            if key != "frozen"
        }
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), run=ocp.args.JsonRestore()
            ),
        )
        return restored["state"], restored["run"]

    def close(self) -> None:
        """Waits for what is still being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _from_all(value: dict[str, Any]) -> list[dict[str, Any]]:
    """This JSON value of every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(data)]))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [
        json.loads(bytes(row[: int(size)])) for row, size in zip(rows, np.ravel(sizes), strict=True)
    ]
