"""The command line: flags, the device's set-up, and one mode. `run(argv)` can be called in process.

code = run(["main.py", "--config=configs/digits.py", "--mode=sample"])
"""

import contextlib
import importlib
import logging
import math
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from absl import logging as absl_logging

from ddpm import backend
from ddpm.build.checks import validate
from ddpm.config import nearest
from ddpm.config.command import CONFIGS, config_file, names, overrides, parse
from ddpm.errors import InputError, NotFinite, first_line, one_line, out_of_memory, path_error
from ddpm.files.progress import doing, say
from ddpm.training.stopping import STOPPED, Hold, answered

COMMAND = Path(__file__).parent / "__main__.py"
DEFAULT_CONFIG = CONFIGS / "digits.py"
USAGE = """usage: python main.py --config=FILE.py[:VARIANT] [--mode=MODE] [--config.KEY=VALUE ..]
       python -m ddpm --config=NAME[:VARIANT] ..

Trains, samples and evaluates diffusion models. The same command resumes where it was stopped. All
keys of a config, with their meaning and the paper's values: ddpm/config/keys.py.

Configs by name, or files of your own:
"""
WRONG = 2  # an exit code, in addition to NotFinite's and STOPPED

# mode -> how its module, ddpm.modes.<mode>, is called with the flags, the run folder and argv. The
# module is imported late: a wrong flag should not wait for Orbax and others.
MODES: dict[str, Callable[[Any, Any, Path, Sequence[str]], None]] = {
    "train": lambda mode, f, workdir, _: mode.train(
        f.config, workdir, f.init_from, int(f.profile or 0)
    ),
    "sample": lambda mode, f, workdir, _: mode.sample(f.config, workdir, f.init_from, f.out),
    "edit": lambda mode, f, workdir, _: mode.edit(f.config, workdir, f.input, f.init_from, f.out),
    "compare": lambda mode, f, workdir, _: mode.compare(f.config, workdir, f.init_from, f.out),
    "evaluate": lambda mode, f, workdir, _: mode.evaluate(f.config, workdir, f.init_from, f.out),
    "sweep": lambda mode, f, workdir, argv: mode.sweep(
        mode.entries(f.configs, overrides(argv)), [int(s) for s in f.seeds], workdir, COMMAND
    ),
    "reference": lambda mode, f, workdir, _: mode.reference(f.config, workdir),
    "export": lambda mode, f, workdir, _: mode.export(f.config, workdir, f.out, f.init_from),
    "compress": lambda mode, f, workdir, _: mode.compress(
        f.config, workdir, f.input, f.init_from, f.out, rate=f.rate, psnr=f.psnr
    ),
    "decompress": lambda mode, f, workdir, _: mode.decompress(
        f.config, workdir, f.input, f.init_from, f.out, rate=f.rate
    ),
}
WITH_OUT = ("export", "sample", "edit", "compare", "evaluate", "compress", "decompress")
WITH_INPUT = ("edit", "compress", "decompress")
# The numbers of the codec, and the modes that they go with.
TARGETS = {"rate": ("compress", "decompress"), "psnr": ("compress",)}


def run(argv: Sequence[str]) -> int:
    """Runs the command argv[1:] and returns its exit code.

    What the user can mend, an OSError of a file included, is one line on standard error, and code
    2; a loss that is not finite is code 3. Ctrl-C, SIGTERM and SIGHUP are 0 where training was
    saved, 130 where there was nothing to save, and for the second time.
    """
    try:
        with answered() as hold:
            return _run(argv, hold)
    except KeyboardInterrupt:  # before the first step, while sampling, or for the second time
        return fail("stopped", STOPPED)  # after the answer, which a thread gives


