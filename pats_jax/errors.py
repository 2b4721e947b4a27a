"""Errors that end a program early: invalid input, which the user can correct, or a signal."""

from typing import Any


class InputError(ValueError):
    """Invalid input: a flag, a file, a folder, a checkpoint.

    The message is one line: what is wrong, where (file and line, flag or tensor name) and what to do. Command-line
    programs print it and exit with code 2.
    """


class Preempted(Exception):
    """A run was asked to stop.

    Attributes:
      signal_number: the signal received; the process should exit with 128 plus this number, like a shell.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


def shown(value: Any, length: int = 80, *, quoted: bool = True) -> str:
    """Formats an outside value for an error message: on one line, and truncated if long.

    Args:
      value: anything with a ``repr``.
      length: maximum number of characters.
      quoted: whether to put a string in quotes.

    Examples:
      >>> print(shown("a\\nb"), shown("x" * 90, 8))
      'a\\nb' 'xxxxxxxx'... (90 characters)
    """
    text = value if isinstance(value, str) else repr(value)
    cut = text[:length]
    written = repr(cut) if isinstance(value, str) else cut
    if not quoted:
        written = written[1:-1] if isinstance(value, str) else written
    return written if len(text) <= length else f"{written}... ({len(text)} characters)"
