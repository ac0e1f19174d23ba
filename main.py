"""Trains and samples diffusion models: python main.py --config=configs/cifar10.py

The same command goes on where it was stopped. Every key of the config can be overridden:
--config.training.batch_size=64. Modes: train, sample.
"""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from ddpm.config import default, flatten, nearest, validate
from ddpm.errors import InputError

_MODES = ("train", "sample")
_CONFIG = config_flags.DEFINE_config_file(
    "config", str(Path(__file__).parent / "configs" / "digits.py"), "The experiment's config file."
)
_WORKDIR = flags.DEFINE_string("workdir", "", "The run folder; runs/<name of the config> if empty.")
_MODE = flags.DEFINE_string("mode", "train", f"One of: {', '.join(_MODES)}.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Several processes: call jax.distributed.initialize() first."
)


def parse(argv: Sequence[str]) -> list[str]:
    """The flags, with one line for anything wrong in them."""
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise InputError(f"unexpected argument {rest[1]!r}: options look like --workdir=runs/new")
        if _MODE.value not in _MODES:
            raise InputError(
                f"--mode={_MODE.value}: must be one of {', '.join(_MODES)}{nearest(_MODE.value, _MODES)}"
            )
        validate(_CONFIG.value)
        return rest
    except InputError as error:
        fail(str(error))
    except flags.Error as error:
        fail(str(error))
    except FileNotFoundError as error:
        fail(f"--config: there is no file {error.filename}")
    except (AttributeError, KeyError) as error:
        fail(f"{_wrong_key(argv)}{str(error).splitlines()[0]}")
    except (TypeError, ValueError, SyntaxError, ImportError) as error:
        fail(f"the config cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}")


def _wrong_key(argv: Sequence[str]) -> str:
    known = flatten(default())
    for argument in argv[1:]:
        key = argument.lstrip("-").split("=")[0].removeprefix("config.")
        if argument.startswith("--config.") and key not in known:
            return f"--config.{key}: there is no such key{nearest(key, known)}; "
    return ""


def fail(text: str, code: int = 2) -> None:
    """One line on standard error, and out."""
    print(f"error: {text}", file=sys.stderr, flush=True)
    sys.exit(code)


def main(argv: Sequence[str]) -> None:
    """Dispatch to a mode."""
    del argv
    logging.set_verbosity(logging.ERROR)
    if version("jaxlib") == "0.10.2":
        # Its default for single convolutions on CPUs takes about 1.5 times as long; newer ones
        # do not have it, and a flag that a version does not know would end the process.
        flag = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
        os.environ["XLA_FLAGS"] = f"{flag} {os.environ.get('XLA_FLAGS', '')}"
    # Imported late: a wrong flag should not wait for JAX.
    import jax

    from ddpm.modes.sample import sample
    from ddpm.modes.train import NotFinite, train

    if _DISTRIBUTED.value:
        jax.distributed.initialize()
    name = Path(flags.FLAGS["config"].config_filename).stem
    workdir = Path(_WORKDIR.value or Path("runs") / name)
    try:
        {"train": train, "sample": sample}[_MODE.value](_CONFIG.value, workdir)
    except InputError as error:
        fail(str(error))
    except NotFinite as error:
        fail(str(error), code=1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
