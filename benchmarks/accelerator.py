"""Takes all figures of this library on a GPU or TPU, with one command that can be cut off.

    python benchmarks/accelerator.py

Each figure is kept at once in --out, a JSON file, and the tables in the Markdown file next to it.
The same command again goes on with what is missing. --rehearse runs every section on whatever is
there, with tiny networks, in two minutes.
"""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import checkout  # noqa: F401
import real_runs
import sections
from figures import Results, markdown
from sections import BATCHES, COMPILED, PRECISIONS, Rows, Setup

from ddpm.errors import InputError, first_line
from ddpm.files.atomic import check_writable, write_atomically

SECTIONS = ("machine", "peak", "networks", "loop", "gradient", "profile", "remat", "training",
            "compiled")  # fmt: skip
FIRST = ("cifar10", "bfloat16")  # of the networks, what is measured before all else
PROFILED = ("cifar10", "celebahq256")
REHEARSED = ("cifar10", "dit")


class Part(NamedTuple):
    """Figures measured in one go: `measure` takes the results of the parts before it."""

    name: str
    measure: Callable[[dict[str, Any]], Rows]

    @property
    def section(self) -> str:
        """Returns the section that a part is of."""
        return self.name.partition("/")[0]


def parts(args: argparse.Namespace, setup: Callable[[dict[str, Any]], Setup]) -> list[Part]:
    """Returns all parts, those first that say most; `setup` takes the results so far."""
    batches = dict(BATCHES)
    if args.rehearse:  # each kind of network, and each precision, once
        batches = {name: (4,) for name in REHEARSED}
    cells = [
        (name, precision, batch)
        for number in range(max(map(len, batches.values())))
        for precision in PRECISIONS
        for name, sizes in batches.items()
        for batch in sizes[number : number + 1]
        if not args.rehearse or FIRST[0] == name or FIRST[1] == precision
    ]
    networks = [
        Part(f"networks/{name} {precision} batch {batch}", partial(_network, setup, cell))
        for cell in cells
        for name, precision, batch in [cell]
    ]
    first = [part for part in networks if f" {FIRST[1]} " in part.name][: len(batches)]
    work = args.out.with_name(f"{args.out.stem}_profiles")
    compiled = ("cifar10",) if args.rehearse else ("cifar10", "fashion_mnist_gpu", "celebahq256")
    training = real_runs.default_workdir(args.out)
    extra = real_runs.parsed(args.training_override) if args.training_override else {}
    return [
        Part("machine", lambda _: sections.machine()),
        Part("peak", lambda so_far: sections.peak(setup(so_far))),
        *first,
        Part("loop/bare", lambda so_far: real_runs.bare_step(setup(so_far))),
        *(Part(f"loop/{o}".rstrip("/"), partial(_loop, setup, o)) for o in args.loop_override),
        *(Part(f"gradient/{name}", partial(_gradient, setup, name)) for name in batches),
        *(
            Part(f"profile/{name}", partial(_profile, setup, name, batches[name][0], work / name))
            for name in PROFILED[: 1 if args.rehearse else None]
        ),
        Part("remat", lambda so_far: sections.remat(setup(so_far))),
        Part(
            "training",
            lambda so_far: real_runs.training(setup(so_far), args.minutes, training, extra),
        ),
        *(part for part in networks if part not in first),
        *(
            Part(f"compiled/{name}", partial(_compiled, setup, name, batches[name][0]))
            for name in compiled
        ),
    ]


def _network(setup: Any, cell: tuple[str, str, int], so_far: dict[str, Any]) -> Rows:
    return sections.network(*cell, setup(so_far), so_far.get("peak", {}))


def _compiled(setup: Any, name: str, batch: int, so_far: dict[str, Any]) -> Rows:
    how = setup(so_far)
    if how.torch:
        return {"left out": how.torch}
    # Compiling takes minutes for each of them.
    what = ("forward",) if how.tiny else ("train", "forward")
    peaks = so_far.get("peak", {})
    return sections.network(name, FIRST[1], batch, how, peaks, theirs=COMPILED, what=what)


