"""Prefill and decoding by the model's own functions, each prompt with pages of its own."""

import jax
import jax.numpy as jnp

from moss_audio_jax.models import cache as kv_cache
from moss_audio_jax.models import moss_audio


def tables(rows, prompts, size):
    """int [rows, prompts, n]: the pages of prompts with up to `size` tokens each."""
    pages = kv_cache.pages_for(size)
    return jnp.tile(jnp.arange(prompts * pages).reshape(1, prompts, pages), (rows, 1, 1))


def prefilled(params, config, compute, batch, size, prompts=1):
    """Logits [B * P, V] and the cache after a batch with P prompts a row. In the cache each row is
    a group, if it is alone on its devices."""
    audio = moss_audio.encode_audio(params, config, compute, batch)
    rows = batch["tokens"].shape[0]
    pages = prompts * kv_cache.pages_for(size)
    kv = kv_cache.init_cache(config.decoder, rows, pages, compute)
    where = tables(rows, prompts, size)
    return moss_audio.prefill(params, config, compute, batch, kv, where, audio)


def held(kv, where, length):
    """Keys and values [R, length, KV, H] of each layer."""
    return [tuple(x[:, :length] for x in kv_cache.read(layer, where)) for layer in kv]


run = jax.jit(prefilled, static_argnums=(1, 2, 4, 5))
