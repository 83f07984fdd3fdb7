"""Eight CPU devices and one cache of programs for all tests; the folder of shared golden data."""

import atexit
import gc
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

# Tests compile much and compute little, so these make compiling several times faster and what it
# makes slower. XLA optimises the same HLO as ever and rounds as usual: only the code of each loop
# is plain. Tests of numbers so keep their meaning and their bounds. A test of a program's memory
# turns the fusion emitters on where they matter.
_FAST_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", _FAST_COMPILE]
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a hub but tests/test_hub.py, its own one
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # One for all workers and for the commands that tests start: they inherit it.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs = tempfile.mkdtemp(prefix="programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("patient", deadline=None)  # no test fails on a busy machine
settings.load_profile("patient")

# Files of whole runs, the longest first: a worker that began one of them last would work alone.
LONG = (
    "train/test_slices",
    "train/test_processes",
    "train/test_local_checkpoints",
    "post_train/test_run",
    "train/test_bucket_runs",
    "test_buckets",
    "train/test_step",
    "train/test_loop",
    "generate/test_drafts",
    "post_train/test_agreement",
    "train/test_resume",
    "models/test_golden",
    "generate/test_engine",
    "serve/test_mesh_processes",
    "evaluate/test_infer",
    "models/test_meshes",
    "weights/test_convert",
    "generate/test_prefix",
    "train/test_shared_clips",
    "annotate/test_ears",
    "train/test_damaged_runs",
    "ops/test_ops",
    "models/test_quantize",
)


def pytest_configure(config):
    """xdist would begin with the files of most tests, and the whole runs are few to a file."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """All modules of tests and what they import stay to the end, so the garbage collector, which
    tracing calls often, looks through them neither now nor later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items):
    order = {str(Path(__file__).parent / f"{name}.py"): i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(str(item.path), len(order)))


SHARED = Path(__file__).parents[2] / "shared"
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module", autouse=True)
def programs():
    """A module's programs are dropped behind it: each maps memory, of which a process may map only
    so many pieces (vm.max_map_count), and past that XLA aborts."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared golden data beside the checkout; a user's clone has none of it."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("no shared golden data beside this checkout (tests/golden covers the same)")
    return SHARED


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a disk here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def buckets():
    """Servers of buckets on loopback, each behind a proxy: {"gs": Proxy, "s3": Proxy}.

    The proxies break no answer until a test sets their share.
    """
    import loopback

    with pytest.MonkeyPatch.context() as patch, loopback.proxies() as found:
        for name, value in loopback.environment({k: p.url for k, p in found.items()}).items():
            patch.setenv(name, value)
        yield found


@pytest.fixture(params=["gs", "s3"])
def proxy(request, buckets):
    """One of the two; a test sets the share of answers that it breaks."""
    found = buckets[request.param]
    found.scheme = request.param
    yield found
    found.share = 0.0


@pytest.fixture
def root(proxy, request) -> str:
    """A folder of one test in that bucket."""
    import loopback

    return f"{proxy.scheme}://{loopback.BUCKET}/{abs(hash(request.node.name))}"
