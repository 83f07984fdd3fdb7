"""From encoder width to decoder width: the adapter and the DeepStack mergers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from moss_audio_jax.config import ModelConfig
from moss_audio_jax.models.blocks import GatedMLP, init_stack

GATE = "inject_gate"  # the leaf [K, D] among the mergers' that the decoder reads (decoder.decode)


def _gated_mlp(config: ModelConfig) -> GatedMLP:
    return GatedMLP(config.adapter_dim, config.decoder.hidden_size)


def init_adapter(key: jax.Array, config: ModelConfig) -> Any:
    x = jnp.zeros((1, config.encoder.output_dim))
    return _gated_mlp(config).init(key, x)["params"]


def init_mergers(key: jax.Array, config: ModelConfig) -> Any:
    """K = inject_layers mergers, stacked on axis 0; and their gates [K, D], if any, which are 0."""
    x = jnp.zeros((1, config.encoder.output_dim))
    mergers = init_stack(_gated_mlp(config), key, config.inject_layers, x)
    gates = {GATE: jnp.zeros((config.inject_layers, config.decoder.hidden_size))}
    return mergers | gates if config.inject_gate else mergers


def adapt(params: Any, config: ModelConfig, features: jax.Array) -> jax.Array:
    """[..., encoder output] -> [..., decoder hidden]: what replaces placeholder embeddings."""
    with jax.named_scope("adapter"):
        return _gated_mlp(config).apply({"params": params}, features)


def merge(params: Any, config: ModelConfig, taps: jax.Array) -> jax.Array:
    """[K, ..., encoder output] -> [K, ..., decoder hidden]: added after decoder layers 0..K-1."""
    mlp = _gated_mlp(config)
    params = {name: leaf for name, leaf in params.items() if name != GATE}
    with jax.named_scope("mergers"):
        return jax.lax.map(lambda xs: mlp.apply({"params": xs[0]}, xs[1]), (params, taps))
