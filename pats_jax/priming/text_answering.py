"""Answers of an encoder-decoder: it generates texts, or says which of a row's options is the likeliest.

Every task is text to text, as in CrossFit: the input begins with the task's name in brackets, choices stand behind the
question, and the answer is the text of the right choice or class. Both heads are trained alike, on the words of the
right answer; they differ in how they answer::

    generate     the text that greedy or beam search finds
    likelihood   the option with the highest mean of log p(word) over its words

References:
  Ye, Lin and Ren, EMNLP 2021, arXiv 2104.08835, github.com/INK-USC/CrossFit.
"""

import dataclasses
import functools
import string
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pats_jax import models
from pats_jax.data import batches
from pats_jax.data.few_shot import MULTIPLE_CHOICE, TEXT_TO_TEXT, FewShotTask, Row, Sample
from pats_jax.errors import InputError
from pats_jax.models import peft
from pats_jax.models.config import read_config
from pats_jax.models.seq2seq_config import config_from_dict
from pats_jax.priming import option_scoring
from pats_jax.priming.answering import Answering
from pats_jax.priming.text_settings import TextSettings
from pats_jax.train_state import IGNORED, Batch, LossFn, make_seq2seq_loss_fn
from pats_jax.training import answer_metrics

TextHead = Literal["generate", "likelihood"]
TEXT_HEADS: tuple[TextHead, ...] = ("generate", "likelihood")
_SHORTEST_ANSWER = 4


def load_text_model(
    name_or_dir: str, config: "peft.PeftConfig | None", *, key: int, adapter: str | None = None, **options: Any
) -> tuple[Any, Any]:
    """Loads a T5 or BART, with an adapter if a config is given, and its parameters.

    Args:
      name_or_dir: as for `pats_jax.models.from_pretrained_seq2seq`.
      config: method and settings of a new adapter; None: no adapter.
      key: an int, for the new parameters of the adapter.
      adapter: folder of a saved adapter, instead of a new one.
      **options: further arguments of `pats_jax.models.from_pretrained_seq2seq`.

    Raises:
      InputError: if the checkpoint cannot be loaded, or does not match the saved adapter.
    """
    model: Any
    model, params, _ = models.from_pretrained_seq2seq(name_or_dir, **options)
    if config is not None:
        model, params = peft.add_peft(model, params, config, key=key)
    if adapter is not None:
        model, params = peft.load_peft(adapter, model, params)
    return model, params


