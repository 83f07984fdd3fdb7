"""The contents of a wheel, which works without a clone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN = """
import moss_audio_jax
from moss_audio_jax import config_file
from moss_audio_jax.config_file import read_config_file
from moss_audio_jax.errors import extra
print(moss_audio_jax.__file__, config_file.FOLDER, extra("plan"), sep="\\n")
print(read_config_file("configs/lora.py:8b,encoder").lora.rank, *config_file.names())
"""


def test_a_wheel_holds_all_that_the_verbs_need(tmp_path):
    """Tests the files that setuptools lays out, instead of a whole build, without the clone."""
    pytest.importorskip("setuptools")
    built, empty = tmp_path / "built", tmp_path / "empty"
    empty.mkdir()
    words = ["setup.py", "-q", "build_py", "--build-lib", str(built)]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
    package = built / "moss_audio_jax"

    sources = (ROOT / "moss_audio_jax").rglob("*")
    wanted = {file.relative_to(ROOT) for file in sources if file.is_file()}
    wanted |= {"moss_audio_jax" / file.relative_to(ROOT) for file in (ROOT / "configs").rglob("*")}
    wanted = {file for file in wanted if "__pycache__" not in file.parts and file.suffix}
    found = {file.relative_to(built) for file in built.rglob("*") if file.is_file()}
    assert found == wanted

    env = os.environ | {"PYTHONPATH": str(built)}
    ran = subprocess.run(
        [sys.executable, "-c", RUN], cwd=empty, env=env, capture_output=True, text=True, check=True
    )
    where, folder, command, rank_and_names = ran.stdout.splitlines()
    assert Path(where) == package / "__init__.py"
    assert Path(folder) == package / "configs"
    assert command == "pip install 'moss_audio_jax[plan]'"  # there is no clone to install from
    rank, *names = rank_and_names.split()
    assert rank == "64"
    assert {"sft", "lora", "tiny", "annotate", "small/sft"} <= set(names)
