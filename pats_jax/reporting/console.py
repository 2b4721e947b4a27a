"""Console output of the programs, safe for any stream and any text."""

import contextlib
import functools
import inspect
import io
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # takes a while to import, and `pats-jax --help` answers at once
    import rich.console

_LONGEST_LINE = 2000  # characters
_LONGEST_COMPLAINT = 40  # lines
_NARROWEST = 40  # columns: with fewer, the parser's help never ends
_UNSEEN = ("Cc", "Cs", "Zl", "Zp")  # control characters, lone surrogates, line and paragraph separators


def say(console: "rich.console.Console", text: str) -> None:
    """Prints text as it is, without markup and line breaks; control characters are escaped."""
    console.print(visible(text, keep="\n"), markup=False, highlight=False, soft_wrap=True)


def visible(text: str, keep: str = "") -> str:
    r"""Escapes control characters, line breaks and lone surrogates as Python does.

    Args:
      text: any text.
      keep: characters to leave unchanged.

    Examples:
      >>> print(visible("café\n\x1b[2J"))
      café\n\x1b[2J
    """
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in _UNSEEN and c not in keep else c for c in text)


def one_line(text: str, length: int = _LONGEST_LINE) -> str:
    """A text on one line, shortened in the middle if long.

    Examples:
      >>> one_line("a long text of many words", 17)
      'a long ...  words'
    """
    shown = visible(text)
    if len(shown) <= length:
        return shown
    half = (length - len(_CUT)) // 2
    return shown[:half] + _CUT + shown[-half:]


_CUT = " ... "


def parse_flags(
    kind: Callable[..., Any], *, args: list[str], prog: str, config: tuple[Any, ...] = (), **options: Any
) -> Any:
    """The result of `tyro.cli` for a class; for a function, a partial with the values of the flags.

    Raises:
      SystemExit: from the parser, with code 2 and its message, shortened if long, on stderr; with code 0 after
        ``--help``.
    """
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config += (tyro.conf.HelptextFromCommentsOff,)  # the search for them takes half of the time
            return tyro.cli(_called_later(kind), args=args, prog=prog, use_underscores=True, config=config, **options)
    finally:
        lines = complaint.getvalue().splitlines()
        if len(lines) > _LONGEST_COMPLAINT:
            lines[_LONGEST_COMPLAINT // 2 : -_LONGEST_COMPLAINT // 2] = ["..."]
        if lines:
            print(*(one_line(line) for line in lines), sep="\n", file=sys.stderr)


def _called_later(kind):
    if inspect.isclass(kind):
        return kind

    @functools.wraps(kind)
    def bind(*args, **kwargs):
        return functools.partial(kind, *args, **kwargs)

    return bind


def open_streams() -> bool:
    """Makes it safe to print anything to stdout and stderr.

    Closed streams are discarded, so that output does not end up in the next opened file; characters that a stream's
    encoding lacks are escaped; very narrow terminals are treated as wider.

    Returns:
      Whether stdout was open.
    """
    was_open = sys.stdout is not None
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(_nowhere(number), mode, encoding="utf-8", closefd=False))
        stream = getattr(sys, name)
        if mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if shutil.get_terminal_size().columns < _NARROWEST:
        os.environ["COLUMNS"] = str(_NARROWEST)
    return was_open


def _nowhere(number):
    """A descriptor that discards output: this number, if nothing has taken it since the process started."""
    made = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if made != number and not _is_open(number):
        os.dup2(made, number)
        os.close(made)
        return number
    return made


def _is_open(number):
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
