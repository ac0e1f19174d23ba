"""Configs from command lines: --config=FILE.py[:VARIANT] and its overrides, --config.key=value.

The experiments that come with the library can be named: --config=digits, in whatever folder.
"""

import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from absl import flags
from ml_collections import ConfigDict, config_flags

from ddpm.config.keys import default
from ddpm.config.tree import flatten, nearest
from ddpm.errors import InputError, first_line

_PACKAGE = Path(__file__).parents[1]
# In the wheel within the package, in a checkout next to it.
CONFIGS = next(p for p in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if p.is_dir())


def parse(argv: Sequence[str], values: flags.FlagValues | None = None) -> flags.FlagValues:
    """Returns the flags of argv, the program first: those that `values` defines, and `config`.

    --config=FILE, or NAME, must be among them. Raises InputError, in one line, for whatever is
    wrong in them or in the config file; the config's values are not checked.
    """
    values = flags.FlagValues() if values is None else values
    _check_keys_are_single(argv)
    argv = _last_of_each(_config_first(argv))
    try:
        make_importable()
        config_flags.DEFINE_config_file(
            "config",
            None,
            "The experiment's config file; configs/digits.py if left out.",
            flag_values=values,
            sys_argv=argv,
        )
        rest = values(argv)
    except flags.Error as error:
        wrong = _error_of_file(error) or _wrong_value(argv, error) or _last_line(error)
        raise InputError(wrong) from error
    except (AttributeError, KeyError) as error:
        wrong = _wrong_key(argv) or f"the config cannot be read: {first_line(error)}"
        raise InputError(wrong) from error
    except Exception as error:  # whatever a config file does
        what = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(_error_of_file(error) or f"the config cannot be read: {what}") from error
    if not isinstance(values["config"].value, ConfigDict):
        raise InputError(
            f"--config={config_file(argv)}: its get_config() must return a config, as "
            "ddpm.config.default() does"
        )
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}: options look like --workdir=runs/new")
    return values


def find_file(flag: str, given: str) -> str:
    """Returns FILE of FILE.py[:VARIANT], or of the NAME of one that comes with the library, with
    its variant. Raises InputError, with the names that there are, if there is none."""
    name, colon, variant = given.partition(":")
    if os.path.isfile(name):  # unlike Path's, not raising for a name that cannot be
        return given
    plain = name.removeprefix("./").removeprefix("configs/").removesuffix(".py")
    if plain in (known := names()):
        return f"{CONFIGS / plain}.py{colon}{variant}"
    if plain == name and "/" not in name:
        plain_names = ", ".join(n for n in known if "/" not in n)
        raise InputError(f"--{flag}={name}: must be a file or {plain_names}")
    files = [f"configs/{n}.py" for n in known] if plain != name else known
    raise InputError(f"--{flag}={name}: there is no such file{nearest(name, files)}")


def names() -> list[str]:
    """Returns the names of the configs that come with the library: digits, ablations/table2."""
    found = (path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob("*.py"))
    return sorted((path.as_posix() for path in found), key=lambda name: ("/" in name, name))


def make_importable() -> None:
    """Makes `from configs import digits`, in a config, find those that come with the library, after
    the user's own folder `configs`."""
    try:
        configs = importlib.import_module("configs")
    except ModuleNotFoundError:
        configs = sys.modules["configs"] = ModuleType("configs")
    paths = list(getattr(configs, "__path__", []))
    if str(CONFIGS) not in paths:
        configs.__path__ = [*paths, str(CONFIGS)]


def overrides(argv: Sequence[str]) -> list[str]:
    """Returns the arguments that override keys of the config, each in one piece."""
    found: list[str] = []
    for argument, after in zip(argv, [*argv[1:], "-"], strict=True):
        if _key(argument) is not None:
            alone = "=" in argument or after.startswith("-")
            found.append(argument if alone else f"{argument}={after}")
    return found


def config_file(argv: Sequence[str]) -> str:
    """Returns what --config is given as in argv, '' where it is not; of several the last."""
    return "".join(_split(argv)[0][-1:])


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the values of --config in argv, and the arguments without it."""
    chosen, others, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        if argument.startswith(("--config=", "-config=")):
            chosen.append(argument.split("=", 1)[1])
        elif argument in ("--config", "-config") and rest:
            chosen.append(rest.pop(0))
        else:
            others.append(argument)
    return chosen, others


def _config_first(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with the last --config=FILE, of a name its file, before its overrides,
    where it must be for absl."""
    chosen, (program, *others) = _split(argv)
    if not chosen:
        return list(argv)
    return [program, f"--config={find_file('config', chosen[-1])}", *others]


def _last_of_each(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with the last override of each key alone: absl would append the values
    of a tuple that is given twice."""
    kept: list[str] = []
    seen: set[str] = set()
    for i in range(len(argv) - 1, -1, -1):
        name = _key(argv[i])
        if name is None:
            kept.append(argv[i])
        elif name not in seen:
            seen.add(name)
            kept.append(argv[i])
        elif "=" not in argv[i] and i + 1 < len(argv) and not argv[i + 1].startswith("-"):
            kept.pop()  # its value
    return kept[::-1]


def _key(argument: str) -> str | None:
    """Returns the key that an argument overrides, None for any other argument."""
    name = argument.lstrip("-").split("=")[0]
    if argument.startswith("-") and name.startswith(("config.", "noconfig.")):
        return name.split("config.", 1)[1]
    return None


def _check_keys_are_single(argv: Sequence[str]) -> None:
    """Raises InputError for an override of a whole section, which absl would put in its place."""
    sections = {key.split(".")[0] for key in flatten(default()) if "." in key}
    for argument in argv:
        if (key := _key(argument)) in sections:
            raise InputError(f"--config.{key} is a section: override its keys, --config.{key}.KEY")


def _wrong_key(argv: Sequence[str]) -> str:
    known = flatten(default())
    for argument in argv[1:]:
        key = argument.lstrip("-").split("=")[0].removeprefix("config.")
        if argument.startswith("--config.") and key not in known:
            return f"--config.{key}: there is no such key{nearest(key, known)}"
    return ""


def _wrong_value(argv: Sequence[str], error: BaseException) -> str:
    """Returns what is wrong with an override not of its key's type, '' for another error."""
    for argument in overrides(argv):
        name, _, value = argument.lstrip("-").partition("=")
        if f"flag --{name}={value}" in str(error):
            kind = type(flatten(default())[name.removeprefix("config.")]).__name__
            return f"--{name}={value}: must be of type {kind}"
    return ""


def _last_line(error: BaseException) -> str:
    """Returns the flag's error in one line; of a config file's traceback where it is, and what."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = re.match("flag (--config=([^:]*)[^:]*):", lines[0]) if lines else None
    if found is None or len(lines) == 1:
        return first_line(error)
    if "get_config() takes 0 positional" in lines[-1]:
        return f"{found[1]}: has no variants, so nothing may follow a colon"
    places = [line for line in lines if line.startswith(f'File "{found[2]}", line ')]
    where = f", line {re.findall('line ([0-9]+)', places[-1])[0]}" if places else ""
    return f"{found[1]}{where}: {lines[-1]}"


def _error_of_file(error: BaseException) -> str:
    """Returns the text of the config file's own InputError, which ml_collections wraps."""
    text, link = "", error.__context__
    while link is not None:
        text = str(link) if isinstance(link, InputError) else text
        link = link.__context__
    return text
