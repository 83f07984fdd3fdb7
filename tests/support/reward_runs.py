"""Rows, rewards and configs for runs that learn from rewards, small enough for a CPU."""

from __future__ import annotations

import importlib.metadata
import json
import string
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from runs import ROOT
from tiny_model import tone, write_checkpoint, write_wav

from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.models import moss_audio
from moss_audio_jax.post_train.phases import questions_of
from moss_audio_jax.post_train.rollout import Sampler
from moss_audio_jax.sharding import make_mesh, param_shardings
from moss_audio_jax.train import setup
from moss_audio_jax.train.__main__ import load_config
from moss_audio_jax.train.start import initial_params, read_start
from moss_audio_jax.tree import flatten

LETTERS = {"default": {"letters": 1.0}}
SECONDS = {"a.wav": 0.9, "b.wav": 2.5, "c.wav": 5.3}


def text(role, content):
    return {"role": role, "message_type": "text", "content": content}


def audio(path):
    return {"role": "user", "message_type": "audio", "content": path}


ROWS = (
    {
        "id": "two clips",
        "conversation": [
            audio("a.wav"),
            audio("c.wav"),
            text("user", "Which is longer?"),
            text("assistant", "<think>\n0.9 < 5.3\n</think>\n\nthe second"),
            text("user", "Surely?"),
            text("assistant", "<think>\nIt is.\n</think>\n\nyes"),
        ],
    },
    {"id": "answer", "conversation": [audio("b.wav"), text("user", "What?")], "answer": "a tone"},
    {
        "id": "branches",
        "conversation": [audio("c.wav")],
        "branches": [
            {"messages": [text("user", "Hum?"), text("assistant", "yes")], "task": "hum"},
            {"messages": [text("user", "Who?"), text("assistant", "nobody")], "task": "who"},
        ],
    },
    {"id": "no sound", "conversation": [text("user", "Say it."), text("assistant", "it")]},
)


def write_corpus(folder: Path, rows=ROWS) -> Path:
    """rows.jsonl, its clips, and the checkpoint `start`."""
    folder.mkdir(exist_ok=True)
    for number, (name, seconds) in enumerate(SECONDS.items()):
        write_wav(folder / name, tone(seconds, 300 * (number + 1)))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_checkpoint(folder / "start", max_positions=1024)
    return folder


def letters(said, row):
    """The share of ASCII letters, in which answers of random weights differ."""
    share = np.mean([each in string.ascii_letters for each in said.text])
    return float(share), "letters"


def plug_in(monkeypatch, name, function):
    """Makes `function` a reward by an entry point."""

    class Point:
        def load(self):
            return function

    real = importlib.metadata.entry_points

    def entry_points(**given):
        return [Point()] if given.get("name") == name else real(**given)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def tiny_run(folder: Path, *overrides: str):
    """The config of a run on the rows of `folder`, with overrides such as "train.steps=2"."""
    given = (
        "data.length=768",
        "data.batch=8",
        "data.chunks=8",
        "train.steps=2",
        "policy.prompts=2",
        "policy.answers=4",
        "policy.prompt_tokens=300",
        "policy.new_tokens=24",
        "policy.slots=8",
        "checkpoint.every=100",
        "checkpoint.export=none",
        "optimizer.warmup=0",
        "optimizer.learning_rate=1e-2",
        "mesh.fsdp=1",
        *overrides,
    )
    config = load_config(
        f"{ROOT / 'configs' / 'dapo.py'}:small", [f"--config.{each}" for each in given]
    )
    config.init_from = str(folder / "start")
    config.data.train = (str(folder / "rows.jsonl"),)
    with config.unlocked():
        config.policy.rewards = ConfigDict(LETTERS)
    return config


def sampled(config, mesh=None, count=4):
    """(run, its state before the first step, a Sampler with these weights, the first questions)."""
    run = setup.build(config, read_start(config), mesh or make_mesh(**config.mesh))
    model = run.start.model
    shardings = param_shardings(moss_audio.abstract_params(model), model, run.mesh)
    with jax.set_mesh(run.mesh):
        state = run.init_state()(flatten(initial_params(run.start, shardings, 0)))
    policy = config.policy
    sizes = policy.answers, policy.prompt_tokens, policy.new_tokens, policy.slots
    sampler = Sampler(run, *sizes)
    sampler.take(state)
    make, jobs = questions_of(run), Mixture(config.data.train).in_order()
    return run, state, sampler, [make(jobs[i]) for i in range(count)]
