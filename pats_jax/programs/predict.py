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
from pats_jax.core import files
from pats_jax.core.files import write_text
from pats_jax.data import batches, own_files, read_texts, readers
from pats_jax.data.columns import BY_NAME, Columns
from pats_jax.data.tables import decoded
from pats_jax.errors import InputError
from pats_jax.models import peft
from pats_jax.run import compilation_cache, xla_flags
from pats_jax.run.records import RunColumns
from pats_jax.train_state import make_predict_step
from pats_jax.training import runners, shape_costs
from pats_jax.training.evaluation import DAMAGED, check_finite, probability_table, sequence_length, to_tsv
from pats_jax.training.loop import predict_logits

logger = logging.getLogger(__name__)


def predict_file(
    model: Annotated[str, tyro.conf.Positional],
    *,
    file: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    text_column_names: tuple[str, ...] = (),
    delimiter: str | None = None,
    output_file: str | None = None,
    max_seq_length: int | None = None,
    batch_size: int = 64,
) -> None:
    """Writes a TSV with labels, probabilities (or scores) and texts: of a file, of standard input, or of one text.

    Args:
      model: folder of a run of `pats-jax train` or `pats-jax glue`, of its model, or of its adapter
      file: texts as CSV, TSV, JSON or parquet, or as .txt with one text per line; if unset or -, standard input
      text: one text, in place of a file
      text_pair: the second text of a pair
      text_column_names: the one or two columns of the texts in the file; if unset, those of the run, or found by name
      delimiter: the character between the cells of a CSV or TSV file
      output_file: where to write the TSV; if unset, standard output
      max_seq_length: tokens; longer texts are truncated; if unset, as in training
      batch_size: rows per batch
    """
    folder = model_folder(model)
    if batch_size < 1:
        raise InputError(f"--batch_size {batch_size}: must be at least 1")
    target = None if output_file is None else pathlib.Path(output_file)
    if target:
        _check_target(target, [*([pathlib.Path(file)] if file else ()), *folder.glob("*")])
    if text is None:
        if text_pair is not None:
            raise InputError("--text_pair: needs --text")
        usual = columns_of_run(folder)
        split = read_input(file, Columns(text_column_names, delimiter=delimiter), usual)
    else:
        if file is not None or text_column_names or delimiter is not None:
            raise InputError("--text: cannot be used with --file, --text_column_names or --delimiter")
        split = readers.Split([text], None if text_pair is None else [text_pair], None, ["0"])
    xla_flags.set_defaults()
    compilation_cache.keep_compiled_programs(None)
    loaded = LoadedModel.load(str(folder))
    logits = loaded.logits(split, max_seq_length, batch_size)
    table = as_table(split, logits, loaded.names, loaded.config.is_multi_label)
    if target:
        _write(target, table)
    else:
        sys.stdout.write(table)


def model_folder(name: str) -> pathlib.Path:
    """The folder of a model or an adapter, which may be that of its run."""
    parts = (pathlib.Path(name) / part for part in ("model", "adapter"))
    return next((part for part in parts if (part / "config.json").exists()), pathlib.Path(name))


def columns_of_run(folder: pathlib.Path) -> Columns:
    """The columns of the texts that the run of a model was told, if its settings stand beside it."""
    path = folder.absolute().parent / "config.json"
    if folder.name not in ("model", "adapter") or not path.is_file():
        return BY_NAME
    return Columns(tuple(files.read_record(path, RunColumns).get("text_column_names") or ()))


def read_input(file: str | None, columns: Columns, usual: Columns) -> readers.Split:
    """The texts of a file, or those on standard input, one a line.

    Args:
      file: its name; "-" and None are standard input.
      columns: those that are asked for.
      usual: those that are looked for first.

    Raises:
      InputError: if there is no text.
    """
    if file not in (None, "-"):
        return read_texts(str(file), columns, usual)
    if columns.texts or columns.delimiter is not None:
        raise InputError("--text_column_names, --delimiter: standard input has one text per line; set --file")
    if file is None and sys.stdin.isatty():
        raise InputError("no texts: set --file or --text, or pipe texts in, one per line")
    place = pathlib.Path("standard input")
    return own_files.lines_as_texts(place, decoded(sys.stdin.buffer.read(), place))


def _check_target(target, inputs):
    """Raises InputError unless a file can be written and is none of the inputs."""
    if target.is_dir() or not os.access(target if target.exists() else target.absolute().parent, os.W_OK):
        raise InputError(f"--output_file {target}: cannot be written; choose a file in an existing folder")
    read = next((path for path in inputs if target.exists() and path.exists() and target.samefile(path)), None)
    if read:
        raise InputError(f"--output_file {target}: is the input {read}; choose another file")


def _write(path, text):
    """Writes a file atomically, also through a link; writes to a device or pipe directly."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
    else:
        write_text(path.resolve(), text)


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


def as_table(
    split: readers.Split, logits: np.ndarray, names: tuple[str, ...] | None, is_multi_label: bool = False
) -> str:
    """A TSV with the columns ``index`` and ``prediction``, for classes a probability each, and the texts."""
    texts = split.texts
    if names is None:
        scores = (f"{score:.{_DIGITS}f}" for score in logits[:, 0])
        return to_tsv(("index", "prediction", *texts), zip(split.ids, scores, *texts.values(), strict=True))
    return probability_table(split.ids, logits, names, texts, _DIGITS, is_multi_label)


_DIGITS = 6
