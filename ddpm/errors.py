"""The one error that stands for 'the user can mend this', and the form of all messages."""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

LONGEST = 300  # characters of a message: a few lines of a terminal


class InputError(ValueError):
    """A wrong value from outside: a config, a file, a folder, a checkpoint.

    Its text is one line that says what is wrong, where, what is allowed and what to do, whatever
    the names and values in it; `main.py` prints it and exits with code 2. Instructions of several
    steps may be `longest` characters.
    """

    def __init__(self, text: object = "", *, longest: int = LONGEST) -> None:
        super().__init__(one_line(str(text), longest))


def one_line(text: str, longest: int = LONGEST) -> str:
    """Returns a message without line breaks, of at most `longest` characters.

    Long words, such as values and paths, are shortened first, then the middle of the whole: what
    is wrong stands at the beginning of a message, and the remedy at its end.
    """
    for part in (60, 40, 20):  # kept of a word's beginning and of its end
        if len(text) > longest:
            text = re.sub(rf"(\S{{{part}}})\S{{3,}}(\S{{{part}}})", r"\1..\2", text)
    return _shortened(printable(_shortened(text, longest)), longest)


def printable(text: str) -> str:
    """Returns a text with whatever would break the line, or is not to be seen, as Python writes it:
    a line break as \\\\n."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def listed(names: Collection[object], most: int = 5) -> str:
    """Returns the first of some names, and how many more there are."""
    shown = ", ".join(str(name) for name, _ in zip(names, range(most), strict=False))
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """Returns the first line of an error that has one, shortened, or its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _shortened(lines[0], LONGEST // 2) if lines else type(error).__name__


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
        if is_of_memory(chain):
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


def is_of_memory(error: BaseException) -> bool:
    """Returns whether an error is Python's or JAX's of memory that could not be had."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


class NotFinite(RuntimeError):
    """The loss or its gradient became NaN or infinite; the text names step and checkpoint."""

    EXIT_CODE = 3


def _shortened(text: str, most: int) -> str:
    """Returns the beginning and the end of a text, `most` characters in all."""
    end = (most - 2) // 2
    return text if len(text) <= most else f"{text[: most - 2 - end]}..{text[-end:]}"
