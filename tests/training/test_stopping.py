"""Ctrl-C in code whose exceptions Python ignores, in a process of its own."""

import subprocess
import sys

import pytest

IN_COLLECTION = """
def callback(phase, info):
    gc.callbacks.remove(callback)
    signal.raise_signal(signal.SIGINT)
    pass

gc.callbacks.append(callback)
gc.collect()
"""
IN_FINALIZER = """
class Gone:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        pass

Gone()
"""
LATER = """
import gc, signal, time
from ddpm.training.stopping import heed_ctrl_c
heed_ctrl_c()
try:
    {lost}
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.01)
    print("lost")
except KeyboardInterrupt:
    print("heeded")
"""


@pytest.mark.parametrize("where", [IN_COLLECTION, IN_FINALIZER], ids=["collection", "finalizer"])
def test_ctrl_c_is_not_lost(where):
    code = LATER.format(lost=where.strip().replace("\n", "\n    "))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == ("heeded\n", "")


def test_what_else_is_ignored_is_still_reported():
    code = LATER.split("try:")[0] + IN_FINALIZER.replace(
        "signal.raise_signal(signal.SIGINT)", "1/0"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert "ZeroDivisionError" in done.stderr