class TextAnswering(Answering):
    """A T5 or BART that answers by texts; answers are texts."""

    def __init__(
        self,
        head: TextHead,
        model: Any,
        tokenizer: Any,
        max_seq_length: int,
        settings: TextSettings,
        generation: models.GenerationConfig,
    ):
        """Takes a model.

        Args:
          head: how it answers.
          model: from `load_text_model`.
          tokenizer: its tokenizer.
          max_seq_length: the longest input in tokens; the model may have fewer positions.
          settings: the settings of inputs, loss and decoding.
          generation: the checkpoint's own settings of generation, of which the settings replace some.
        """
        self.model, self.tokenizer, self.head = model, tokenizer, head
        longest = model.config.max_length
        self.max_length = max_seq_length if longest is None else min(max_seq_length, longest)
        self.max_target = settings.max_target_length if longest is None else min(settings.max_target_length, longest)
        self._settings = settings
        self._generation = decoding(settings, generation, self.max_target)

    def prepare(self, task):
        """The task with inputs as the model reads them: `` [name] input (A) one (B) other``."""
        with_choices = task.kind == MULTIPLE_CHOICE

        def prepared(rows: Sequence[Row]) -> tuple[Row, ...]:
            return tuple(self._prepared(task.name, row, with_choices) for row in rows)

        samples = (Sample(s.seed, prepared(s.train), prepared(s.dev), prepared(s.test)) for s in task.samples)
        return dataclasses.replace(task, samples=tuple(samples))

    def _prepared(self, name: str, row: Row, with_choices: bool) -> Row:
        text = row.whole if row.whole is not None else row.input + (choices(row.options) if with_choices else "")
        return row._replace(input=f" [{name}] {text.strip()}" if self._settings.show_task else f" {text.strip()}")

    def trainable_mask(self, params, trained):
        parts = trained.split("+")

        def is_trained(path, _):
            return ("pe" if path[0].key == "peft" else "plm") in parts

        return jax.tree_util.tree_map_with_path(is_trained, params)

    def make_loss(self, *, deterministic=False):
        settings = self._settings
        smoothing, reduction = settings.label_smoothing_factor, settings.loss_reduction
        return make_text_loss(self.model, smoothing=smoothing, reduction=reduction, deterministic=deterministic)

    def encode(self, rows, *, share_options=False):
        return self._inputs(rows) | self._targets([row.right_answers[0] for row in rows], "label")

    def shares_options(self, task):
        return False

    def simplify(self, row, most, rng):
        """The row with one of its right answers, drawn at random, as CrossFit has it in training."""
        if len(row.references) < 2:
            return row
        return row._replace(references=(row.references[rng.integers(len(row.references))],))

    def variants(self, row, most):
        return [row._replace(references=(one,)) for one in row.references] or [row]

    @property
    def step(self):
        if self.head == "likelihood":
            return functools.partial(option_log_probabilities, self.model)
        generate = models.make_generate_step(self.model, self._generation)
        return lambda params, batch: generate(params, batch).sequences[:, 0]

    def answer(self, step, params, rows, batch_size, *, share_options=False):
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i].options), len(rows[i].input)))
        answers, parts = [""] * len(rows), []
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            filled = [rows[i] for i in index] + [rows[index[-1]]] * (batch_size - len(index))
            parts.append((index, step(params, self._question(filled))))
        for index, part in parts:  # fetched when all have been dispatched
            for i, answer in zip(index, self._texts(np.asarray(part), [rows[i] for i in index]), strict=True):
                answers[i] = answer
        return answers

    def metric(self, task):
        return task.answer_metric

    def score(self, task, answers, rows):
        return answer_metrics.score_answers(task.answer_metric, answers, [row.right_answers for row in rows])

    def make_examination(self, step, task, rows, shapes):
        batch = option_scoring.pad_to(self.encode(rows), shapes)
        loss_fn, key = self._deterministic_loss, jax.random.key(0)

        def examine(params):
            score = self.score(task, self.answer(step, params, rows, len(rows)), rows)
            return score.value, float(loss_fn(params, batch, key)[0])

        return examine

    @functools.cached_property
    def _deterministic_loss(self) -> Any:
        return jax.jit(self.make_loss(deterministic=True))

    def _question(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        inputs = self._inputs(rows)
        if self.head == "generate":
            return inputs
        slots = option_scoring.padded(max(len(row.options) for row in rows), option_scoring.FEWEST_OPTIONS)
        texts = [text for row in rows for text in (*row.options, *[""] * (slots - len(row.options)))]
        options = {name: x.reshape(len(rows), slots, -1) for name, x in self._targets(texts, "option").items()}
        counts = np.array([len(row.options) for row in rows])
        return inputs | options | {"has_option": (np.arange(slots) < counts[:, None]).astype(np.int32)}

    def _texts(self, found: np.ndarray, rows: Sequence[Row]) -> list[str]:
        if self.head == "generate":
            known = found[: len(rows), 1:] < len(self.tokenizer)  # a model may have more words than its tokenizer
            ids = [own[keep].tolist() for own, keep in zip(found[:, 1:], known, strict=False)]
            return self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        best = np.argmax(found[: len(rows)], axis=1)
        return [row.options[index] for row, index in zip(rows, best, strict=True)]

    def _inputs(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        return option_scoring.padded_ids(
            self.tokenizer, [row.input for row in rows], option_scoring.SHORTEST_TEXT, self.max_length
        )

    def _targets(self, texts: Sequence[str], name: str) -> dict[str, np.ndarray]:
        """``NAME_ids`` and ``NAME_mask``; every text with a leading blank, which today's BART tokenizers do not add."""
        own = option_scoring.padded_ids(
            self.tokenizer, [f" {text.strip()}" for text in texts], _SHORTEST_ANSWER, self.max_target
        )
        return {f"{name}_ids": own["input_ids"], f"{name}_mask": own["attention_mask"]}


def make_text_loss(
    model: Any, *, smoothing: float = 0.0, reduction: Literal["mean", "sum"] = "mean", deterministic: bool = False
) -> LossFn:
    """The cross-entropy of the words of the right answers, see `pats_jax.make_seq2seq_loss_fn`.

    Args:
      model: a T5 or BART.
      smoothing: the share of the loss that all words have alike.
      reduction: the mean over the batch's words, or their sum, as in CrossFit.
      deterministic: no dropout.

    Returns:
      ``loss_fn(params, batch, key) -> (loss, {})`` for the batches of `TextAnswering.encode`.
    """
    mean_loss = make_seq2seq_loss_fn(model.apply, label_smoothing=smoothing, deterministic=deterministic)

    def loss_fn(params, batch, key):
        labels = jnp.where(batch["label_mask"] > 0, batch["label_ids"], IGNORED)
        own = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        loss, metrics = mean_loss(params, own, key)
        return (loss * jnp.sum(batch["label_mask"]) if reduction == "sum" else loss), metrics

    return loss_fn


def option_log_probabilities(model: Any, params: Any, batch: Batch) -> jax.Array:
    """The mean of log p(word) over each option's words, (rows, options) float32; far below all others without option.

    Args:
      model: a T5 or BART.
      params: its parameters.
      batch: ``input_ids`` and ``attention_mask`` (rows, length), ``option_ids`` and ``option_mask`` (rows, options,
        words), ``has_option`` (rows, options).
    """

    def mean_of_one(option):
        ids, mask = option
        labels = jnp.where(mask > 0, ids, IGNORED)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model.apply({"params": params}, **inputs, labels=labels, deterministic=True)
        found = -optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), ids)
        return jnp.sum(mask * found, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)

    by_option = (jnp.moveaxis(batch[name], 1, 0) for name in ("option_ids", "option_mask"))
    means = jax.lax.map(mean_of_one, tuple(by_option)).T
    return jnp.where(batch["has_option"] > 0, means, option_scoring.NO_OPTION)


