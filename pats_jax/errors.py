"""The one exception for everything that a user can get wrong."""


class InputError(ValueError):
    """Something handed in from outside is wrong: a flag, a file, a folder, a checkpoint.

    The message is one line: what is wrong, where (file and line, flag or tensor name) and what to do. Command-line
    programs print it and exit with code 2.
    """
