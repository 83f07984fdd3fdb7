"""Eight CPU devices for every test, and where the shared golden data lies, if it does."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import pytest

SHARED = Path(__file__).parents[2] / "shared"
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared golden data beside the checkout; a user's clone has none."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("no shared golden data beside this checkout (tests/golden covers the same)")
    return SHARED
