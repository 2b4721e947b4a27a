"""Few-shot tasks: rows with options to choose from, or with a text as answer, in samples of a few rows each.

References:
  CrossFit and the NLP few-shot gym: Ye, Lin and Ren, EMNLP 2021, arXiv 2104.08835, github.com/INK-USC/CrossFit.
  Its tasks with their options: MetaICL, Min et al., NAACL 2022, arXiv 2110.15943.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pats_jax.data.crossfit import AnswerMetric, crossfit_tasks
from pats_jax.data.tables import listed
from pats_jax.errors import InputError

CLASSIFICATION, MULTIPLE_CHOICE, TEXT_TO_TEXT = KINDS = ("classification", "multiple_choice", "text_to_text")
SPLITS = ("train", "dev", "test")


class Row(NamedTuple):
    """One row of a task.

    Attributes:
      input: the text; its parts, if any, are named and separated by " [SEP] ".
      options: the possible outputs, at least two different ones; none if the task is text to text.
      answer: index of the right option; the first one if several are spelled alike. 0 without options.
      references: without options the right answers, at least one.
      whole: the input as the file has it, if the options were taken off its end.
    """

    input: str
    options: tuple[str, ...]
    answer: int
    references: tuple[str, ...] = ()
    whole: str | None = None

    @property
    def output(self) -> str:
        """The right option, or the first reference."""
        return self.options[self.answer] if self.options else self.references[0]

    @property
    def right_answers(self) -> tuple[str, ...]:
        """All right answers as texts."""
        return self.references or (self.output,)


@dataclass(frozen=True)
class Sample:
    """One few-shot sample of a task: tune on train, choose on dev, score on test.

    Attributes:
      seed: the seed that drew it, which names its files.
      train: the rows to tune on.
      dev: the rows to choose settings by, as many as in ``train``.
      test: many rows, usually the same for all samples; empty if the gym has no test file.
    """

    seed: int
    train: tuple[Row, ...]
    dev: tuple[Row, ...]
    test: tuple[Row, ...] = ()


@dataclass(frozen=True)
class FewShotTask:
    """A task of a few-shot gym.

    Attributes:
      name: its name in file names and partitions.
      options: the classes by index, the options of every row in that order; None if each row has its own options, or
        none.
      samples: the samples, by increasing seed.
    """

    name: str
    options: tuple[str, ...] | None
    samples: tuple[Sample, ...]

    @property
    def kind(self) -> str:
        """One of ``KINDS``: the same options on every row make a classification task, no options text to text."""
        if self.options is not None:
            return CLASSIFICATION
        return TEXT_TO_TEXT if self.samples and not self.samples[0].train[0].options else MULTIPLE_CHOICE

    @property
    def metric(self) -> str:
        """The name of the task's metric in ``pats_jax.training.metrics``, which takes option indices.

        If each row has its own options, indices are not classes, and only accuracy makes sense. (CrossFit uses the F1
        over the texts of the answers for one such task, codah.)
        """
        return "accuracy" if self.options is None else task_metric(self.name)

    @property
    def answer_metric(self) -> AnswerMetric:
        """The name of the metric of its answers as texts: CrossFit's.

        For a task that CrossFit does not have: accuracy if it has options, else exact match.
        """
        known = crossfit_tasks().get(self.name)
        if known is not None:
            return known.metric
        return "exact_match" if self.kind == TEXT_TO_TEXT else "accuracy"

    @property
    def is_crossfits_sampling(self) -> bool | None:
        """Whether the samples have the sizes that CrossFit draws; None for a task that CrossFit does not have.

        CrossFit takes the first 16 rows of each output for training and the next 16 for dev, or the first and the next
        32 of all rows; only a set without further rows gives fewer. MetaICL's files have 16 rows in all.
        """
        known = crossfit_tasks().get(self.name)
        if known is None:
            return None
        by_output = known.shots == 16
        for sample in self.samples:
            train, dev = (
                Counter(row.output if by_output else None for row in rows) for rows in (sample.train, sample.dev)
            )
            full = {output for output, count in train.items() if count == known.shots}
            if max((*train.values(), *dev.values())) > known.shots or not set(dev) <= full:
                return False
        return True

    def sample(self, seed: int) -> Sample:
        """The sample of a seed.

        Raises:
          InputError: if the task has no sample with that seed.
        """
        for sample in self.samples:
            if sample.seed == seed:
                return sample
        seeds = ", ".join(str(sample.seed) for sample in self.samples)
        raise InputError(f"{self.name}: no sample of seed {seed}; there are {seeds}")

    def choose(self, seeds: Sequence[int] | None) -> "FewShotTask":
        """The same with the samples of these seeds only; None keeps all.

        Raises:
          InputError: if the task has no sample with one of them.
        """
        if seeds is None:
            return self
        return FewShotTask(self.name, self.options, tuple(map(self.sample, sorted(set(seeds)))))


def task_metric(name: str) -> str:
    """The metric of a task's option indices, by its name in ``pats_jax.training.metrics``.

    It is that by which CrossFit scores the task, if that is Matthews correlation or macro F1, else accuracy.

    Examples:
      >>> [task_metric(name) for name in ("glue-cola", "tweet_eval-irony", "glue-sst2", "my-own")]
      ['matthews_correlation', 'macro_f1', 'accuracy', 'accuracy']
    """
    known = crossfit_tasks().get(name)
    return known.metric if known and known.metric in ("matthews_correlation", "macro_f1") else "accuracy"


def other_sampling(tasks: Sequence[FewShotTask]) -> str | None:
    """Says in one line which tasks of CrossFit have samples that are not drawn as CrossFit draws them; None if none.

    Args:
      tasks: any tasks.
    """
    known = [task for task in tasks if task.is_crossfits_sampling is not None]
    others = [task for task in known if not task.is_crossfits_sampling]
    if not others:
        return None
    sizes = sorted({len(sample.train) for task in others for sample in task.samples})
    rows = f"{sizes[0]} rows" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} rows"
    return (
        f"not CrossFit's sampling: {len(others)} of {len(known)} tasks have {rows} in all in train; CrossFit has "
        "16 per class, or 32, so an ARG on them is not CrossFit's"
    )


def chosen_names(there: Iterable[str], wanted: Sequence[str] | None, where: str) -> list[str]:
    """Names of tasks in alphabetical order.

    Args:
      there: all existing names.
      wanted: the requested names; None: all.
      where: where they are, for the message.

    Raises:
      InputError: if a requested name does not exist.
    """
    names = sorted(there)
    missing = sorted(set(wanted or ()) - set(names))
    if missing:
        raise InputError(f"{where}: no task {listed(missing)}; its tasks are {listed(names)}")
    return names if wanted is None else sorted(set(wanted))


def build_task(name: str, samples: Iterable[Sample]) -> FewShotTask:
    """Builds a task from samples; if all rows have the same options, gives them the same order.

    Args:
      name: the task's name.
      samples: at least one.
    """
    ordered = sorted(samples, key=lambda sample: sample.seed)
    first = ordered[0].train[0].options
    rows = (row for sample in ordered for split in (sample.train, sample.dev, sample.test) for row in split)
    if not first or not all(set(row.options) == set(first) for row in rows):
        return FewShotTask(name, None, tuple(ordered))
    classes = tuple(dict.fromkeys(first))
    return FewShotTask(name, classes, tuple(_with_classes(sample, classes) for sample in ordered))


def _with_classes(sample: Sample, classes: tuple[str, ...]) -> Sample:
    index_of = {name: index for index, name in enumerate(classes)}

    def aligned(rows: Sequence[Row]) -> tuple[Row, ...]:
        return tuple(row._replace(options=classes, answer=index_of[row.output]) for row in rows)

    return Sample(sample.seed, aligned(sample.train), aligned(sample.dev), aligned(sample.test))
