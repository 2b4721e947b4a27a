"""Loads a model with the way it answers that ``--head`` names."""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.console

from pats_jax import methods, models
from pats_jax.data.few_shot import FewShotTask, other_sampling
from pats_jax.data.partitions import Partition
from pats_jax.errors import InputError
from pats_jax.methods import Method
from pats_jax.models import peft
from pats_jax.models.settings import ModelSettings
from pats_jax.priming import option_scoring, text_answering
from pats_jax.priming.answering import Answering
from pats_jax.priming.option_answering import OptionAnswering
from pats_jax.priming.text_answering import TEXT_HEADS, TextAnswering
from pats_jax.priming.text_settings import TextSettings
from pats_jax.reporting.console import say


def tell_about_data(
    console: rich.console.Console, gym: Mapping[str, FewShotTask], partition: Partition, name: str
) -> None:
    """Says what is odd about data: a leak of the partition, and samples that are not drawn as CrossFit draws them.

    Args:
      console: where to say it.
      gym: the tasks that are used.
      partition: the partition.
      name: its name.
    """
    if partition.leaks:
        leaks = ", ".join(partition.leaks)
        say(console, f"{name}: {leaks} is upstream and a target in CrossFit's file, a leak; here it is a target only")
    others = other_sampling([gym[task] for task in partition.names if task in gym])
    if others:
        say(console, others)


def check_model(head: str, model: ModelSettings) -> None:
    """Raises InputError if a head is of the other kind of model, or a setting of the model does not apply to it."""
    name, is_text = model.model_name_or_path, head in TEXT_HEADS
    if text_answering.is_encoder_decoder(name) != is_text:
        own, kind = (" or ".join(TEXT_HEADS), "an encoder-decoder") if not is_text else ("embedding", "an encoder")
        raise InputError(f"--head {head}: {name} is {kind}; use --head {own}")
    if is_text and model.attention_dropout is not None:
        raise InputError("--attention_dropout: T5 and BART have one rate here; use --hidden_dropout")
    if is_text and model.attention == "cudnn":
        raise InputError("--attention cudnn: not available for T5 and BART; omit the flag")


def load(
    head: str,
    model: ModelSettings,
    text: TextSettings,
    chosen: Sequence[Method],
    total_steps: int,
    tokenizer: Any,
    *,
    key: int,
    source: str | None = None,
    base: str | None = None,
    config: "peft.PeftConfig | None" = None,
    adapter: str | None = None,
    attention: str = "einsum",
    max_options: int | None = None,
) -> tuple[Answering, Any]:
    """Loads a model and how it answers, and its parameters.

    Args:
      head: the name of the head.
      model: the settings of the model.
      text: those of text-to-text models.
      chosen: the methods, which may turn dropout off.
      total_steps: the number of steps to train.
      tokenizer: the model's tokenizer.
      key: an int, for new parameters.
      source: name or folder of the model, if not that of the settings.
      base: name or folder of the model that it was primed from, if any.
      config: method and settings of a new adapter; None: no adapter.
      adapter: folder of a saved adapter, instead of a new one.
      attention: how an encoder computes attention.
      max_options: the most options of a row that is trained on; None: all.

    Raises:
      InputError: if the checkpoint cannot be loaded, is of the other kind, or does not match the saved adapter.
    """
    name = source or model.model_name_or_path
    base = base or model.model_name_or_path
    rates = methods.dropout_rates(model, chosen, total_steps)
    form = {"gradient_checkpointing": model.gradient_checkpointing, "layers": model.layers, "unroll": model.unroll or 0}
    if head in TEXT_HEADS:
        made, params = text_answering.load_text_model(
            name, config, key=key, adapter=adapter, dtype=model.dtype, dropout=rates["hidden_dropout"], **form
        )
        generation = models.GenerationConfig.from_pretrained(base)
        return TextAnswering(head, made, tokenizer, model.max_seq_length, text, generation), params
    scorer, params = option_scoring.load_scorer(
        name,
        head,
        config,
        key=key,
        adapter=adapter,
        mlm_head_from=base,
        dtype=model.dtype,
        attention=attention,
        ignore_mismatched_sizes=model.ignore_mismatched_sizes,
        **form,
        **rates,
    )
    return OptionAnswering(head, scorer, tokenizer, model.max_seq_length, max_options), params


def checkpoint_config(head: str, model: ModelSettings) -> Any:
    """The config of the checkpoint, of the kind that the head needs."""
    name = model.model_name_or_path
    if head in TEXT_HEADS:
        return text_answering.checkpoint_config(name)
    return models.read_encoder_config(models.checkpoint_folder(name, check_weights=False))


def check_tasks(head: str, answered: Sequence[FewShotTask], partition: str) -> None:
    """Raises InputError if the head cannot answer one of the tasks.

    Args:
      head: the name of the head.
      answered: the tasks.
      partition: the partition that names them, for the message.
    """
    text_answering.check_tasks(head, answered, partition)
    if head not in TEXT_HEADS:
        option_scoring.check_tasks(head, answered)


def check_tokens(head: str, tokenizer: Any, config: Any, tasks: Sequence[FewShotTask]) -> None:
    """Raises InputError if the tokenizer gives an id that the model lacks, for any text of the tasks."""
    if head in TEXT_HEADS:
        text_answering.check_tokens(tokenizer, config.vocab_size, tasks)
    else:
        option_scoring.check_tokens(head, tokenizer, config, tasks)
