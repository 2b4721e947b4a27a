"""`pats-jax text2text`: fine-tunes T5 or BART to write texts, by the loop of `pats-jax train`.

Sources and targets are two columns of a file or of a data set. The model is scored by the texts that it generates for
the validation sources. `carry_out` is the program from top to bottom; it checks every input before it touches the
folder.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import rich.console

from pats_jax import glue, methods, models, train_state
from pats_jax.core.files import JsonObject
from pats_jax.data import batches
from pats_jax.data.pair_batches import PairTokens
from pats_jax.data.readers import Split
from pats_jax.data.text_pairs import TextPairs
from pats_jax.errors import InputError
from pats_jax.models.encoder_decoder import EncoderDecoder
from pats_jax.reporting.console import say
from pats_jax.run import model_card, own_data, pe_modules, run_folder, run_start, table_training, training_run
from pats_jax.run.text2text_settings import Text2TextSettings
from pats_jax.run.training_run import Trained
from pats_jax.training import preemption, runners, shape_costs, text_metrics
from pats_jax.training.evaluation import write_files
from pats_jax.training.fine_tuning import Training
from pats_jax.training.pair_table import PairSource
from pats_jax.training.table import bucket_boundaries, count_steps
from pats_jax.training.text_evaluation import TextWriter

logger = logging.getLogger(__name__)


def run(settings: Text2TextSettings, console: rich.console.Console | None = None) -> JsonObject:
    """Runs the program; arguments, result and errors are those of `pats_jax.glue.run`."""
    keep_batch = settings.batches.train_batch_size is not None
    return glue.start_and_carry_out(
        settings,
        default_folder(settings),
        console,
        lambda start, loading: carry_out(start, loading, keep_batch=keep_batch),
    )


def carry_out(
    start: run_start.Start[Text2TextSettings], loading: concurrent.futures.Future, *, keep_batch: bool = False
) -> JsonObject:
    """Carries out `run` after settings and devices have been checked; arguments as of `pats_jax.glue.carry_out`."""
    settings, runner = start.settings, start.runner
    text_metrics.check_packages(settings.metrics)

    # data and model
    splits = load_data(settings)
    if "train" in splits and not keep_batch:
        settings = own_data.with_batch_of(settings, len(splits["train"]), runner.num_devices)
        start = dataclasses.replace(start, settings=settings)
    model, params = load_model(settings, splits)
    generation = generation_config(settings, model)
    texts = Texts.of(splits, loading.result(), model, settings, generation)
    results = describe_run(settings, params, generation)

    # train, evaluating on the way; predict; write the folder that people read
    with preemption.watch() as asked:
        training = None
        if "train" in splits:
            training, source = make_training(settings, runner, texts.pairs("train"), model, params)
            if settings.batches.length_buckets is None:  # a resumed run reads what was chosen
                settings = settings.replace(length_buckets=len(source.boundaries))
                start = dataclasses.replace(start, settings=settings)
        writer = TextWriter(
            runner.compile_predict(models.make_generate_step(model, generation)),
            runner,
            splits,
            texts.sources,
            texts.tokenizer,
            settings.metrics,
            settings.batches.per_device_eval_batch_size,
            asked.check,
            shape_costs.shape_cost(params, runner.platform, 1, training=True),  # a search compiles as long as a step
            1 if training is None else training.rhythm.evaluations,
        )
        saved = model if training is None else pe_modules.in_training(model, training.rhythm.total_steps)
        finish = Finish(start, saved, texts.tokenizer, generation, writer)
        placed = runner.place(params) if training is None else None
        job = training_run.Job(settings.program, training, writer, placed, finish.use, finish.write)
        results = training_run.carry_out(start, job, results, asked)
    say(start.console, glue.summary(results, start.folder))
    return results


# data


def load_data(settings: Text2TextSettings) -> dict[str, TextPairs]:
    """The splits that the phases need, cut to the first ``max_*_samples`` rows."""
    data = settings.data
    phases = {"train": "train", "eval": "validation", "predict": "test"}
    names = [name for phase, name in phases.items() if phase in settings.phases]
    splits = own_data.load_pairs(data, names, settings.seed)
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_predict_samples}
    return {name: split.first(limits[name]) for name, split in splits.items()}


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of a run, tokenised.

    Attributes:
      tokenizer: the checkpoint's own.
      sources: split -> tokens of its sources, with the prefix.
      targets: the same of targets.
    """

    tokenizer: Any
    sources: Mapping[str, batches.Tokens]
    targets: Mapping[str, batches.Tokens]

    @classmethod
    def of(
        cls,
        splits: Mapping[str, TextPairs],
        tokenizer: Any,
        model: EncoderDecoder,
        settings: Text2TextSettings,
        generation: models.GenerationConfig,
    ) -> "Texts":
        """Tokenises the texts of the splits.

        Args:
          splits: the texts.
          tokenizer: the checkpoint's own.
          model: the model.
          settings: the length of sources, and their prefix.
          generation: the length of targets, and the tokens that end them.

        Raises:
          InputError: if a text is not suitable for the model.
        """
        tokenizer.model_max_length = length = fitting_length("max_source_length", settings, model)
        longest, ends = generation.max_new_tokens, generation.eos_token_id
        assert longest is not None
        prefix, sources, targets = settings.model.source_prefix, {}, {}
        for name, split in splits.items():
            texts = [prefix + text for text in split.sources]
            sources[name] = _tokenize(name, texts, split.ids, tokenizer, model, length, "source")
            if split.targets is not None:  # those to compare with are only counted
                targets[name] = _tokenize(name, split.targets, split.ids, tokenizer, model, longest, "target")
        found = targets.get("train")
        if found is not None and not np.isin(found.input_ids[found.offsets[1:] - 1], ends).all():
            raise InputError(
                f"the tokenizer does not end texts with a token that ends generation (eos_token_id "
                f"{' '.join(map(str, ends))}); use the checkpoint's own tokenizer"
            )
        return cls(tokenizer, sources, targets)

    def pairs(self, name: str) -> PairTokens:
        """Sources and targets of a split."""
        return PairTokens(self.sources[name], self.targets[name])