def _loop(setup: Any, override: str, so_far: dict[str, Any]) -> Rows:
    if "loop/bare" not in so_far or "failed" in so_far["loop/bare"]:
        raise RuntimeError("the step alone was not measured")
    extra = real_runs.parsed(override) if override else {}
    return real_runs.real_loop(setup(so_far), so_far["loop/bare"], extra)


def _gradient(setup: Any, name: str, so_far: dict[str, Any]) -> Rows:
    return sections.gradient(name, setup(so_far))


def _profile(setup: Any, name: str, batch: int, keep: Path, so_far: dict[str, Any]) -> Rows:
    return sections.profile(name, batch, setup(so_far), keep)


def measure(
    todo: list[Part], results: Results, budget: float, clock: Callable[[], float] = time.monotonic
) -> list[str]:
    """Measures the parts that the results do not have, until `budget` seconds are over; returns
    the names of those that are left.

    A part that fails is kept as failed, with the reason, and the others go on.
    """
    start, left = clock(), []
    for part in todo:
        if results.done(part.name):
            continue
        spent = clock() - start
        if spent > budget:
            left.append(part.name)
            continue
        say(f"{part.name} .. ({spent:.0f} s of {budget:.0f})")
        try:
            results.add(part.name, part.measure(results.parts))
        except Exception as error:  # of any kind: what else there is to measure is worth more
            results.add(part.name, {"failed": f"{type(error).__name__}: {first_line(error)}"})
            say(f"{part.name} failed: {first_line(error)}")
        write_tables(results)
    return left


def write_tables(results: Results) -> None:
    """Writes the tables so far, next to the JSON."""
    text = markdown(results) + "\n"
    write_atomically(results.path.with_suffix(".md"), lambda path: path.write_text(text))


def say(text: str) -> None:
    """Prints a line about the work on standard error."""
    print(text, file=sys.stderr, flush=True)


def arguments(argv: list[str]) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path("runs/accelerator.json"))
    parser.add_argument(
        "--budget", type=float, default=10.0, help="minutes after which no part is begun"
    )
    parser.add_argument(
        "--minutes", type=float, default=2.0, help="of the training, within the budget or not"
    )
    parser.add_argument(
        "--loop-override",
        action="append",
        default=[""],
        metavar="'KEY=VALUE ..'",
        help="times main.py's loop with these keys of the config too; can be given again",
    )
    parser.add_argument(
        "--training-override",
        default="",
        metavar="'KEY=VALUE ..'",
        help="keys of the config of the training: 'data.name=npz data.path=FILE'",
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny networks, to try it out")
    args = parser.parse_args(argv)
    for text in filter(None, (*args.loop_override, args.training_override)):
        try:
            real_runs.parsed(text)
        except ValueError as error:
            parser.error(str(error))
    return args


def chosen(args: argparse.Namespace) -> Iterator[Part]:
    """Yields the parts of the chosen sections, and of those that they need."""

    def setup(so_far: dict[str, Any]) -> Setup:
        left_out = so_far["machine"].get("PyTorch", "")
        if args.rehearse:
            return Setup(rounds=2, seconds=0.01, tiny=True, torch=left_out)
        return Setup(torch=left_out)

    wanted = {"machine", *args.sections}  # which says whether PyTorch is there
    return (part for part in parts(args, setup) if part.section in wanted)


def run(argv: list[str]) -> int:
    """Runs the command line; returns its exit code: 1 if a part failed, 2 for wrong input."""
    args = arguments(argv)
    try:
        check_writable(args.out.resolve().parent)
        about = {"rehearsal": args.rehearse, "device": sections.nvidia("name")}
        results = Results(args.out, about)
    except (InputError, OSError) as error:
        say(f"error: {first_line(error)}")
        return 2
    todo = list(chosen(args))
    left = measure(todo, results, 60 * args.budget)
    print(markdown(results))
    if left:
        say(f"not measured, for want of time: {', '.join(left)}; the same command goes on")
    failed = [name for name, rows in results.parts.items() if "failed" in rows]
    if failed:
        say(f"failed: {', '.join(failed)}; the same command tries again")
    say(f"{args.out} has every figure, {args.out.with_suffix('.md')} the tables")
    return 1 if failed else 0


if __name__ == "__main__":
    # What it started is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(run(sys.argv[1:]))
