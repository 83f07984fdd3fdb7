"""A few rows to memorise, and a run config small enough for CPUs."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from runs import ROOT
from tiny_model import tiny_config, write_checkpoint

from moss_audio_jax.train.__main__ import load_config
from moss_audio_jax.train.defaults import sizes

CONFIGS = ROOT / "configs"
TONES = (250, 400, 650, 1000, 1600, 2500)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """rows.jsonl: six clips of one tone each, with its pitch and length as the answer."""
    folder = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(0)
    rows = []
    for i, pitch in enumerate(TONES):
        n = 8000 + 3200 * i
        wav = 0.3 * np.sin(2 * np.pi * pitch * np.arange(n) / 16000) + 0.01 * rng.normal(size=n)
        soundfile.write(folder / f"{pitch}.wav", wav, 16000)
        answer = f"{pitch} Hz"
        rows.append(
            {
                "task": ("pitch", "tone")[i % 2],
                "conversation": [
                    {"role": "user", "message_type": "audio", "content": f"{pitch}.wav"},
                    {"role": "user", "message_type": "text", "content": "Which?"},
                    {"role": "assistant", "message_type": "text", "content": answer},
                ],
            }
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_checkpoint(folder / "start", max_positions=512)
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
        config.data.length, config.data.chunks, config.data.batch = 128, 2, 4
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
    file.write_text(
        f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests/support")!r}, {str(ROOT / "configs")!r}]
import common, tiny, tiny_model

def get_config():
    c = tiny.get_config()
    c.model = common.sizes(tiny_model.tiny_config(512))
    c.tokenizer = {str(corpus / "start")!r}
    c.data.train = ({str(corpus / "rows.jsonl")!r},)
    c.data.length, c.data.chunks, c.data.batch, c.data.streams = 128, 2, 8, 8
    c.data.log_rows = True
    c.data.window = 3
    c.train.steps, c.train.log_every = 16, 1
    c.checkpoint.every, c.checkpoint.export = 2, "none"
    return c
"""
    )
    return file
