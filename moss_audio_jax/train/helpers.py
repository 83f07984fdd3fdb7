"""Helper losses that teach a model from scratch what is said and heard when.

They use linear heads on the encoder's last features, for training only. An export leaves the heads
out of the model's weights and writes them into its folder `helpers` (`weights.heads`).

  ctc       connectionist temporal classification over the tokenizer's pieces, chunk by chunk
  frames    cross entropy of the piece that is said at each token (80 ms), from known word times
  tags      binary cross entropy of each tag that holds at a token
  position  cross entropy of a token's place in its chunk: the absolute position fades through many
            layers, but timestamps depend on it
  adapter   cross entropy of the piece that is said at a token, from the adapter's output through
            the decoder's own head: a decoder from scratch finds known words among the audio tokens
  clock     like position, from the adapter's output: a decoder that learns what is said at a token
            but not when would guess times
  adapter_tags  like tags, from the adapter's output
  adapter_before  cross entropy of the piece said before the current one, from the adapter's output
            through a matrix and the decoder's own head: to continue after a word, a decoder looks
            for the tokens that follow that word
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moss_audio_jax.config import ModelConfig
from moss_audio_jax.data.targets import IGNORE, NOTHING, UNKNOWN
from moss_audio_jax.ops.linear import precision
from moss_audio_jax.ops.loss import cross_entropy
from moss_audio_jax.ops.norms import rms_norm

NAMES = (
    "ctc", "frames", "tags", "position", "adapter", "clock", "adapter_tags", "adapter_before",
)  # fmt: skip
FROM_WORDS = ("ctc", "frames", "adapter", "adapter_before")
FROM_TAGS = ("tags", "adapter_tags")


@dataclasses.dataclass(frozen=True)
class Helpers:
    """Weights of the helper losses; 0 = none. `pieces`: size of the vocabulary."""

    ctc: float
    frames: float
    tags: float
    position: float
    adapter: float
    clock: float
    adapter_tags: float
    adapter_before: float
    names: tuple[str, ...]
    pieces: int

    @property
    def any(self) -> bool:
        return any(getattr(self, name) for name in NAMES)

    @property
    def on_adapter(self) -> bool:
        """Whether any loss uses the adapter's output."""
        return bool(self.adapter or self.clock or self.adapter_tags or self.adapter_before)


