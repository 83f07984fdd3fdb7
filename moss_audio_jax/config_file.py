"""Reads a run's config: a Python file with `get_config()`, and overrides of its keys.

The files of configs/ are part of the package and have short names: `sft` is configs/sft.py.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.files import brief
from moss_audio_jax.remote import redact

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_PACKAGE = Path(__file__).parent
# In a wheel they are in the package (setup.py puts them there), in a clone beside it.
FOLDER = next(
    (folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()),
    _PACKAGE / "configs",
)


def names() -> list[str]:
    """Names of the packaged configs that are runs, whose docstrings have a launch command."""
    found = []
    for file in sorted(FOLDER.rglob("*.py")):
        name = file.relative_to(FOLDER).with_suffix("").as_posix()
        if f"--config configs/{name}.py" in file.read_text(encoding="utf-8"):
            found.append(name)
    return found


def find(name: str) -> Path:
    """The config file at a path, or else of a packaged config: sft, small/sft, configs/sft.py.

    Raises:
      InputError: neither exists.
    """
    if (file := Path(name)).is_file():
        return file
    packaged = FOLDER / f"{name.removeprefix('configs/').removesuffix('.py')}.py"
    # A path to another place is not a name, and must not match a packaged config.
    if ".." not in packaged.parts and packaged.is_relative_to(FOLDER) and packaged.is_file():
        return packaged
    raise InputError(
        f"{name}: no such config file; those that come with the package: {', '.join(names())}"
    )


def _unknown(keys: Sequence[str], words: Sequence[str]) -> str | None:
    """A message about the first of `keys` that the config does not have; None if it has all."""
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=list(words))
    try:
        values(list(words))
    except Exception:  # the error is in the file itself
        return None
    for key in keys:
        inside, at = values.config, ""
        for part in key.split("."):
            if not isinstance(inside, ConfigDict):
                return f"there is no key {key}: {at} is a value"
            if part not in inside:
                near = difflib.get_close_matches(part, list(inside), 3) or sorted(inside)[:12]
                return f"there is no key {key}; {at or 'the config'} has {', '.join(near)}"
            inside, at = inside[part], f"{at}.{part}".strip(".")
    return None


def read_config_file(name: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of FILE[:ARG] or NAME[:ARG] with overrides like --config.train.steps=5.

    The file may import its neighbours and the packaged configs. Each verb checks the keys itself.

    Raises:
      InputError: no such file.
      UsageError: the file fails, an option overrides no key, or a value has the wrong type.
    """
    path, colon, argument = name.partition(":")
    file = find(path).resolve()
    given = {}  # the last value of each key, because ml_collections would join two tuples
    for option in overrides:
        key, equals, _ = option.removeprefix("--config.").partition("=")
        if not (option.startswith("--config.") and key and equals):
            raise UsageError(f"unknown option {redact(option)!r}; expected --config.KEY=VALUE")
        given[key] = option
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    words = ["moss-audio-jax", f"--config={file}{colon}{argument}", *given.values()]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=words)
    searched = list(sys.path)
    sys.path[:] = [str(file.parent), *searched, str(FOLDER)]
    try:
        values(words)
        return values.config
    except (AttributeError, KeyError) as error:
        unknown = _unknown(list(given), words[:2])
        text = unknown or brief(f"{error} ({type(error).__name__})", 300)
        raise UsageError(f"{name}: {redact(text)}") from None
    except Exception as error:  # a user's Python file may raise anything
        text = f"{error} ({type(error).__name__})"
        if "Traceback (most recent call last)" in text:  # the error of get_config is the last line
            text = str(error).strip().splitlines()[-1]
        # A KeyError holds the repr of a message with two lines.
        text = " ".join(text.replace("\\n", " ").replace("\\'", "'").split())[:300]
        raise UsageError(f"{name}: {redact(text)}") from None
    finally:
        sys.path[:] = searched
