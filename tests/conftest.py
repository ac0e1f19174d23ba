"""Compiled programs are kept between tests and between runs: compiling is most of their time."""

import os
import signal
import threading
from pathlib import Path

import pytest

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm-tests" / "jax"
# In the environment, before JAX is imported, so that the processes which tests start have it too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Tests run each program for a moment: optimising the machine code would take longer than it saves.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

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


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Those of one file are of no use to the next, and together would fill gigabytes."""
    yield
    import jax

    jax.clear_caches()
