"""The policy-gradient objectives DAPO, GRPO and GSPO: advantages of groups, losses of tokens.

    r_t = exp(logprobs - old_logprobs)                       what changed since the batch was scored
    w_t = min(exp(old_logprobs - sampler_logprobs), cap)     what the sampler computes differently
    loss = -mean of  w_t * min(r_t * A, clip(r_t, 1 - clip_low, 1 + clip_high) * A)

w (truncated importance sampling) has no gradient. The objectives differ in three things:

    DAPO   r of each token;              mean over all tokens of the batch; clip 0.2 and 0.28
    GRPO   r of each token;              mean over an answer, then over answers; clip 0.2 and 0.2
    GSPO   r and w of the whole answer;  mean over answers; clip 3e-4 and 4e-4

GSPO's r is exp(the mean over the answer's tokens of logprobs - old_logprobs) (arXiv 2507.18071);
its w is made in the same way.

`token_sums` is the core. It returns sums, so that the parts of a batch may be computed apart and
added before they are divided, as in `train.step`; and several answers may share a packed row. The
`*_loss` functions divide at once, for batches with one answer a row.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

Sums = dict[str, jax.Array]

# Beyond this a log-ratio counts as this: exp(89) is no float32, and 0 * inf would be NaN.
_LARGEST = 80.0


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is maximised.

    Attributes:
      ratio: whether r and w belong to a token or to a whole answer.
      mean: over all tokens, or over each answer's tokens and then over answers.
      clip_low, clip_high: r counts within 1 - clip_low and 1 + clip_high.
      tis_cap: the largest w.
      kl: weight of the divergence from a reference policy; 0: none is needed.
    """

    ratio: Literal["token", "answer"] = "token"
    mean: Literal["tokens", "answers"] = "tokens"
    clip_low: float = 0.2
    clip_high: float = 0.28
    tis_cap: float = 2.0
    kl: float = 0.0


VARIANTS = {
    "dapo": Objective(),
    "grpo": Objective(mean="answers", clip_high=0.2),
    "gspo": Objective(ratio="answer", mean="answers", clip_low=3e-4, clip_high=4e-4),
}


