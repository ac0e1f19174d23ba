"""Configs from command lines: --config=FILE.py[:VARIANT] and its overrides, --config.key=value."""

import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from ddpm.config.keys import default
from ddpm.config.tree import flatten, nearest
from ddpm.errors import InputError, first_line


def parse(argv: Sequence[str], values: flags.FlagValues | None = None) -> flags.FlagValues:
    """Returns the flags of argv, the program first: those that `values` defines, and `config`.

    --config=FILE must be among them. Raises InputError, in one line, for whatever is wrong in them
    or in the config file; the config's values are not checked.
    """
    values = flags.FlagValues() if values is None else values
    argv = _last_of_each(_config_first(argv))
    try:
        config_flags.DEFINE_config_file(
            "config",
            None,
            "The experiment's config file; configs/digits.py if left out.",
            flag_values=values,
            sys_argv=argv,
        )
        rest = values(argv)
    except flags.Error as error:
        text = str(error).strip()
        if "Traceback (most recent call last)" in text:  # of the config file; its last line says it
            text = f"--config={config_file(argv)}: {text.splitlines()[-1]}"
        raise InputError(_error_of_file(error) or text) from error
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


def check_file(flag: str, given: str) -> None:
    """Raises InputError, with the nearest name, unless FILE of FILE.py[:VARIANT] is there."""
    file = given.split(":")[0]
    if not os.path.isfile(file):  # unlike Path's, not raising for a name that cannot be
        known = sorted(p.as_posix() for p in Path("configs").rglob("*.py"))
        raise InputError(f"--{flag}={file}: there is no such file{nearest(file, known)}")


def overrides(argv: Sequence[str]) -> list[str]:
    """Returns the arguments that override keys of the config, each in one piece."""
    found: list[str] = []
    for argument, after in zip(argv, [*argv[1:], "-"], strict=True):
        if _key(argument) is not None:
            alone = "=" in argument or after.startswith("-")
            found.append(argument if alone else f"{argument}={after}")
    return found


def config_file(argv: Sequence[str]) -> str:
    """Returns what --config is given as in argv, '' where it is not."""
    for argument, after in zip(argv, [*argv[1:], ""], strict=True):
        if argument.startswith(("--config=", "-config=")):
            return argument.split("=", 1)[1]
        if argument in ("--config", "-config"):
            return after
    return ""


def _config_first(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with --config=FILE before its overrides, where it must be for absl."""
    program, *rest = argv
    for i, argument in enumerate(rest):
        if argument.startswith(("--config=", "-config=")):
            return [program, rest.pop(i), *rest]
        if argument in ("--config", "-config") and i + 1 < len(rest):
            chosen = f"--config={rest.pop(i + 1)}"
            rest.pop(i)
            return [program, chosen, *rest]
    return list(argv)


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


def _wrong_key(argv: Sequence[str]) -> str:
    known = flatten(default())
    for argument in argv[1:]:
        key = argument.lstrip("-").split("=")[0].removeprefix("config.")
        if argument.startswith("--config.") and key not in known:
            return f"--config.{key}: there is no such key{nearest(key, known)}"
    return ""


def _error_of_file(error: BaseException) -> str:
    """Returns the text of the config file's own InputError, which ml_collections wraps."""
    text, link = "", error.__context__
    while link is not None:
        text = str(link) if isinstance(link, InputError) else text
        link = link.__context__
    return text
