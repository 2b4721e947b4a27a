"""Which trainings the study makes, and in which order."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from pats_jax.methods import METHODS, Method
from pats_jax.methods.pats import Noise

RATE_SEEDS = tuple(range(100, 105))  # for the choice of the learning rate
RATES = (5e-5, 1e-4, 2e-4)
SCALES = (1e-2, 3e-2, 3e-3, 1e-1, 1e-3)  # in the order in which they are trained
PLAIN = "plain"


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is compared: a method of `pats-jax glue` with some settings.

    Attributes:
      name: in runs.jsonl and in the report.
      method: as in ``--method``.
      settings: (flag, value) pairs; everything else has its default.
      whole_vocabulary: whether the method measures the table of words as one tensor, so that words which do not occur
        count.
    """

    name: str
    method: str
    settings: tuple[tuple[str, str], ...] = ()
    whole_vocabulary: bool = False

    @property
    def method_type(self) -> type[Method]:
        """The class of its method."""
        return METHODS[self.method]

    @property
    def is_noisy(self) -> bool:
        """Whether its method has a noise scale, which is 0 for plain fine-tuning, and measures sensitivity."""
        return issubclass(self.method_type, Noise)

    @property
    def response(self) -> str:
        """How noise depends on sensitivity, which lanes of one program may differ in."""
        return dict(self.settings).get("response", "linear")

    @property
    def program(self) -> tuple[object, ...]:
        """What arms that share their programs have in common."""
        return self.method, self.whole_vocabulary, *(pair for pair in self.settings if pair[0] != "response")


ARMS = {
    arm.name: arm
    for arm in (
        Arm(PLAIN, "pats"),  # noise of scale 0
        Arm("pats", "pats"),
        Arm("constant", "pats", (("response", "constant"),)),
        Arm("reversed", "pats", (("response", "reversed"),)),
        Arm("perturbed", "perturbed"),
        Arm("not-annealed", "pats", (("noise_schedule", "constant"),)),
        Arm("all-leaves", "pats", (("noise_layers", "."),), whole_vocabulary=True),
        Arm("exponential", "pats", (("response", "exponential"),)),
        Arm("dps-dense", "dps-dense"),
        Arm("dps-mix", "dps-mix"),
        Arm("noisytune", "noisytune", whole_vocabulary=True),
        Arm("sage", "sage"),
        Arm("child-f", "child-f"),
        Arm("child-d", "child-d"),
        Arm("mixout", "mixout"),
        Arm("r3f", "r3f"),
        Arm("r-drop", "r-drop"),
        Arm("lnsr", "lnsr"),
    )
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the study.

    Attributes:
      title: its heading in the report.
      tasks: in the order in which they are trained.
      stages: names of arms; those of a stage are trained scale by scale, and the next stage's programs are compiled
        meanwhile.
    """

    title: str
    tasks: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]

    @property
    def arms(self) -> list[str]:
        """The names of all its arms but plain."""
        return [name for stage in self.stages for name in stage if name != PLAIN]


_SMALL_TASKS = ("mrpc", "rte", "sst2", "cola")
# In the order of training: what answers the question first.
PARTS = {
    "a": Part("PATS and its controls", _SMALL_TASKS, ((PLAIN, "pats", "constant"), ("reversed",), ("perturbed",))),
    "b": Part("More tasks", ("stsb", "trec", "subj"), ((PLAIN, "pats", "constant"),)),
    "c": Part("Other forms of PATS", _SMALL_TASKS, (("not-annealed", "all-leaves", "exponential"),)),
    "d": Part(
        "Other methods",
        _SMALL_TASKS,
        tuple((name,) for name, arm in ARMS.items() if not arm.is_noisy),
    ),
}
TASKS = tuple(dict.fromkeys(task for part in PARTS.values() for task in part.tasks))


@dataclasses.dataclass(frozen=True)
class Training:
    """One training of the study.

    Attributes:
      task: one of `TASKS`.
      method: the name of one of `ARMS`.
      noise_scale: 0 without noise.
      learning_rate: peak.
      seed: of head, order of rows, dropout and noise.
    """

    task: str
    method: str
    noise_scale: float
    learning_rate: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Stage:
    """Arms that are trained on tasks."""

    tasks: tuple[str, ...]
    arms: tuple[str, ...]


def stages(parts: Iterable[str], tasks: Iterable[str], arms: Iterable[str]) -> Iterator[Stage]:
    """The stages of the parts, with those of their tasks and arms that are asked for."""
    asked_tasks, asked_arms = set(tasks), set(arms)
    for part in (PARTS[name] for name in PARTS if name in set(parts)):
        of_part = tuple(task for task in part.tasks if task in asked_tasks)
        for stage in part.stages:
            chosen = tuple(name for name in stage if name in asked_arms)
            if of_part and chosen:
                yield Stage(of_part, chosen)


def rate_trainings(task: str, seeds: Sequence[int] = RATE_SEEDS, rates: Sequence[float] = RATES) -> list[Training]:
    """Those by which a task's learning rate is chosen."""
    return [Training(task, PLAIN, 0.0, rate, seed) for rate in rates for seed in seeds]


def best_rate(scores: dict[Training, float]) -> float:
    """The learning rate with the highest mean score; of equal ones the lowest."""
    rates = sorted({training.learning_rate for training in scores})

    def mean(rate):
        found = [score for training, score in scores.items() if training.learning_rate == rate]
        return sum(found) / len(found)

    return max(rates, key=mean)


def main_trainings(
    task: str, rate: float, seeds: Sequence[int], scales: Sequence[float], arms: Sequence[str]
) -> list[Training]:
    """All seeds of the arms without noise, one arm after the other; then of the others, scale by scale."""
    noisy = [name for name in arms if ARMS[name].is_noisy and name != PLAIN]
    settings = [(name, 0.0) for name in arms if name not in noisy]
    settings += [(name, scale) for scale in scales for name in noisy]
    return [Training(task, name, scale, rate, seed) for name, scale in settings for seed in seeds]


def in_sets(trainings: Sequence[Training], lanes: int) -> list[list[Training]]:
    """Cuts the trainings of a task into sets of at most so many lanes."""
    return [list(trainings[start : start + lanes]) for start in range(0, len(trainings), lanes)]


def in_turns(sets_of_tasks: Iterable[Sequence[list[Training]]]) -> list[list[Training]]:
    """The first set of every task, the second of every task, and so on."""
    columns = [list(sets) for sets in sets_of_tasks]
    longest = max(map(len, columns), default=0)
    return [sets[number] for number in range(longest) for sets in columns if number < len(sets)]