def fitting_length(name: str, settings: Text2TextSettings, model: EncoderDecoder) -> int:
    """``--max_source_length`` or ``--max_target_length``, reduced with a warning to the model's positions.

    An adapter's virtual tokens take some of those of sources.
    """
    asked, longest = getattr(settings.model, name), model.config.max_length
    if longest is not None and settings.adapter and name == "max_source_length":
        longest -= settings.adapter.virtual_tokens
    if longest is None or asked <= longest:
        return asked
    warnings.warn(f"{name} {asked} exceeds the model's {longest} positions; using {longest}", stacklevel=2)
    return longest


def _tokenize(split, texts, ids, tokenizer, model, max_length, kind):
    """The tokens of sources or targets; warns how many were truncated, or cannot be reached."""
    setting = f"max_{kind}_length"
    tokens = batches.tokenize(Split(texts, None, None, ids), tokenizer, max_length, setting)
    largest = max(int(tokens.input_ids.max(initial=0)), tokens.pad_id)
    batches.check_vocabulary(largest, model.config.vocab_size)
    cut = batches.describe_cut(tokens, max_length, model.config.max_length, setting, f"{kind}s")
    if cut and kind == "target" and split != "train":
        cut = (
            f"{tokens.cut} of {len(tokens)} targets are longer than the {max_length} tokens that are generated at most"
        )
    if cut and runners.is_first():
        logger.warning("%s: %s", split, cut)
    return tokens


# model


