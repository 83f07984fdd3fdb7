"""Reads a run's config: a Python file with `get_config()`, and overrides of its keys."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.remote import redact


def read_config_file(name: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of FILE[:ARG] with overrides like --config.train.steps=5.

    The file may import its neighbours. Which keys a verb knows is for the verb to check.

    Raises:
      InputError: no such file.
      UsageError: a file that fails, an option that overrides nothing, a value of the wrong type.
    """
    file = Path(name.split(":")[0])
    if not file.is_file():
        raise InputError(f"{file}: no such config file")
    for option in overrides:
        if not option.startswith("--config."):
            raise UsageError(f"unknown option {redact(option)!r}; expected --config.KEY=VALUE")
    values = flags.FlagValues()
    words = ["moss-audio-jax", f"--config={name}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=words)
    sys.path.insert(0, str(file.parent.resolve()))
    try:
        values(words)
        return values.config
    except Exception as error:  # whatever a user's Python file may raise
        text = f"{error} ({type(error).__name__})"
        if "Traceback (most recent call last)" in text:  # of get_config: what it raised comes last
            text = str(error).strip().splitlines()[-1]
        # KeyErrors hold the repr of a message of two lines.
        text = " ".join(text.replace("\\n", " ").replace("\\'", "'").split())[:300]
        raise UsageError(f"{name}: {redact(text)}") from None
    finally:
        sys.path.remove(str(file.parent.resolve()))
