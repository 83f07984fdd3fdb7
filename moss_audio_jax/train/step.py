"""The train step: a pure function (state, batch) -> (state, metrics), and its state.

state = {
  "trained":  {path: float32}   master copies of what is trained
  "frozen":   {path: compute dtype}   everything else: no optimizer state, no float32 copy
  "opt":      the optimizer's state, for trained parameters only
  "ema":      {path: float32}   only with train.ema
  "step":     int32
  "skipped":  int32, updates skipped in a row because loss or gradient was not finite
}
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moss_audio_jax.config import Compute, ModelConfig
from moss_audio_jax.models import decoder, lora, moss_audio
from moss_audio_jax.models.adapter import adapt
from moss_audio_jax.models.blocks import as_dtype
from moss_audio_jax.ops.loss import IGNORE, cross_entropy, shift_labels
from moss_audio_jax.sharding import ACTIVATIONS, fit, param_specs
from moss_audio_jax.train import helpers as helping
from moss_audio_jax.train.helpers import Helpers
from moss_audio_jax.tree import path_name, unflatten

State = dict[str, Any]
Flat = dict[str, Any]

# What an objective knows of each token of an answer; each stands at its own token, like a label.
ANSWERED = (
    "answers",
    "advantages",
    "sampler_logprobs",
    "old_logprobs",
    "reference_logprobs",
)
# These stay float32 until they are used, because their gradients add up over the loss's chunks.
_KEPT = ("lm_head/kernel", "language_model/embed_tokens/embedding")


class Objective(Protocol):
    """What the decoder's answers are trained for, instead of their cross entropy. Hashable.

    Attributes:
      temperature: by which logits are divided.
    """

    temperature: float

    def count(self, batch: dict) -> jax.Array:
        """What the sum of a whole batch is divided by, above 0."""

    def sums(self, logprobs: jax.Array, batch: dict) -> tuple[jax.Array, dict]:
        """(the loss's sum, what `means` needs) of a part of a batch.

        `logprobs` float32 [B, T]: at each position that of the next token, if that has a label.
        """

    def means(self, sums: dict) -> dict[str, jax.Array]:
        """What metrics.jsonl reports, from the sums of a whole batch."""

    def moves(self, sums: dict) -> jax.Array:
        """bool: whether the batch says anything at all; if not, the weights stay as they are."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything static about a step."""

    model: ModelConfig
    compute: Compute
    accumulate: int = 1  # micro-batches a step
    clip_norm: float = 1.0  # 0: no clipping
    z_loss: float = 0.0
    ema: float = 0.0  # decay; 0: none
    lora_alpha: float = 0.0
    tasks: int = 1  # kinds of rows whose losses are reported separately
    decoder_loss: float = 1.0  # weight of the decoder's loss; 0: the decoder does not run
    helpers: Helpers | None = None
    objective: Objective | None = None  # None: cross entropy


def init_state(
    params: Flat, trained: set[str], optimizer: optax.GradientTransformation, recipe: Recipe
) -> State:
    """The state before the first step, from parameters of any dtype."""
    dtype = as_dtype(recipe.compute)
    master = {path: params[path].astype(jnp.float32) for path in sorted(trained)}
    frozen = {path: leaf.astype(dtype) for path, leaf in params.items() if path not in trained}
    state = {
        "trained": master,
        "frozen": frozen,
        "opt": optimizer.init(master),
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
    }
    if recipe.ema:
        state["ema"] = jax.tree.map(jnp.copy, master)
    return state


def state_shardings(state: State, config: ModelConfig, mesh: Mesh) -> State:
    """NamedShardings of a state (arrays or ShapeDtypeStructs).

    A moment is sharded like its parameter. Anything of another shape (factored moments, counters)
    is small and replicated.
    """
    shapes = {**state["frozen"], **state["trained"]}
    specs = param_specs(unflatten(shapes), config, mesh)
    flat = {
        path_name(p): s
        for p, s in jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda s: isinstance(s, P))
    }

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        parameter = str(getattr(path[-1], "key", ""))
        same = parameter in flat and shapes[parameter].shape == leaf.shape
        return NamedSharding(mesh, flat[parameter] if same else P())

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_shardings(batch: dict[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Rows over data and fsdp; tokens over sequence."""
    tokens = (
        "tokens",
        "positions",
        "segment_ids",
        "audio_index",
        "labels",
        "weights",
        "tasks",
        "branch_ids",
        "time_places",
        *ANSWERED,
    )

    def sharding(name: str, array: Any) -> NamedSharding:
        axes = [ACTIVATIONS["batch"], ACTIVATIONS["tokens"] if name in tokens else None]
        return NamedSharding(mesh, fit(array.shape, axes, mesh))

    return {name: sharding(name, array) for name, array in batch.items()}


def model_params(trained: Flat, frozen: Flat, compute: Compute) -> Any:
    """The model's tree for one pass: master copies rounded to the compute dtype."""
    dtype = as_dtype(compute)
    rounded = {
        path: leaf if path in _KEPT else leaf.astype(dtype) for path, leaf in trained.items()
    }
    return unflatten({**frozen, **rounded})


def loss_sums(
    trained: Flat, frozen: Flat, recipe: Recipe, batch: dict, counts: dict
) -> tuple[jax.Array, dict]:
    """The loss of a batch, or a part of one (what is differentiated), and sums to report.

    Args:
      counts: `loss_counts` of the whole batch, the number that each loss is averaged over. The
        losses of a batch's parts then add up to that of the batch.

    Returns:
      (decoder_loss * mean of weight * (cross entropy + z_loss * log Z^2) + the helpers' means by
      their weights, {"total": the same, "loss": sum of weight * cross entropy, "weight": sum of
      weights, "task_loss" [tasks], "task_weight" [tasks], "ctc": each helper's sum, ...}).
    """
    params = model_params(trained, frozen, recipe.compute)
    helpers = params.pop("helpers", None)
    attached = lora.attached(recipe.lora_alpha) if recipe.lora_alpha else contextlib.nullcontext()
    total, sums = jnp.zeros(()), {}
    with attached:
        audio = moss_audio.encode_audio(params, recipe.model, recipe.compute, batch)
        if recipe.helpers:
            read = ()
            if recipe.helpers.on_adapter:
                adapted = adapt(params["audio_adapter"], recipe.model, audio[0])
                read = adapted, decoder.head_kernel(params)
            sums = helping.losses(helpers, recipe.helpers, audio[0], batch, *read)
        targets = shift_labels(batch["labels"])
        weights = jnp.pad(batch["weights"][:, 1:], ((0, 0), (0, 1))) * (targets != IGNORE)
        if recipe.decoder_loss:
            hidden = moss_audio.hidden_states(params, recipe.model, recipe.compute, batch, audio)
            losses, log_z = _token_losses(params, recipe, hidden, targets)
            if recipe.helpers and recipe.helpers.on_decoder:
                read = None, decoder.head_kernel(params), hidden
                sums |= helping.losses(helpers, recipe.helpers, audio[0], batch, *read)
        else:
            losses = log_z = jnp.zeros(targets.shape)
        if recipe.helpers:
            weight = dict(recipe.helpers.weights)
            for name, value in sums.items():
                total += weight[name] * value / counts[name]
    decoded = jnp.sum(weights * (losses + recipe.z_loss * log_z**2))
    reported = jnp.sum(weights * losses)
    if recipe.objective:
        decoded, about = recipe.objective.sums(-losses, batch)
        reported = decoded
        sums |= {"objective": about}
    total += recipe.decoder_loss * decoded / counts["decoder"]
    tasks = jax.nn.one_hot(batch["tasks"], recipe.tasks, dtype=jnp.float32)
    return total, {
        **sums,
        "total": total,
        "loss": reported,
        "weight": jnp.sum(weights),
        "task_loss": jnp.einsum("bt,btk->k", weights * losses, tasks),
        "task_weight": jnp.einsum("bt,btk->k", weights, tasks),
    }


def _token_losses(
    params: Any, recipe: Recipe, hidden: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """-log p of each target, and log Z: float32 [B, T] each."""
    if recipe.objective and recipe.objective.temperature != 1:
        hidden = hidden / recipe.objective.temperature  # the head has no bias
    head = decoder.head_kernel(params)
    return cross_entropy(hidden, head, targets, recipe.compute.loss_chunk)


def label_logprobs(trained: Flat, frozen: Flat, batch: dict, recipe: Recipe) -> jax.Array:
    """float32 [B, T]: the log-probability of each label, at its own token; 0 where there is none.

    By the whole softmax, at the objective's temperature.
    """
    params = model_params(trained, frozen, recipe.compute)
    params.pop("helpers", None)
    attached = lora.attached(recipe.lora_alpha) if recipe.lora_alpha else contextlib.nullcontext()
    with attached:
        audio = moss_audio.encode_audio(params, recipe.model, recipe.compute, batch)
        targets = shift_labels(batch["labels"])
        hidden = moss_audio.hidden_states(params, recipe.model, recipe.compute, batch, audio)
        losses, _ = _token_losses(params, recipe, hidden, targets)
    return jnp.pad(-losses[:, :-1], ((0, 0), (1, 0)))


def loss_counts(recipe: Recipe, batch: dict) -> dict[str, jax.Array]:
    """The number that each loss of a batch is averaged over."""
    # A batch without any label has zero gradient instead of a division by zero.
    if recipe.objective:
        found = {"decoder": recipe.objective.count(batch)}
    else:
        found = {"decoder": jnp.maximum(jnp.sum(batch["weights"][:, 1:]), 1e-6)}
    return found | (helping.counts(recipe.helpers, batch) if recipe.helpers else {})


def gradients(trained: Flat, frozen: Flat, recipe: Recipe, batch: dict) -> tuple[Flat, dict]:
    """Gradient of the whole batch's loss, computed by micro-batches, and the sums to report."""
    counts = loss_counts(recipe, batch)

    def grad(part: dict) -> tuple[Flat, dict]:
        return jax.grad(loss_sums, has_aux=True)(trained, frozen, recipe, part, counts)

    if recipe.accumulate == 1:
        return grad(batch)
    # Row b goes to micro-batch b % accumulate, so that every device has rows in each.
    micro = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, recipe.accumulate, *x.shape[1:]), 1, 0), batch
    )

    def add(total: Any, part: dict) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, grad(part)), None

    shapes = jax.eval_shape(grad, jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, micro)[0]


