"""How a model answers the rows of few-shot tasks: what an upstream stage and a tuning need of it.

`option_answering` scores options by an encoder; `text_answering` generates texts by an encoder-decoder, or scores
options by their likelihood.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pats_jax.data.few_shot import FewShotTask, Row
from pats_jax.train_state import Batch, LossFn
from pats_jax.training.answer_metrics import AnswerScore

Answers = Sequence[Any]  # one for each row: the index of an option, or a text
Step = Callable[[Any, Batch], Any]
Shapes = dict[str, tuple[int, ...]]


class Answering(abc.ABC):
    """A model with its tokenizer and a way to answer.

    Attributes:
      model: the model, with its adapter if it has one.
      tokenizer: its tokenizer.
      max_length: the longest input, in tokens.
    """

    model: Any
    tokenizer: Any
    max_length: int

    def prepare(self, task: FewShotTask) -> FewShotTask:
        """The task with inputs as the model reads them."""
        return task

    @abc.abstractmethod
    def trainable_mask(self, params: Any, trained: str) -> Any:
        """A tree of bools like params: which are trained, for "plm", "pe" or "plm+pe"."""

    @abc.abstractmethod
    def make_loss(self, *, deterministic: bool = False) -> LossFn:
        """``loss_fn(params, batch, key) -> (loss, metrics)`` for the batches of `encode`."""

    @abc.abstractmethod
    def encode(self, rows: Sequence[Row], *, share_options: bool = False) -> dict[str, np.ndarray]:
        """A batch to train on, padded to few shapes; see `option_scoring.encode_rows`."""

    def row_shapes(self, rows: Sequence[Row]) -> Shapes:
        """The shapes, without the rows' axis, that hold a batch of any of the rows; for `option_scoring.pad_to`."""
        return {name: x.shape[1:] for name, x in self.encode(rows).items()}

    @abc.abstractmethod
    def shares_options(self, task: FewShotTask) -> bool:
        """Whether all rows in a batch of the task have the same options, and the model reads them only once."""

    @abc.abstractmethod
    def simplify(self, row: Row, most: int, rng: np.random.Generator) -> Row:
        """A row as it is trained on once: with at most ``most`` options, or one of its right answers."""

    @abc.abstractmethod
    def variants(self, row: Row, most: int) -> list[Row]:
        """Rows that are together as wide as any that `simplify` can make of a row."""

    @property
    @abc.abstractmethod
    def step(self) -> Step:
        """A pure function ``step(params, batch)`` that answers a batch, for `answer`."""

    @abc.abstractmethod
    def answer(
        self, step: Step, params: Any, rows: Sequence[Row], batch_size: int, *, share_options: bool = False
    ) -> Answers:
        """Answers rows.

        Args:
          step: `step`, compiled.
          params: the parameters.
          rows: at least one.
          batch_size: rows per batch.
          share_options: see `option_scoring.encode_rows`.
        """

    @abc.abstractmethod
    def metric(self, task: FewShotTask) -> str:
        """The name of the task's score."""

    @abc.abstractmethod
    def score(self, task: FewShotTask, answers: Answers, rows: Sequence[Row]) -> AnswerScore:
        """The score of answers to a task's rows."""

    @abc.abstractmethod
    def make_examination(
        self, step: Step, task: FewShotTask, rows: Sequence[Row], shapes: Shapes
    ) -> Callable[[Any], tuple[float, float]]:
        """Returns ``examine(params) -> (score, loss)`` on a few rows, such as a sample's dev rows.

        Args:
          step: `step`, compiled.
          task: the rows' task.
          rows: at least one.
          shapes: those of the task, see `row_shapes`.
        """


def count_rows(batch: dict[str, np.ndarray]) -> int:
    """The number of rows of a batch of `Answering.encode`, whatever axes stand before the rows."""
    for suffix, trailing in (("answers", 0), ("label_mask", 1)):
        found = [x.shape for name, x in batch.items() if name.endswith(suffix)]
        if found:
            return sum(int(np.prod(shape[: len(shape) - trailing])) for shape in found)
    raise ValueError(f"the batch has neither answers nor labels; it has {', '.join(batch)}")
