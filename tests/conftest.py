"""Compiled programs are kept between tests and between runs: compiling is most of their time."""

import os
import shutil
import signal
import threading
from importlib.metadata import version
from pathlib import Path

import filelock
import pytest
import threadpoolctl

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm-tests" / "jax"
# In the environment, before JAX is imported, so that the processes which tests start have it too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Tests run each program for a moment: optimising the machine code would take longer than it saves.
_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):  # a flag that a version does not know ends the process
    _FLAGS += " --xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false"
if version("jaxlib") == "0.10.2":  # as `ddpm.backend` sets it: so processes share the programs
    _FLAGS += " --xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
os.environ.setdefault("XLA_FLAGS", _FLAGS)

# A worker of pytest-xdist has about one core: more threads of NumPy's would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(_name, "1")
    threadpoolctl.threadpool_limits(1)  # NumPy is there already if a plugin imported it

# A shell starts what is in the background with Ctrl-C ignored, and so all that it starts: tests
# that send it would wait in vain.
in_main = threading.current_thread() is threading.main_thread()
if in_main and signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    # A run that was killed may leave half an entry: it is compiled anew then, and that is all.
    config.addinivalue_line(
        "filterwarnings", "ignore:Error (reading|writing) persistent compilation cache"
    )


def pytest_collection_modifyitems(items):
    # Those of whole commands take longest: first, so that no worker is left with one in the end.
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Those of one file are of no use to the next, and together would fill gigabytes."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(scope="session")
def _shared_run(tmp_path_factory):
    from tests import runs

    base = tmp_path_factory.getbasetemp()
    # Of pytest-xdist's workers each has a folder in the same one.
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "shared"
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            done = runs.run(runs.command(folder))
            assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def shared_run(_shared_run):
    """The run folder of `runs.command`, eight steps long, trained once: not to be changed."""
    return _shared_run


@pytest.fixture(scope="module")
def module_run(_shared_run, tmp_path_factory):
    """A copy of `shared_run` for the tests of one file, which may add to it."""
    return Path(shutil.copytree(_shared_run, tmp_path_factory.mktemp("copy") / "run"))


@pytest.fixture
def own_run(_shared_run, tmp_path):
    """A copy of `shared_run` for one test."""
    return Path(shutil.copytree(_shared_run, tmp_path / "own_run"))
