"""Helper losses that teach a model from scratch what is said and heard when.

Most use linear projections of the encoder's last features, for training only. An export keeps the
projections apart from the model's weights, in its folder `helpers` (`weights.helpers`).

  ctc       connectionist temporal classification over the tokenizer's pieces, chunk by chunk
  frames    cross entropy of the piece that is said at each token (80 ms), from known word times
  tags      binary cross entropy of each tag that holds at a token
  position  cross entropy of a token's place in its chunk: the absolute position fades through many
            layers, but timestamps depend on it
  adapter   cross entropy of the piece that is said at a token, from the adapter's output through
            `lm_head`: a decoder from scratch finds known words among the audio tokens
  clock     like position, from the adapter's output: a decoder that learns what is said at a token
            but not when would guess times
  adapter_tags  like tags, from the adapter's output
  adapter_before  cross entropy of the piece said before the current one, from the adapter's output
            through a matrix and `lm_head`: to continue after a word, a decoder looks
            for the tokens that follow that word
  times     of the answers, at each digit of a time such as [12.34]: how far off the digits are that
            the decoder holds possible (`_times`). To cross entropy, all wrong digits are alike
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moss_audio_jax.config import ModelConfig
from moss_audio_jax.data.targets import IGNORE, NOTHING, UNKNOWN
from moss_audio_jax.models.encoder import piece_positions
from moss_audio_jax.ops.linear import precision
from moss_audio_jax.ops.loss import cross_entropy, shift_labels
from moss_audio_jax.ops.norms import rms_norm
from moss_audio_jax.sharding import constrain

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Projection:
    """A linear projection: its name, how many outputs it has, and its first values.

    Attributes:
      seed: of its kernel; no two projections share one.
      bias: of each output.
    """

    name: str
    size: Callable[[Helpers, ModelConfig], int]
    seed: int
    bias: float = 0.0


@dataclasses.dataclass(frozen=True)
class Loss:
    """One helper loss.

    Attributes:
      summed: of a batch; may read the projection's logits.
      count: how many things of a batch it is a mean over.
      projection: two losses may share one; None: `lm_head`.
      on_adapter: whether it reads the adapter's output; else the encoder's.
      on_decoder: whether it reads the decoder's hidden states.
      needs: what rows must say for it, "words" or "tags", or "times" in answers; "": nothing.
    """

    summed: Callable[[_Heard], jax.Array]
    count: Callable[[Batch], jax.Array]
    projection: Projection | None = None
    on_adapter: bool = False
    on_decoder: bool = False
    needs: str = ""


@dataclasses.dataclass(frozen=True)
class Helpers:
    """The helper losses of a run.

    Attributes:
      weights: (name, weight) of each loss; 0 = none.
      names: of the tags.
      pieces: size of the vocabulary.
      digits: ids of "0" to "9", for `times`.
    """

    weights: tuple[tuple[str, float], ...]
    names: tuple[str, ...]
    pieces: int
    digits: tuple[int, ...] = ()

    @property
    def losses(self) -> dict[str, Loss]:
        """Those that have a weight."""
        weights = dict(self.weights)
        return {name: loss for name, loss in LOSSES.items() if weights.get(name)}

    @property
    def on_adapter(self) -> bool:
        """Whether a loss reads the adapter's output."""
        return any(loss.on_adapter for loss in self.losses.values())

    @property
    def on_decoder(self) -> bool:
        """Whether a loss reads the decoder's hidden states."""
        return any(loss.on_decoder for loss in self.losses.values())


def init_helpers(key: jax.Array, config: ModelConfig, helpers: Helpers) -> dict[str, jax.Array]:
    """{path: float32}: a kernel [D, N] and a bias [N] for each projection that has a loss."""
    params = {}
    for loss in helpers.losses.values():
        if projection := loss.projection:
            decoder = config.decoder.hidden_size
            width = decoder if loss.on_adapter else config.encoder.output_dim
            size = projection.size(helpers, config)
            each = jax.random.fold_in(key, projection.seed)
            kernel = jax.random.normal(each, (width, size)) * width**-0.5
            params[f"helpers/{projection.name}/kernel"] = kernel
            params[f"helpers/{projection.name}/bias"] = jnp.full(size, projection.bias)
    return params


def counts(helpers: Helpers, batch: Batch) -> dict[str, jax.Array]:
    """How many things each loss is a mean over: chunks for CTC, tokens for the others (of `times`
    their weights), or 1 where there are none."""
    found = {name: loss.count(batch) for name, loss in helpers.losses.items()}
    return {name: jnp.where(n > 0, n, 1).astype(jnp.float32) for name, n in found.items()}


