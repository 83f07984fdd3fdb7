"""Evaluation: ask a model the questions of a benchmark, score its answers. Starts no JAX."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from moss_audio_jax import __version__


@functools.cache
def code_version() -> str:
    """The package's version and a hash of its code: "0.1.0+3f2a90c1b7de"."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"
