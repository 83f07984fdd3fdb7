"""`serve --lora NAME=DIR`: LoRA adapters of the served model, each chosen by a request's `model`.

Each is a model of its own with an engine of its own. It shares the weights that it does not change
with the base, and unless it changes the encoder also what either has heard.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moss_audio_jax import command
from moss_audio_jax.errors import UsageError
from moss_audio_jax.weights.adapters import describe
from moss_audio_jax.weights.opening import read_config

if TYPE_CHECKING:
    from moss_audio_jax.api import MossAudio
    from moss_audio_jax.generate.service import Service

# It stands in URLs, in labels of metrics and in lists of names.
_NAME = r"[A-Za-z0-9][\w.:-]*(/[A-Za-z0-9][\w.:-]*)*"


def add_adapters(options: argparse.ArgumentParser) -> None:
    """The option; `adapters` is a list of (name, folder)."""
    options.add_argument(
        "--lora",
        dest="adapters",
        type=_named,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="LoRA adapters that answer requests whose `model` is NAME; may be repeated",
    )


def check(adapters: Sequence[tuple[str, Path]], names: Sequence[str], checkpoint: Path) -> None:
    """Says what each adapter is, before any weights are read.

    Args:
      names: of the base.

    Raises:
      UsageError: two models would have one name.
      InputError: an adapter is broken or does not fit the checkpoint.
    """
    taken = set(names)
    for name, folder in adapters:
        if name in taken:
            who = "the base is" if name in names else "other adapters are"
            raise UsageError(f"--lora {name}={folder}: {who} called {name}; choose another name")
        taken.add(name)
    for name, folder in adapters:
        command.say(f"{name}: {describe(folder, read_config(checkpoint))}")


def start(
    model: MossAudio,
    service: Service,
    adapters: Sequence[tuple[str, Path]],
    size: dict[str, int],
    stack: contextlib.ExitStack,
) -> dict[str, Service]:
    """Loads the adapters and starts an engine for each, which ends when the stack is left.

    Args:
      model, service: the base and its engine, whose programs are those of the others, too.
      size: options of `MossAudio.service`.

    Raises:
      InputError: an adapter is broken, or there is no memory for it.
    """
    return {
        name: stack.enter_context(model.adapted(folder).service(**size, beside=service))
        for name, folder in adapters
    }


def _named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or not folder:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected NAME=DIR, the name that requests give as `model` and a folder of "
            "adapters"
        )
    if not re.fullmatch(_NAME, name, re.ASCII) or len(name) > 100:
        raise argparse.ArgumentTypeError(
            f"{name!r}: expected a name of at most 100 letters, digits and . _ : - that begins "
            "with a letter or digit; / may stand between such names"
        )
    return name, Path(folder)
