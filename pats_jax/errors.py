"""What ends a program early: something a user can put right, or a request from outside."""

from typing import Any


class InputError(ValueError):
    """Something handed in from outside is wrong: a flag, a file, a folder, a checkpoint.

    The message is one line: what is wrong, where (file and line, flag or tensor name) and what to do. Command-line
    programs print it and exit with code 2.
    """


class Preempted(Exception):
    """A run was asked to end.

    Attributes:
      signal_number: the signal that said so; the process should exit with 128 more, as shells count.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


def shown(value: Any, length: int = 80, *, quoted: bool = True) -> str:
    """A value from outside as an error message shows it: on one line, and cut where it is long.

    Args:
      value: anything with a ``repr``.
      length: characters of the value at most.
      quoted: whether a text stands in quotes.

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
