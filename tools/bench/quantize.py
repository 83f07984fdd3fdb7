"""What int8 costs in quality: logits and greedy answers beside those of float32, same weights.

    python tools/bench/quantize.py [--checkpoint DIR] [--tokens 96]

The clips and questions of `moss-audio-jax demo`, asked in float32 first. Each other way to compute
reads the same answers token by token, through the cache as in generation, and says at every token
what would come next (a token's logits are compared whole); then it answers by itself.

Prints one JSON line for each of bfloat16, int8 weights and int8 weights and cache, in float32 and
in bfloat16:
  max_difference, mean_difference  of logits, over the standard deviation of the reference's
  top1     share of tokens whose likeliest successor is the reference's
  kl       mean Kullback-Leibler divergence from the reference, nats a token
  same     share of tokens of its own answers that equal the reference's up to the first that
           does not, and `answers` that are equal to the end
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moss_audio_jax import demo
from moss_audio_jax.api import MossAudio, Request
from moss_audio_jax.config import DEFAULT_CHECKPOINT, Compute, ModelConfig, Quantize
from moss_audio_jax.data.batch import Example
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.models import cache, moss_audio

WAYS: tuple[tuple[str, Quantize], ...] = (
    ("bfloat16", "none"),
    ("float32", "weights"),
    ("float32", "weights+cache"),
    ("bfloat16", "weights"),
    ("bfloat16", "weights+cache"),
)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _forced(
    params: Any,
    batch: moss_audio.Batch,
    answers: jax.Array,
    lengths: jax.Array,
    config: ModelConfig,
    compute: Compute,
) -> jax.Array:
    """Logits [A + 1, B, V] after the prompts and after each token of the answers [B, A].

    As the engine: a prompt attends to keys and values as the cache stores them.
    """
    rows, length = answers.shape[0], batch["tokens"].shape[1] + answers.shape[1]
    pages = cache.pages_for(length)
    tables = jnp.arange(pages)[None, None].repeat(rows, axis=0)
    kv = cache.init_cache(config.decoder, rows, pages, compute)
    audio = moss_audio.encode_audio(params, config, compute, batch)
    first, kv = moss_audio.prefill(params, config, compute, batch, kv, tables, audio)

    def step(carry: tuple, token: jax.Array) -> tuple:
        kv, at = carry
        logits, kv = moss_audio.decode_step(
            params, config, compute, token[:, None], at, kv, tables[:, 0]
        )
        return (kv, at + 1), logits[:, 0]

    _, rest = jax.lax.scan(step, (kv, lengths), answers.T)
    return jnp.concatenate([first[None], rest])


def forced(model: MossAudio, prompts: Sequence[Example], answers: Sequence[list[int]]) -> list:
    """For each prompt float32 [n + 1, V]: what is said to come at each token of its answer."""
    padded = np.zeros((len(answers), max(map(len, answers))), np.int32)
    for row, answer in enumerate(answers):
        padded[row, : len(answer)] = answer
    lengths = np.array([len(prompt.ids) for prompt in prompts], np.int32)
    with jax.set_mesh(model.mesh):
        batch = model._batch(prompts)
        logits = _forced(model.params, batch, padded, lengths, model.config, model.compute)
    logits = np.asarray(logits)
    return [logits[: len(answer) + 1, row] for row, answer in enumerate(answers)]


def compared(found: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> dict[str, float]:
    """See the module's docstring; logits [n, V] of each answer."""
    ours, theirs = (np.concatenate(logits).astype(np.float64) for logits in (found, reference))
    difference = np.abs(ours - theirs) / theirs.std()
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (theirs, ours))
    return {
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "top1": float((ours.argmax(1) == theirs.argmax(1)).mean()),
        "kl": float((np.exp(log_p) * (log_p - log_q)).sum(1).mean()),
    }


def agreement(found: Sequence[list[int]], reference: Sequence[list[int]]) -> dict[str, float]:
    same = [
        next(
            (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
            min(len(one), len(other)),
        )
        for one, other in zip(found, reference, strict=True)
    ]
    equal = sum(one == other for one, other in zip(found, reference, strict=True))
    return {"same": sum(same) / sum(map(len, reference)), "answers": equal}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--tokens", type=int, default=96, help="of an answer, at most")
    args = parser.parse_args()
    sampling = Sampling(args.tokens, loop_guard=False)

    def greedy(model: MossAudio) -> list[list[int]]:
        return [reply.ids for reply in model.answer(prompts, 8)]

    model = MossAudio.load(args.checkpoint, "float32")
    requests = [
        Request(question.prompt, clip.wav, sampling)
        for clip in demo.load_clips()
        for question in clip.questions
    ]
    prompts = [model.prepare(request) for request in requests]
    answers = greedy(model)
    reference = forced(model, prompts, answers)
    for dtype, quantize in WAYS:
        model = MossAudio.load(args.checkpoint, dtype, quantize=quantize)
        found = compared(forced(model, prompts, answers), reference)
        found |= agreement(greedy(model), answers)
        size = sum(x.nbytes for x in jax.tree.leaves(model.params["language_model"]))
        print(
            json.dumps(
                {
                    "dtype": dtype,
                    "quantize": quantize,
                    "questions": len(prompts),
                    "tokens": sum(map(len, answers)),
                    "decoder_bytes": size,
                }
                | {name: round(value, 6) for name, value in found.items()}
            )
        )


if __name__ == "__main__":
    main()