def _run(argv: Sequence[str], hold: Hold) -> int:
    try:
        if {"--help", "-help", "--helpfull", "-h"} & set(argv[1:]):
            known = textwrap.fill(
                ", ".join(names()), 78, initial_indent="  ", subsequent_indent="  "
            )
            print(f"{USAGE}{known}\n\n{_flags().module_help(__name__)}")
            return 0
        given = _read(argv)
        with _progress_on_stderr():
            _set_up(given.distributed)
            speaks = not given.distributed or jax.process_index() == 0
            with doing(f"--mode={given.mode}", speaks=speaks):
                with hold():  # an exception from a handler would crash what is imported
                    mode = importlib.import_module(f"ddpm.modes.{given.mode}")
                try:
                    MODES[given.mode](mode, given, _workdir(given, argv), argv)
                except Exception as error:
                    found = out_of_memory(error, _batch_sizes(given))
                    if found is None:
                        raise
                    raise found from error
    except InputError as error:
        return fail(str(error), WRONG)
    except OSError as error:  # a full disk, a file that may not be written
        return fail(str(path_error(error)), WRONG)
    except NotFinite as error:
        return fail(str(error), NotFinite.EXIT_CODE)
    return 0


def _batch_sizes(given: Any) -> dict[str, int]:
    """Returns the keys that set how much a mode computes at once, with their values."""
    parts = {"train": ["training"], "evaluate": ["sampling", "evaluation"]}
    parts |= {"reference": ["evaluation"]}
    sections = parts.get(given.mode, ["sampling"])
    return {f"{part}.batch_size": given.config[part].batch_size for part in sections}


def fail(text: str, code: int) -> int:
    """Prints one line on standard error and returns the exit code."""
    print(f"error: {one_line(text)}", file=sys.stderr, flush=True)
    return code


def _flags() -> flags.FlagValues:
    """Returns the command's flags, unparsed. They are its own: absl's global ones parse once."""
    own = flags.FlagValues()
    for name, value, about in (
        ("workdir", "", "The run folder; runs/<name of the config> if empty."),
        ("mode", "train", f"One of: {', '.join(MODES)}."),
        (
            "init_from",
            "",
            "Pretrained weights to begin from, in every mode but reference: the library's own by "
            "name, digits or fashion_mnist; a folder of diffusers, a file, or the name of a "
            "repository on the hub.",
        ),
        (
            "input",
            "",
            "For --mode=edit and compress: pictures FILE[,FILE..], a folder of them, or an .npz. "
            "For decompress: files .ddpm, or a folder of them.",
        ),
        (
            "out",
            "",
            "For --mode=export: a new folder for diffusers, or a file .safetensors. For sample, "
            "edit, compare, evaluate, compress and decompress: the folder of what they write, if "
            "not the run's.",
        ),
        (
            "profile",
            "",
            "For training: steps to trace into the run's profile/, after a few to warm up.",
        ),
        (
            "distributed",
            "",
            "Several processes: 'auto' where JAX finds them (TPU pods, SLURM, Open MPI, "
            "Kubernetes), else HOST:PORT,COUNT,INDEX, the first two the same, an INDEX for each.",
        ),
    ):
        flags.DEFINE_string(name, value, about, flag_values=own)
    for name, about in (
        ("rate", "For --mode=compress: bits/dim to end at. For decompress: to read of each file."),
        ("psnr", "For --mode=compress: dB to end at. Without this and --rate it is lossless."),
    ):
        flags.DEFINE_float(name, None, about, flag_values=own)
    about = "For --mode=sweep: config files FILE.py[,FILE.py:VARIANT..]; all variants if none."
    flags.DEFINE_list("configs", [], about, flag_values=own)
    flags.DEFINE_list("seeds", ["0"], "For --mode=sweep: a run with each, 0,1,2.", flag_values=own)
    return own


