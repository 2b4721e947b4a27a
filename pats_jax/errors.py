"""What ends a program early: something a user can put right, or a request from outside."""


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