def init_helpers(key: jax.Array, config: ModelConfig, helpers: Helpers) -> dict[str, jax.Array]:
    """{path: float32}: a kernel [D, N] and a bias [N] for each head that has a loss."""
    features, adapted = config.encoder.output_dim, config.decoder.hidden_size
    sizes = {
        "pieces": (features, (helpers.pieces + 1) * bool(helpers.ctc or helpers.frames)),
        "tags": (features, len(helpers.names) * bool(helpers.tags)),
        "position": (features, config.encoder.chunk_frames // 8 * bool(helpers.position)),
        "clock": (adapted, config.encoder.chunk_frames // 8 * bool(helpers.clock)),
        "adapter_tags": (adapted, len(helpers.names) * bool(helpers.adapter_tags)),
        "adapter_before": (adapted, adapted * bool(helpers.adapter_before)),
    }
    params = {}
    for number, (name, (width, size)) in enumerate(sizes.items()):
        if size:
            each = jax.random.fold_in(key, number)
            kernel = jax.random.normal(each, (width, size)) * width**-0.5
            params[f"helpers/{name}/kernel"] = kernel
            # Most tags hold at few tokens, so start with low probabilities.
            params[f"helpers/{name}/bias"] = jnp.full(size, -4.0 if "tags" in name else 0.0)
    return params


def counts(helpers: Helpers, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The number that each loss is averaged over: chunks for CTC, tokens for the others."""
    heard = _heard(batch)
    found = {"ctc": jnp.sum(_aligned(batch)) if helpers.ctc else 0.0}
    found["frames"] = jnp.sum(batch["heard_pieces"] != IGNORE) if helpers.frames else 0.0
    tagged = jnp.sum(_tagged(batch)) if helpers.tags or helpers.adapter_tags else 0.0
    found["tags"] = found["adapter_tags"] = tagged
    found["position"] = found["clock"] = jnp.sum(heard)
    found["adapter"] = jnp.sum(batch["heard_pieces"] >= 0) if helpers.adapter else 0.0
    known = jnp.sum(batch["heard_before"] != IGNORE) if helpers.adapter_before else 0.0
    found["adapter_before"] = known
    return {name: jnp.maximum(value, 1).astype(jnp.float32) for name, value in found.items()}


def losses(
    params: Any,
    helpers: Helpers,
    features: jax.Array,
    batch: dict[str, jax.Array],
    adapted: jax.Array | None = None,
    head_kernel: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Sums of the losses that have a weight, {name: float32 scalar}.

    Args:
      params: {"pieces": {"kernel", "bias"}, ...}.
      features: the encoder's [B, C * S, D].
      batch: with the arrays of `data.targets`.
      adapted, head_kernel: the adapter's output [B, C * S, hidden], for the losses `adapter`,
        `clock`, `adapter_tags`, `adapter_before`; the decoder's head, for the first and last.
    """
    heard = _heard(batch).astype(jnp.float32)

    def head(name: str, x: jax.Array = features) -> jax.Array:
        p = params[name]
        kernel = p["kernel"].astype(x.dtype)
        product = jnp.matmul(x, kernel, precision=precision(x.dtype))
        return product.astype(jnp.float32) + p["bias"]

    found = {}
    if helpers.ctc or helpers.frames:
        log_probs = jax.nn.log_softmax(head("pieces"), axis=-1)
    if helpers.frames:
        target = batch["heard_pieces"]
        picked = jnp.where(target == NOTHING, helpers.pieces, jnp.maximum(target, 0))
        taken = jnp.take_along_axis(log_probs, picked[..., None], axis=-1)[..., 0]
        found["frames"] = -jnp.sum(jnp.where(target == IGNORE, 0.0, taken))
    if helpers.ctc:
        order = batch["heard_order"].reshape(-1, batch["heard_order"].shape[-1])  # [N, W]
        each = optax.ctc_loss(
            log_probs.reshape(order.shape[0], -1, log_probs.shape[-1]),
            1.0 - heard.reshape(order.shape[0], -1),
            jnp.maximum(order, 0),
            (order < 0).astype(jnp.float32),
            blank_id=helpers.pieces,
        )
        found["ctc"] = jnp.sum(jnp.where(_aligned(batch).reshape(-1), each, 0.0))
    if helpers.on_adapter:
        # Normalised as the decoder's hidden states are: root mean square 1.
        said = rms_norm(adapted, jnp.ones(adapted.shape[-1]), 1e-6)
    for name in FROM_TAGS:
        if getattr(helpers, name):
            logits = head(name, features if name == "tags" else said)
            each = optax.sigmoid_binary_cross_entropy(logits, batch["heard_tags"] == 1)
            found[name] = jnp.sum(jnp.where(_tagged(batch)[..., None], each, 0.0))
    for name in ("position", "clock"):
        if getattr(helpers, name):
            logits = head(name, features if name == "position" else said)
            place = jnp.broadcast_to(jnp.arange(logits.shape[1]) % logits.shape[2], heard.shape)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, place)
            found[name] = jnp.sum(each * heard)
    if helpers.adapter:
        targets = jnp.where(batch["heard_pieces"] >= 0, batch["heard_pieces"], IGNORE)
        found["adapter"] = jnp.sum(cross_entropy(said, head_kernel, targets)[0])
    if helpers.adapter_before:
        turned = head("adapter_before", said).astype(said.dtype)
        found["adapter_before"] = jnp.sum(
            cross_entropy(turned, head_kernel, batch["heard_before"])[0]
        )
    return found


def _heard(batch: dict[str, jax.Array]) -> jax.Array:
    """bool [B, C * S]: tokens within their chunk's frames."""
    frames, size = batch["frames"], batch["mels"].shape[2]
    inside = jnp.arange(0, size, 8) < frames[..., None]
    return inside.reshape(frames.shape[0], -1)


def _tagged(batch: dict[str, jax.Array]) -> jax.Array:
    """bool [B, C * S]: tokens whose tags are known."""
    return _heard(batch) & (batch["heard_tags"][..., 0] != UNKNOWN)


def _aligned(batch: dict[str, jax.Array]) -> jax.Array:
    """bool [B, C]: chunks whose pieces are known."""
    return (batch["heard_order"][..., 0] != IGNORE) & (batch["frames"] > 0)
