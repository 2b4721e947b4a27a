"""An input: the files that a reader gets, and what is known of the right answer."""

import dataclasses
import math
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# What may stand in the place of a file.
PIPE, FOLDER, LOOP, MISSING = SPECIAL = ("a pipe", "a folder", "a link to itself", "no file")


class _Anything:
    """A value that agrees with every other."""

    def __repr__(self) -> str:
        return "ANY"


ANY = _Anything()


@dataclasses.dataclass(frozen=True)
class Expected:
    """What is right.

    Attributes:
      value: what the reader must give if it accepts the input; `ANY` where that is not known.
      accept: whether it must accept the input (True), must refuse it (False), or may do either (None).
    """

    value: Any = ANY
    accept: bool | None = None


REFUSED = Expected(accept=False)
UNKNOWN = Expected()


@dataclasses.dataclass(frozen=True)
class Input:
    """What a reader gets.

    Attributes:
      files: path below the input's folder -> its bytes, or one of `SPECIAL`.
      told: what it is, in short.
      expected: what is right.
      options: for the reader; ``names`` are what, beside its files, a message may call it.
    """

    files: Mapping[str, bytes | str]
    told: str
    expected: Expected = UNKNOWN
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Makes the files below a new folder."""
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content == PIPE:
                os.mkfifo(path)
            elif content == FOLDER:
                path.mkdir()
            elif content == LOOP:
                path.symlink_to(path)


@dataclasses.dataclass(frozen=True)
class Reader:
    """What is fuzzed.

    Attributes:
      draw: makes an input.
      read: gives the input's folder, and the input, to the library; returns plain values, comparable with what is
        expected.
    """

    draw: Callable[[random.Random], Input]
    read: Callable[[Path, Input], Any]


class Unfit(Exception):
    """What a reader has accepted is of no use."""


def must(holds: bool, told: str) -> None:
    """Raises Unfit unless something holds."""
    if not holds:
        raise Unfit(told)


def agree(found: Any, expected: Any) -> bool:
    """Whether a value is the one expected; `ANY` in the latter agrees with everything."""
    if expected is ANY:
        return True
    if isinstance(expected, float) and isinstance(found, float):
        return found == expected or (math.isnan(found) and math.isnan(expected))
    if isinstance(expected, dict) and isinstance(found, dict):
        return found.keys() == expected.keys() and all(agree(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple) and isinstance(found, list | tuple):
        return len(found) == len(expected) and all(map(agree, found, expected))
    return type(found) is type(expected) and found == expected
