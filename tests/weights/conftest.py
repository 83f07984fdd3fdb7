"""Fixtures for the tests of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoint import CONFIG, write_checkpoint

from moss_audio_jax.config import ModelConfig
from moss_audio_jax.weights import safetensors


@pytest.fixture
def config() -> ModelConfig:
    return CONFIG


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The checkpoint in bfloat16, in several shards."""
    write_checkpoint(tmp_path / "official", CONFIG, max_shard_bytes=100_000)
    return tmp_path / "official"


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads of tensors' bytes."""
    sizes: list[int] = []
    real = safetensors.os.preadv

    def preadv(fd, buffers, offset):
        sizes.append(sum(len(buffer) for buffer in buffers))
        return real(fd, buffers, offset)

    monkeypatch.setattr(safetensors.os, "preadv", preadv)
    return sizes
