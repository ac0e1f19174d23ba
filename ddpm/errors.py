"""The one error that stands for 'the user can mend this'."""

import os
from collections.abc import Mapping
from pathlib import Path


class InputError(ValueError):
    """A wrong value from outside: a config, a file, a folder, a checkpoint.

    Its text is one line that says what is wrong, where, what is allowed and what to do;
    `main.py` prints it and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """Returns the first line of an error that has one, or its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def path_error(error: OSError) -> InputError:
    """Returns the error of a file or folder as the one for the user: where, why, and what to do."""
    if error.filename is None:
        return InputError(
            f"a file cannot be written or read: {error.strerror or first_line(error)}"
        )
    path = Path(os.fsdecode(error.filename2 or error.filename))
    advice = "choose another --workdir, or --out"
    if isinstance(error, FileExistsError | NotADirectoryError):
        in_the_way = (p for p in (path, *path.parents) if p.is_symlink() or p.exists())
        file = next((p for p in in_the_way if not p.is_dir()), path)
        return InputError(
            f"{path}: cannot be written, as {file} is no folder: move that away, or {advice}"
        )
    if isinstance(error, IsADirectoryError):
        return InputError(
            f"{path}: cannot be written, as it is a folder: move it away, or {advice}"
        )
    return InputError(
        f"{path}: cannot be written or read ({error.strerror}): mend that, or {advice}"
    )


def out_of_memory(error: BaseException, batches: Mapping[str, int]) -> InputError | None:
    """Returns the error for the user, if this one, or what it comes from, is of memory that could
    not be had; `batches` are the keys that set the size of what was computed, with their values."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, MemoryError) or "RESOURCE_EXHAUSTED" in str(chain):
            break
        chain = chain.__cause__
    else:
        return None
    lower = " or ".join(f"config.{key} = {value}" for key, value in batches.items())
    why = first_line(chain).removeprefix("RESOURCE_EXHAUSTED: ")[:100]
    return InputError(
        f"out of memory ({why}): lower {lower}, or train with a smaller config.data.image_size or "
        "config.model.channels"
    )


class NotFinite(RuntimeError):
    """The loss or its gradient became NaN or infinite; the text names step and checkpoint."""

    EXIT_CODE = 3