def group_advantages(rewards: jax.Array) -> jax.Array:
    """How much better each answer is than its group: (r - mean) / (standard deviation + 1e-6).

    Args:
      rewards: float [G, K], K answers to each of G questions.

    Returns:
      float32 [G, K]; exactly 0 in a group whose rewards are all equal. The deviation is that of the
      population (divided by K).
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    centred = rewards - jnp.mean(rewards, axis=-1, keepdims=True)
    spread = jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True))
    # The mean of equal numbers may be rounded away from them.
    equal = jnp.all(rewards == rewards[..., :1], axis=-1, keepdims=True)
    return jnp.where(equal, 0.0, centred / (spread + 1e-6))


def loss_weights(
    objective: Objective, mask: jax.Array, answers: jax.Array | None = None
) -> jax.Array:
    """The weight of each token in the mean. Their sum over the whole batch is what divides.

    Args:
      mask: [B, T], 1 on the tokens of answers.
      answers: int [B, T], which of the row's answers a token belongs to, such as the segment ids of
        packed rows: 0 to T. None: each row is one answer.

    Returns:
      float32 [B, T]: the mask; for a mean over answers, divided by the answer's sum of it. The sum
      is then the number of answers.
    """
    mask = mask.astype(jnp.float32)
    return mask if objective.mean == "tokens" else _over(mask, _answer_sums(mask, answers))


def token_sums(
    objective: Objective,
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    sampler_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    answers: jax.Array | None = None,
    reference_logprobs: jax.Array | None = None,
) -> Sums:
    """Sums over the tokens of a batch or of a part of it that holds whole rows.

    Positions outside the mask may hold anything, also infinities and NaN.

    Args:
      logprobs: [B, T], of the tokens by the policy that learns; alone has a gradient.
      old_logprobs: by the policy before this batch's updates, as the trainer computes them.
      sampler_logprobs: by the policy that sampled, as it computed them.
      advantages: [B, T] or [B, 1].
      mask, answers: see `loss_weights`.
      reference_logprobs: by the reference policy, if `objective.kl` is above 0.

    Returns:
      float32 scalars. "loss" / "weight" is the loss, where "weight" is the sum of `loss_weights`.
      The others, divided by "tokens" (the sum of the mask), are the metrics; see `means`.
    """
    weights = loss_weights(objective, mask, answers)
    mask = mask.astype(jnp.float32)
    counted = mask > 0
    new, old, sampler, advantages = (
        jnp.where(counted, x.astype(jnp.float32), 0.0)
        for x in (logprobs, old_logprobs, sampler_logprobs, advantages)
    )
    change, mismatch = new - old, old - sampler
    if objective.ratio == "answer":
        length = _answer_sums(mask, answers)
        change, mismatch = (
            jnp.where(counted, _over(_answer_sums(mask * x, answers), length), 0.0)
            for x in (change, mismatch)
        )
    ratio, importance = _exp(change), _exp(jax.lax.stop_gradient(mismatch))
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    weight = jnp.minimum(importance, objective.tis_cap)
    gain = weight * jnp.minimum(ratio * advantages, jnp.clip(ratio, low, high) * advantages)
    loss = -jnp.sum(weights * gain)
    sums = {
        "weight": jnp.sum(weights),
        "tokens": jnp.sum(mask),
        "clipped_low": jnp.sum(mask * ((ratio < low) & (advantages < 0))),
        "clipped_high": jnp.sum(mask * ((ratio > high) & (advantages > 0))),
        "importance": jnp.sum(mask * weight),
        "capped": jnp.sum(mask * (importance > objective.tis_cap)),
        "kl": jnp.sum(mask * _k3(new - old)),
        "entropy_estimate": -jnp.sum(mask * new),
    }
    if objective.kl:
        away = _k3(jnp.where(counted, reference_logprobs.astype(jnp.float32), 0.0) - new)
        loss += objective.kl * jnp.sum(weights * away)
        sums["reference_kl"] = jnp.sum(mask * away)
    return jax.lax.stop_gradient(sums) | {"loss": loss}


def means(sums: Sums) -> tuple[jax.Array, Sums]:
    """(loss, metrics) from sums over a whole batch; all 0 if no token counts.

    Metrics, over tokens: "clipped_low" and "clipped_high", the shares whose gain is clipped because
    r is too low (A below 0) or too high (A above 0); "importance", the mean of w; "capped", the
    share whose w reached the cap; "kl", of the old policy from the new, by Schulman's estimate k3,
    r - 1 - log r of each token; "entropy_estimate", the mean of -logprobs of the sampled tokens,
    which estimates the entropy but is not computed over the vocabulary; with a reference,
    "reference_kl", of the policy from it, by k3.
    """
    sums = dict(sums)
    loss = _over(sums.pop("loss"), sums.pop("weight"))
    tokens = sums.pop("tokens")
    return loss, {name: _over(value, tokens) for name, value in sums.items()}


def dapo_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    sampler_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    tis_cap: float = 2.0,
) -> tuple[jax.Array, Sums]:
    """DAPO's loss of a batch with one answer a row.

    Args:
      logprobs, old_logprobs, sampler_logprobs: float32 [B, T]; see `token_sums`.
      advantages: float32 [B], of each row's answer.
      mask: float32 [B, T], 1 on the answer's tokens.

    Returns:
      (loss, metrics), float32 scalars; see `means`.
    """
    objective = Objective(clip_low=clip_low, clip_high=clip_high, tis_cap=tis_cap)
    return policy_loss(objective, logprobs, old_logprobs, sampler_logprobs, advantages, mask)


def policy_loss(
    objective: Objective,
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    sampler_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    reference_logprobs: jax.Array | None = None,
) -> tuple[jax.Array, Sums]:
    """The loss of any objective, such as `VARIANTS["gspo"]`; see `dapo_loss` and `token_sums`."""
    logs = (logprobs, old_logprobs, sampler_logprobs)
    return means(token_sums(objective, *logs, advantages[:, None], mask, None, reference_logprobs))


def _answer_sums(values: jax.Array, answers: jax.Array | None) -> jax.Array:
    """The sum over each token's answer, at each of its tokens: [B, T]."""
    if answers is None:
        return jnp.broadcast_to(jnp.sum(values, axis=-1, keepdims=True), values.shape)

    def of_row(values: jax.Array, answers: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values, answers, values.shape[0] + 1)[answers]

    return jax.vmap(of_row)(values, answers)


def _over(values: jax.Array, divisor: jax.Array) -> jax.Array:
    """values / divisor, and 0 where the divisor is 0."""
    return jnp.where(divisor > 0, values / jnp.where(divisor > 0, divisor, 1.0), 0.0)


def _exp(log_ratio: jax.Array) -> jax.Array:
    return jnp.exp(jnp.minimum(log_ratio, _LARGEST))


def _k3(log_ratio: jax.Array) -> jax.Array:
    """Schulman's estimate of KL(q, p) from a sample of q, of log_ratio = log p - log q."""
    return _exp(log_ratio) - 1 - log_ratio
