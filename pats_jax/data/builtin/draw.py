"""Seeded choices, the same on every Python version and platform.

Python promises the same sequence in all versions only for ``random()``, so every choice is made from it.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")

# Every fifth entry of a vocabulary table is kept from the training rows.
UNSEEN_EVERY = 5
VOCABULARIES = ("seen", "unseen", "all")


class Example(NamedTuple):
    """One row of a task: one or two texts, and the label as the official files spell it."""

    sentence1: str
    sentence2: str | None
    label: str


class Draw:
    """The choices that make the rows of one file.

    Args:
      seed: any text; the same text gives the same choices.
      vocabulary: the entries of the vocabulary tables that `word` and `words` may return: "seen" (those of the training
        rows), "unseen" (those kept out of them) or "all".
    """

    def __init__(self, seed: str, vocabulary: str):
        if vocabulary not in VOCABULARIES:
            raise ValueError(f"vocabulary must be one of {', '.join(VOCABULARIES)}, got {vocabulary!r}")
        self._random = random.Random(seed)
        self._vocabulary = vocabulary

    def below(self, count: int) -> int:
        """Returns a whole number in [0, count)."""
        return int(self._random.random() * count)

    def chance(self, probability: float) -> bool:
        """Returns True with the given probability."""
        return self._random.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        """Returns one of the items, all equally likely."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Returns the items in a random order (the shuffle of Fisher and Yates)."""
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def word(self, table: Sequence[T]) -> T:
        """Returns one entry of a vocabulary table."""
        return self.words(table, 1)[0]

    def words(self, table: Sequence[T], count: int) -> list[T]:
        """Returns different entries of a vocabulary table."""
        allowed = [index for index in range(len(table)) if self._allows(index)]
        chosen: list[int] = []
        while len(chosen) < count:
            index = self.pick(allowed)
            if index not in chosen:
                chosen.append(index)
        return [table[index] for index in chosen]

    def _allows(self, index: int) -> bool:
        unseen = index % UNSEEN_EVERY == UNSEEN_EVERY - 1
        return self._vocabulary == "all" or unseen == (self._vocabulary == "unseen")
