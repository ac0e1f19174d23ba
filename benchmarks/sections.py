"""The sections of accelerator.py that workers measure: each returns rows of figures.

A row is {column: figure}, with words where there is none, such as 'out of memory'.
"""

import contextlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from compare import OutOfMemory, Side, in_turns
from figures import figure
from kernels import kernels, most_expensive
from networks import NETWORKS, WHAT

Rows = dict[str, Any]
# (dtype, options) of a Side. JAX's own default on GPUs is TF32; 'float32' is without.
PRECISIONS = {
    "bfloat16": ("bfloat16", {}),
    "tf32": ("float32", {"precision": "tf32"}),
    "float32": ("float32", {"precision": "float32"}),
}
# The first is that of the config.
BATCHES = {
    "cifar10": (128, 64, 256),
    "celebahq256": (64, 16, 32),
    "fashion_mnist_gpu": (128, 64, 256),
    "dit": (128, 64, 256),
}
TITLES = {"train": "train step", "forward": "forward", "step": "ancestral step", "sample": "DDIM"}
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "flax", "optax",
            "numpy", "torch", "triton", "diffusers")  # fmt: skip
OURS, THEIRS, COMPILED = "ours", "diffusers-channels_last", "diffusers-compile-channels_last"
OUT = "out of memory"
LONGEST = 2.0  # seconds of a batch of samples that is drawn several times


class Setup(NamedTuple):
    """The length of a measurement: rounds of about so many seconds; `tiny` networks to rehearse.

    `torch` is empty, or says why PyTorch's side is left out.
    """

    rounds: int = 7
    seconds: float = 0.3
    tiny: bool = False
    torch: str = ""


def environment(tiny: bool) -> dict[str, str]:
    """Returns what workers are given, unless the environment has its own: no more memory than they
    use, as two share a device; no programs from the cache, as compiling is timed."""
    given = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if tiny:  # whose programs run for a moment: optimising them takes longer than it saves
        quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        given |= {"OMP_NUM_THREADS": "1", "XLA_FLAGS": quick}
    else:
        given["JAX_COMPILATION_CACHE_DIR"] = ""
    return given | os.environ


@contextlib.contextmanager
def sides(
    names: tuple[str, ...], network: str, precision: str, setup: Setup, **options: Any
) -> Iterator[list[Side]]:
    """Starts a worker for each name, and ends it."""
    dtype, more = PRECISIONS[precision]
    if setup.tiny:
        options |= {"tiny": True}
    found: list[Side] = []
    try:
        for name in names:
            found.append(Side(name, network, dtype, environment(setup.tiny), **more, **options))
        yield found
    except (KeyboardInterrupt, SystemExit):  # no time to wait for an answer
        for side in found:
            side.process.kill()
        raise
    finally:
        for side in found:
            side.end()


def nvidia(what: str) -> str:
    """Returns what nvidia-smi says of the GPUs, or that there are none."""
    if not shutil.which("nvidia-smi"):
        return "none"
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return "; ".join(done.stdout.strip().splitlines()) or "none"


def machine() -> dict[str, str]:
    """Returns devices, driver and versions, and under 'PyTorch' why it is left out, if it is."""
    found = {"system": f"{platform.platform()}, {os.cpu_count()} cores"}
    found["Python"] = platform.python_version()
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    found["nvidia-smi"] = nvidia("name,driver_version,memory.total,power.limit,clocks.max.sm")
    with sides((OURS,), "digits", "float32", Setup()) as (ours,):
        ours_on = ours.ask("devices")
    found |= {f"JAX: {key}": value for key, value in ours_on.items()}
    if "torch" not in found or "diffusers" not in found:
        return found | {"PyTorch": "left out: torch or diffusers is not installed"}
    try:
        with sides((THEIRS,), "digits", "float32", Setup()) as (theirs,):
            theirs_on = theirs.ask("devices")
    except RuntimeError as error:
        return found | {"PyTorch": f"left out: {error}"}
    found |= {f"PyTorch: {key}": value for key, value in theirs_on.items()}
    gpu = ours_on["platform"] in ("gpu", "cuda", "rocm")
    if ours_on["platform"] != "cpu" and not (gpu and theirs_on["platform"] == "cuda"):
        found["PyTorch"] = f"left out: it computes on {theirs_on['platform']} here, not beside JAX"
    return found


def peak(setup: Setup) -> Rows:
    """Returns the FLOP/s of a large matrix product, by precision and side."""
    n = 256 if setup.tiny else 8192
    rows: Rows = {}
    for precision in PRECISIONS:
        names = (OURS,) if setup.torch else (OURS, THEIRS)
        with sides(names, "digits", precision, setup) as found:
            for side in found:
                rates = side.ask("peak", n=n, chained=5)
                rows[f"{precision} {side.name}"] = {
                    f"{n} x {n} product": figure([r / 1e12 for r in rates], "TFLOP/s")
                }
    return rows


def best_peak(peaks: Rows, precision: str) -> float:
    """Returns the greatest FLOP/s of the peak section's rows, or NaN where it was not measured."""
    rows = [cells for name, cells in peaks.items() if name.split()[0] == precision]
    rates = [value["median"] * 1e12 for cells in rows for value in cells.values()]
    return max(rates, default=float("nan"))


