import os
from pathlib import Path

import jax


def pytest_configure(config):
    """Compiled programs are kept between runs: most of these tests' time is compilation."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(cache / "ddpm-tests" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    # A run that was killed may leave half an entry: it is compiled anew then, and that is all.
    config.addinivalue_line(
        "filterwarnings", "ignore:Error (reading|writing) persistent compilation cache"
    )
