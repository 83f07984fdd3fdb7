"""Qwen3 decoder, for training, prefill and decoding alike.

Training scans stacked layers, so compile time does not grow with depth. Generation unrolls them
into a tuple of trees, because a scan copies each layer's weights out of the stack before it
multiplies, and a decoding step does little more than read them (docs/design.md). Only `decode` asks
which form it is given.

Letters: L layers, B rows, T tokens, N query heads, KV key/value heads, H head size, D width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moss_audio_jax.config import Compute, DecoderConfig
from moss_audio_jax.models.blocks import (
    GatedMLP,
    Linear,
    RMSNorm,
    init_residual_stack,
    rematerialised,
    row_major,
    settled,
)
from moss_audio_jax.models.cache import Cache, LayerCache
from moss_audio_jax.ops.linear import Kernel, dense, matmul
from moss_audio_jax.ops.norms import rms_norm
from moss_audio_jax.ops.rotary import rotary_angles, rotate
from moss_audio_jax.sharding import constrain, on_each, ways

# (query [B,T,N,H], key [B,T,KV,H], value [B,T,KV,H], the layer's cache) -> (out [B,T,N,H], cache)
Attend = Callable[..., tuple[jax.Array, LayerCache | None]]
Keep = Callable[[jax.Array], jax.Array]  # [B, T, ...] -> [B, t, ...]: some of the tokens


class SelfAttention(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: tuple, attend: Callable, keep: Keep
    ) -> tuple[jax.Array, Any]:
        cfg = self.config

        def heads(name: str, count: int, x: jax.Array) -> jax.Array:
            y = Linear((count, cfg.head_dim), name=name)(x)
            return constrain(y, "batch", "tokens", "heads", None)

        query = RMSNorm(cfg.norm_eps, name="q_norm")(heads("q_proj", cfg.heads, keep(x)))
        key = RMSNorm(cfg.norm_eps, name="k_norm")(heads("k_proj", cfg.kv_heads, x))
        value = heads("v_proj", cfg.kv_heads, x)
        query = rotate(query, jax.tree.map(keep, angles))
        out, state = attend(query, rotate(key, angles), value)
        return Linear(cfg.hidden_size, axes=2, name="o_proj")(out), state


class DecoderLayer(nn.Module):
    """x [B, T, D] -> (x [B, t, D], whatever `attend` returned beside its output).

    `keep` chooses the t tokens whose output is computed, by default all. The keys and values of all
    tokens reach `attend`.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: tuple, attend: Callable, keep: Keep = lambda x: x
    ) -> tuple[jax.Array, Any]:
        cfg = self.config
        y = settled(RMSNorm(cfg.norm_eps, name="input_layernorm")(x))
        y, state = SelfAttention(cfg, name="self_attn")(y, angles, attend, keep)
        x = keep(x) + y
        y = settled(RMSNorm(cfg.norm_eps, name="post_attention_layernorm")(x))
        return x + GatedMLP(cfg.ffn_dim, cfg.hidden_size, name="mlp")(y), state


def init_decoder(key: jax.Array, config: DecoderConfig) -> Any:
    """Parameter tree without the output head, float32, layers stacked on axis 0."""
    embed_key, layer_key, norm_key = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, config.hidden_size))
    angles = rotary_angles(jnp.zeros((1, 1)), config.head_dim, config.rope_theta)
    shape = (config.vocab_size, config.hidden_size)
    return {
        "embed_tokens": {"embedding": 0.02 * jax.random.normal(embed_key, shape)},
        "layers": init_residual_stack(
            DecoderLayer(config), layer_key, config.layers, x, angles, lambda q, k, v: (q, None)
        ),
        "norm": RMSNorm(config.norm_eps).init(norm_key, x)["params"],
    }


def init_head(key: jax.Array, config: DecoderConfig) -> Any:
    x = jnp.zeros((1, config.hidden_size))
    return Linear(config.vocab_size).init(key, x)["params"]


def unstack(layers: Any) -> tuple[Any, ...]:
    """Stacked layers, or one leaf of them: leaves [L, ...] as L trees of leaves [...]."""
    count = jax.tree.leaves(layers)[0].shape[0]
    return tuple(_layer(layers, index) for index in range(count))


