"""Log-probabilities of answers by the trainer, where the loss needs more than it computes itself.

"old_logprobs" are by the weights that sampled, if these move before a batch is learned from.
"reference_logprobs" are by the model that the run started from, if `policy.kl` holds the policy
near it: with LoRA the base, which is there; else a frozen copy of what is trained, in the compute
dtype, that is read from `init_from` again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moss_audio_jax.models import moss_audio
from moss_audio_jax.models.blocks import as_dtype
from moss_audio_jax.sharding import param_shardings
from moss_audio_jax.train.setup import Setup
from moss_audio_jax.train.start import initial_params
from moss_audio_jax.train.step import Flat, Recipe, State, label_logprobs
from moss_audio_jax.tree import flatten

# (train state, a batch's arrays) -> float32 [B, T] at the answers' own tokens, whole on each device
Score = Callable[[State, dict[str, Any]], jax.Array]


def scores_of(policy: Any) -> tuple[str, ...]:
    """What `Answer.scores` needs, of `config.policy`; nothing on policy without a reference."""
    moved = policy.updates > 1 or policy.ahead > 0
    return ("old_logprobs",) * moved + ("reference_logprobs",) * bool(policy.kl)


def scorers(run: Setup) -> dict[str, Score]:
    """What computes each of `scores_of`."""
    wanted, found = scores_of(run.config.policy), {}
    if "old_logprobs" in wanted:
        score = program(run.mesh, run.recipe)
        found["old_logprobs"] = lambda state, arrays: score(
            state["trained"], state["frozen"], arrays
        )
    if "reference_logprobs" in wanted:
        trained, recipe = _reference(run)
        judge = program(run.mesh, recipe)
        found["reference_logprobs"] = lambda state, arrays: judge(trained, state["frozen"], arrays)
    return found


def program(mesh: Mesh, recipe: Recipe) -> Callable[[Flat, Flat, dict], jax.Array]:
    """`label_logprobs`, jitted: (trained, frozen, a batch's arrays) -> [B, T], whole everywhere."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(functools.partial(label_logprobs, recipe=recipe), out_shardings=whole)


def _reference(run: Setup) -> tuple[Flat, Recipe]:
    """What the reference has in the place of the trained parameters, and how it is run."""
    start, recipe = run.start, run.recipe
    if recipe.lora_alpha:
        return {}, dataclasses.replace(recipe, lora_alpha=0.0)
    shardings = param_shardings(moss_audio.abstract_params(start.model), start.model, run.mesh)
    params = flatten(initial_params(start, shardings, run.config.train.seed))
    dtype = as_dtype(recipe.compute)
    return {path: params[path].astype(dtype) for path in run.state["trained"]}, recipe