def losses(
    params: Any,
    helpers: Helpers,
    features: jax.Array,
    batch: Batch,
    adapted: jax.Array | None = None,
    lm_head: jax.Array | None = None,
    hidden: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Sums of the losses that have a weight, {name: float32 scalar}: with `hidden` those that read
    it, else all others.

    Args:
      params: {"pieces": {"kernel", "bias"}, ...}.
      features: the encoder's [B, C * S, D].
      batch: with the arrays of `data.targets`.
      adapted, lm_head: the adapter's output [B, C * S, hidden], for the losses that read it;
        `lm_head`'s kernel, for those without a projection of their own and for
        `adapter_before`.
      hidden: the decoder's hidden states [B, T, hidden], for `times`.
    """
    if adapted is not None:
        # As the decoder sees hidden states: of length one a dimension.
        adapted = rms_norm(adapted, jnp.ones(adapted.shape[-1]), 1e-6)
    heard = _Heard(params, features, adapted, batch, lm_head, hidden, helpers.digits)
    wanted = {
        n: loss for n, loss in helpers.losses.items() if loss.on_decoder == (hidden is not None)
    }
    return {name: loss.summed(heard) for name, loss in wanted.items()}


@dataclasses.dataclass
class _Heard:
    """What the losses of a batch read; see `losses`."""

    params: Any
    features: jax.Array
    adapted: jax.Array | None
    batch: Batch
    lm_head: jax.Array | None
    hidden: jax.Array | None
    digits: tuple[int, ...]

    def logits(self, name: str, x: jax.Array) -> jax.Array:
        """float32 [B, C * S, N] of a projection."""
        p = self.params[name]
        kernel = p["kernel"].astype(x.dtype)
        product = jnp.matmul(x, kernel, precision=precision(x.dtype))
        return product.astype(jnp.float32) + p["bias"]

    @functools.cached_property
    def pieces(self) -> jax.Array:
        """Log probabilities; the last is of no piece. Two losses share them."""
        return jax.nn.log_softmax(self.logits("pieces", self.features), axis=-1)


def _frames(heard: _Heard) -> jax.Array:
    target = heard.batch["heard_pieces"]
    blank = heard.pieces.shape[-1] - 1
    picked = jnp.where(target == NOTHING, blank, jnp.maximum(target, 0))
    taken = jnp.take_along_axis(heard.pieces, picked[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(target == IGNORE, 0.0, taken))


def _ctc(heard: _Heard) -> jax.Array:
    order = heard.batch["heard_order"]
    order = order.reshape(-1, order.shape[-1])  # [N, W]
    inside = _inside(heard.batch).astype(jnp.float32)
    each = optax.ctc_loss(
        heard.pieces.reshape(order.shape[0], -1, heard.pieces.shape[-1]),
        1.0 - inside.reshape(order.shape[0], -1),
        jnp.maximum(order, 0),
        (order < 0).astype(jnp.float32),
        blank_id=heard.pieces.shape[-1] - 1,
    )
    return jnp.sum(jnp.where(_aligned(heard.batch).reshape(-1), each, 0.0))


def _tags(heard: _Heard, logits: jax.Array) -> jax.Array:
    each = optax.sigmoid_binary_cross_entropy(logits, heard.batch["heard_tags"] == 1)
    return jnp.sum(jnp.where(_tagged(heard.batch)[..., None], each, 0.0))


def _place(heard: _Heard, logits: jax.Array) -> jax.Array:
    inside = _inside(heard.batch).astype(jnp.float32)
    place = piece_positions(heard.batch["frames"]).reshape(inside.shape)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, place)
    return jnp.sum(each * inside)


def _adapter(heard: _Heard) -> jax.Array:
    pieces = heard.batch["heard_pieces"]
    targets = jnp.where(pieces >= 0, pieces, IGNORE)
    return jnp.sum(cross_entropy(heard.adapted, heard.lm_head, targets)[0])


def _adapter_before(heard: _Heard) -> jax.Array:
    turned = heard.logits("adapter_before", heard.adapted).astype(heard.adapted.dtype)
    return jnp.sum(cross_entropy(turned, heard.lm_head, heard.batch["heard_before"])[0])


def _times(heard: _Heard) -> jax.Array:
    """Sum over digits of times, by the weights of their labels, of E[log(1 + e / 0.1 s)].

    e = |v - d| * 10^place is how many seconds off a time is whose digit d became v, with all its
    other digits right; v is drawn from the softmax of the ten digits' logits behind the true digits
    before. The logarithm is nearly proportional below 0.1 s, where times of words are judged. Above
    it grows by 2.3 a place: an error of 10 s weighs 6.7 times as much as one of 0.1 s, not a
    hundred times, so tens do not drown the rest. And at a border (9.98 and 10.02), where digits far
    apart are times close together, it errs by a few units instead of by 80 s.

    The ten columns of the head make the logits: [B, T, 10], not [B, T, V].
    """
    digits = jnp.array(heard.digits)
    labels, places, weights = _digits(heard.batch)
    columns = constrain(jnp.take(heard.lm_head, digits, axis=1), None, None)
    logits = jnp.matmul(
        heard.hidden,
        columns.astype(heard.hidden.dtype),
        precision=precision(heard.hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    true = jnp.argmax(labels[..., None] == digits, axis=-1)
    apart = jnp.abs(jnp.arange(10) - true[..., None])
    seconds = apart * 10.0 ** places[..., None].astype(jnp.float32)
    cost = jax.nn.softmax(logits) * jnp.log1p(seconds / _HEARD_APART)
    return jnp.sum(weights * jnp.sum(cost, axis=-1))


def _digits(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B, T] each, at the position that predicts it: a label, its place, and its weight if it is a
    digit of a time, else 0."""
    places = shift_labels(batch["time_places"])
    weights = jnp.pad(batch["weights"][:, 1:], ((0, 0), (0, 1)))
    known = places != IGNORE
    return shift_labels(batch["labels"]), places, jnp.where(known, weights, 0.0)


def _inside(batch: Batch) -> jax.Array:
    """bool [B, C * S]: tokens within their chunk's frames."""
    frames = batch["frames"]
    return (frames > 0).reshape(frames.shape[0], -1)


def _tagged(batch: Batch) -> jax.Array:
    """bool [B, C * S]: tokens of which it is known what tags hold."""
    return _inside(batch) & (batch["heard_tags"][..., 0] != UNKNOWN)


def _aligned(batch: Batch) -> jax.Array:
    """bool [B, C]: chunks whose pieces are known."""
    return (batch["heard_order"][..., 0] != IGNORE) & jnp.any(batch["frames"] > 0, axis=-1)


def _tag_count(helpers: Helpers, _: ModelConfig) -> int:
    return len(helpers.names)


def _chunk_tokens(_: Helpers, config: ModelConfig) -> int:
    return config.encoder.chunk_frames // 8


# Most tags hold at few tokens: their biases start from there.
_RARE = -4.0
_HEARD_APART = 0.1  # seconds: errors of `times` beyond it count by their logarithm
_PIECES = Projection("pieces", lambda helpers, _: helpers.pieces + 1, seed=0)

# Every helper loss, in the order in which they are added up. Each has a key `helpers.NAME`, its
# weight.
LOSSES = {
    "frames": Loss(
        _frames,
        count=lambda batch: jnp.sum(batch["heard_pieces"] != IGNORE),
        projection=_PIECES,
        needs="words",
    ),
    "ctc": Loss(
        _ctc, count=lambda batch: jnp.sum(_aligned(batch)), projection=_PIECES, needs="words"
    ),
    "tags": Loss(
        lambda heard: _tags(heard, heard.logits("tags", heard.features)),
        count=lambda batch: jnp.sum(_tagged(batch)),
        projection=Projection("tags", _tag_count, seed=1, bias=_RARE),
        needs="tags",
    ),
    "adapter_tags": Loss(
        lambda heard: _tags(heard, heard.logits("adapter_tags", heard.adapted)),
        count=lambda batch: jnp.sum(_tagged(batch)),
        projection=Projection("adapter_tags", _tag_count, seed=4, bias=_RARE),
        on_adapter=True,
        needs="tags",
    ),
    "position": Loss(
        lambda heard: _place(heard, heard.logits("position", heard.features)),
        count=lambda batch: jnp.sum(_inside(batch)),
        projection=Projection("position", _chunk_tokens, seed=2),
    ),
    "clock": Loss(
        lambda heard: _place(heard, heard.logits("clock", heard.adapted)),
        count=lambda batch: jnp.sum(_inside(batch)),
        projection=Projection("clock", _chunk_tokens, seed=3),
        on_adapter=True,
    ),
    "adapter": Loss(
        _adapter,
        count=lambda batch: jnp.sum(batch["heard_pieces"] >= 0),
        on_adapter=True,
        needs="words",
    ),
    "adapter_before": Loss(
        _adapter_before,
        count=lambda batch: jnp.sum(batch["heard_before"] != IGNORE),
        projection=Projection(
            "adapter_before", lambda _, config: config.decoder.hidden_size, seed=5
        ),
        on_adapter=True,
        needs="words",
    ),
    "times": Loss(
        _times,
        count=lambda batch: jnp.sum(_digits(batch)[2]),
        on_decoder=True,
        needs="times",
    ),
}
