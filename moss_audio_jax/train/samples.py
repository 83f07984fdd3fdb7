"""A few answers of the model in training, to be read by people."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import jax
import numpy as np

from moss_audio_jax import files
from moss_audio_jax.data.batch import Example, TrainExample
from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.data.pipeline import example_maker
from moss_audio_jax.generate.engine import Engine
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.generate.vocabulary import vocabulary
from moss_audio_jax.train.export import merged_params
from moss_audio_jax.train.setup import Setup
from moss_audio_jax.train.step import State

_log = logging.getLogger(__name__)

LOG = "samples.jsonl"


def show(run: Setup, state: State, mixture: Mixture, workdir: Path, step: int) -> None:
    """Generates greedy answers to the first `eval.samples` held-out rows; prints and logs them."""
    start, config = run.start, dataclasses.replace(run.loader, branches=1)
    limit, count = run.config.eval.max_new_tokens, min(run.config.eval.samples, mixture.rows)
    make = example_maker(start.tokenizer, start.model.encoder, config)
    jobs = mixture.in_order()
    made = [make(jobs[i]) for i in range(count)]
    examples = [example for example in made if isinstance(example, TrainExample)]
    firsts = [int(np.flatnonzero(example.labels >= 0)[0]) for example in examples]
    prompts = [
        (Example(example.ids[:first], example.mels), Sampling(limit))
        for example, first in zip(examples, firsts, strict=True)
    ]
    tokenizer = start.tokenizer
    vocab = vocabulary(start.model, tokenizer, tokenizer.processor)
    weights = merged_params(state, run.recipe)
    engine = Engine(weights, start.model, run.recipe.compute, vocab, run.mesh)
    outputs = engine.run(prompts)
    if jax.process_index():
        return
    for example, output in zip(examples, outputs, strict=True):
        answer = tokenizer.decode(example.ids[example.labels >= 0])
        row = {
            "step": step,
            "row": example.row_id,
            "expected": answer,
            "answer": tokenizer.decode(output.ids),
            "finish_reason": output.finish_reason,
        }
        files.append(workdir / LOG, json.dumps(row, ensure_ascii=False) + "\n")
        _log.info(f"  {row['row']}: {row['answer']!r}  (expected {row['expected']!r})")
