"""Requests to stop: Ctrl-C, SIGTERM and SIGHUP, answered at once, end training after its step."""

import _thread
import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

import jax

from ddpm.files.progress import say

NUMBERS = tuple(
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
ANSWER = "stopping after this step; again to quit now"
STOPPED = 130  # exit code where there was nothing to save, and of a second signal
_SAME_S = 0.05  # signals so close are one: `timeout`, say, signals a process and its group
_AGAIN_S = 0.1
_GRACE_S = 2.0  # after a second signal, to remove half-written files
_END = b"\0"  # no signal's number

_own: list[int] = []  # signals that are no one's request, but one of before again

Hold = Callable[[], contextlib.AbstractContextManager[None]]


def heed_ctrl_c() -> None:
    """Raises KeyboardInterrupt again where it came in code whose exceptions Python ignores.

    That code is finalizers and the collector's callbacks, of which JAX has one at every
    collection: Ctrl-C at such a moment would be printed, and lost.
    """
    before = sys.unraisablehook
    if getattr(before, "heeds_ctrl_c", False):
        return

    def hook(ignored: Any) -> None:
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            # Later: raised here, it would be ignored as well.
            threading.Timer(_AGAIN_S, _raise_again).start()
        else:
            before(ignored)

    hook.heeds_ctrl_c = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


def _raise_again() -> None:
    _own.append(signal.SIGINT)
    if hasattr(signal, "pthread_kill"):  # also wakes the main thread where it waits
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


@contextlib.contextmanager
def answered() -> Iterator[Hold]:
    """Answers the first signal within in one line, at once, and quits soon after a second one.

    A thread does both, for Python calls handlers only when a call that compiles or samples
    returns. Then, unless a `StopSignal` takes it, KeyboardInterrupt is raised; within what is
    yielded, at the end of that. Only the main thread can do this; in others nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield contextlib.nullcontext
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    hook, fd = sys.unraisablehook, signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    heed_ctrl_c()
    interrupts = _Interrupts()
    before = _install(interrupts)
    watcher = threading.Thread(target=_watch, args=(read,), daemon=True)
    watcher.start()
    try:
        yield interrupts.hold
    finally:
        _restore(before)
        signal.set_wakeup_fd(fd)
        sys.unraisablehook = hook
        os.write(write, _END)
        watcher.join()
        os.close(read)
        os.close(write)


def _watch(read: int) -> None:
    """Answers the signals whose numbers come through the pipe, until its end is said."""
    first = 0.0
    while (number := os.read(read, 1)) != _END:
        if number[0] not in NUMBERS:
            continue
        if number[0] in _own:
            _own.remove(number[0])
            continue
        if not first:
            first = time.monotonic()
            say(ANSWER)
        elif time.monotonic() - first > _SAME_S:
            if select.select([read], [], [], _GRACE_S)[0] and os.read(read, 1) == _END:
                return
            os.write(2, b"error: stopped\n")
            os._exit(STOPPED)


class _Interrupts:
    """A handler that raises KeyboardInterrupt, once for signals that are one."""

    def __init__(self) -> None:
        self._last = float("-inf")
        self._held: bool | None = None  # whether one came while it was held, if it is

    def __call__(self, number: int, frame: FrameType | None) -> None:
        before, self._last = self._last, time.monotonic()
        if self._held is not None:
            self._held = True
        elif self._last - before > _SAME_S:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Puts it off to the end of `with`."""
        self._held = False
        try:
            yield
        finally:
            came, self._held = self._held, None
        if came:
            raise KeyboardInterrupt


@contextlib.contextmanager
def handed_on(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Hands on to a process, which answers them, all signals to stop that come within."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    fd = signal.set_wakeup_fd(-1)
    before = _install(lambda number, frame: process.send_signal(number))
    try:
        yield
    finally:
        _restore(before)
        signal.set_wakeup_fd(fd)


class StopSignal:
    """The stop signal: within `with StopSignal() as stop:`, stop.requested(number) says whether to
    save and leave.

    A second signal is not caught: it ends the process as it would outside.
    """

    def __init__(self) -> None:
        self.name = ""
        self._came = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            return self
        if jax.process_count() == 1:
            self._before = _install(self._caught)
        elif hasattr(signal, "SIGHUP"):  # SIGTERM has a handler of jax.distributed's
            self._before = _install(lambda *_: signal.raise_signal(signal.SIGTERM), signal.SIGHUP)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _restore(self._before)

    def requested(self, number: int) -> bool:
        """Returns whether a signal came; several processes all get the same answer at the same of
        numbers that follow one another."""
        if jax.process_count() > 1:
            # jax.distributed has its own handler, and agrees on a number among the processes.
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(number):
                self.name = "SIGTERM"
        return bool(self.name)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if not self.name:
            self.name, self._came = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._came > _SAME_S:
            before = self._before[signal.Signals(number)]
            _restore(self._before)
            if callable(before):  # not raised anew, which would be counted as one more
                before(number, frame)
            else:
                signal.raise_signal(number)


def _install(handler: Callable[..., None], *numbers: signal.Signals) -> dict[signal.Signals, Any]:
    """Installs the handler for the numbers, all if none, that are not ignored, as nohup ignores
    SIGHUP; returns the handlers of before."""
    before = {number: signal.getsignal(number) for number in numbers or NUMBERS}
    before = {n: b for n, b in before.items() if b not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    return before


def _restore(before: dict[signal.Signals, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
    before.clear()
