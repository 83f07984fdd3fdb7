"""What is trained, at which rate and by which rule: a table of (path regex, rate factor)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_map_with_path
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from moss_audio_jax.errors import UsageError


def factors(paths: Sequence[str], groups: Sequence[tuple[str, float]]) -> dict[str, float]:
    """The learning-rate factor of each parameter path; 0 = frozen. The first match wins.

    Raises:
      UsageError: a path that no group matches, or nothing left to train.
    """
    found: dict[str, float] = {}
    for path in paths:
        matches = [factor for pattern, factor in groups if re.search(pattern, path)]
        if not matches:
            raise UsageError(
                f"optimizer.groups: no pattern matches {path}; end the list with ('.*', 1.0), or "
                "('.*', 0.0) to freeze the rest"
            )
        found[path] = float(matches[0])
    if not any(found.values()):
        raise UsageError("optimizer.groups freezes every parameter: nothing is left to train")
    return found


_LAYERS = "language_model/layers/"
# Behind the decoder's layers, or beside them: their gradients pass through none of these.
_ABOVE = re.compile(r"language_model/norm/|lm_head/|helpers/")


def untouched_layers(factor: Mapping[str, float], layers: Sequence[float]) -> int:
    """How many of the decoder's first layers no gradient has to pass.

    Args:
      factor: of `factors`.
      layers: `optimizer.layers`.
    """
    trained = [path for path, value in factor.items() if value]
    if not all(path.startswith(_LAYERS) or _ABOVE.match(path) for path in trained):
        return 0
    return next((index for index, value in enumerate(layers) if value), len(layers))


def _wsd(peak: float, rest: int, o: Any) -> optax.Schedule:
    falling = max(1, int(rest * o.decay))
    return optax.linear_schedule(peak, peak * o.final, falling, rest - falling)


# Name -> (peak, steps after warmup, `config.optimizer`) -> schedule. cosine and linear fall to
# `final`, a share of the peak, at the last step. wsd stays at the peak and falls linearly over the
# last `decay` share of the steps.
SCHEDULES: dict[str, Callable[[float, int, Any], optax.Schedule]] = {
    "cosine": lambda peak, rest, o: optax.cosine_decay_schedule(peak, rest, alpha=o.final),
    "wsd": _wsd,
    "linear": lambda peak, rest, o: optax.linear_schedule(peak, peak * o.final, rest),
    "constant": lambda peak, rest, o: optax.constant_schedule(peak),
}


def schedule(config: Any, steps: int) -> optax.Schedule:
    """step -> learning rate, from `config.optimizer`: warmup, then the named shape."""
    peak, warmup = config.learning_rate, config.warmup
    body = SCHEDULES[config.schedule](peak, max(1, steps - warmup), config)
    if not warmup:
        return body
    # (step + 1) / warmup, so that the first step already changes the weights.
    return optax.join_schedules(
        [optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1)), body], [warmup]
    )


def make_optimizer(
    config: Any, steps: int, factor: Mapping[str, float]
) -> optax.GradientTransformation:
    """The update rule over a flat dict {path: float32 array} of the trained parameters.

    Weight decay applies only to kernels and embeddings, scaled by the learning rate (decoupled,
    arXiv 1711.05101).
    """

    def decayed(params: Mapping[str, Any]) -> dict[str, bool]:
        return {path: path.endswith(("/kernel", "/embedding")) for path in params}

    return optax.chain(
        OPTIMIZERS[config.name](config),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(schedule(config, steps)),
        optax.stateless(
            lambda updates, _: {
                path: u * factor[path] * _of_layers(path, u.ndim, config.layers)
                for path, u in updates.items()
            }
        ),
    )


def _of_layers(path: str, ndim: int, layers: Sequence[float]) -> jax.Array | float:
    """`optimizer.layers` for the leaf [L, ...] of a stack of layers; else 1."""
    if not layers or not path.startswith(_LAYERS):
        return 1.0
    return jnp.asarray(layers, jnp.float32).reshape(-1, *[1] * (ndim - 1))


def _adam(config: Any) -> optax.GradientTransformation:
    return optax.scale_by_adam(
        b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=jnp.dtype(config.moment_dtype)
    )


def _adafactor(config: Any) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=config.b2), optax.clip_by_block_rms(1.0)
    )


def _muon(config: Any) -> optax.GradientTransformation:
    """Muon for matrices, Adam for everything else."""
    return optax.partition(
        {"matrix": _scale_by_muon(config), "other": _adam(config)},
        lambda params: {
            path: "matrix" if _matrix(path, leaf.ndim) else "other" for path, leaf in params.items()
        },
    )


OPTIMIZERS = {"adamw": _adam, "adafactor": _adafactor, "muon": _muon}


def _scale_by_muon(config: Any) -> optax.GradientTransformation:
    """Orthogonalised momentum (arXiv 2502.16982), scaled to the size of Adam's updates.

    A learning rate for AdamW then also suits Muon. Each layer of a stack is its own matrix; a
    convolution's matrix is [all inputs of a position, channels].
    """

    # Maps over trees, because `partition` leaves empty nodes in place of other groups' leaves.
    def axes(params: Any) -> Any:
        return tree_map_with_path(lambda path, x: _matrix(path[0].key, x.ndim), params)

    def sized(updates: Any, _: Any) -> Any:
        return jax.tree.map(
            lambda u: u * 0.2 * math.sqrt(max(math.prod(_inputs(u.shape)), u.shape[-1])), updates
        )

    return optax.chain(
        scale_by_muon(
            ns_steps=4,  # one less than usual, thanks to the preconditioning
            preconditioning="aol",
            mu_dtype=jnp.dtype(config.moment_dtype),
            weight_dimension_numbers=axes,
        ),
        optax.stateless(sized),
    )


def _inputs(shape: Sequence[int]) -> Sequence[int]:
    """Which dimensions of a kernel [..., in, out] or convolution [H, W, in, out] are its inputs."""
    return shape[:-1] if len(shape) == 4 else shape[-2:-1]


def _matrix(path: str, ndim: int) -> MuonDimensionNumbers | None:
    """The axes of a parameter that form a matrix for Muon; None: Adam, as for vectors, heads."""
    if not path.endswith("/kernel") or re.match(r"lm_head/|helpers/|.*/conv1/", path):
        return None
    if ndim == 4:
        return MuonDimensionNumbers((0, 1, 2), 3)
    return MuonDimensionNumbers(ndim - 2, ndim - 1)