@jax.jit
def stack(layers: tuple[Any, ...]) -> Any:
    """The inverse of `unstack`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def with_layers(params: Any, layers: Any) -> Any:
    """A whole model's tree with other layers in its decoder."""
    return params | {"language_model": params["language_model"] | {"layers": layers}}


def unrolled(params: Any) -> Any:
    """A whole model's tree with its decoder's layers one by one, as a cache needs them."""
    layers = params["language_model"]["layers"]
    return params if isinstance(layers, tuple) else with_layers(params, unstack(layers))


def stacked(params: Any) -> Any:
    """The inverse of `unrolled`; a tree that is stacked is returned as it is."""
    layers = params["language_model"]["layers"]
    return with_layers(params, stack(layers)) if isinstance(layers, tuple) else params


@jax.jit  # of any index: one program for all layers
def _layer(layers: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), layers)


@jax.named_scope("language_model")
def decode(
    params: Any,
    config: DecoderConfig,
    compute: Compute,
    x: jax.Array,
    positions: jax.Array,
    attend: Attend,
    cache: Cache | None = None,
    injected: jax.Array | None = None,
    gates: jax.Array | None = None,
    keep: Keep = lambda x: x,
) -> tuple[jax.Array, Cache | None]:
    """Runs all layers and the final norm.

    With `gates`, layer k is followed by x + (1 + tanh(y . gates[k])) * injected[k] instead of x +
    injected[k], where x is a token's residual stream behind the layer, and y = x / rms(x), as every
    layer reads it: the stream itself may be so large that one step of training closes a gate. y
    depends on nothing but the token and what its attention sees: the system prompt, the text before
    the clip, and what was heard so far, but not a question behind the clip. So the keys and values
    of a prefix stay good for whatever follows it, and a prompt in pieces, in a packed row or before
    branches is computed as it is alone. Gates of 0 change no bit.

    Args:
      params: the `language_model` subtree, its layers stacked or, where there is a cache, a tuple
        (`unrolled`).
      x: embeddings [B, T, D].
      positions: int [B, T], for the rotary embedding.
      attend: computes attention; it gets the layer's cache, or None, and returns the new one.
      cache: one for each layer, or None if nothing is cached.
      injected: [K, B, T, D], added to the outputs of layers 0..K-1 (DeepStack), or None.
      gates: [K, D], of what is injected; None: it is added as it is.
      keep: chooses the t tokens whose hidden states are needed, where there is a cache: the last
        layer computes no others.

    Returns:
      (hidden [B, t, D], cache).
    """
    angles = rotary_angles(positions, config.head_dim, config.rope_theta)
    layer, layers = DecoderLayer(config), params["layers"]

    def body(carry: tuple, xs: tuple, **last: Keep) -> tuple[tuple, LayerCache | None]:
        x, gradients_of = carry
        layer_params, index, own_cache = xs

        def attend_here(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple:
            return attend(query, key, value, own_cache)

        x, own_cache = layer.apply({"params": layer_params}, x, angles, attend_here, **last)
        if injected is not None:
            with jax.named_scope("deepstack"):
                here = jax.vmap(last["keep"])(injected) if last else injected
                here = jax.lax.stop_gradient(here)
                factor = None if gates is None else _factor(x, gates, index, config.norm_eps)
                x, gradients_of = _inject(x, factor, here, gradients_of, index)
        x = on_each(row_major, x, "batch", "tokens", None)
        return (x, gradients_of), own_cache

    x = constrain(x, "batch", "tokens", None)
    if cache is None:  # with one there are no gradients
        body = rematerialised(body, compute)
    if isinstance(layers, tuple):
        body = jax.jit(body, static_argnames="keep")  # traced once for all layers but the last
        carry, updated = (x, injected), []
        for index, own in enumerate(layers):
            own_cache = None if cache is None else cache[index]
            last = {"keep": keep} if cache and index == len(layers) - 1 else {}
            carry, own_cache = body(carry, (own, jnp.int32(index), own_cache), **last)
            updated.append(own_cache)
        x, cache = carry[0], None if cache is None else tuple(updated)
    else:
        if cache is not None:
            raise ValueError("a cache needs unrolled layers (decoder.unrolled)")
        carry, xs = (x, injected), (layers, jnp.arange(config.layers), None)
        if count := compute.untouched_layers:
            stop = jax.lax.stop_gradient
            first = jax.tree.map(lambda x: x[:count], xs)
            carry, _ = stop(jax.lax.scan(body, *stop((carry, first))))
            xs = jax.tree.map(lambda x: x[count:], xs)
        (x, _), _ = jax.lax.scan(body, carry, xs)
    return RMSNorm(config.norm_eps).apply({"params": params["norm"]}, x), cache


# One scan over all layers: a loop over layers[:K] and one over layers[K:] would first copy a slice
# of nearly all weights. If the loop's body read `injected` directly, a gradient of its whole size
# would be added in every layer. So its gradients travel backwards in the loop's carry instead: each
# layer writes one entry. Several layers share entry K - 1, and layer K - 1 is the last to write it.
# With a gate, its factor has the plain gradient, and so have x and the gates through it.
@jax.custom_vjp
def _inject(
    x: jax.Array,
    factor: jax.Array | None,
    injected: jax.Array,
    gradients_of: jax.Array,
    layer: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(x + factor * injected[layer], where there is one, and `gradients_of`: `injected` as the
    carry). `factor`: float32 [B, T, 1]; None: 1."""
    here = _at(injected, layer)
    if factor is not None:
        here = (factor * here).astype(x.dtype)
    return x + jnp.where(layer < injected.shape[0], here, 0), gradients_of


def _inject_forward(x: Any, factor: Any, injected: Any, gradients_of: Any, layer: Any) -> tuple:
    kept = layer, None if factor is None else (factor, injected)
    return _inject(x, factor, injected, gradients_of, layer), kept


def _inject_backward(kept: tuple, gradients: tuple[jax.Array, jax.Array]) -> tuple:
    layer, gate = kept
    of_x, of_injected = gradients
    of_here, of_factor = of_x, None
    if gate is not None:
        factor, injected = gate
        of_here = (factor * of_x).astype(of_x.dtype)
        both = of_x.astype(jnp.float32) * _at(injected, layer)
        summed = jnp.sum(both, axis=-1, keepdims=True)
        of_factor = jnp.where(layer < injected.shape[0], summed, 0)
    entry = jnp.minimum(layer, of_injected.shape[0] - 1)
    written = jax.lax.dynamic_update_index_in_dim(of_injected, of_here, entry, axis=0)
    return of_x, of_factor, None, written, None


_inject.defvjp(_inject_forward, _inject_backward)


def _factor(x: jax.Array, gates: jax.Array, layer: jax.Array, eps: float) -> jax.Array:
    """1 + tanh(x / rms(x) . the layer's gate), float32 [B, T, 1]."""
    gated = rms_norm(x.astype(jnp.float32), _at(gates, layer), eps)
    return 1 + jnp.tanh(jnp.sum(gated, axis=-1, keepdims=True))


def _at(x: jax.Array, layer: jax.Array) -> jax.Array:
    """x[layer], or the last entry for layers beyond it."""
    index = jnp.minimum(layer, x.shape[0] - 1)
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


@jax.named_scope("embed_tokens")
def embed_tokens(params: Any, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """int [B, T] -> [B, T, D]."""
    table = params["embed_tokens"]["embedding"]
    # Of an int8 table (a tied head's) each row and its scale.
    x = dense(jax.tree.map(lambda x: jnp.take(x, tokens, axis=0), table)).astype(dtype)
    # Each device looks up its part of the width for all rows of its replica, and `decoder_layers`
    # exchanges parts for rows. Left alone, the compiler gathers rows across replicas.
    return constrain(x, "replica", "tokens", "width") if ways(x.shape[-1:], "width") > 1 else x


def head_kernel(params: Any) -> Kernel:
    """The output head [D, V] of a whole model's tree; tied models reuse the embedding."""
    if "lm_head" in params:
        return params["lm_head"]["kernel"]
    return params["language_model"]["embed_tokens"]["embedding"].T


@jax.named_scope("lm_head")
def logits(params: Any, hidden: jax.Array) -> jax.Array:
    """hidden [..., D] -> float32 [..., V]. `params` is the whole model's tree."""
    return matmul(hidden, head_kernel(params), jnp.float32)
