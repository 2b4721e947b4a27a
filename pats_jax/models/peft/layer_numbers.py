"""A number for each layer, given by regexes over the layers' names, by PEFT's rule."""

import math
import re
from collections.abc import Callable, Iterable

from pats_jax.errors import InputError, shown
from pats_jax.models.patterns import compile_pattern


class LayerNumbers:
    """A number for each layer: that of the first pattern that matches its name, else the default.

    As in PEFT's ``get_pattern_key``, a pattern must match the whole name, or the end of it after a dot: ``query`` and
    ``0\\.attention\\.self\\.query`` both match ``bert.encoder.layer.0.attention.self.query``.

    Attributes:
      by_pattern: pattern -> number, in order.
    """

    def __init__(
        self,
        settings: Iterable[str],
        default: float,
        flag: str,
        kind: Callable[[str], float],
        largest: float = math.inf,
    ):
        """Reads the patterns.

        Args:
          settings: ``REGEX=NUMBER``, each.
          default: the number of layers that no pattern matches.
          flag: what to call the patterns in error messages.
          kind: ``int`` or ``float``; numbers must be greater than 0.
          largest: and at most this.

        Raises:
          InputError: if one is not of this form, its regex is not valid, or it occurs twice.
        """
        self._default, self._flag = default, flag
        self.by_pattern: dict[str, float] = {}
        for text in settings:
            pattern, _, number = text.rpartition("=")
            if pattern in self.by_pattern:
                raise InputError(f"{flag} {shown(text)}: {shown(pattern)} occurs twice; give it once")
            self.by_pattern[pattern] = _number(number, kind) if pattern else math.nan
            if not 0 < self.by_pattern[pattern] <= largest or self.by_pattern[pattern] == math.inf:
                what = f"a whole number from 1 to {largest}" if kind is int else "a number greater than 0"
                raise InputError(f"{flag} {shown(text)}: must be REGEX=NUMBER, with {what}")
        self._rules = {pattern: _rule(pattern, flag) for pattern in self.by_pattern}

    def __call__(self, name: str) -> float:
        """The number of the layer with this name."""
        pattern = self._pattern_of(name)
        return self._default if pattern is None else self.by_pattern[pattern]

    def source_of(self, name: str, plain: str, of_patterns: str) -> str:
        """What gives a layer its number, for error messages: the setting ``plain``, or a pattern of another one."""
        pattern = self._pattern_of(name)
        return plain if pattern is None else f"{of_patterns} {shown(pattern)}"

    def used(self, names: Iterable[str]) -> tuple[str, ...]:
        """The settings that give at least one of the layers its number."""
        found = set(map(self._pattern_of, names))
        return as_settings({pattern: number for pattern, number in self.by_pattern.items() if pattern in found})

    def check_used(self, names: Iterable[str]) -> None:
        """Raises InputError if a pattern gives none of the layers its number."""
        names = list(names)
        found = set(map(self._pattern_of, names))
        for pattern in self.by_pattern:
            if pattern not in found:
                earlier = " that no earlier one matches" if any(map(self._rules[pattern], names)) else ""
                raise InputError(
                    f"{self._flag} {shown(pattern)}: matches the end of no adapted layer's name{earlier}; one is named "
                    f"{names[0]}"
                )

    def _pattern_of(self, name):
        return next((pattern for pattern, matches in self._rules.items() if matches(name)), None)


def as_settings(by_pattern: dict[str, float]) -> tuple[str, ...]:
    """Pattern -> number, as the settings that `LayerNumbers` reads."""
    return tuple(f"{pattern}={number}" for pattern, number in by_pattern.items())


def _number(text: str, kind: Callable[[str], float]) -> float:
    try:
        return kind(text)
    except ValueError:
        return math.nan


def _rule(pattern: str, flag: str) -> Callable[[str], bool]:
    compile_pattern(pattern, flag)  # by itself, so that the brackets around it are its only ones
    whole = rf"(.*\.)?({pattern})"
    try:
        re.compile(whole)  # which PEFT will do
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise InputError(f"{flag} {shown(pattern)}: not a regular expression of Python's re: {error}") from None
    return compile_pattern(whole, flag, whole=True)
