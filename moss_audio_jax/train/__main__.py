"""Trains a model, or continues the run in a folder, and exports it.

example:
  moss-audio-jax train --config sft --workdir DIR \\
      --config.init_from=CHECKPOINT --config.data.train="('rows.jsonl',)"

--config NAME[:argument] is a packaged config (`moss-audio-jax` lists them) or the path of a Python
file with get_config(). --config.KEY=VALUE overrides one of its keys. The same command continues a
run. SIGTERM saves it and ends it with exit code 0.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, so that Ctrl-C ends those too
    from moss_audio_jax import cli

    cli.run_verb("train")

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moss_audio_jax import command
from moss_audio_jax.buckets import as_path
from moss_audio_jax.config_file import read_config_file


def main(argv: Sequence[str]) -> int:
    config, workdir = parse(argv)
    command.join_processes()
    command.keep_memory()
    from moss_audio_jax.train.loop import train

    return train(config, workdir)


def parse(argv: Sequence[str]) -> tuple[Any, Path]:
    """The config and the work folder of a command line.

    Raises:
      InputError: the config file cannot be loaded.
      UsageError: a key is unknown, or a value has the wrong type.
    """
    options = command.parser("train", __doc__)
    options.add_argument("--config", required=True, metavar="NAME[:ARG]")
    options.add_argument("--workdir", required=True, metavar="DIR")
    args, rest = options.parse_known_args(argv)
    return load_config(args.config, rest), as_path(args.workdir)


def load_config(name: str, overrides: Sequence[str] = ()) -> Any:
    """The config of FILE[:ARG] with overrides like --config.train.steps=5, checked key by key."""
    from moss_audio_jax.train.check import check_keys

    config = read_config_file(name, overrides)
    given = {option.split("=")[0] for option in overrides}
    if "--config.data.train" in given and config.data.train:
        config.data.mixture = ConfigDict()  # a recipe's own data gives way
    check_keys(config)
    return config
