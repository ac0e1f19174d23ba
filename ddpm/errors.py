"""The one error that stands for 'the user can mend this'."""


class InputError(ValueError):
    """A wrong value from outside: a config, a file, a folder, a checkpoint.

    Its text is one line that says what is wrong, where, what is allowed and what to do;
    `main.py` prints it and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """Returns the first line of an error that has one, or its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class NotFinite(RuntimeError):
    """The loss or its gradient became NaN or infinite; the text names step and checkpoint."""

    EXIT_CODE = 3