def choices(options: Sequence[str]) -> str:
    """Choices as CrossFit appends them to a question.

    Examples:
      >>> choices(["tea", "a rock"])
      ' (A) tea (B) a rock'
    """
    marks = [*string.ascii_uppercase, *map(str, range(27, len(options) + 1))]
    return "".join(f" ({mark}) {text}" for mark, text in zip(marks, options, strict=False))


def decoding(settings: TextSettings, generation: models.GenerationConfig, max_target: int) -> models.GenerationConfig:
    """How answers are generated.

    Args:
      settings: the settings; with ``start_with_bos`` as CrossFit decodes with a model that has a bos token.
      generation: the checkpoint's own settings.
      max_target: the longest answer in tokens.
    """
    changes: dict[str, Any] = {"max_new_tokens": max_target, "max_length": None}
    bos, ends = generation.bos_token_id, generation.eos_token_id
    if settings.start_with_bos and bos is not None:
        changes = {"max_new_tokens": None, "max_length": max_target}
        changes |= {"decoder_start_token_id": bos, "forced_bos_token_id": bos}
        changes |= {"forced_eos_token_id": next(iter(ends), None)}
    changes |= {"min_length": 0, "min_new_tokens": None, "num_return_sequences": 1}
    return dataclasses.replace(generation, num_beams=settings.num_beams, early_stopping=False, **changes)


def is_encoder_decoder(name_or_dir: str) -> bool:
    """Whether a checkpoint is one of T5 or BART."""
    values, _ = read_config(models.checkpoint_folder(name_or_dir, check_weights=False))
    return values.get("model_type") in ("t5", "bart")


def checkpoint_config(name_or_dir: str) -> Any:
    """The config of a checkpoint of T5 or BART."""
    return config_from_dict(*read_config(models.checkpoint_folder(name_or_dir, check_weights=False)))


def check_tasks(head: str, answered: Sequence[FewShotTask], partition: str) -> None:
    """Raises InputError if the head cannot answer one of the tasks, or its score needs a package that is missing.

    Args:
      head: the name of a head of either kind of model.
      answered: the tasks that it must answer.
      partition: the partition that names them, for the message.
    """
    for task in answered:
        if task.kind == TEXT_TO_TEXT and head != "generate":
            raise InputError(
                f"--partition {partition}: {task.name} is text to text, without options for --head {head}; take it off "
                "the partition, or use T5 or BART with --head generate"
            )
        if head in TEXT_HEADS:
            answer_metrics.check_packages(task.answer_metric)


def check_tokens(tokenizer: Any, vocab_size: int, tasks: Sequence[FewShotTask]) -> None:
    """Raises InputError if the tokenizer gives an id that the model lacks, for any text of the tasks."""
    if batches.largest_id(tokenizer) < vocab_size:
        return
    rows = [row for task in tasks for s in task.samples for row in (*s.train, *s.dev, *s.test)]
    texts = sorted({text for row in rows for text in (row.input, *row.options, *row.right_answers)})
    ids = [one for own in tokenizer(texts, verbose=False)["input_ids"] for one in own]
    batches.check_vocabulary(max(ids), vocab_size)
