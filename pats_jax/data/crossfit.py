"""CrossFit's table of its 160 few-shot tasks, ``crossfit_tasks.tsv``.

The table is the project's own: the facts are those of CrossFit's code (commit 56285ca) and of the ontology in
CrossTaskMoE (commit 251fb95), which groups the tasks.

References:
  CrossFit and the NLP few-shot gym: Ye, Lin and Ren, EMNLP 2021, arXiv 2104.08835, github.com/INK-USC/CrossFit.
"""

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pats_jax.data.tables import read_tsv

AnswerMetric = Literal[
    "exact_match", "accuracy", "qa_f1", "macro_f1", "matthews_correlation", "pearson", "rouge_l", "rouge_score_l"
]
ANSWER_METRICS: tuple[AnswerMetric, ...] = get_args(AnswerMetric)
_COLUMNS = ("task", "category", "group", "metric", "shots", "references", "input")


@dataclass(frozen=True)
class CrossFitTask:
    """A row of the table.

    Attributes:
      name: the task's name.
      category: "classification", "qa", "conditional generation" or "other".
      group: the group within the category, such as "nli".
      metric: the metric of its answers, see `pats_jax.training.answer_metrics`; the first seven of ``ANSWER_METRICS``
        occur.
      shots: 16: CrossFit's samples have up to 16 rows of each output in each of train and dev; 32: 32 rows in all.
      has_several_references: whether a row may have several right answers.
      input: the format of an input, with what is filled in in braces; oddities such as missing blanks are CrossFit's.
        Choices are written `` (A) one (B) other``, behind a blank.
    """

    name: str
    category: str
    group: str
    metric: AnswerMetric
    shots: int
    has_several_references: bool
    input: str

    @property
    def is_text_to_text(self) -> bool:
        """Whether its answers are scored as texts, so that they need not be among a few options."""
        return self.metric in ("exact_match", "qa_f1", "rouge_l")


@functools.cache
def crossfit_tasks() -> Mapping[str, CrossFitTask]:
    """Name -> task, of all 160, in alphabetical order.

    Examples:
      >>> task = crossfit_tasks()["anli"]
      >>> task.group, task.metric, task.shots, task.input
      ('nli', 'macro_f1', 16, 'premise: {premise} [SEP] hypothesis: {hypothesis}')
    """
    table, _ = read_tsv(Path(__file__).with_name("crossfit_tasks.tsv"), _COLUMNS)
    rows = zip(*(table.columns[name] for name in _COLUMNS), strict=True)
    tasks = {
        name: CrossFitTask(name, category, group, metric, int(shots), references == "several", given)  # type: ignore[arg-type]
        for name, category, group, metric, shots, references, given in rows
    }
    return types.MappingProxyType(tasks)
