"""The work under way is shown on a terminal and, as lines after silences, elsewhere."""

import fcntl
import io
import pty
import struct
import sys
import termios
import time

import pytest

from ddpm.files import progress
from ddpm.files.progress import doing, say


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(progress, "SILENCE_S", 0.02)
    monkeypatch.setattr(progress, "_TICK_S", 0.01)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def stderr(monkeypatch, stream):
    """Standard error from here on, for pytest has its own by now."""
    monkeypatch.setattr(sys, "stderr", stream)
    return stream.getvalue


def test_silence_is_broken_by_the_innermost(monkeypatch):
    printed = stderr(monkeypatch, io.StringIO())
    with doing("training", total=8, unit="step"), doing("compiling the sampler"):
        wait_until(lambda: printed().count("compiling the sampler: 0:00:00 so far\n") > 1)
    assert "training" not in printed()
    before = printed()
    time.sleep(0.1)
    assert printed() == before  # nothing is being done


def test_how_much_is_done_and_what_follows(monkeypatch):
    printed = stderr(monkeypatch, io.StringIO())
    with doing("sampling", total=64, initial=8, then="a grid") as bar:
        wait_until(lambda: "sampling: 8/64 images, 0:00:00 so far\n" in printed())
        bar.update(8)
        bar._began -= 60
        wait_until(
            lambda: "sampling: 16/64 images, 0:01:00 so far, 0:06:00 left, then a grid" in printed()
        )


def test_other_processes_are_silent(monkeypatch):
    printed = stderr(monkeypatch, io.StringIO())
    with doing("sampling", total=64, speaks=False) as bar:
        bar.update(8)
        time.sleep(0.1)
    assert not printed()


@pytest.mark.parametrize("total", [0, 64])
def test_a_terminal_has_a_bar_whose_clock_runs(monkeypatch, total):
    printed = stderr(monkeypatch, Terminal())
    with doing("sampling", total=total) as bar:
        wait_until(lambda: ("0/64" if total else "sampling: 00:00") in printed())
        bar.bar.start_t -= 5
        wait_until(lambda: "00:05" in printed())
        say("one line")
    assert "\rone line\n" in printed().replace("\x1b[A", "")


def test_a_terminal_without_a_size_has_lines(monkeypatch):
    ours, theirs = pty.openpty()  # 0 x 0, where tqdm shows nothing
    with open(ours, "rb"), open(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        for size in (0, 80):
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", size, size, 0, 0))
            with doing("sampling", total=64) as bar:
                assert (bar.bar is not None) == (size > 0)
