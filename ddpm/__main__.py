"""The command, where the library is installed: python -m ddpm --config=digits"""

import os
import signal
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

    def end_at_once(code: int) -> None:
        """Signals end the process with this code: in code that an exception would crash."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, lambda *_: end(code))

    def end(code: int) -> None:
        if code == 130:
            os.write(2, b"error: stopped\n")
        os._exit(code)

    end_at_once(130)  # while JAX is imported

    from ddpm.cli import run

    code = run(sys.argv)
    sys.stdout.flush()
    if code:  # what was stopped anywhere may crash, or print tracebacks, as the interpreter ends
        os._exit(code)
    end_at_once(code)  # while the interpreter ends
    sys.exit(code)
