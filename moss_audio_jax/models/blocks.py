"""The small modules that every part uses. Linen declares their parameters; `ops` computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from moss_audio_jax.config import Compute
from moss_audio_jax.ops.activations import silu_times
from moss_audio_jax.ops.cudnn import FORWARD
from moss_audio_jax.ops.linear import matmul
from moss_audio_jax.ops.norms import layer_norm, rms_norm
from moss_audio_jax.ops.splash import RESIDUALS
from moss_audio_jax.sharding import platform

REMAT = ("none", "full", "attention", "projections", "offload")  # see `rematerialised`
_ADDED = ("out_proj", "fc2", "o_proj", "down_proj")  # whose outputs join the residual stream


def settled(x: Any) -> Any:
    """Returns a tree of arrays unchanged; its gradients are written out once in the backward pass.

    A TPU's compiler would otherwise recompute them inside each product that reads them, or fuse a
    norm's sums into a product, which costs more in tiling than a pass over memory
    (docs/findings/2026-11-28-modelled-train-step.md). On CPUs it does nothing, because there the
    compiler would transpose what is written out.
    """
    return x if platform() == "cpu" else _settled(x)


@jax.custom_vjp
def _settled(x: Any) -> Any:
    return x


_settled.defvjp(lambda x: (x, None), lambda _, grads: (jax.lax.optimization_barrier(grads),))


def row_major(x: jax.Array) -> jax.Array:
    """Returns x [..., T, D], on TPUs with its last axis innermost in memory, unless T is 1.

    By itself the compiler stores a decoder's residual stream with tokens innermost and transposes
    it in the backward pass (docs/findings/2026-11-28-modelled-train-step.md). A single token
    would be padded to 8.
    """
    if platform() != "tpu" or x.shape[-2] == 1:
        return x
    return with_layout_constraint(x, Layout(range(x.ndim)))


def param(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> jax.Array:
    """`module.param` without Flax's check of the shape, for parameters that exist.

    Flax traces the initialiser for this check, which took a quarter of the time to trace a model.
    Loading checks all shapes.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape)


class Linear(nn.Module):
    """x [..., in] -> x @ kernel [in, out] (+ bias [out]).

    With `features` (N, H) the output is [..., N, H]; with `axes` 2 the input is [..., N, H]. The
    kernel is a matrix in all cases.
    """

    features: int | tuple[int, ...]
    use_bias: bool = False
    axes: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = self.features if isinstance(self.features, tuple) else (self.features,)
        n_in, n_out = math.prod(x.shape[-self.axes :]), math.prod(shape)
        kernel = param(self, "kernel", nn.initializers.lecun_normal(), (n_in, n_out))
        y = matmul(x, kernel, axes=self.axes, shape=shape)
        if self.use_bias:
            bias = param(self, "bias", nn.initializers.zeros, (n_out,))
            y = y + bias.astype(x.dtype).reshape(shape)
        return y


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, param(self, "scale", nn.initializers.ones, (x.shape[-1],)), self.eps)


class LayerNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = param(self, "scale", nn.initializers.ones, (x.shape[-1],))
        bias = param(self, "bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x, scale, bias, self.eps)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)): [..., in] -> [..., out] (arXiv 2002.05202)."""

    hidden: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = Linear(self.hidden, name="gate_proj")(x)
        up = Linear(self.hidden, name="up_proj")(x)
        gate, up = settled((gate, up))
        return Linear(self.features, name="down_proj")(silu_times(gate, up))


def init_stack(module: nn.Module, key: jax.Array, layers: int, *args: Any) -> Any:
    """Parameters of `layers` copies of a module, stacked on axis 0 of every leaf."""
    keys = jax.random.split(key, layers)
    return jax.vmap(lambda k: module.init(k, *args)["params"])(keys)


def init_residual_stack(module: nn.Module, key: jax.Array, layers: int, *args: Any) -> Any:
    """`init_stack` of residual layers.

    The kernels of what each layer adds are scaled down by sqrt(2 * layers) (two additions a layer);
    otherwise the sum would drown the first layer's input (GPT-2).
    """

    def scaled(path: tuple, leaf: jax.Array) -> jax.Array:
        adds = len(path) > 1 and path[-2].key in _ADDED and path[-1].key == "kernel"
        return leaf * (2 * layers) ** -0.5 if adds else leaf

    return jax.tree_util.tree_map_with_path(scaled, init_stack(module, key, layers, *args))


def rematerialised(body: Callable, compute: Compute) -> Callable:
    """A scan body under the memory policy `compute.remat`.

    none: keep every intermediate. full: keep the body's input only. attention: also keep what an
    attention kernel's backward pass needs, so that its forward pass runs once. projections: also
    keep the outputs of the matrix products. offload: keep those outputs in host memory.
    """
    policies = jax.checkpoint_policies
    named = policies.save_only_these_names(RESIDUALS)

    def kernels(primitive: Any, *args: Any, **params: Any) -> Any:  # cuDNN's carry no name
        return primitive.name.startswith(FORWARD) or named(primitive, *args, **params)

    products = policies.dots_with_no_batch_dims_saveable
    policy = {
        "none": None,
        "full": policies.nothing_saveable,
        "attention": kernels,
        "projections": policies.save_from_both_policies(products, kernels),
        "offload": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    }[compute.remat]
    # The body is compiled inside a loop, so CSE cannot merge the recomputation with the forward
    # pass.
    return jax.checkpoint(body, policy=policy, prevent_cse=False) if policy else body


def as_dtype(compute: Compute) -> jnp.dtype:
    return jnp.dtype(compute.dtype)
