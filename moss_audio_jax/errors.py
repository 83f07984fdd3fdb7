"""The errors that a caller can cause. A verb prints one as a line and sets the exit code."""

import re
from pathlib import Path


class InputError(ValueError):
    """An input cannot be used: a file, a checkpoint, a row. The message names it (exit code 1)."""


class TooLong(InputError):
    """A prompt has more tokens than the model's positions or the cache's room."""


class UsageError(ValueError):
    """The request itself is wrong: an unknown option, a contradiction (exit code 2)."""


def extra(name: str) -> str:
    """The command that installs an extra, for a message.

    The project is not on a package index. A clone installs from its folder; after installation from
    a wheel, pip keeps the installed package and adds what the extra needs.
    """
    in_clone = (Path(__file__).parents[1] / "setup.cfg").exists()
    return f"pip install -e '.[{name}]'" if in_clone else f"pip install 'moss_audio_jax[{name}]'"


# Messages of the allocators: XLA's on devices and hosts, CUDA's, C++'s.
_NO_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "OUT_OF_MEMORY", "bad_alloc")


def out_of_memory(error: BaseException) -> str | None:
    """A one-line message if the error means too little memory on a device or host; else None."""
    by_xla = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    if not isinstance(error, MemoryError) and not (
        by_xla and any(word in str(error) for word in _NO_MEMORY)
    ):
        return None
    asked = re.search(r"allocat\w+ ([\d.]+ ?[A-Za-z]+)", str(error))
    what = f" ({asked[0]})" if asked else ""
    return (
        f"out of memory{what}. To train, lower data.batch or data.length, raise train.accumulate, "
        "set train.remat to full, or train only adapters (lora.rank). For inference, lower "
        "--batch-size, or give --dtype bfloat16, --quantize weights+cache or a larger --mesh."
    )
