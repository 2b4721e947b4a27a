"""Checks of the arguments that optimizers and objectives are made with; each failure is a ValueError of one line."""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def choose(argument: str, name: Any, table: dict[str, Any]) -> Any:
    """The table's entry of that name."""
    if name not in table:
        raise ValueError(f"{argument}={name!r} is not one of {', '.join(map(repr, table))}")
    return table[name]


def check_number(argument: str, value: Any, holds: Callable[[float], bool], expected: str) -> None:
    """Raises if a number is not as expected; traced numbers are not checked."""
    if isinstance(value, jax.core.Tracer):
        return
    if not isinstance(value, (numbers.Real, np.ndarray, jax.Array)) or not holds(float(value)):
        raise ValueError(f"{argument}={value!r} must be {expected}")


def is_plainly(value: Any, number: float) -> bool:
    """Whether an argument is that number; arrays, traced or not, may change later and are never plainly anything."""
    return isinstance(value, numbers.Real) and value == number
