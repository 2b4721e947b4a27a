"""The class names of a head, and matching them with those of a task.

Checkpoints order the same classes differently: one has CONTRADICTION, NEUTRAL, ENTAILMENT, the task entailment,
neutral, contradiction. So labels are matched by name, and logits are reordered to the task's order.
"""

from collections.abc import Mapping, Sequence

import numpy as np


def simplified(label: str) -> str:
    """A label without blanks, hyphens and underscores, in lower case.

    Examples:
      >>> simplified("Not-Entailment") == simplified("not_entailment") == simplified("NOT ENTAILMENT")
      True
    """
    return "".join(letter for letter in label.casefold() if letter not in "-_" and not letter.isspace())


def match_labels(labels: Sequence[str], others: Sequence[str]) -> np.ndarray | None:
    """Matches labels with others by name.

    Names are compared exactly first, then `simplified`; simplified names must be unique.

    Args:
      labels: names of classes by index.
      others: names of classes by index.

    Returns:
      int32 (labels,), where ``others[result[i]]`` is ``labels[i]``; None unless both have the same names.

    Examples:
      >>> match_labels(("entailment", "neutral", "contradiction"), ("CONTRADICTION", "NEUTRAL", "ENTAILMENT"))
      array([2, 1, 0], dtype=int32)
    """
    for spell in (str, simplified):
        places = {spell(name): index for index, name in enumerate(others)}
        found = [places.get(spell(name), -1) for name in labels]
        if len(places) == len(others) and sorted(found) == list(range(len(others))):
            return np.array(found, np.int32)
    return None


def is_nameless(labels: Mapping[int, str] | Sequence[str]) -> bool:
    """Whether a head's labels are only numbers: ``LABEL_0``, ``LABEL_1``, ... or ``0``, ``1``, ...

    Examples:
      >>> is_nameless(("LABEL_0", "LABEL_1")), is_nameless({0: "0", 1: "1"}), is_nameless(("LABEL_1", "LABEL_0"))
      (True, True, False)
    """
    names = [labels[index] for index in range(len(labels))]
    return any(
        all(simplified(name) == f"{prefix}{index}" for index, name in enumerate(names)) for prefix in ("label", "")
    )


def respelled(names: Sequence[str], written: Sequence[str]) -> tuple[str, ...]:
    """A head's names as spelled in the data, where exactly one spelling matches.

    Args:
      names: the head's names, by index.
      written: the labels that occur in the data, in any order; the data may lack some classes.

    Examples:
      >>> respelled(("NEGATIVE", "POSITIVE"), ["positive"])
      ('NEGATIVE', 'positive')
    """

    def respell(name):
        same = [label for label in written if simplified(label) == simplified(name)]
        alone = sum(simplified(other) == simplified(name) for other in names) == 1
        return same[0] if alone and len(same) == 1 and name not in written else name

    return tuple(map(respell, names))
