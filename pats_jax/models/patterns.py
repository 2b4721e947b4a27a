"""Regular expressions from flags and files, with a time limit.

Python's own engine has no time limit and blocks signals while it matches. Here a pattern has one second of CPU time in
all, far more than an ordinary pattern needs.
"""

import time
from collections.abc import Callable
from typing import Any

from pats_jax.errors import InputError, shown

_SECONDS = 1.0  # for all names together
_LONGEST = 100_000  # characters; compiling is not timed


def compile_pattern(pattern: Any, source: str, *, whole: bool = False) -> Callable[[str], bool]:
    r"""Compiles a regular expression to a function that returns whether it matches a name.

    Args:
      pattern: the expression, in the syntax of Python's ``re``.
      source: what to call it in error messages, such as ``--lora_layers``.
      whole: whether it must match the whole name, rather than any part of it.

    Raises:
      InputError: if it is not a regular expression; from the function, if matching takes too long.

    Examples:
      >>> is_query = compile_pattern(r"\.query$", "--lora_layers")
      >>> is_query("attention.self.query"), is_query("attention.self.key")
      (True, False)
    """
    import regex  # most commands match nothing

    name = f"{source} {shown(pattern)}"
    if not isinstance(pattern, str):
        raise InputError(f"{name}: not a regular expression: it must be a string")
    if len(pattern) > _LONGEST:
        raise InputError(f"{name}: not a regular expression: longer than {_LONGEST} characters")
    try:
        compiled = regex.compile(pattern)
    except (regex.error, ValueError, OverflowError) as error:  # ValueError: a number of thousands of digits
        raise InputError(f"{name}: not a regular expression: {shown(str(error), 200, quoted=False)}") from None
    except (RecursionError, MemoryError):
        raise InputError(f"{name}: not a regular expression: nested too deeply") from None
    search = compiled.fullmatch if whole else compiled.search
    left = _SECONDS

    def matches(text: str) -> bool:
        nonlocal left
        started = time.thread_time()
        try:
            found = search(text, timeout=max(left, 1e-3)) is not None
        except (TimeoutError, MemoryError, RecursionError):
            raise InputError(f"{name}: takes too long to match {shown(text)}; write a simpler pattern") from None
        left -= time.thread_time() - started
        return found

    return matches