def network(
    name: str,
    precision: str,
    batch: int,
    setup: Setup,
    peaks: Rows,
    *,
    theirs: str = THEIRS,
    what: tuple[str, ...] = WHAT,
) -> Rows:
    """Returns times, share of the peak and memory of a network, ours and PyTorch's in turns.

    Where both do not fit on the device at once, each is measured alone.
    """
    names = (OURS,) if setup.torch or NETWORKS[name].kind != "unet" else (OURS, theirs)
    how = {"batch_size": batch, "ddim_steps": 2 if setup.tiny else 50}
    peak = best_peak(peaks, precision)
    try:
        with sides(names, name, precision, setup, **how) as found:
            return _measured(found, NETWORKS[name], batch, what, setup, peak)
    except OutOfMemory:
        if len(names) == 1:
            return {OURS: {TITLES["train"]: OUT}}
    rows: Rows = {}
    for one in names:
        try:
            with sides((one,), name, precision, setup, **how) as found:
                rows |= _measured(found, NETWORKS[name], batch, what, setup, peak)
        except OutOfMemory:
            rows[one] = {TITLES["train"]: OUT}
    return rows


def _measured(
    found: list[Side],
    described: Any,
    batch: int,
    what: tuple[str, ...],
    setup: Setup,
    peak: float,
) -> Rows:
    rows: Rows = {side.name: {} for side in found}
    flops: dict[str, float] = {}
    for side in found:  # one after the other, so that each has the processor to itself
        for name, seconds in side.ask("compile", what=what).items():
            rows[side.name][f"first {TITLES[name]}"] = figure([seconds], "s")
        if side.name == OURS:
            analysis = side.ask("analysis")
            flops = {name: counts["flops"] for name, counts in analysis.items()}
            if "train" in analysis:
                temporary = figure([analysis["train"]["temporary_bytes"] / 2**20], "MiB")
                rows[OURS]["temporary memory of the step"] = temporary
    if described.forward_flops and not setup.tiny:
        flops = {"forward": batch * described.forward_flops}
        flops["train"] = 3 * flops["forward"]
    for name in what:
        if name == "sample":  # which may take half a minute
            times = in_turns(found, name, max(2, setup.rounds // 2), setup.seconds, longest=LONGEST)
        else:
            times = in_turns(found, name, setup.rounds, setup.seconds, chained=True)
        for side, seconds in times.items():
            rows[side][TITLES[name]] = figure([1e3 * s for s in seconds], "ms")
            if flops.get(name) and name in ("train", "forward"):
                shares = [100 * flops[name] / s / peak for s in seconds]
                if peak == peak:
                    rows[side][f"{TITLES[name]} of peak"] = figure(shares, "%")
            if len(times) > 1 and side != OURS:
                ratios = [o / s for o, s in zip(times[OURS], seconds, strict=True)]
                rows[side][f"ours over it, {TITLES[name]}"] = figure(ratios, "times")
    for side in found:
        rows[side.name]["peak memory"] = figure([side.ask("memory") / 2**20], "MiB")
    return rows


def remat(setup: Setup) -> Rows:
    """Returns memory and time of CIFAR-10's training step by model.remat."""
    rows: Rows = {}
    for how in ("none", "blocks", "full"):
        try:
            with sides(
                (OURS,), "cifar10", "bfloat16", setup, batch_size=_batch(setup), remat=how
            ) as (ours,):
                seconds = ours.ask("compile", what=["train"])["train"]
                memory = ours.ask("analysis")["train"]["temporary_bytes"]
                times = in_turns([ours], "train", setup.rounds, setup.seconds, chained=True)[OURS]
                rows[how] = {
                    "compile": figure([seconds], "s"),
                    "temporary memory": figure([memory / 2**20], "MiB"),
                    "train step": figure([1e3 * s for s in times], "ms"),
                    "peak memory": figure([ours.ask("memory") / 2**20], "MiB"),
                }
        except OutOfMemory:
            rows[how] = {"train step": OUT}
    return rows


def _batch(setup: Setup) -> int:
    return 4 if setup.tiny else BATCHES["cifar10"][0]


def gradient(name: str, setup: Setup) -> Rows:
    """Returns the relative difference of a step's gradient from that in float32, by precision."""
    batch = 4 if setup.tiny else 16
    with sides((OURS,), name, "float32", setup, batch_size=batch) as (ours,):
        errors = ours.ask("gradient_errors", batches=3)
    return {precision: {"|g - g32| / |g32|": figure(e, "1")} for precision, e in errors.items()}


def profile(name: str, batch: int, setup: Setup, keep: Path) -> Rows:
    """Returns the ten most expensive kernels of a training step in bfloat16; the profile is left in
    `keep`."""
    calls = 2 if setup.tiny else 5
    shutil.rmtree(keep, ignore_errors=True)
    with sides((OURS,), name, "bfloat16", setup, batch_size=batch) as (ours,):
        ours.ask("compile", what=["train"])
        times = in_turns([ours], "train", setup.rounds, setup.seconds, chained=True)[OURS]
        ours.ask("profile", folder=str(keep), calls=calls)
    found = kernels(keep)
    total = sum(map(sum, found.values()))
    number = sum(map(len, found.values()))
    rows: Rows = {
        "all kernels": {
            "time a step": figure([1e3 * total / calls], "ms"),
            "calls a step": figure([number / calls], "1"),
            "step without profile": figure([1e3 * s for s in times], "ms"),
        }
    }
    for kernel, share, count in most_expensive(found):
        rows[f"`{kernel[:80]}`"] = {
            "share": figure([100 * share], "%"),
            "calls a step": figure([count / calls], "1"),
            "time of a call": figure([1e6 * s for s in found[kernel]], "us"),
        }
    return rows
