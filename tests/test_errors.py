"""Errors from outside: memory that runs out, missing extras; log messages of libraries."""

import logging
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moss_audio_jax import command
from moss_audio_jax.errors import extra, out_of_memory

ROOT = Path(__file__).parents[1]


def _of_xla():
    jnp.zeros(1 << 44, jnp.float32).block_until_ready()  # 64 TiB


def _of_numpy():
    np.zeros(1 << 55, np.int64)


def _of_a_gpu():
    raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 25769803776 bytes.\n"
        "BufferAssignment OOM Debugging."
    )


def _of_a_tpu():
    raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 15.80G of 15.75G hbm."
    )


@pytest.mark.parametrize("fail", [_of_xla, _of_numpy, _of_a_gpu, _of_a_tpu])
def test_out_of_memory_is_one_line_that_names_what_to_lower(fail, capsys):
    assert command.run(lambda argv: fail(), []) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: out of memory")
    assert line.count("\n") == 1
    for key in ("data.batch", "data.length", "train.remat", "lora.rank", "--batch-size"):
        assert key in line
    if fail is _of_a_gpu:
        assert "(allocate 25769803776 bytes)" in line


def test_other_errors_stay_what_they_are():
    for error in (
        ValueError("Out of memory"),  # not an allocator's message
        jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such flag"),
    ):
        assert out_of_memory(error) is None
        with pytest.raises(type(error)):
            command.run(lambda argv, error=error: (_ for _ in ()).throw(error), [])


def test_an_extra_is_installed_from_the_clone():
    assert extra("plan") == "pip install -e '.[plan]'"
    # The project is not on an index, so messages about extras use `extra`.
    for file in (*ROOT.glob("moss_audio_jax/**/*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md"):
        if file.name != "errors.py":
            assert not re.search(r"pip install '?moss[_-]audio", file.read_text()), file


def test_what_the_package_logs_is_said_by_verbs_alone(capsys):
    log = logging.getLogger("moss_audio_jax.train.loop")
    log.info("before")
    assert command.run(lambda argv: log.info("step 1/2") or 0, []) == 0
    log.info("after")
    assert capsys.readouterr().err == "step 1/2\n"
