"""cuDNN's fused attention, the kernel of NVIDIA GPUs, on every device's own rows and heads.

Scores never leave the chip. cuDNN applies the causal term itself and skips the blocks above the
diagonal. There are two ways to tell it what else a query may see:

  * a mask: all other terms as one array [B, T, T] for all heads, added to the scores. Blocks that
    the mask empties are still computed.
  * the packed layout: where each segment of a row begins and how long it is. Scores between
    segments are never computed.

The backward pass adds in no fixed order, so two runs agree only up to rounding (XLA's
--xla_gpu_deterministic_ops excludes such kernels).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused  # jax.nn takes no offsets

from moss_audio_jax.sharding import on_each_device, platform, splits_whole, ways

FORWARD = "dot_product_attention_fwd"  # prefix of its primitives that save residuals
_ROWS = 64  # rows are multiples of it; JAX asks for even ones, but not all of those were tried
_HEAD = 128  # the largest head that every chip with the kernel takes
_CAPABILITY = 8.0  # Ampere, the first with the kernel
_PACKED_CAPABILITY = 9.0  # Hopper, the first with its packed layout


def present(capability: float = _CAPABILITY) -> bool:
    """Is the program compiled for GPUs that have the kernel?"""
    if platform() != "gpu":
        return False
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version:  # AMD's are "gpu" too
        return False
    return float(getattr(device, "compute_capability", 0)) >= capability


def fits(query: jax.Array, key: jax.Array) -> bool:
    """Can the kernel take these arrays on the mesh in context, heads and rows split over it?"""
    length, keys, dim = query.shape[1], key.shape[1], query.shape[3]
    half = query.dtype == key.dtype and query.dtype in (jnp.bfloat16, jnp.float16)
    sizes = length == keys and length % _ROWS == 0 and dim % 8 == 0 and dim <= _HEAD
    return half and sizes and splits_whole(query, key)


def packs(query: jax.Array) -> bool:
    """Does the kernel have the packed layout here, for queries [B, T, N, H] that `fits` allows?"""
    batch, _, heads, _ = query.shape
    elements = query.size // ways((batch, heads), "batch", "heads")
    # It counts the elements before a segment in 32 bits.
    return present(_PACKED_CAPABILITY) and elements < 2**31


def cudnn_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool,
    mask: jax.Array | None = None,
) -> jax.Array:
    """`attention` (see there) of arrays that `fits` allows.

    Args:
      query: [B, T, N, H].
      key, value: [B, T, KV, H].
      causal: the causal term.
      mask: bool [B, T, T], all other terms of what query t may see; None: all keys.

    Returns:
      [B, T, N, H]. Masked scores are lowered by a large finite number, so a query that sees
      nothing gets the mean of all values (if causal, of those up to its own).
    """
    masks = () if mask is None else (mask,)
    return on_each_device(functools.partial(_on_device, causal=causal), query, key, value, *masks)


def _on_device(
    query: jax.Array, key: jax.Array, value: jax.Array, *masks: jax.Array, causal: bool
) -> jax.Array:
    mask = masks[0][:, None] if masks else None  # [B, 1, T, T]: one for all heads
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=causal, implementation="cudnn"
    )


def packed_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, most: int
) -> jax.Array:
    """Causal `cudnn_attention` within the segments of packed rows, in the packed layout.

    Memory of the softmax's sums, and of the gradients of queries, grows with `most`.

    Args:
      query: [B, T, N, H].
      key, value: [B, T, KV, H].
      segment_ids: int [B, T]; they never fall along a row, but for 0 (padding) at its end.
      most: how many segments a row has at most; padding is one of them.

    Returns:
      [B, T, N, H]. Rows that break the rules above are NaN.
    """
    attend = functools.partial(_packed_on_device, most=most)
    return on_each_device(attend, query, key, value, segment_ids)


def _packed_on_device(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, *, most: int
) -> jax.Array:
    offsets, lengths, valid = segment_offsets(segment_ids, most)
    query = jnp.where(valid[:, None, None, None], query, jnp.nan)
    # JAX before 0.12 counts the offsets of keys in query heads. cuDNN's backward pass would repeat
    # them too, in a buffer for each segment.
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    return fused.dot_product_attention(
        query,
        key,
        value,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=1 / math.sqrt(query.shape[-1]),
        mask_type=fused.MaskType.PADDING_CAUSAL,
    )


def segment_offsets(segment_ids: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the segments of rows begin, and how long they are, as JAX hands them to cuDNN.

    Args:
      segment_ids: int [B, T].
      most: M, the number of segments that there is room for.

    Returns:
      (offsets int32 [B, M + 1], lengths int32 [B, M], valid bool [B]). -1 fills what a row does not
      have. `valid`: a row has at most M segments, and its ids never fall, but for 0 at its end.
    """
    rows, length = segment_ids.shape
    last = jnp.iinfo(segment_ids.dtype).max
    steps = jnp.diff(jnp.where(segment_ids == 0, last, segment_ids), axis=1)
    begins = jnp.concatenate([jnp.ones((rows, 1), bool), steps != 0], axis=1)
    valid = jnp.all(steps >= 0, axis=1) & (jnp.sum(begins, axis=1) <= most)
    find = functools.partial(jnp.nonzero, size=most, fill_value=-1)
    here = jax.vmap(lambda row: find(row)[0])(begins).astype(jnp.int32)
    offsets = jnp.pad(here, ((0, 0), (0, 1)), constant_values=-1)
    after = offsets[:, 1:]
    lengths = jnp.where(here < 0, -1, jnp.where(after < 0, length, after) - here)
    return offsets, lengths, valid
