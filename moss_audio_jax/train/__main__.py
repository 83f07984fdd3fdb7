"""Trains a model, or continues the run in a folder, and exports it.

example:
  moss-audio-jax train --config sft --workdir DIR \\
      --config.init_from=CHECKPOINT --config.data.train="('rows.jsonl',)"

--config NAME[:argument] is a packaged config (`moss-audio-jax` lists them) or the path of a Python
file with get_config(). --config.KEY=VALUE overrides one of its keys. The same command continues a
run. SIGTERM saves it and ends it with exit code 0.

--check-data trains nothing. It reads every row once, on all cores and no accelerator, and prints
which rows cannot be used and why, hours, tokens, lengths, how rows are packed, tasks, languages,
duplicates, and held-out rows that are also trained on. Exit code 1: some row is bad. --report names
the page with the same tables and plots; a JSONL of the same name beside it lists the rows.

  moss-audio-jax train --check-data --config sft --report data_check.html \\
      --config.init_from=CHECKPOINT --config.data.train="('rows.jsonl',)"
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, so that Ctrl-C ends those too
    from moss_audio_jax import cli

    cli.run_verb("train")

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moss_audio_jax import command
from moss_audio_jax.buckets import as_path
from moss_audio_jax.config_file import read_config_file
from moss_audio_jax.errors import UsageError


def main(argv: Sequence[str]) -> int:
    config, args = parse(argv)
    if args.check_data:
        return _check_data(config, Path(args.report))
    workdir = as_path(args.workdir)
    command.join_processes()
    command.keep_memory()
    from moss_audio_jax.train.loop import train

    return train(config, workdir)


def _check_data(config: Any, report: Path) -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")  # whatever asks for a device, none is taken
    from moss_audio_jax.train.data_check import check_data

    return check_data(config, report, progress=sys.stderr.isatty())


def parse(argv: Sequence[str]) -> tuple[Any, Namespace]:
    """The config and the options of a command line.

    Raises:
      InputError: the config file cannot be loaded.
      UsageError: a key is unknown, or a value has the wrong type.
    """
    options = command.parser("train", __doc__)
    options.add_argument("--config", required=True, metavar="NAME[:ARG]")
    options.add_argument("--workdir", metavar="DIR", help="needed but for --check-data")
    options.add_argument("--check-data", action="store_true", help="read the rows, do not train")
    options.add_argument("--report", metavar="FILE.html", help="default data_check.html")
    args, rest = options.parse_known_args(argv)
    if args.report is not None and not args.check_data:
        raise UsageError("--report: belongs to --check-data")
    args.report = args.report or "data_check.html"
    if args.workdir is None and not args.check_data:
        raise UsageError("--workdir is missing: the folder of the run")
    return load_config(args.config, rest), args


def load_config(name: str, overrides: Sequence[str] = ()) -> Any:
    """The config of FILE[:ARG] with overrides like --config.train.steps=5, checked key by key."""
    from moss_audio_jax.train.check import check_keys

    config = read_config_file(name, overrides)
    given = {option.split("=")[0] for option in overrides}
    if "--config.data.train" in given and config.data.train:
        config.data.mixture = ConfigDict()  # a recipe's own data gives way
    check_keys(config)
    return config