def make_train_step(
    recipe: Recipe, optimizer: optax.GradientTransformation, learning_rate: Callable
) -> Callable[[State, dict], tuple[State, dict]]:
    """The step to jit (donate the state)."""

    def train_step(state: State, batch: dict) -> tuple[State, dict]:
        grads, sums = gradients(state["trained"], state["frozen"], recipe, batch)
        norm = optax.global_norm(grads)
        counts = loss_counts(recipe, batch)
        finite = jnp.isfinite(sums["total"]) & jnp.isfinite(norm)
        if recipe.clip_norm:
            scale = jnp.minimum(1.0, recipe.clip_norm / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt = optimizer.update(grads, state["opt"], state["trained"])
        trained = optax.apply_updates(state["trained"], updates)
        new = {"trained": trained, "opt": opt}
        if recipe.ema:
            new["ema"] = jax.tree.map(
                lambda old, x: recipe.ema * old + (1 - recipe.ema) * x, state["ema"], trained
            )
        # One bad batch must not spoil the weights: keep all of the old state but the count.
        moves = finite
        if recipe.objective:
            moves = finite & recipe.objective.moves(sums["objective"])
        kept = jax.tree.map(
            lambda a, b: jnp.where(moves, a, b), new, {key: state[key] for key in new}
        )
        metrics = {
            **sums,
            "mean_loss": sums["loss"] / counts["decoder"],
            "helper_losses": {
                name: sums[name] / counts[name] for name in helping.LOSSES if name in sums
            },
            "objective": recipe.objective.means(sums["objective"]) if recipe.objective else {},
            "tokens": jnp.sum(batch["segment_ids"] > 0),
            "room": jnp.float32(batch["tokens"].size),
            "labels": jnp.sum(batch["labels"] != IGNORE),
            "audio_frames": jnp.sum(batch["frames"]),
            "grad_norm": norm,
            "learning_rate": learning_rate(state["step"]),
            "finite": finite,
        }
        return {
            **state,
            **kept,
            "step": state["step"] + 1,
            "skipped": jnp.where(finite, 0, state["skipped"] + 1),
        }, metrics

    return train_step


@jax.jit
def all_finite(state: State) -> jax.Array:
    """Whether no value of a state, or of a part of one, is NaN or infinite: bool []."""
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in floats]))


def eval_step(trained: Flat, frozen: Flat, batch: dict, recipe: Recipe) -> dict:
    """Sums over a held-out batch; see `loss_sums`."""
    return loss_sums(trained, frozen, recipe, batch, loss_counts(recipe, batch))[1]
