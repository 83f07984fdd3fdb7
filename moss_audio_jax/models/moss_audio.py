"""The whole model: encode audio, place it among the tokens, inject the taps, run the decoder.

A batch is a dict of arrays with static shapes:

    tokens       int32 [B, T]        token ids; 0 where a row has ended
    positions    int32 [B, T]        0, 1, 2, ... within each packed segment
    segment_ids  int32 [B, T]        1, 2, ... for packed prompts, 0 = padding
    audio_index  int32 [B, T]        at a placeholder: its token among the row's C * F/8; else -1
    mels         float [B, C, F, M]  log-mel in strips, zeros where there is no sound
    frames       int32 [B, C, F/8]   mel frames behind each audio token, 0 = none; all are 8 but
                                     the last of a piece of sound, up to the length to which its
                                     prompt pads pieces (lengths.padded_frames)
    branch_ids   int32 [B, T]        optional, in training: 0 for the opening that conversations of
                                     a segment share, 1, 2, ... for the conversations

C may be 0: a batch of text. A piece of sound is heard by itself: a chunk of 4 s or less
(`chunked`) or a whole clip (`full`, `sliding`). Pieces in one strip have an empty token between
them.
Everything here is a pure function of (params, batch).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from moss_audio_jax.config import Compute, ModelConfig
from moss_audio_jax.models import adapter, cache, decoder, encoder
from moss_audio_jax.models.blocks import as_dtype
from moss_audio_jax.models.cache import Cache
from moss_audio_jax.ops.attention import attention
from moss_audio_jax.sharding import constrain

Batch = dict[str, jax.Array]


def init_params(key: jax.Array, config: ModelConfig, dtype: str = "float32") -> Any:
    """A freshly initialised parameter tree; under `jax.jit` with out_shardings, born sharded."""
    keys = jax.random.split(key, 5)
    params = {
        "audio_encoder": encoder.init_encoder(keys[0], config.encoder),
        "audio_adapter": adapter.init_adapter(keys[1], config),
        "language_model": decoder.init_decoder(keys[3], config.decoder),
    }
    if config.inject_layers:
        params["mergers"] = adapter.init_mergers(keys[2], config)
    if not config.decoder.tie_embeddings:
        params["lm_head"] = decoder.init_head(keys[4], config.decoder)
    return jax.tree.map(lambda x: x.astype(dtype), params)


def abstract_params(config: ModelConfig, dtype: str = "float32") -> Any:
    """The tree of `init_params` as ShapeDtypeStructs: nothing is computed or stored."""
    return jax.eval_shape(lambda: init_params(jax.random.key(0), config, dtype))


def count_params(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


Audio = tuple[jax.Array, jax.Array]  # features [B, C * S, D] and taps [K, B, C * S, D]


def encode_audio(params: Any, config: ModelConfig, compute: Compute, batch: Batch) -> Audio | None:
    """The encoder's output for a batch's chunks; None for a batch of text."""
    if batch["frames"].shape[1] == 0:
        return None
    with jax.named_scope("audio_encoder"):
        return encoder.encode_rows(
            params["audio_encoder"],
            config.encoder,
            compute,
            batch["mels"],
            batch["frames"],
        )


def hidden_states(
    params: Any, config: ModelConfig, compute: Compute, batch: Batch, audio: Audio | None = None
) -> jax.Array:
    """The decoder's last hidden states [B, T, D] of packed or padded rows (no cache).

    `audio` is `encode_audio` of the same batch, if it was computed already.
    """
    audio = encode_audio(params, config, compute, batch) if audio is None else audio
    x, injected = _embed(params, config, compute, batch, audio)
    segments = batch["segment_ids"]

    def attend(query, key, value, _):
        out = attention(
            query,
            key,
            value,
            causal=True,
            segment_ids=(segments, segments),
            branch_ids=batch.get("branch_ids"),
            most_segments=compute.most_segments,
            implementation=compute.attention,
        )
        return out, None

    hidden, _ = decoder.decode(
        params["language_model"],
        config.decoder,
        compute,
        x,
        batch["positions"],
        attend,
        injected=injected,
        gates=_gates(params),
    )
    return hidden


def prefill(
    params: Any,
    config: ModelConfig,
    compute: Compute,
    batch: Batch,
    kv: Cache,
    tables: jax.Array,
    audio: Audio | None = None,
) -> tuple[jax.Array, Cache]:
    """Runs whole prompts and returns their logits and the cache with their keys and values.

    Args:
      params: with the decoder's layers unrolled, as in `extend` and `decode_step`.
      batch: P prompts a row, one after the other (segments 1..P, then 0); a row for each group of
        the cache.
      kv: the cache; it is written at the pages of `tables`.
      tables: int [B, P, n], the pages of each prompt.
      audio: features and taps at which `audio_index` points; None for a batch of text.

    Returns:
      float32 logits [B * P, V] after each prompt's last token, and the cache.
    """
    x, injected = _embed(params, config, compute, batch, audio)
    rows, tokens = batch["tokens"].shape
    prompts = tables.shape[1]
    segments, positions = batch["segment_ids"], batch["positions"]
    # The last token of each prompt: [B, P].
    count = jnp.sum(segments[:, None] == 1 + jnp.arange(prompts)[:, None], axis=-1)
    end = jnp.maximum(jnp.cumsum(count, axis=1) - 1, 0)
    number = jnp.clip(segments - 1, 0, prompts - 1) * tables.shape[2] + positions // cache.PAGE
    page = jnp.take_along_axis(tables.reshape(rows, -1), number, axis=1)
    place = jnp.where(segments > 0, page, cache.NOWHERE), positions % cache.PAGE

    def last(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [B, P, ...]
        return _take(x, end)

    def attend(query, key, value, kv):
        written = cache.write(kv, place, key, value)
        key, value = cache.as_stored(kv, key, value)
        if query.shape[1] == tokens:
            # A row with one prompt has its padding on the right, where causality hides it.
            alone = prompts == 1
            out = attention(
                query,
                key,
                value,
                causal=True,
                segment_ids=None if alone else (segments, segments),
                most_segments=0 if alone else prompts,
                implementation=compute.attention,
            )
            return out, written
        out = attention(
            query,
            key,
            value,
            causal=True,
            segment_ids=(last(segments), segments),
            query_positions=end,
        )
        return out, written

    hidden, kv = decoder.decode(
        params["language_model"],
        config.decoder,
        compute,
        x,
        positions,
        attend,
        cache=kv,
        injected=injected,
        gates=_gates(params),
        keep=last,
    )
    return decoder.logits(params, hidden.reshape(rows * prompts, -1)), cache.pin(kv)


def extend(
    params: Any,
    config: ModelConfig,
    compute: Compute,
    batch: Batch,
    kv: Cache,
    tables: jax.Array,
    start: jax.Array,
    audio: Audio | None = None,
) -> tuple[jax.Array, Cache]:
    """Runs tokens that continue what the cache holds, in one pass.

    Args:
      batch: `tokens` and `segment_ids` [B, T], one text a row, padded on the right; with `audio`
        also `audio_index`.
      tables: int [B, n], the pages of each row, of which those before its `start` are filled.
      start: int [B], the position of each row's first token here.
      audio: as in `prefill`.

    Returns:
      float32 logits [B, V] after each row's last token, and the cache with the tokens in it.
    """
    tokens = batch["tokens"].shape[1]
    x, injected = _embed(params, config, compute, batch, audio)
    here = batch["segment_ids"] > 0
    positions = start[:, None] + jnp.arange(tokens)
    page, inside = cache.at_positions(tables, positions)
    place = jnp.where(here, page, cache.NOWHERE), inside
    end = jnp.maximum(jnp.sum(here, axis=1, keepdims=True) - 1, 0)

    def last(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [B, 1, ...]
        return _take(x, end)

    def attend(query, key, value, kv):
        kv = cache.write(kv, place, key, value)
        at = positions if query.shape[1] == tokens else last(positions)
        return attention(query, *cache.read(kv, tables), causal=True, query_positions=at), kv

    hidden, kv = decoder.decode(
        params["language_model"],
        config.decoder,
        compute,
        x,
        positions,
        attend,
        cache=kv,
        injected=injected,
        gates=_gates(params),
        keep=last,
    )
    return decoder.logits(params, hidden[:, 0]), cache.pin(kv)


def decode_step(
    params: Any,
    config: ModelConfig,
    compute: Compute,
    tokens: jax.Array,
    positions: jax.Array,
    kv: Cache,
    tables: jax.Array,
) -> tuple[jax.Array, Cache]:
    """One token for each row, or several that follow each other.

    Args:
      tokens: int [B, T], the newest tokens of each row.
      positions: int [B], that of the first of them.
      tables: int [B, n], the pages of each row, up to its newest token or further. All of them are
        read.

    Returns:
      float32 logits [B, T, V] after each token, and the cache with the tokens in it.
    """
    x = decoder.embed_tokens(params["language_model"], tokens, as_dtype(compute))
    here = positions[:, None] + jnp.arange(tokens.shape[1])
    place = cache.at_positions(tables, here)

    def attend(query, key, value, kv):
        written = cache.write(kv, place, key, value)
        return cache.attend(written, tables, query, here), written

    hidden, kv = decoder.decode(
        params["language_model"], config.decoder, compute, x, here, attend, cache=kv
    )
    return decoder.logits(params, hidden), kv


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    """x [B, T, ...] at `at` [B, m] -> [B, m, ...]."""
    return jnp.take_along_axis(x, at.reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1)


def _gates(params: Any) -> jax.Array | None:
    return params.get("mergers", {}).get(adapter.GATE)


def _embed(
    params: Any, config: ModelConfig, compute: Compute, batch: Batch, audio: Audio | None
) -> tuple[jax.Array, jax.Array | None]:
    """Embeddings with the audio at its placeholders [B, T, D], and what DeepStack adds there
    [K, B, T, D], if anything."""
    x = decoder.embed_tokens(params["language_model"], batch["tokens"], as_dtype(compute))
    if audio is None:
        return x, None
    features, taps = audio
    index = batch["audio_index"]
    is_audio = (index >= 0)[..., None]

    def place(features: jax.Array) -> jax.Array:  # [B, C * S, D] -> [B, T, D], by placeholder
        return jnp.take_along_axis(features, jnp.maximum(index, 0)[..., None], axis=1)

    x = jnp.where(is_audio, place(adapter.adapt(params["audio_adapter"], config, features)), x)
    count = config.inject_layers
    if count == 0:
        return x, None
    merged = adapter.merge(params["mergers"], config, taps[:count])
    placed = jnp.where(is_audio, jax.vmap(place)(merged), 0)
    return x, constrain(placed, None, "batch", "tokens", None)
