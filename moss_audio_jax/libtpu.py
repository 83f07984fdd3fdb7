"""libtpu, which comes with the extra `plan`, on machines that have no TPU.

Where it is installed JAX looks for a TPU whenever it starts. Without one that prints errors, and
takes a lock that keeps other processes from libtpu.
"""

from __future__ import annotations

import glob
import importlib.util
import os

# For libtpu: ask no metadata server, be one host, load beside other processes. The type only saves
# a warning: which chips `plan` compiles for, its topology says.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")  # of TPUs up to v4, since v5e


def installed() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def set_environment() -> None:
    """Before JAX's first use: libtpu is quiet and shared. What the environment says already stays.

    On a machine with TPUs only for those who leave them alone (JAX_PLATFORMS=cpu).
    """
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)


def quieten() -> None:
    """`set_environment` where libtpu is installed and the machine has no TPU."""
    if installed() and not any(map(glob.glob, _DEVICES)):
        set_environment()
