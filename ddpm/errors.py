"""The one error that stands for 'the user can mend this'."""


class InputError(ValueError):
    """A wrong value from outside: a config, a file, a folder, a checkpoint.

    Its text is one line that says what is wrong, where, what is allowed and what to do;
    `main.py` prints it and exits with code 2.
    """
