"""Signals to stop: answered at once, not lost where Python ignores exceptions, one line each."""

import gc
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ddpm.training.stopping import ANSWER, NUMBERS, STOPPED, StopSignal, answered
from tests.runs import ROOT


def in_collection(fails):
    def callback(phase, info):
        gc.callbacks.remove(callback)
        fails()

    gc.callbacks.append(callback)
    gc.collect()


def in_finalizer(fails):
    class Gone:
        def __del__(self):
            fails()

    Gone()


def ctrl_c():
    signal.raise_signal(signal.SIGINT)
    time.sleep(0)  # where the handler is called


def lose(where):
    where(ctrl_c)
    threading.Event().wait(60)


@pytest.mark.parametrize("where", [in_collection, in_finalizer])
def test_ctrl_c_is_not_lost_where_python_ignores_exceptions(where):
    with answered(), pytest.raises(KeyboardInterrupt):
        lose(where)


def test_what_else_is_ignored_is_still_reported(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda ignored: seen.append(ignored.exc_type))
    with answered():
        in_finalizer(lambda: 1 / 0)
    assert seen == [ZeroDivisionError]


# --- Answered at once, though Python calls its handlers only when a long call returns


def long_call(rounds):
    """A call that, as one that compiles or samples, lets threads run but no handler."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)


def send(number, *moments):
    for seconds in moments:
        threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_answered_during_a_long_call(number, capsys):
    before = [signal.getsignal(n) for n in NUMBERS]
    with answered(), StopSignal() as stop:
        send(number, 0.01, 0.01)  # which are one
        while not (said := capsys.readouterr().err):
            long_call(300_000)
        assert said == f"{ANSWER}\n"
        assert stop.requested(1)
        assert stop.name == number.name
    assert [signal.getsignal(n) for n in NUMBERS] == before


def test_without_something_to_save_it_ends_the_command(capsys):
    done = []

    def imports():
        with hold():
            signal.raise_signal(signal.SIGHUP)
            done.append("imported")

    with answered() as hold:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        time.sleep(0.1)
        with pytest.raises(KeyboardInterrupt):
            imports()
    assert done == ["imported"]


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # by nohup
    try:
        with answered(), StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested(1)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_quits_during_a_long_call():
    code = (
        "import signal, tests.training.test_stopping as here\n"
        "from ddpm.training.stopping import StopSignal, answered\n"
        "with answered(), StopSignal():\n"
        "    here.send(signal.SIGTERM, 0.1, 0.4)\n"
        "    here.long_call(2_000_000_000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == STOPPED
    assert done.stderr.splitlines() == [ANSWER, "error: stopped"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_while_jax_is_imported_is_one_line(number):
    program = [sys.executable, "-X", "importtime", str(ROOT / "main.py"), "--config=none.py"]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:  # of each module that has been imported
        if "numpy" in line:
            break
    process.send_signal(number)
    said = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.wait(timeout=60) == STOPPED
    assert said == ["error: stopped\n"]
