"""Settings of JAX and XLA before the first computation, for the command line and benchmarks."""

import hashlib
import logging
import os
import platform
from importlib.metadata import version
from pathlib import Path

import jax

from ddpm.data.cache import cache_folder

_log = logging.getLogger(__name__)
_YNN = "--xla_cpu_experimental_ynn_fusion_type"


def configure() -> None:
    """Sets XLA's flags and the folder of compiled programs, unless the environment has its own.

    JAX_COMPILATION_CACHE_DIR= (empty) keeps no programs.
    """
    if version("jaxlib") == "0.10.2":
        # Its default for single convolutions on CPUs takes about 1.5 times as long; newer ones
        # do not have it, and a flag that a version does not know would end the process.
        flag, flags = f"{_YNN}=-individual_convolution", os.environ.get("XLA_FLAGS", "")
        if _YNN not in flags:
            os.environ["XLA_FLAGS"] = f"{flag} {flags}"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = cache_folder() / "compiled" / _processor()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if not folder.exists():
            _log.info(
                "compiled programs are kept in %s for the next start; "
                "JAX_COMPILATION_CACHE_DIR names another place, or (empty) none",
                folder,
            )


def memory() -> int | None:
    """Returns the bytes of memory of a device, or of the machine; None where neither says."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _processor() -> str:
    """Returns a name of this processor, whose programs others may not be able to run."""
    text = platform.machine() + platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        text += "".join(sorted({x for x in lines if x.startswith(("model name", "flags"))}))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
