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
from moss_audio_jax.ops.attention import attention, decode_attention
from moss_audio_jax.sharding import constrain, platform

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
    )
    return hidden


def prefill(
    params: Any,
    config: ModelConfig,
    compute: Compute,
    batch: Batch,
    length: int,
    prompts: int = 1,
    audio: Audio | None = None,
) -> tuple[jax.Array, Cache]:
    """Runs prompts and returns their logits and a cache of their keys and values.

    Prompts are packed: only attention, which takes little of the time, sees each in a row of its
    own. All else runs over the packed tokens, of which few are padding.

    Args:
      params: with the decoder's layers unrolled, as in `extend` and `decode_step`.
      batch: P prompts a row, one after the other (segments 1..P, then 0).
      length: tokens that the cache made here has room for, at least those of the longest prompt.
      prompts: P.
      audio: `encode_audio` of the same batch, if it was computed already.

    Returns:
      float32 logits [B * P, V] after each prompt's last token, and the cache of B * P slots.
    """
    audio = encode_audio(params, config, compute, batch) if audio is None else audio
    x, injected = _embed(params, config, compute, batch, audio)
    rows, tokens = batch["tokens"].shape
    width = min(length, tokens)
    segments, positions = batch["segment_ids"], batch["positions"]
    number = 1 + jnp.arange(prompts)[:, None]
    # Tokens of each prompt, and where it starts: [B, P].
    count = jnp.sum(segments[:, None] == number, axis=-1)
    start = jnp.cumsum(count, axis=1) - count

    def take(x: jax.Array, at: jax.Array) -> jax.Array:  # x [B, n, ...], at [B, m] -> [B, m, ...]
        return jnp.take_along_axis(x, at.reshape(rows, -1, *[1] * (x.ndim - 2)), axis=1)

    def apart(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [B * P, width, ...]
        # Beyond a prompt's end stands the next one, where its padding would be.
        at = jnp.minimum(start[..., None] + jnp.arange(width), tokens - 1)
        return x if prompts == 1 else take(x, at).reshape(-1, width, *x.shape[2:])

    def packed(x: jax.Array) -> jax.Array:  # the inverse
        at = jnp.maximum(segments - 1, 0) * width + positions
        return x if prompts == 1 else take(x.reshape(rows, -1, *x.shape[2:]), at)

    def last(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [B, P, ...]
        return take(x, jnp.maximum(start + count - 1, 0))

    def attend(query, key, value, kv):
        key, value = apart(key), apart(value)
        kv = cache.write_prefix(kv, key, value)
        # Padding is to the right of every prompt, so causality alone hides it.
        if query.shape[1] != tokens:  # in the last layer
            query = query.reshape(-1, 1, *query.shape[2:])
            ends = count.reshape(-1, 1) - 1
            out = attention(query, key, value, causal=True, query_positions=ends)
            return out.reshape(rows, prompts, *out.shape[2:]), kv
        out = attention(apart(query), key, value, causal=True, implementation=compute.attention)
        return packed(out), kv

    hidden, kv = decoder.decode(
        params["language_model"],
        config.decoder,
        compute,
        x,
        positions,
        attend,
        cache=cache.init_cache(config.decoder, rows * prompts, length, compute),
        injected=injected,
        keep=last,
    )
    return decoder.logits(params, hidden.reshape(rows * prompts, -1)), cache.pin(kv)


def extend(
    params: Any, config: ModelConfig, compute: Compute, batch: Batch, kv: Cache, start: jax.Array
) -> tuple[jax.Array, Cache]:
    """Runs text that continues what a cache holds, in one pass.

    Args:
      batch: `tokens` and `segment_ids` [B, T], one text a row, padded on the right; no audio.
      kv: cache of B rows; a row's positions below its `start` are filled, all others may hold
        anything.
      start: int [B], the position of each row's first token here.

    Returns:
      float32 logits [B, V] after each row's last token, and the cache with the text in it. Later
      positions are never read before they are written.
    """
    tokens = batch["tokens"]
    x = decoder.embed_tokens(params["language_model"], tokens, as_dtype(compute))
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    end = jnp.maximum(jnp.sum(batch["segment_ids"] > 0, axis=1, keepdims=True) - 1, 0)

    def last(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [B, 1, ...]
        return jnp.take_along_axis(x, end.reshape(-1, *[1] * (x.ndim - 1)), axis=1)

    def attend(query, key, value, kv):
        kv = cache.write(kv, positions, key, value)
        at = positions if query.shape[1] == tokens.shape[1] else last(positions)
        return attention(query, *cache.read(kv), causal=True, query_positions=at), kv

    hidden, kv = decoder.decode(
        params["language_model"], config.decoder, compute, x, positions, attend, kv, keep=last
    )
    return decoder.logits(params, hidden[:, 0]), cache.pin(kv)


def decode_step(
    params: Any,
    config: ModelConfig,
    compute: Compute,
    tokens: jax.Array,
    positions: jax.Array,
    kv: Cache,
    reach: int | None = None,
) -> tuple[jax.Array, Cache]:
    """One token for each row, or several that follow each other.

    Args:
      tokens: int [B, T], the newest tokens of each row.
      positions: int [B], that of the first of them.
      reach: how many of the cache's positions are read, by default all: more than the position of
        any token whose logits matter.

    Returns:
      float32 logits [B, T, V] after each token, and the cache with the tokens in it.
    """
    x = decoder.embed_tokens(params["language_model"], tokens, as_dtype(compute))
    here = positions[:, None] + jnp.arange(tokens.shape[1])

    def attend(query, key, value, kv):
        written = cache.write(kv, here, key, value)
        if platform() == "tpu" and tokens.shape[1] == 1:
            # If the cache is written first, a TPU's compiler moves all of it into the core's memory
            # and back. If it is written last, a CPU's compiler copies it.
            held = cache.read(kv, reach)
            return decode_attention(query, key, value, *held, positions), written
        held = cache.read(written, reach)
        return attention(query, *held, causal=True, query_positions=here), written

    hidden, kv = decoder.decode(
        params["language_model"], config.decoder, compute, x, here, attend, cache=kv
    )
    return decoder.logits(params, hidden), kv


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
