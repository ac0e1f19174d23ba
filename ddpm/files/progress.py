"""Progress on standard error: lines, and what is being done, so that no command is silent for long.

with doing("sampling", total=64) as bar:
    bar.update(8)
"""

import os
import sys
import threading
import time
from types import TracebackType

from tqdm import tqdm

from ddpm.errors import printable

SILENCE_S = 8.0  # at most, where there is no terminal
_TICK_S = 1.0

_now: list["doing"] = []  # what is being done, the innermost last
# When something was last printed; at first, about when the process began, for imports take a while.
_spoke = time.monotonic() - min(time.process_time(), SILENCE_S)
_lock = threading.Lock()


def say(text: str) -> None:
    """Prints one line on standard error, above the bars."""
    global _spoke
    tqdm.write(printable(text), file=sys.stderr)
    sys.stderr.flush()
    _spoke = time.monotonic()


def on_terminal() -> bool:
    """Returns whether a bar can be seen. tqdm shows none on a terminal without a size, as `ssh -tt`
    from a script gives one."""
    if not sys.stderr.isatty():
        return False
    try:
        return min(os.get_terminal_size(sys.stderr.fileno())) > 0
    except OSError:  # a stream in its place, without a descriptor
        return True


def clock(seconds: float) -> str:
    """Returns a time as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class doing:
    """The work within `with`, shown: on a terminal a bar whose clock runs, elsewhere a line
    whenever nothing was printed for SILENCE_S seconds.

    With `total`, how much of it there is, in `unit`s: `update` says how many are done. Of several
    at a time the innermost speaks. `then` follows, and is not in the time left. With `leave` the
    bar stays; without `speaks` nothing is shown, as in all processes but the first.
    """

    def __init__(
        self,
        what: str,
        *,
        total: int = 0,
        initial: int = 0,
        unit: str = "image",
        leave: bool = False,
        then: str = "",
        speaks: bool = True,
    ) -> None:
        self.what, self.total, self.unit, self.then = what, total, unit, then
        self.done = self._initial = initial
        self._leave, self._speaks = leave, speaks
        self._over = threading.Event()
        self.bar: tqdm | None = None

    def __enter__(self) -> "doing":
        self._began = time.monotonic()
        if not self._speaks:
            return self
        with _lock:
            for outer in _now:
                outer._hide()
            _now.append(self)
            if self.total:
                self._show()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._ticker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._speaks:
            return
        self._over.set()
        self._ticker.join()
        with _lock:
            _now.remove(self)
            if self.bar is not None:
                self.bar.close()

    def update(self, n: int) -> None:
        """Counts n more as done."""
        self.done += n
        if self.bar is not None:
            self.bar.update(n)

    def resume(self) -> None:
        """Counts the time from here: after compiling, after a pause."""
        self._began, self._initial = time.monotonic(), self.done
        if self.bar is not None:
            self.bar.unpause()

    def _show(self) -> None:
        """Shows the bar, or a clock alone, if there is a terminal."""
        if on_terminal():
            self.bar = tqdm(
                total=self.total or None,
                initial=self.done,
                desc=self.what,
                unit=self.unit,
                leave=self._leave,
                dynamic_ncols=True,
                smoothing=0.05,
                bar_format=None if self.total else "{desc}: {elapsed}",
                file=sys.stderr,
            )
            self.bar.start_t -= time.monotonic() - self._began

    def _hide(self) -> None:
        """Hides a clock alone, which would stand still."""
        if not self.total and self.bar is not None:
            self.bar.close()
            self.bar = None

    def _tick(self) -> None:
        while not self._over.wait(_TICK_S):
            with _lock:
                if _now[-1] is not self:
                    continue
                if self.bar is not None:
                    self.bar.refresh()
                elif on_terminal():
                    self._show()
                elif time.monotonic() - _spoke >= SILENCE_S:
                    say(self._line())

    def _line(self) -> str:
        since = time.monotonic() - self._began
        if not self.total:
            return f"{self.what}: {clock(since)} so far"
        text = f"{self.what}: {self.done}/{self.total} {self.unit}s, {clock(since)} so far"
        done = self.done - self._initial
        return f"{text}, {self.left((self.total - self.done) * since / done)}" if done else text

    def left(self, seconds: float) -> str:
        """Returns the time left, and what follows."""
        return f"{clock(seconds)} left" + (f", then {self.then}" if self.then else "")
