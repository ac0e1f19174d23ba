"""Trains, samples and evaluates diffusion models: python main.py --config=configs/cifar10.py

The same command goes on where it was stopped. Every key of the config can be overridden:
--config.training.batch_size=64. Modes: train, sample, edit, compare, evaluate, sweep, reference,
export.
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__" and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    # Memory in large pages: a sixth off a training step on a CPU (docs/performance.md). The C
    # library reads this only as a process starts, so it starts again, before JAX is imported.
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from ddpm import backend
from ddpm.config import default, flatten, nearest
from ddpm.errors import InputError, first_line
from ddpm.validation import validate

_MODES = ("train", "sample", "edit", "compare", "evaluate", "sweep", "reference", "export")
_DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits.py"
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment's config file; configs/digits.py if left out."
)
_WORKDIR = flags.DEFINE_string("workdir", "", "The run folder; runs/<name of the config> if empty.")
_MODE = flags.DEFINE_string("mode", "train", f"One of: {', '.join(_MODES)}.")
_INIT_FROM = flags.DEFINE_string(
    "init_from",
    "",
    "Weights of others to begin from, for every mode but reference: a folder of diffusers, a file, "
    "or the name of a repository on the hub.",
)
_INPUT = flags.DEFINE_string(
    "input", "", "Of --mode=edit: pictures FILE[,FILE..], a folder of them, or an .npz as data."
)
_OUT = flags.DEFINE_string(
    "out", "", "Of --mode=export: a new folder for diffusers, or a file .safetensors."
)
_CONFIGS = flags.DEFINE_list(
    "configs",
    [],
    "Of --mode=sweep: config files FILE.py[,FILE.py:VARIANT..], without a variant all it has.",
)
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Of --mode=sweep: a run with each, 0,1,2.")
_DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    "",
    "Several processes: 'auto' where JAX can tell (TPU pods, SLURM, Open MPI, Kubernetes), "
    "else HOST:PORT,COUNT,INDEX, the same first two for all and an INDEX each.",
)


def parse(argv: Sequence[str]) -> list[str]:
    """The flags, with one line for anything wrong in them."""
    try:
        sys.argv = argv = _config_first(argv)  # where ml_collections looks for the file's name
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise InputError(
                f"unexpected argument {rest[1]!r}: options look like --workdir=runs/new"
            )
        if _MODE.value not in _MODES:
            allowed = ", ".join(_MODES)
            raise InputError(
                f"--mode={_MODE.value}: must be one of {allowed}{nearest(_MODE.value, _MODES)}"
            )
        if _OUT.value and _MODE.value != "export":
            raise InputError(f"--out={_OUT.value} goes with --mode=export alone")
        if bool(_INPUT.value) != (_MODE.value == "edit"):
            raise InputError(
                f"--input={_INPUT.value} goes with --mode=edit alone"
                if _INPUT.value
                else "--mode=edit needs --input: pictures FILE[,FILE..], a folder, or an .npz"
            )
        _check_sweep(argv)
        if _INIT_FROM.value and _MODE.value == "reference":
            raise InputError("--init_from: --mode=reference uses no weights; leave it out")
        validate(_CONFIG.value)
        return rest
    except InputError as error:
        fail(str(error))
    except flags.Error as error:
        fail(_said_by_file(error) or str(error))
    except (AttributeError, KeyError) as error:
        fail(_wrong_key(argv) or f"the config cannot be read: {first_line(error)}")
    except Exception as error:  # whatever a config file does
        fail(f"the config cannot be read: {type(error).__name__}: {first_line(error)}")


def _check_sweep(argv: Sequence[str]) -> None:
    """InputError for flags of --mode=sweep in another mode, and for others in that."""
    sweeps = _MODE.value == "sweep"
    if bool(_CONFIGS.value) != sweeps:
        raise InputError(
            "--mode=sweep needs --configs: files FILE.py[,FILE.py:VARIANT..]"
            if sweeps
            else f"--configs={','.join(_CONFIGS.value)} goes with --mode=sweep alone"
        )
    if not sweeps:
        if _SEEDS.present:
            raise InputError("--seeds goes with --mode=sweep alone; elsewhere: --config.seed")
        return
    for name, given in (
        ("config", sys.argv[1] != f"--config={_DEFAULT_CONFIG}"),
        ("init_from", _INIT_FROM.value),
        ("distributed", _DISTRIBUTED.value),
    ):
        if given:
            raise InputError(f"--{name} does not go with --mode=sweep, which has --configs")
    seeds = _SEEDS.value
    if not all(s.isdecimal() and int(s) < 2**32 for s in seeds) or len(set(seeds)) < len(seeds):
        raise InputError(
            f"--seeds={','.join(seeds)}: must be different whole numbers in 0..2^32 - 1"
        )
    if any("config.seed" in argument for argument in argv):
        raise InputError("--config.seed does not go with --mode=sweep, which has --seeds")


def _config_first(argv: Sequence[str]) -> list[str]:
    """The arguments with --config=FILE before its overrides, and the default if there is none."""
    program, *rest = argv
    chosen = f"--config={_DEFAULT_CONFIG}"
    for i, argument in enumerate(rest):
        if argument.startswith(("--config=", "-config=")):
            chosen = rest.pop(i)
            break
        if argument in ("--config", "-config") and i + 1 < len(rest):
            chosen = f"--config={rest.pop(i + 1)}"
            rest.pop(i)
            break
    file = chosen.split("=", 1)[1].split(":")[0]
    if not Path(file).is_file():
        known = sorted(p.as_posix() for p in Path("configs").rglob("*.py"))
        raise InputError(f"--config={file}: there is no such file{nearest(file, known)}")
    return [program, chosen, *rest]


def _wrong_key(argv: Sequence[str]) -> str:
    known = flatten(default())
    for argument in argv[1:]:
        key = argument.lstrip("-").split("=")[0].removeprefix("config.")
        if argument.startswith("--config.") and key not in known:
            return f"--config.{key}: there is no such key{nearest(key, known)}"
    return ""


def _said_by_file(error: BaseException) -> str:
    """What an InputError of the config file says, which ml_collections wraps in a traceback."""
    said, link = "", error.__context__
    while link is not None:
        said = str(link) if isinstance(link, InputError) else said
        link = link.__context__
    return said


def fail(text: str, code: int = 2) -> NoReturn:
    """One line on standard error, and out."""
    print(f"error: {text}", file=sys.stderr, flush=True)
    sys.exit(code)


def main(argv: Sequence[str]) -> None:
    """Dispatch to a mode."""
    del argv
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax tells of every file
    logger = logging.getLogger("ddpm")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False
    backend.configure()
    # Imported late: a wrong flag should not wait for Orbax and others.
    from ddpm.modes.compare import compare
    from ddpm.modes.edit import edit
    from ddpm.modes.evaluate import evaluate
    from ddpm.modes.export import export
    from ddpm.modes.reference import reference
    from ddpm.modes.sample import sample
    from ddpm.modes.sweep import entries, overrides_of, sweep
    from ddpm.modes.train import NOT_FINITE, NotFinite, train
    from ddpm.training.stopping import heed_ctrl_c

    heed_ctrl_c()
    if _DISTRIBUTED.value:
        join(_DISTRIBUTED.value)
    config_flag: Any = flags.FLAGS["config"]
    file, _, variant = config_flag.config_filename.partition(":")
    name = "_".join(filter(None, (Path(file).stem, variant)))
    workdir = Path(_WORKDIR.value or Path("runs") / name)
    try:
        config, given = _CONFIG.value, _INIT_FROM.value
        match _MODE.value:
            case "train":
                train(config, workdir, given)
            case "sample":
                sample(config, workdir, given)
            case "compare":
                compare(config, workdir, given)
            case "edit":
                edit(config, workdir, _INPUT.value, given)
            case "evaluate":
                evaluate(config, workdir, given)
            case "sweep":
                folder = Path(_WORKDIR.value or "runs/sweep")
                rows = entries(_CONFIGS.value, overrides_of(sys.argv))
                sweep(rows, [int(s) for s in _SEEDS.value], folder, Path(__file__))
            case "reference":
                reference(config, workdir)
            case "export":
                export(config, workdir, _OUT.value, given)
    except InputError as error:
        fail(str(error))
    except NotFinite as error:
        fail(str(error), code=NOT_FINITE)
    except KeyboardInterrupt:  # before the first step, while sampling, or for the second time
        fail("stopped", code=130)


def join(where: str) -> None:
    """Several processes as one computation."""
    import jax

    said = f"--distributed={where}"
    if where == "auto":
        try:
            return jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            fail(f"{said}: JAX cannot tell the processes here ({first_line(error)})")
    try:
        address, count, index = where.split(",")
        processes = int(count), int(index)
    except ValueError:
        fail(f"{said}: must be 'auto' or HOST:PORT,COUNT,INDEX")
    if not 0 <= processes[1] < processes[0]:
        fail(f"{said}: INDEX must be in 0..COUNT - 1")
    jax.distributed.initialize(address, *processes)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
