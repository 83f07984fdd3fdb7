"""The metadata lies in setup.cfg; this puts configs/ into wheels, as moss_audio_jax/configs."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # a clone has them beside the package
            target = Path(self.build_lib, "moss_audio_jax", "configs")
            for file in Path("configs").rglob("*.py"):
                copy = target / file.relative_to("configs")
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)


setup(cmdclass={"build_py": BuildPy})
