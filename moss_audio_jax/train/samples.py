"""A few answers of the model in training, to be read by people."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moss_audio_jax import files
from moss_audio_jax.data.batch import Example, TrainExample
from moss_audio_jax.data.loader_config import LoaderConfig
from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.data.pipeline import example_maker, job_for
from moss_audio_jax.generate.engine import Engine
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.generate.vocabulary import vocabulary
from moss_audio_jax.train.export import merged_params
from moss_audio_jax.train.start import Start
from moss_audio_jax.train.step import Recipe

_log = logging.getLogger(__name__)

LOG = "samples.jsonl"


def show(
    count: int, max_new_tokens: int, state: dict[str, Any], mixture: Mixture, start: Start,
    recipe: Recipe, config: LoaderConfig, mesh: Mesh, workdir: Path, step: int,
) -> None:  # fmt: skip
    """Generates greedy answers to the first `count` held-out rows; prints and logs them."""
    config = dataclasses.replace(config, branches=1)
    make = example_maker(start.tokenizer, start.model.encoder, config)
    made = [make(job_for(mixture, i, 0, i)) for i in range(min(count, mixture.rows))]
    examples = [example for example in made if isinstance(example, TrainExample)]
    firsts = [int(np.flatnonzero(example.labels >= 0)[0]) for example in examples]
    prompts = [
        (Example(example.ids[:first], example.mels), Sampling(max_new_tokens))
        for example, first in zip(examples, firsts, strict=True)
    ]
    tokenizer = start.tokenizer
    vocab = vocabulary(start.model, tokenizer, tokenizer.processor)
    engine = Engine(merged_params(state, recipe), start.model, recipe.compute, vocab, mesh)
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
