"""libtpu, which the extra `plan` installs, on machines without a TPU.

If it is installed, JAX looks for a TPU whenever it starts. Without a TPU this prints errors, and
takes a lock that keeps other processes from using libtpu.
"""

from __future__ import annotations

import glob
import importlib.util
import os

# For libtpu: ask no metadata server, be one host, load beside other processes. The type only avoids
# a warning; the topology of `plan` determines the chips that it compiles for.
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
    """Makes libtpu quiet and shared; call it before JAX's first use.

    Variables that are already set stay. On a machine with TPUs, call it only for processes that do
    not use them (JAX_PLATFORMS=cpu).
    """
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)


def quieten() -> None:
    """Calls `set_environment` if libtpu is installed and the machine has no TPU."""
    if installed() and not any(map(glob.glob, _DEVICES)):
        set_environment()
