"""Trains a model, or continues what a folder holds, and exports it.

example:
  moss-audio-jax train --config configs/sft.py --workdir DIR \\
      --config.init_from=CHECKPOINT --config.data.train="('rows.jsonl',)"

--config FILE[:argument] names a Python file with get_config(); --config.KEY=VALUE overrides one of
its keys. The same command again continues; SIGTERM saves and ends the run with exit code 0.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from moss_audio_jax import command
from moss_audio_jax.errors import InputError, UsageError


def main(argv: Sequence[str]) -> int:
    config, workdir = parse(argv)
    command.join_processes()
    from moss_audio_jax.train.loop import train

    return train(config, workdir)


def parse(argv: Sequence[str]) -> tuple[Any, Path]:
    """The config and the work folder of a command line.

    Raises:
      InputError: a config file that cannot be loaded.
      UsageError: an unknown key, a value of the wrong type.
    """
    options = command.parser("train", __doc__)
    options.add_argument("--config", required=True, metavar="FILE[:ARG]")
    options.add_argument("--workdir", required=True, metavar="DIR")
    args, rest = options.parse_known_args(argv)
    if "://" in args.workdir:
        raise UsageError(
            f"--workdir {args.workdir}: remote folders are not supported; mount one that all hosts "
            "share"
        )
    return load_config(args.config, rest), Path(args.workdir)


def load_config(name: str, overrides: Sequence[str] = ()) -> Any:
    """The config of FILE[:ARG] with overrides like --config.train.steps=5, checked key by key."""
    from moss_audio_jax.train.check import check_keys

    file = Path(name.split(":")[0])
    if not file.is_file():
        raise InputError(f"{file}: no such config file")
    for option in overrides:
        if not option.startswith("--config."):
            raise UsageError(f"unknown option {option!r}; expected --config.KEY=VALUE")
    values = flags.FlagValues()
    words = ["train", f"--config={name}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=words)
    sys.path.insert(0, str(file.parent.resolve()))  # recipes import their neighbours
    try:
        values(words)
        config = values.config
    except Exception as error:  # whatever a user's Python file may raise
        # KeyErrors hold the repr of a message of two lines.
        text = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split())[:300]
        raise UsageError(f"{name}: {text} ({type(error).__name__})") from None
    finally:
        sys.path.remove(str(file.parent.resolve()))
    given = {option.split("=")[0] for option in overrides}
    if "--config.data.train" in given and config.data.train:
        config.data.mixture = ConfigDict()  # a recipe's own data gives way
    check_keys(config)
    return config


if __name__ == "__main__":
    sys.exit(command.run(main))
