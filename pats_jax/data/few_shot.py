"""Few-shot tasks: rows with options to choose from, in samples of a few training and dev rows each.

References:
  CrossFit and the NLP few-shot gym: Ye, Lin and Ren, EMNLP 2021, arXiv 2104.08835, github.com/INK-USC/CrossFit.
  Its tasks with their options: MetaICL, Min et al., NAACL 2022, arXiv 2110.15943.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pats_jax.data.tables import listed
from pats_jax.errors import InputError

CLASSIFICATION, MULTIPLE_CHOICE = KINDS = ("classification", "multiple_choice")
SPLITS = ("train", "dev", "test")

# How CrossFit scores the tasks that are not scored by accuracy (dataloader/metrics.py there), as far as they are
# questions with options: "Classification-F1" is the mean of the classes' F1, "Matthew-Correlation" is glue-cola's.
_MACRO_F1 = frozenset(
    "ade_corpus_v2-classification ag_news amazon_polarity anli circa climate_fever dbpedia_14 discovery emo emotion "
    "financial_phrasebank hate_speech18 hate_speech_offensive hatexplain health_fact imdb liar onestop_english paws "
    "poem_sentiment rotten_tomatoes scicite scitail sick sms_spam tab_fact trec trec-finegrained wiki_auto wiki_qa "
    "yahoo_answers_topics yelp_polarity".split()
)
_MACRO_F1_COLLECTIONS = ("ethos-", "tweet_eval-")


class Row(NamedTuple):
    """One row of a task.

    Attributes:
      input: the text; its parts, if any, are named and separated by " [SEP] ".
      options: the possible outputs, at least two different ones.
      answer: index of the right option; the first one if several are spelled alike.
    """

    input: str
    options: tuple[str, ...]
    answer: int

    @property
    def output(self) -> str:
        return self.options[self.answer]


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
      options: the classes by index, the options of every row in that order; None if each row has its own options.
      samples: the samples, by increasing seed.
    """

    name: str
    options: tuple[str, ...] | None
    samples: tuple[Sample, ...]

    @property
    def kind(self) -> str:
        """One of ``KINDS``: the same options on every row make a classification task."""
        return MULTIPLE_CHOICE if self.options is None else CLASSIFICATION

    @property
    def metric(self) -> str:
        """The name of the task's metric in ``pats_jax.metrics``, which takes option indices.

        If each row has its own options, indices are not classes, and only accuracy makes sense. (CrossFit uses the F1
        over the texts of the answers for one such task, codah.)
        """
        return "accuracy" if self.options is None else task_metric(self.name)

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
    """The metric by which CrossFit scores a task, by its name in ``pats_jax.metrics``; accuracy for any other.

    Examples:
      >>> [task_metric(name) for name in ("glue-cola", "tweet_eval-irony", "glue-sst2", "my-own")]
      ['matthews_correlation', 'macro_f1', 'accuracy', 'accuracy']
    """
    if name == "glue-cola":
        return "matthews_correlation"
    return "macro_f1" if name in _MACRO_F1 or name.startswith(_MACRO_F1_COLLECTIONS) else "accuracy"


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
    if not all(set(row.options) == set(first) for row in rows):
        return FewShotTask(name, None, tuple(ordered))
    classes = tuple(dict.fromkeys(first))
    return FewShotTask(name, classes, tuple(_with_classes(sample, classes) for sample in ordered))


def _with_classes(sample: Sample, classes: tuple[str, ...]) -> Sample:
    index_of = {name: index for index, name in enumerate(classes)}

    def aligned(rows: Sequence[Row]) -> tuple[Row, ...]:
        return tuple(Row(row.input, classes, index_of[row.output]) for row in rows)

    return Sample(sample.seed, aligned(sample.train), aligned(sample.dev), aligned(sample.test))