def load_model(settings: Text2TextSettings, splits: Mapping[str, TextPairs]) -> tuple[Any, Any]:
    """The model and its parameters, with the adapter of ``--peft``.

    Raises:
      InputError: if the checkpoint cannot be used, or a method does not work with its model.
    """
    settings = settings.with_layers(*runners.default_form(jax.default_backend()), settings.adapter)
    dropout = settings.model.dropout
    if dropout is None and "train" in splits:
        steps = count_steps(settings.length, settings.batches.train_batch_size, len(splits["train"]))
        dropout = 0.0 if methods.turns_dropout_off(settings.methods, steps) else None
    model, params, config = models.from_pretrained_seq2seq(
        settings.model.model_name_or_path,
        dtype=settings.model.dtype,
        dropout=dropout,
        gradient_checkpointing=settings.model.gradient_checkpointing,
        layers=settings.model.layers,
        unroll=settings.model.unroll or 0,
    )
    if isinstance(config, models.T5Config) and any(method.name == "bitfit" for method in settings.methods):
        raise InputError("--method bitfit: T5 has no biases to train; choose another method")
    return pe_modules.add_adapter(settings, model, params)


def generation_config(settings: Text2TextSettings, model: EncoderDecoder) -> models.GenerationConfig:
    """The checkpoint's settings of generation with those of the flags, for at most ``--max_target_length`` new tokens.

    Raises:
      InputError: if they do not fit together, or not the model.
    """
    own = models.GenerationConfig.from_pretrained(settings.model.model_name_or_path)
    given = {name: value for name, value in vars(settings.generation).items() if value is not None}
    if "early_stopping" in given:
        given["early_stopping"] = {"true": True, "false": False}.get(given["early_stopping"], "never")
    if "min_length" in given:
        given["min_new_tokens"] = None  # which would take precedence
    longest = fitting_length("max_target_length", settings, model)
    try:
        found = dataclasses.replace(own, **given, max_length=None, max_new_tokens=longest, num_return_sequences=1)
    except InputError as error:
        raise InputError(f"{error}; set --max_target_length, --min_length or --min_new_tokens") from None
    for name in ("early_stopping", "length_penalty"):
        if name in given and found.num_beams == 1:
            raise InputError(f"--{name}: is for beam search; set --num_beams to at least 2, or omit the flag")
    return found


def make_training(
    settings: Text2TextSettings, runner: runners.MeshRunner, pairs: PairTokens, model: Any, params: Any
) -> tuple[Training, PairSource]:
    """The training on sources and targets, and the source of its batches."""
    loss_fn, without_dropout = make_losses(settings, model)
    source = make_source(settings, runner, pairs, params, without_dropout)
    training = table_training.train_on_table(
        settings,
        source,
        runner,
        model,
        params,
        loss_fn,
        num_layers=model.config.num_layers_of,
        metric=settings.main_metric,
        total_steps=count_steps(settings.length, settings.batches.train_batch_size, len(pairs)),
    )
    return training, source


def make_losses(settings: Text2TextSettings, model: Any) -> tuple[train_state.LossFn, train_state.LossFn]:
    """The loss to minimise, and the same without dropout, to measure sensitivity with."""
    make = functools.partial(
        train_state.make_seq2seq_loss_fn, model.apply, label_smoothing=settings.loss.label_smoothing_factor
    )
    return make(), make(deterministic=True)


def make_source(
    settings: Text2TextSettings,
    runner: runners.MeshRunner,
    pairs: PairTokens,
    params: Any,
    loss_without_dropout: train_state.LossFn,
) -> PairSource:
    """The batches of sources and targets."""
    steps = count_steps(settings.length, settings.batches.train_batch_size, len(pairs))
    rows = steps * (settings.batches.train_batch_size or 1)
    boundaries = bucket_boundaries(settings.batches, runner.platform, params, pairs.sources.lengths, rows)
    return PairSource(settings.batches, runner, pairs, boundaries, loss_without_dropout, settings.seed)


# results


