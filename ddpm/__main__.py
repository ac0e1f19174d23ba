"""The command, where the library is installed: python -m ddpm --config=digits"""

import os
import sys

if __name__ == "__main__":
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        # Memory in large pages: a sixth off a training step on a CPU (docs/performance.md). The C
        # library reads this only as a process starts, so it starts again.
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

    folder = os.path.dirname(os.path.realpath(__file__))
    if sys.path[0] == folder:  # started by its path: what is here must not hide other packages
        sys.path[0] = os.path.dirname(folder)

    from ddpm.cli import run

    sys.exit(run(sys.argv))
