"""The two shapes of a generated task: what a grammar must give so that rows can be made of it."""

from collections.abc import Callable
from typing import NamedTuple

from pats_jax.data.builtin.draw import Draw


class Classification(NamedTuple):
    """The same options on every row.

    Attributes:
      options: the classes.
      write: returns an input whose right option is the given one.
    """

    options: tuple[str, ...]
    write: Callable[[Draw, str], str]


class Question(NamedTuple):
    """One row of a multiple-choice task; the options are shuffled later."""

    input: str
    right: str
    wrong: tuple[str, ...]


class MultipleChoice(NamedTuple):
    """Each row has options of its own.

    Attributes:
      ask: returns a row.
    """

    ask: Callable[[Draw], Question]


Grammar = Classification | MultipleChoice


def parts(**named: str) -> str:
    """An input of named parts, in the gym's way of writing it: "premise: ... [SEP] hypothesis: ..."."""
    return " [SEP] ".join(f"{name.replace('_', ' ')}: {text}" for name, text in named.items())
