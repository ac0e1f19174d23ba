"""The log of a run: progress on the terminal, scalars as JSON lines and for TensorBoard, curves."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddpm.files.atomic import write_atomically
from ddpm.files.progress import doing, say

FEW_ROWS = 50  # that are marked one by one in a plot


class Logbook:
    """Writes `metrics.jsonl` and TensorBoard files in a run folder; shows a bar, or plain lines.

    Starting again at `step` cuts off what was written after it, so that no step stands twice.
    `then` says what follows the last step, and is not in the time left. Of several processes only
    the first writes and speaks.
    """

    def __init__(self, workdir: Path, *, step: int, steps: int, then: str = "") -> None:
        self._steps = steps
        self._mark = (step, time.perf_counter())
        self.path = workdir / "metrics.jsonl"
        self._plotted = -1  # the size of metrics.jsonl when it was
        self.speaks = jax.process_index() == 0
        self._bar = doing(
            "training",
            total=steps,
            initial=step,
            unit="step",
            leave=True,
            then=then,
            speaks=self.speaks,
        )
        if not self.speaks:
            return
        rows, odd = _read(self.path)
        if odd:
            aside = workdir / "metrics_unreadable.jsonl"
            with aside.open("ab") as file:
                file.writelines(line + b"\n" for line in odd)
            self.say(
                f"metrics.jsonl: {len(odd)} lines are no rows with a step and a loss; they are "
                f"now in {aside}"
            )
        kept = [row for row in rows if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomically(self.path, lambda path: path.write_text(text))
        self._file = self.path.open("a")
        self._board = _summary_writer()(str(workdir / "tensorboard"), purge_step=step + 1)
        self._bar.__enter__()

    def say(self, text: str) -> None:
        """Prints one line, above the bar."""
        if self.speaks:
            say(text)

    def expect(self, then: str) -> None:
        """Changes what is said to follow the last step."""
        self._bar.then = then

    def start_clock(self, step: int) -> None:
        """Starts counting speed from here: after compiling, after a pause for samples."""
        self._mark = (step, time.perf_counter())
        self._bar.resume()

    def advance(self, step: int) -> None:
        """Advances the bar to a step."""
        self._bar.update(step - self._bar.done)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a row of scalars, with the speed since the last one; prints a line where there is
        no bar."""
        if not self.speaks:
            return
        since, start = self._mark
        row = {"step": step, **values}
        if step > since:
            row["steps_per_second"] = (step - since) / (time.perf_counter() - start)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, step)
        if self._bar.bar is not None:
            then = f", then {self._bar.then}" if self._bar.then else ""
            self._bar.bar.set_postfix_str(f"loss={values['loss']:.4f}{then}", refresh=False)
        else:
            text = f"step {step}/{self._steps}  loss {values['loss']:.4f}"
            if "steps_per_second" in row:
                speed = row["steps_per_second"]
                text += f"  {speed:.3g} steps/s  {self._bar.left((self._steps - step) / speed)}"
            self.say(text)
        self._mark = (step, time.perf_counter())

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes uint8[h, w, c] for TensorBoard."""
        if not self.speaks:
            return
        self._board.add_image(name, image, step, dataformats="HWC")

    def plot(self) -> None:
        """Plots the losses so far as losses.png."""
        if self.speaks and self.path.stat().st_size != self._plotted:
            self._plotted = self.path.stat().st_size
            plot_losses(self.path, self.path.with_name("losses.png"))

    def close(self) -> None:
        """Ends the bar and the files."""
        if not self.speaks:
            return
        self._bar.__exit__(None, None, None)
        self._file.close()
        self._board.close()


def _summary_writer() -> Any:
    """Returns tensorboardX's writer, kept from importing PyTorch, which it would where that is
    installed: that takes seconds, and nothing here needs it."""
    without = "torch" not in sys.modules
    if without:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if without:
            del sys.modules["torch"]
    return SummaryWriter


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Returns the rows of a metrics.jsonl, each with a step and a loss; [] if there is none."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, float]], list[bytes]]:
    """Returns the rows, and the lines that are none but for a last one, cut off by a kill."""
    if not path.exists():
        return [], []
    rows, odd = [], []
    *lines, last = path.read_bytes().split(b"\n")
    for line in filter(bytes.strip, [*lines, last]):
        try:
            row = json.loads(line)
        except ValueError:  # of text that is not UTF-8 too
            row = None
        fits = isinstance(row, dict) and all(
            isinstance(row.get(key), kind) for key, kind in (("step", int), ("loss", int | float))
        )
        if fits:
            rows.append(row)
        elif line is not last:
            odd.append(line)
    return rows, odd


def plot_losses(metrics: Path, picture: Path) -> None:
    """Plots the loss over steps, in all and by parts of 1..T, as a PNG."""
    rows = read_metrics(metrics)
    if not rows:
        return
    # Imported here: it takes a while, and a run needs it only now and then.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.13, 0.1, 0.69, 0.86))
    steps = [row["step"] for row in rows]
    mark = ".-" if len(rows) < FEW_ROWS else "-"  # a line through one row shows nothing
    names = sorted({name for row in rows for name in row if name.startswith("loss_t")})
    for i, name in enumerate(names):
        shade = 0.15 + 0.75 * i / max(1, len(names) - 1)
        values = [row.get(name, float("nan")) for row in rows]
        color = (shade, 0.5, 1 - shade)
        axes.plot(steps, values, mark, color=color, lw=0.8, label=name[5:])
    axes.plot(steps, [row["loss"] for row in rows], mark, color="black", lw=1.5, label="all t")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(title="t", fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    axes.grid(alpha=0.3)
    write_atomically(picture, lambda path: figure.savefig(path, dpi=110, format="png"))