def _read(argv: Sequence[str]) -> Any:
    """Returns the flags, checked; InputError for what is wrong in them or in the config."""
    chosen = config_file(argv)
    named = [] if chosen else [f"--config={DEFAULT_CONFIG}"]
    given: Any = parse([argv[0], *named, *argv[1:]], _flags())
    if given.mode not in MODES:
        allowed = ", ".join(MODES)
        raise InputError(
            f"--mode={given.mode}: must be one of {allowed}{nearest(given.mode, MODES)}"
        )
    if given.out and given.mode not in WITH_OUT:
        raise InputError(f"--out={given.out} goes with --mode={', '.join(WITH_OUT)} alone")
    if given.init_from and given.mode == "reference":
        raise InputError("--init_from: --mode=reference uses no weights; leave it out")
    if bool(given.input) != (given.mode in WITH_INPUT):
        what = "files .ddpm" if given.mode == "decompress" else "pictures"
        raise InputError(
            f"--input={given.input} goes with --mode={', '.join(WITH_INPUT)} alone"
            if given.input
            else f"--mode={given.mode} needs --input: {what} FILE[,FILE..], or a folder of them"
        )
    for name, modes in TARGETS.items():
        value = given[name].value
        if value is not None and given.mode not in modes:
            raise InputError(f"--{name}={value:g} goes with --mode={', '.join(modes)} alone")
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name}={value:g}: must be a number > 0")
    if given["profile"].present:
        if given.mode != "train":
            raise InputError(f"--profile={given.profile} goes with --mode=train alone")
        steps = given.profile
        if not steps.isdecimal() or len(steps) > 9 or not int(steps):
            raise InputError(f"--profile={steps}: must be a number of steps, 1..999999999")
    _check_sweep(given, chosen, argv)
    validate(given.config)
    return given


def _check_sweep(given: Any, chosen: str, argv: Sequence[str]) -> None:
    """Raises InputError for flags of --mode=sweep in another mode, and for others in that."""
    sweeps = given.mode == "sweep"
    if bool(given.configs) != sweeps:
        raise InputError(
            "--mode=sweep needs --configs: files FILE.py[,FILE.py:VARIANT..]"
            if sweeps
            else f"--configs={','.join(given.configs)} goes with --mode=sweep alone"
        )
    if not sweeps:
        if given["seeds"].present:
            raise InputError("--seeds goes with --mode=sweep alone; elsewhere: --config.seed")
        return
    for name, value in (
        ("config", chosen),
        ("init_from", given.init_from),
        ("distributed", given.distributed),
    ):
        if value:
            raise InputError(f"--{name} does not go with --mode=sweep, which has --configs")
    seeds = given.seeds
    if not all(s.isdecimal() and int(s) < 2**32 for s in seeds) or len(set(seeds)) < len(seeds):
        raise InputError(
            f"--seeds={','.join(seeds)}: must be different whole numbers in 0..2^32 - 1"
        )
    if any("config.seed" in argument for argument in argv):
        raise InputError("--config.seed does not go with --mode=sweep, which has --seeds")


def _workdir(given: Any, argv: Sequence[str]) -> Path:
    if given.workdir:
        return Path(given.workdir)
    if given.mode == "sweep":
        return Path("runs/sweep")
    file, _, variant = (config_file(argv) or str(DEFAULT_CONFIG)).partition(":")
    return Path("runs") / "_".join(filter(None, (Path(file).stem, variant)))


@contextlib.contextmanager
def _progress_on_stderr() -> Iterator[None]:
    """Shows what the library logs, while the command runs."""
    logger, handler = logging.getLogger("ddpm"), logging.Handler()
    handler.emit = lambda record: say(handler.format(record))  # type: ignore[method-assign]
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    hook = sys.unraisablehook

    def without_noise(ignored: Any) -> None:
        # What TensorStore has to say, hundreds of times, of writes that failed, which is raised.
        if str(ignored.exc_value) != "Event loop is closed":
            hook(ignored)

    sys.unraisablehook = without_noise
    try:
        yield
    finally:
        sys.unraisablehook = hook
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def _set_up(distributed: str) -> None:
    """Sets up JAX and, with `distributed`, several processes as one."""
    # Orbax logs every file; its errors, and those of its tasks, are raised as well.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    backend.configure()
    if distributed:
        join(distributed)


def join(where: str) -> None:
    """Makes several processes one computation; InputError for processes that cannot be found."""
    flag = f"--distributed={where}"
    if where == "auto":
        try:
            return jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"{flag}: JAX cannot find the processes here ({first_line(error)})"
            ) from error
    try:
        address, count, index = where.split(",")
        processes = int(count), int(index)
    except ValueError as error:
        raise InputError(f"{flag}: must be 'auto' or HOST:PORT,COUNT,INDEX") from error
    if not 0 <= processes[1] < processes[0]:
        raise InputError(f"{flag}: INDEX must be in 0..COUNT - 1")
    jax.distributed.initialize(address, *processes)
