"""What JAX and XLA are told before the first computation, by the command line and benchmarks."""

import hashlib
import logging
import os
import platform
from importlib.metadata import version
from pathlib import Path

import jax

from ddpm.data.cache import cache_folder

_log = logging.getLogger(__name__)


def configure() -> None:
    """Sets XLA's flags and the folder of compiled programs, unless the environment has its own.

    JAX_COMPILATION_CACHE_DIR= (empty) keeps no programs.
    """
    if version("jaxlib") == "0.10.2":
        # Its default for single convolutions on CPUs takes about 1.5 times as long; newer ones
        # do not have it, and a flag that a version does not know would end the process.
        flag = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
        os.environ["XLA_FLAGS"] = f"{flag} {os.environ.get('XLA_FLAGS', '')}"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = cache_folder() / "compiled" / _processor()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if not folder.exists():
            _log.info(
                "compiled programs are kept in %s for the next start; "
                "JAX_COMPILATION_CACHE_DIR names another place, or (empty) none",
                folder,
            )


def _processor() -> str:
    """Programs for one processor may not run on another that shares the home folder."""
    text = platform.machine() + platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        text += "".join(sorted({x for x in lines if x.startswith(("model name", "flags"))}))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
