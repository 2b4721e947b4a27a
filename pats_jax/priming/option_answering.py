"""Answers of an encoder: it scores each of a row's options, see `option_scoring`."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from pats_jax.data.few_shot import Row
from pats_jax.priming import option_scoring
from pats_jax.priming.answering import Answering
from pats_jax.training import metrics
from pats_jax.training.answer_metrics import AnswerScore


class OptionAnswering(Answering):
    """An encoder with one of ``option_scoring.HEADS``; answers are the indices of options."""

    def __init__(self, head: str, model: Any, tokenizer: Any, max_seq_length: int, max_options: int | None = None):
        """Takes a scorer.

        Args:
          head: the name of the head.
          model: from `option_scoring.load_scorer`.
          tokenizer: its tokenizer.
          max_seq_length: the longest text in tokens; the model may have fewer positions.
          max_options: the most options of a row that is trained on; None: all.

        Raises:
          InputError: if the model has too few positions.
        """
        self.model, self.tokenizer = model, tokenizer
        self.max_length = option_scoring.text_length(max_seq_length, model)
        self.head = option_scoring.get_head(head)
        self._head_name, self._max_options = head, max_options

    def trainable_mask(self, params, trained):
        return option_scoring.trainable_mask(params, trained, self._head_name)

    def make_loss(self, *, deterministic=False):
        return option_scoring.make_option_loss(self.head, self.model, deterministic=deterministic)

    def encode(self, rows, *, share_options=False):
        return option_scoring.encode_rows(self.head, rows, self.tokenizer, self.max_length, share_options=share_options)

    def shares_options(self, task):
        most = self._max_options
        return task.options is not None and (most is None or len(task.options) <= most)

    def simplify(self, row, most, rng):
        return option_scoring.with_fewer_options(row, most, rng)

    def variants(self, row, most):
        return [Row(row.input, row.options[first : first + most], 0) for first in range(0, len(row.options), most)]

    @property
    def step(self):
        return functools.partial(option_scoring.option_scores, self.head, self.model)

    def answer(self, step, params, rows, batch_size, *, share_options=False):
        return option_scoring.choose(
            step, self.head, params, rows, self.tokenizer, self.max_length, batch_size, share_options=share_options
        )

    def metric(self, task):
        return task.metric

    def score(self, task, answers, rows):
        return AnswerScore(metrics.METRICS[task.metric](answers, np.array([row.answer for row in rows])))

    def make_examination(self, step, task, rows, shapes):
        batch = option_scoring.pad_to(self.encode(rows, share_options=self.shares_options(task)), shapes)
        right = np.array([row.answer for row in rows])

        def examine(params):
            found = np.asarray(step(params, batch))
            loss = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(found), right).mean()
            return metrics.METRICS[task.metric](np.argmax(found, axis=1), right), float(loss)

        return examine