@dataclasses.dataclass
class Finish:
    """What follows a training: scores and texts on the devices, then the folder.

    Attributes:
      keeps_model: whether the model is written.
      files: file name -> the texts that the model has written.
    """

    start: run_start.Start[Text2TextSettings]
    model: Any
    tokenizer: Any
    generation: models.GenerationConfig
    writer: TextWriter
    keeps_model: bool = True
    files: dict[str, str] = dataclasses.field(default_factory=dict)

    def use(self, trained: Trained) -> JsonObject:
        """Evaluates and predicts; returns its part of results.json. May raise `Preempted`."""
        phases, writer = self.start.settings.phases, self.writer
        found: JsonObject = {}
        if "train" not in phases and "eval" in phases:
            trained.records.append({"step": 0, "eval": writer.evaluate(trained.params)})
            if runners.is_first():
                run_folder.write_metrics(self.start.folder, trained.records)
        if "eval" in phases:
            found |= describe_scores(writer, trained.records, self.start.settings.main_metric)
            self.files["validation.tsv"] = writer.table("validation", self._validation_texts(trained))
        if "predict" in phases:
            texts, split = writer.texts(trained.params, "test"), writer.splits["test"]
            self.files["test.tsv"] = writer.table("test", texts)
            if split.targets is not None:
                found["test"] = {"metrics": writer.scores("test", texts), "examples": len(split)}
        return found

    def _validation_texts(self, trained):
        """What the model that the run keeps writes; that of the last evaluation, if it was of this model."""
        evaluated = next(record["step"] for record in reversed(trained.records) if "eval" in record)
        is_last = trained.facts.get("model_step", evaluated) == evaluated
        known = self.writer.last.get("validation") if is_last else None
        return self.writer.texts(trained.params, "validation") if known is None else known

    def write(self, trained: Trained, params: Any, results: JsonObject) -> None:
        """Writes model, texts, plots and card."""
        settings, folder = self.start.settings, self.start.folder
        if self.keeps_model:
            glue.save_model(folder, settings, self.model, params, self.tokenizer, self.generation)
        write_files(folder / "predictions", self.files)
        trained.draw()
        glue.draw(folder, results, trained.records)
        model_card.write_fine_tuned(folder, settings.to_dict(), results, settings.defaults(), settings.program)


def describe_run(settings: Text2TextSettings, params: Any, generation: models.GenerationConfig) -> JsonObject:
    """The part of results.json that is known before training."""
    return {
        "model_name_or_path": settings.model.model_name_or_path,
        "data": str(settings.data.own_name),
        "method": settings.method,
        "peft": settings.peft,
        "seed": settings.seed,
        "num_parameters": sum(p.size for p in jax.tree.leaves(params)),
        "main_metric": settings.main_metric,
        "pipeline_tag": pipeline_tag(settings),
        "source_prefix": settings.model.source_prefix,
        "generation": generation.to_dict(),
        "versions": run_folder.versions(),
        "timing": {},
    }


def describe_scores(writer: TextWriter, records: list[JsonObject], metric: str) -> JsonObject:
    """The final and the best logged evaluation."""
    scores = [{"step": record["step"], "metrics": record["eval"]} for record in records if "eval" in record]
    best = max(scores, key=lambda score: score["metrics"][metric])
    return {"eval_examples": len(writer.splits["validation"]), "final": scores[-1], "best": best}


def pipeline_tag(settings: Text2TextSettings) -> str:
    """The hub's name for the task, by the prefix and the names of columns."""
    prefix, data = settings.model.source_prefix.strip().lower(), settings.data
    if prefix.startswith("translate"):
        return "translation"
    if data.summary_column or data.target_column == "summary" or prefix.startswith("summarize"):
        return "summarization"
    return "text2text-generation"


def default_folder(settings: Text2TextSettings) -> str:
    """``runs/DATA-METHOD-seedSEED``; with an adapter ``runs/DATA-KIND-METHOD-seedSEED``."""
    kind = f"{settings.peft}-" if settings.peft else ""
    return f"runs/{pathlib.Path(str(settings.data.own_name)).stem}-{kind}{settings.method}-seed{settings.seed}"
