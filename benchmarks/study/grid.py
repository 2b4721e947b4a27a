"""Which trainings the study makes, and in which order."""

import dataclasses
from collections.abc import Iterable, Sequence

RATE_SEEDS = tuple(range(100, 105))  # for the choice of the learning rate
RATES = (5e-5, 1e-4, 2e-4)
SCALES = (1e-2, 3e-2, 3e-3, 1e-1, 1e-3)  # in the order in which they are trained
RESPONSES = {"plain": "linear", "pats": "linear", "constant": "constant", "reversed": "reversed", "perturbed": "linear"}


@dataclasses.dataclass(frozen=True)
class Training:
    """One training of the study.

    Attributes:
      task: of `benchmarks.study.data.TASKS`.
      method: one of `RESPONSES`.
      noise_scale: 0 for plain.
      learning_rate: peak.
      seed: of head, order of rows, dropout and noise.
    """

    task: str
    method: str
    noise_scale: float
    learning_rate: float
    seed: int


def rate_trainings(task: str, seeds: Sequence[int] = RATE_SEEDS, rates: Sequence[float] = RATES) -> list[Training]:
    """Those by which a task's learning rate is chosen."""
    return [Training(task, "plain", 0.0, rate, seed) for rate in rates for seed in seeds]


def best_rate(scores: dict[Training, float]) -> float:
    """The learning rate with the highest mean score; of equal ones the lowest."""
    rates = sorted({training.learning_rate for training in scores})

    def mean(rate):
        found = [score for training, score in scores.items() if training.learning_rate == rate]
        return sum(found) / len(found)

    return max(rates, key=mean)


def main_trainings(
    task: str, rate: float, seeds: Sequence[int], scales: Sequence[float], methods: Iterable[str]
) -> list[Training]:
    """All seeds of plain (if it is among the methods), then of all methods scale by scale."""
    methods = list(methods)
    settings = [("plain", 0.0)] if "plain" in methods else []
    settings += [(method, scale) for scale in scales for method in methods if method != "plain"]
    return [Training(task, method, scale, rate, seed) for method, scale in settings for seed in seeds]


def in_sets(trainings: Sequence[Training], lanes: int) -> list[list[Training]]:
    """Cuts the trainings of a task into sets of at most so many lanes."""
    return [list(trainings[start : start + lanes]) for start in range(0, len(trainings), lanes)]


def in_turns(sets_of_tasks: Iterable[Sequence[list[Training]]]) -> list[list[Training]]:
    """The first set of every task, the second of every task, and so on."""
    columns = [list(sets) for sets in sets_of_tasks]
    longest = max(map(len, columns), default=0)
    return [sets[number] for number in range(longest) for sets in columns if number < len(sets)]
