"""How far are the sampler's log-probabilities from the trainer's? Prints one JSON line.

python tools/bench/importance.py scenes/rows.jsonl [--checkpoint DIR] [--dtype bfloat16]
    [--prompts 8] [--answers 16] [--temperature 1.0]

Both have the same weights, so w = exp(trainer - sampler) of a sampled token differs from 1 by
rounding alone: quantiles of w over all tokens and, as GSPO takes it, over whole answers.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import jax
import numpy as np

from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.models import moss_audio
from moss_audio_jax.post_train.batches import lay_out, pieces_of, read_back, rows_needed
from moss_audio_jax.post_train.phases import questions_of
from moss_audio_jax.post_train.questions import Question
from moss_audio_jax.post_train.rollout import Group, Sampler, answer_of
from moss_audio_jax.sharding import make_mesh, param_shardings
from moss_audio_jax.train import setup
from moss_audio_jax.train.__main__ import load_config
from moss_audio_jax.train.start import initial_params, read_start
from moss_audio_jax.train.step import batch_shardings, label_logprobs
from moss_audio_jax.tree import flatten

CONFIG = Path(__file__).parents[2] / "configs" / "dapo.py"
QUANTILES = (0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("rows")
    options.add_argument("--checkpoint", default=str(DEFAULT_CHECKPOINT))
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--prompts", type=int, default=8)
    options.add_argument("--answers", type=int, default=16)
    options.add_argument("--temperature", type=float, default=1.0)
    args = options.parse_args()
    config = load_config(f"{CONFIG}:small")
    config.init_from, config.data.train = args.checkpoint, (args.rows,)
    config.train.dtype, config.policy.temperature = args.dtype, args.temperature
    config.policy.prompts, config.policy.answers = args.prompts, args.answers
    config.policy.slots = args.answers
    policy, length = config.policy, config.data.length
    config.data.batch = rows_needed(
        args.prompts, args.answers, length, policy.prompt_tokens, policy.new_tokens
    )

    run = setup.build(config, read_start(config), make_mesh(**config.mesh))
    model, mesh = run.start.model, run.mesh
    shardings = param_shardings(moss_audio.abstract_params(model), model, mesh)
    with jax.set_mesh(mesh):
        state = run.init_state()(flatten(initial_params(run.start, shardings, 0)))
    sampler = Sampler(
        run, policy.answers, policy.prompt_tokens, policy.new_tokens, slots=policy.slots
    )
    sampler.take(state)
    make, jobs = questions_of(run), Mixture(config.data.train, config.train.seed).jobs()
    asked: list[Question] = []
    at = 0
    while len(asked) < args.prompts:
        made = make(jobs[at])
        asked += [made] if isinstance(made, Question) else []
        at += 1
    groups = [
        Group(question, [answer_of(each, 0.0) for each in outputs])
        for question, outputs in zip(asked, sampler.sample(asked, args.temperature), strict=True)
    ]

    multiple = mesh.shape["data"] * mesh.shape["fsdp"]
    pieces = pieces_of(groups, run.shape.tokens)
    processor = run.start.tokenizer.processor
    arrays, rows = lay_out(pieces, run.shape, multiple, model.encoder, processor)
    place = batch_shardings(arrays, mesh)
    with jax.set_mesh(mesh):
        score = jax.jit(functools.partial(label_logprobs, recipe=run.recipe))
        arrays = {name: jax.device_put(x, place[name]) for name, x in arrays.items()}
        values = np.asarray(score(state["trained"], state["frozen"], arrays))
    found = read_back(values, pieces, rows)
    away = [
        found[n, k] - answer.logprobs
        for n, group in enumerate(groups)
        for k, answer in enumerate(group.answers)
    ]
    w = np.exp(np.concatenate(away).astype(np.float64))
    whole = np.exp([each.mean(dtype=np.float64) for each in away])
    entropy = -np.mean(np.concatenate([a.logprobs for g in groups for a in g.answers]))
    print(
        json.dumps(
            {
                "device": jax.devices()[0].device_kind,
                "dtype": args.dtype,
                "temperature": args.temperature,
                "answers": len(away),
                "tokens": len(w),
                "entropy_estimate": round(float(entropy), 3),
                "w": {str(q): round(float(np.quantile(w, q)), 5) for q in QUANTILES},
                "mean_w": round(float(w.mean()), 6),
                "share_beyond_2": float((w > 2).mean()),
                "w_of_answers": {str(q): round(float(np.quantile(whole, q)), 5) for q in QUANTILES},
            }
        )
    )


if __name__ == "__main__":
    main()
