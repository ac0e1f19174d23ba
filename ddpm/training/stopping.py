"""Requests to stop: SIGTERM and Ctrl-C end training after the step under way."""

import _thread
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import jax

_AGAIN_S = 0.1


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
            threading.Timer(_AGAIN_S, _thread.interrupt_main).start()
        else:
            before(ignored)

    hook.heeds_ctrl_c = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


class StopSignal:
    """The stop signal: within `with StopSignal() as stop:`, stop.requested(step) says whether to
    save and leave.

    A second signal is not caught: it ends the process as usual.
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def requested(self, step: int) -> bool:
        """Returns whether a signal came; several processes all get the same answer at a step."""
        if jax.process_count() > 1:
            # jax.distributed has its own handler, and agrees on a step among the processes.
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.name = "SIGTERM"
        return bool(self.name)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
