"""A few rows to memorise, and a run config small enough for CPUs."""

import json
from pathlib import Path

import pytest
from runs import ROOT, write_config, write_corpus
from tiny_model import tiny_config

from moss_audio_jax.train.__main__ import load_config
from moss_audio_jax.train.defaults import sizes

CONFIGS = ROOT / "configs"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """rows.jsonl: six clips of one tone each, with its pitch and length as the answer."""
    folder = tmp_path_factory.mktemp("tones")
    write_corpus(folder)
    return folder


@pytest.fixture
def run_config(corpus):
    """run_config("train.steps=5", ...): configs/tiny.py made still smaller, with overrides."""

    def make(*overrides: str, recipe: str = "tiny.py"):
        config = load_config(str(CONFIGS / recipe))
        with config.unlocked():
            config.model = sizes(tiny_config(max_positions=512))
        config.tokenizer = str(corpus / "start")
        config.data.train = (str(corpus / "rows.jsonl"),)
        config.data.length, config.data.chunks, config.data.batch = 128, 2, 8
        config.train.log_every = 1
        config.train.dtype, config.train.remat = "float32", "none"
        config.checkpoint.export = "none"
        config.mesh.fsdp = 1
        for override in overrides:
            key, value = override.split("=", 1)
            group, _, name = key.rpartition(".")
            target = config[group] if group else config
            old = target[name]
            target[name] = value if isinstance(old, str) else type(old)(json.loads(value))
        return config

    return make


@pytest.fixture
def small_run(corpus, tmp_path) -> Path:
    """A config file of a run small enough to be started many times."""
    file = tmp_path / "small.py"
    write_config(file, corpus)
    return file
