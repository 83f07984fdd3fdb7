"""The objectives of `dapo` as the train step takes them (`train.step.Objective`)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moss_audio_jax.post_train import dapo
from moss_audio_jax.train.step import ANSWERED


@dataclasses.dataclass(frozen=True)
class Policy:
    """The objective of a batch of sampled answers.

    The batch has "answers" int, "advantages", "sampler_logprobs" and, if the weights have moved
    since it was sampled, "old_logprobs": [B, T] each, at the answers' own tokens. If the objective
    has `kl`, "reference_logprobs" too.
    """

    objective: dapo.Objective
    temperature: float = 1.0

    def count(self, batch: dict) -> jax.Array:
        mask, answers = _predicted(batch, "weights"), _predicted(batch, "answers")
        return jnp.maximum(jnp.sum(dapo.loss_weights(self.objective, mask, answers)), 1e-6)

    def sums(self, logprobs: jax.Array, batch: dict) -> tuple[jax.Array, dict]:
        known = {name: _predicted(batch, name) for name in ANSWERED if name in batch}
        old = known.pop("old_logprobs", jax.lax.stop_gradient(logprobs))
        mask = _predicted(batch, "weights")
        sums = dapo.token_sums(
            self.objective,
            logprobs,
            old,
            known["sampler_logprobs"],
            known["advantages"],
            mask,
            known["answers"],
            known.get("reference_logprobs"),
        )
        loss = sums.pop("loss")
        pulled = known["advantages"] != 0 if not self.objective.kl else mask > 0
        return loss, sums | {"moving": jnp.sum(mask * pulled)}

    def means(self, sums: dict) -> dict[str, jax.Array]:
        tokens = jnp.maximum(sums["tokens"], 1)
        shown = sums.keys() - {"weight", "tokens", "moving"}
        return {name: sums[name] / tokens for name in sorted(shown)}

    def moves(self, sums: dict) -> jax.Array:
        return sums["moving"] > 0


def _predicted(batch: dict, name: str) -> jax.Array:
    """An array [B, T] at the positions that predict its tokens, as `ops.loss.shift_labels`."""
    return jnp.pad(batch[name][:, 1:], ((0, 0), (0, 1)))
