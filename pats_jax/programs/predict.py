"""Predicts labels and probabilities for new texts: `pats-jax predict`."""

import dataclasses
import functools
import logging
import os
import pathlib
import sys
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from pats_jax import models
from pats_jax.core.files import write_text
from pats_jax.data import batches, read_texts, readers
from pats_jax.errors import InputError
from pats_jax.models import peft
from pats_jax.run import compilation_cache, xla_flags
from pats_jax.train_state import make_predict_step
from pats_jax.training import runners, shape_costs
from pats_jax.training.evaluation import DAMAGED, check_finite, probability_table, sequence_length, to_tsv
from pats_jax.training.loop import predict_logits

logger = logging.getLogger(__name__)


def predict_file(
    model: Annotated[str, tyro.conf.Positional],
    *,
    file: str,
    output_file: str | None = None,
    max_seq_length: int | None = None,
    batch_size: int = 64,
) -> None:
    """Writes a TSV with labels and probabilities (or scores) for the texts in a file.

    Args:
      model: folder of a trained model, such as RUN/model, or of an adapter, such as RUN/adapter
      file: texts as CSV, TSV or JSON lines with sentence1[, sentence2], or as .txt with one text per line
      output_file: where to write the TSV; if unset, standard output
      max_seq_length: tokens; longer texts are truncated; if unset, as in training
      batch_size: rows per batch
    """
    for part in ("model", "adapter"):
        if (pathlib.Path(model) / part / "config.json").exists():
            raise InputError(f"{model}: this is the folder of a run; use its model, {pathlib.Path(model) / part}")
    if batch_size < 1:
        raise InputError(f"--batch_size {batch_size}: must be at least 1")
    target = None if output_file is None else pathlib.Path(output_file)
    if target and (target.is_dir() or not os.access(target if target.exists() else target.absolute().parent, os.W_OK)):
        raise InputError(f"--output_file {target}: cannot be written; choose a file in an existing folder")
    if target and target.exists():
        inputs = [pathlib.Path(file), *pathlib.Path(model).glob("*")]
        read = next((path for path in inputs if path.exists() and target.samefile(path)), None)
        if read:
            raise InputError(f"--output_file {target}: is the input {read}; choose another file")
    xla_flags.set_defaults()
    compilation_cache.keep_compiled_programs(None)
    table = as_table(*predict_texts(model, file, max_seq_length, batch_size))
    if target:
        _write(target, table)
    else:
        sys.stdout.write(table)


def _write(path, text):
    """Writes a file atomically, also through a link; writes to a device or pipe directly."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
    else:
        write_text(path.resolve(), text)


def predict_texts(
    model: str, file: str, max_seq_length: int | None, batch_size: int
) -> tuple[list[str], np.ndarray, tuple[str, ...] | None]:
    """The ids of a file's rows, the model's logits (rows, num_labels), and the names of the labels.

    The names are None if the model predicts a score.

    Raises:
      InputError: if a logit is not finite, or a token id is outside the model's embedding table.
    """
    split = read_texts(file)
    loaded = LoadedModel.load(model)
    return split.ids, loaded.logits(split, max_seq_length, batch_size), loaded.names


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained model or adapter, ready to predict.

    Attributes:
      network: the model.
      params: its parameters.
      config: its config.
      tokenizer: its tokenizer.
    """

    network: models.SequenceClassifier
    params: Any
    config: models.EncoderConfig
    tokenizer: Any

    @classmethod
    def load(cls, folder: str) -> "LoadedModel":
        """Loads the folder of a model or of an adapter."""
        tokenizer = models.load_tokenizer(folder)
        network: models.SequenceClassifier
        if peft.is_peft_folder(folder):
            network, params, config = peft.load_peft_model(folder)
        else:
            layers, unroll = runners.default_form(jax.default_backend())
            network, params, config = models.from_pretrained(folder, num_labels=None, layers=layers, unroll=unroll)
        return cls(network, params, config, tokenizer)

    @property
    def names(self) -> tuple[str, ...] | None:
        """The names of the classes by index; None if the model predicts a score."""
        count = self.config.num_labels
        return None if count == 1 else tuple(self.config.id2label[i] for i in range(count))

    def logits(self, split: readers.Split, max_seq_length: int | None, batch_size: int) -> np.ndarray:
        """Logits (rows, num_labels) of texts.

        Raises:
          InputError: if a logit is not finite, or a token id is outside the model's embedding table.
        """
        config, longest = self.config, self.network.max_length
        asked = min(self.tokenizer.model_max_length, longest) if max_seq_length is None else max_seq_length
        max_length = sequence_length(asked, self.network)
        tokens = batches.tokenize(split, self.tokenizer, max_length)
        batches.check_ids(tokens, config.vocab_size, config.type_vocab_size)
        if cut := batches.describe_cut(tokens, max_length, longest):
            logger.warning("%s", cut)
        cost = shape_costs.shape_cost(self.params, jax.default_backend(), 1, training=False)
        boundaries = batches.bucket_boundaries(tokens.lengths, shape_costs.MOST_BUCKETS, shape_cost=cost)
        rows = batches.eval_batches(tokens, None, min(batch_size, len(tokens)), boundaries)
        logits = predict_logits(self._step, self.params, rows, len(tokens))
        check_finite(logits, DAMAGED)
        return logits

    @functools.cached_property
    def _step(self):
        return jax.jit(make_predict_step(self.network.apply))


def as_table(ids: list[str], logits: np.ndarray, names: tuple[str, ...] | None) -> str:
    """A TSV with the columns ``index`` and ``prediction`` and, for classes, a probability column for each."""
    if names is None:
        scores = (f"{score:.4f}" for score in logits[:, 0])
        return to_tsv(("index", "prediction"), zip(ids, scores, strict=True))
    return probability_table(ids, logits, names)
