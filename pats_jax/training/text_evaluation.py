"""Writes texts with a model, scores them, and puts them into tables."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pats_jax.data import batches
from pats_jax.data.pair_batches import source_inputs
from pats_jax.data.text_pairs import TextPairs
from pats_jax.train_state import Batch
from pats_jax.training.evaluation import to_tsv
from pats_jax.training.runners import CompiledProgram, MeshRunner
from pats_jax.training.shape_costs import MOST_BUCKETS
from pats_jax.training.text_metrics import TextMetric, score_texts


@dataclasses.dataclass(frozen=True)
class TextWriter:
    """Writes a text for each source of a split by generation, and scores them on the validation split.

    Attributes:
      generate: returns the texts' tokens as `Generated` for parameters and this process's own rows of a batch.
      runner: distributes rows over the devices.
      splits: the data by name.
      tokens: split -> its sources' tokens.
      tokenizer: makes texts of tokens.
      metrics: those of `evaluate`.
      batch_size: number of rows per device.
      interrupt: called before every batch; what it raises ends the writing.
      shape_cost: see `shape_costs`, for one pass.
      evaluations: the number of times that the validation data is scored.
      last: the texts of the last evaluation, by split.
    """

    generate: CompiledProgram
    runner: MeshRunner
    splits: Mapping[str, TextPairs]
    tokens: Mapping[str, batches.Tokens]
    tokenizer: Any
    metrics: Sequence[TextMetric]
    batch_size: int
    interrupt: Callable[[], None] = lambda: None
    shape_cost: float = 0.0
    evaluations: int = 1
    last: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def texts(self, params: Any, name: str) -> list[str]:
        """The text that the model writes for each source of a split. May raise `Preempted`."""
        found = [""] * len(self.tokens[name])
        for rows, batch in self.rows_and_batches(name):
            self.interrupt()
            sequences = np.asarray(self.generate(params, batch).sequences)[: len(rows), 0]
            for row, text in zip(rows, self.decoded(sequences), strict=True):
                found[row] = text
        return found

    def decoded(self, sequences: np.ndarray) -> list[str]:
        """The texts of tokens (rows, length), without special tokens and blanks around them.

        A model may have more ids than the tokenizer; those stand for nothing.
        """
        known = [row[row < len(self.tokenizer)] for row in sequences]
        return [text.strip() for text in self.tokenizer.batch_decode(known, skip_special_tokens=True)]

    def evaluate(self, params: Any) -> dict[str, float]:
        """The scores on the validation split. May raise `Preempted`."""
        self.last["validation"] = self.texts(params, "validation")
        return self.scores("validation", self.last["validation"])

    def scores(self, name: str, texts: Sequence[str]) -> dict[str, float]:
        """The scores of texts for the sources of a split that has targets."""
        targets = self.splits[name].targets
        assert targets is not None
        return score_texts(self.metrics, texts, [target.strip() for target in targets])

    def programs(self, params: Any) -> list[Callable[[], None]]:
        """Functions that compile the programs of `evaluate`, one per shape, for the shapes of parameters."""
        shapes = {batch["input_ids"].shape: batch for _, batch in self.rows_and_batches("validation")}
        return [functools.partial(self.generate.compile, params, batch) for batch in shapes.values()]

    def rows_and_batches(self, name: str) -> Iterator[tuple[np.ndarray, Batch]]:
        """Row numbers and batches of a split, with only this process's own rows."""
        tokens, devices = self.tokens[name], self.runner.num_devices
        passes = self.evaluations if name == "validation" else 1
        boundaries = batches.bucket_boundaries(tokens.lengths, MOST_BUCKETS, shape_cost=self.shape_cost / passes)
        batch_size = min(self.batch_size, -(-len(tokens) // devices)) * devices
        own = self.runner.own_rows(batch_size)
        for rows, batch in batches.eval_batches(tokens, None, batch_size, boundaries, own=own):
            yield rows, source_inputs(batch)

    def table(self, name: str, texts: Sequence[str]) -> str:
        """A TSV with the columns ``id`` and ``prediction`` and, if the split has targets, ``reference``."""
        split = self.splits[name]
        if split.targets is None:
            return to_tsv(("id", "prediction"), zip(split.ids, texts, strict=True))
        return to_tsv(("id", "prediction", "reference"), zip(split.ids, texts, split.targets, strict=True))
