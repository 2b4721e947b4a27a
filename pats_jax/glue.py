"""The GLUE program: ``python -m pats_jax.glue``, or `pats-jax glue`; on your own data also `pats-jax train`.

Reads a task, loads a pretrained encoder, trains it with the chosen method in one jitted step, evaluates it with the
task's own metric and writes a folder of results. `carry_out` is the program from top to bottom; it checks every input
before it touches the folder.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import rich.console

from pats_jax import methods, models, objectives, train_state
from pats_jax.core.files import JsonObject
from pats_jax.data import batches, low_resource, out_of_domain, readers, tasks
from pats_jax.errors import InputError
from pats_jax.models import labels, peft
from pats_jax.reporting import plots
from pats_jax.reporting.console import say
from pats_jax.run import (
    hub,
    model_card,
    own_data,
    pe_modules,
    run_folder,
    run_start,
    settings as run_settings,
    table_training,
    training_run,
)
from pats_jax.run.settings import Settings
from pats_jax.run.training_run import Trained
from pats_jax.training import diagnosis, preemption, runners, shape_costs, task_loss
from pats_jax.training.evaluation import Predictor, sequence_length, true_labels, write_files
from pats_jax.training.fine_tuning import Training
from pats_jax.training.table import TableSource, bucket_boundaries, count_steps

logger = logging.getLogger(__name__)


def run(settings: Settings, console: rich.console.Console | None = None) -> JsonObject:
    """Runs the program.

    Args:
      settings: the settings of the run.
      console: where to print progress and scores; None: nowhere.

    Returns:
      The content of results.json.

    Raises:
      InputError: if settings, data or checkpoint are invalid, before anything is written; or if training diverges, or
        the disk is full.
      Preempted: if the run was asked to stop; it has been saved.
    """
    keep_batch = settings.batches.train_batch_size is not None
    return start_and_carry_out(
        settings,
        default_folder(settings),
        console,
        lambda start, loading: carry_out(start, loading, keep_batch=keep_batch),
    )


def start_and_carry_out(
    settings: run_settings.Kind,
    folder: str,
    console: rich.console.Console | None,
    carry: Callable[[run_start.Start[run_settings.Kind], concurrent.futures.Future], JsonObject],
) -> JsonObject:
    """Starts a run and carries it out, unless it is already finished.

    Args:
      settings: the settings of the run.
      folder: its folder if the settings name none.
      console: where to print progress and scores; None: nowhere.
      carry: ``carry(start, loading)`` with the future of the tokenizer; returns the content of results.json.

    Returns:
      The content of results.json.
    """
    settings.check()
    with concurrent.futures.ThreadPoolExecutor(1) as background:
        # Transformers, which the tokenizer needs, is imported while the devices start and the model is loaded
        loading = background.submit(models.load_tokenizer, settings.model.model_name_or_path)
        with run_start.begin(settings, folder, console) as start:
            if start.finished:
                say(start.console, f"already finished: {summary(start.finished, start.folder)}")
                hub.publish(start.settings, start.folder, start.console)
                return start.finished
            return carry(start, loading)


def carry_out(
    start: run_start.Start[Settings], loading: concurrent.futures.Future, *, keep_batch: bool = False
) -> JsonObject:
    """Carries out `run` after settings and devices have been checked, while the tokenizer is loading.

    Args:
      start: the started run.
      loading: the future of the tokenizer.
      keep_batch: whether the rows of a step were given, so that they are not fitted to a small table.
    """
    settings, runner = start.settings, start.runner

    # data and model
    task, splits = load_data(settings)
    task_loss.check_loss(settings.loss, task, methods.chosen_objectives(settings.methods))
    if settings.data.own_name and "train" in splits and not keep_batch:
        settings = own_data.with_batch_of(settings, len(splits["train"]), runner.num_devices)
        start = dataclasses.replace(start, settings=settings)
    model, params, config = load_model(settings, task, splits)
    texts = Texts.check(splits, loading.result(), model, settings.model.max_seq_length)
    order = None if task.labels is None else labels.match_labels(task.labels, list(config.id2label.values()))
    results = describe_run(settings, task, params)

    # train, evaluating on the way; predict; write the folder that people read
    with preemption.watch() as asked:
        training = None
        if "train" in splits:
            split, tokens = in_order_of_head(splits["train"], order), texts.tokens("train")
            training, source = make_training(settings, runner, task, split, tokens, model, params)
            if settings.batches.length_buckets is None:  # a resumed run reads what was chosen
                settings = settings.replace(length_buckets=len(source.boundaries))
                start = dataclasses.replace(start, settings=settings)
        predictor = Predictor(
            runner.compile_predict(train_state.make_predict_step(model.apply)),
            runner,
            task,
            splits,
            texts.tokens,
            settings.batches.per_device_eval_batch_size,
            asked.check,
            order,
            shape_costs.shape_cost(params, runner.platform, 1, training=False),
            1 if training is None else training.rhythm.evaluations,
        )
        saved = model if training is None else pe_modules.in_training(model, training.rhythm.total_steps)
        finish = Finish(start, task, saved, texts.tokenizer, predictor)
        placed = runner.place(params) if training is None else None
        job = training_run.Job(settings.program, training, predictor, placed, finish.use, finish.write)
        results = training_run.carry_out(start, job, results, asked)
    say(start.console, summary(results, start.folder))
    return results


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of a run, checked against tokenizer and model, and tokenised on first use."""

    splits: dict[str, readers.Split]
    tokenizer: Any
    model: models.SequenceClassifier
    max_length: int

    @classmethod
    def check(
        cls, splits: dict[str, readers.Split], tokenizer: Any, model: models.SequenceClassifier, max_seq_length: int
    ) -> "Texts":
        """Checks the texts of the splits.

        Raises:
          InputError: if a text is not suitable for the model.
        """
        max_length = sequence_length(max_seq_length, model)
        tokenizer.model_max_length = max_length  # saved with the model: how long its texts were
        for split in splits.values():
            batches.check_room(split, tokenizer, max_length)
            batches.check_types(batches.largest_type(split, tokenizer), model.config.type_vocab_size)
        texts = cls(splits, tokenizer, model, max_length)
        # a text that the tokenizer or the model cannot take must not cost a finished training its model
        if not batches.takes_any_text(tokenizer) or batches.largest_id(tokenizer) >= model.config.vocab_size:
            for name in splits:
                texts.tokens(name)
        return texts

    def tokens(self, name: str) -> batches.Tokens:
        """The tokens of a split."""
        if name not in self._tokens:
            self._tokens[name] = tokenize_split(name, self.splits[name], self.tokenizer, self.model, self.max_length)
        return self._tokens[name]

    @functools.cached_property
    def _tokens(self) -> dict[str, batches.Tokens]:
        return {}


def make_training(
    settings: Settings,
    runner: runners.MeshRunner,
    task: tasks.Task,
    split: readers.Split,
    tokens: batches.Tokens,
    model: Any,
    params: Any,
) -> tuple[Training, TableSource]:
    """The training on a split, with labels numbered as in the head, and the source of its batches."""
    steps = count_steps(settings.length, settings.batches.train_batch_size, len(tokens))
    rows = steps * (settings.batches.train_batch_size or 1)
    boundaries = bucket_boundaries(settings.batches, runner.platform, params, tokens.lengths, rows)
    loss = task_loss.make_task_loss(settings.loss, split.labels, tuple(model.config.id2label.values()))
    plain = train_state.make_loss_fn(
        model.apply, regression=task.is_regression, deterministic=True, row_loss=loss.row_loss
    )
    source = TableSource(
        settings.batches, runner, tokens, split.labels, boundaries, plain, settings.seed, loss.row_weights
    )
    terms = methods.chosen_objectives(settings.methods)
    training = table_training.train_on_table(
        settings,
        source,
        runner,
        model,
        params,
        objectives.with_objectives(model.apply, *terms, regression=task.is_regression, row_loss=loss.row_loss),
        num_layers=model.config.num_hidden_layers,
        metric=task.main_metric,
        total_steps=steps,
    )
    return training, source


@dataclasses.dataclass
class Finish:
    """What follows a training: scores and predictions on the devices, then the folder.

    Attributes:
      keeps_model: whether the model is written.
      files: file name -> predictions, once they are made.
      examined: the examination of the model, once it is made.
    """

    start: run_start.Start[Settings]
    task: tasks.Task
    model: Any
    tokenizer: Any
    predictor: Predictor
    keeps_model: bool = True
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    examined: diagnosis.Examination | None = None

    def use(self, trained: Trained) -> JsonObject:
        """Evaluates and predicts; returns its part of results.json. May raise `Preempted`."""
        settings, found = self.start.settings, {}
        if "train" not in settings.phases and "eval" in settings.phases:
            trained.records.append({"step": 0, "eval": self.predictor.evaluate(trained.params)})
            if runners.is_first():
                run_folder.write_metrics(self.start.folder, trained.records)
        if settings.data.out_of_domain:
            names = settings.data.out_of_domain
            found["out_of_domain"] = self.predictor.evaluate_out_of_domain(trained.params, names)
        if "predict" in settings.phases:
            self.files = self.predictor.predictions(trained.params)
        if "eval" in settings.phases:
            self.examined = examine(self.predictor, trained)
            found |= describe_scores(self.predictor, trained.records) | {"diagnosis": self.examined.record()}
        return found

    def write(self, trained: Trained, params: Any, results: JsonObject) -> None:
        """Writes model, predictions, plots and card."""
        settings, folder = self.start.settings, self.start.folder
        if self.keeps_model:
            save_model(folder, settings, self.model, params, self.tokenizer)
        if self.files:
            write_files(folder / "predictions", self.files)
        if self.examined:
            write_files(folder / "diagnosis", self.examined.tables())
            self.examined.draw(folder / "plots")
        trained.draw()
        draw(folder, results, trained.records)
        model_card.write_fine_tuned(folder, settings.to_dict(), results, settings.defaults(), settings.program)


# data


def load_data(settings: Settings) -> tuple[tasks.Task, dict[str, readers.Split]]:
    """The task and the splits that the phases need, cut to the first ``max_*_samples`` rows."""
    names = [name for phase, name in _SPLITS.items() if phase in settings.phases]
    if settings.data.task_name:
        task = tasks.get_task(settings.data.task_name, "--task_name")
        if settings.data.do_regression not in (None, task.is_regression):
            kind = "scores" if task.is_regression else "classes"
            raise InputError(f"--do_regression: the labels of --task_name {task.name} are {kind}; omit the flag")
        splits = readers.load_task(task, settings.data.data_dir, splits=names)
        if task.name == "mnli" and "predict" in settings.phases:
            splits |= load_diagnostic(settings.data.data_dir)
    else:
        task, splits = own_data.load(settings, names)
    if settings.metric_for_best_model:
        task = task.scored_by(settings.metric_for_best_model)
    if settings.data.low_resource:
        train = splits["train"]
        if train.is_multi_label:
            raise InputError("--low_resource: is for one label a text; use --max_train_samples")
        rows = low_resource.stratified_rows(true_labels(train), settings.data.low_resource, settings.seed)
        splits["train"] = train.take(rows)
    limits = {"train": settings.data.max_train_samples, "validation": settings.data.max_eval_samples}
    limited = {
        name: split.first(limits.get(name.removesuffix("_mismatched"), settings.data.max_predict_samples))
        for name, split in splits.items()
    }
    return task, limited | load_out_of_domain(settings, task)


def load_out_of_domain(settings: Settings, task: tasks.Task) -> dict[str, readers.Split]:
    """The sets of ``--out_of_domain`` by name, cut like the validation split."""
    if not settings.data.out_of_domain:
        return {}
    if labels.match_labels(task.labels or (), out_of_domain.THREE_CLASSES) is None:
        raise InputError(f"--out_of_domain: needs a model with the classes {', '.join(out_of_domain.THREE_CLASSES)}")
    folder, data_dir = settings.data.out_of_domain_dir, settings.data.data_dir
    found = {name: out_of_domain.load_out_of_domain(name, folder, data_dir) for name in settings.data.out_of_domain}
    return {name: split.first(settings.data.max_eval_samples) for name, split in found.items()}


_SPLITS = {"train": "train", "eval": "validation", "predict": "test"}


def load_diagnostic(data_dir: str | None) -> dict[str, readers.Split]:
    """The diagnostic set AX, on which an MNLI model predicts, if the data includes it."""
    try:
        return {"ax": readers.load_task("ax", data_dir, splits=["test"])["test"]}
    except InputError as error:
        logger.warning("no predictions for AX: %s", error)
        return {}


def load_model(settings: Settings, task: tasks.Task, splits: dict[str, readers.Split]) -> tuple[Any, Any, Any]:
    """The model, its parameters and its config, for the task's labels, with the adapter of ``--peft``."""
    settings = settings.with_layers(*runners.default_form(jax.default_backend()), settings.adapter)
    model, params, config = models.from_pretrained(
        settings.model.model_name_or_path,
        num_labels=task.num_labels,
        dtype=settings.model.dtype,
        regression=task.is_regression,
        multi_label=task.is_multi_label,
        id2label=dict(enumerate(task.labels)) if task.labels else None,
        key=settings.seed,
        ignore_mismatched_sizes=settings.model.ignore_mismatched_sizes,
        strict_labels="train" not in splits,
        **dropout_rates(settings, splits),
        gradient_checkpointing=settings.model.gradient_checkpointing,
        layers=settings.model.layers,
        unroll=settings.model.unroll or 0,
        attention=settings.model_attention,
    )
    for method in settings.methods:
        method.check_model(config.num_hidden_layers)
    return *add_adapter(settings, model, params), config


def add_adapter(settings: Settings, model: Any, params: Any) -> tuple[Any, Any]:
    """A plain model and its parameters, with the adapter of ``--peft`` if there is one."""
    modules = settings.adapter
    if modules and not modules.train_pooler and models.lacks_pooler(settings.model.model_name_or_path):
        raise InputError(
            f"--peft {settings.peft}: the checkpoint has no pooler, so a new one must be trained and saved; "
            "set --peft_pooler"
        )
    return pe_modules.add_adapter(settings, model, params)


def tokenize_split(
    name: str, split: readers.Split, tokenizer: Any, model: models.SequenceClassifier, max_length: int
) -> batches.Tokens:
    """Tokenises a split; warns how many of its texts were truncated.

    Raises:
      InputError: if the model has no embedding for a token.
    """
    tokens, config = batches.tokenize(split, tokenizer, max_length), model.config
    batches.check_ids(tokens, config.vocab_size, config.type_vocab_size)
    cut = batches.describe_cut(tokens, max_length, model.max_length)
    if cut and runners.is_first():
        logger.warning("%s: %s", name, cut)
    return tokens


def in_order_of_head(split: readers.Split, order: np.ndarray | None) -> readers.Split:
    """The rows with labels numbered as in the model's head; see `Predictor.order`."""
    if order is None or split.labels is None:
        return split
    if split.is_multi_label:
        labels_of_head = np.empty_like(split.labels)
        labels_of_head[:, order] = split.labels
        return dataclasses.replace(split, labels=labels_of_head, label_names=None)
    return dataclasses.replace(split, labels=order[split.labels], label_names=None)


def dropout_rates(settings: Settings, splits: dict[str, readers.Split]) -> methods.DropoutRates:
    """The rates for `models.from_pretrained`: as set, else 0 if the method's authors use none, else None."""
    steps = None
    if "train" in splits:
        steps = count_steps(settings.length, settings.batches.train_batch_size, len(splits["train"]))
    return methods.dropout_rates(settings.model, settings.methods, steps)


# results


def save_model(
    folder: pathlib.Path,
    settings: run_settings.FineTuningSettings,
    model: Any,
    params: Any,
    tokenizer: Any,
    generation: models.GenerationConfig | None = None,
) -> None:
    """Writes ``model/``; with an adapter ``adapter/``, and ``model/`` too if it can be merged into the weights."""
    if settings.adapter:
        name = settings.model.model_name_or_path
        peft.save_peft(
            folder / "adapter", model=model, params=params, base_model_name_or_path=name, tokenizer=tokenizer
        )
        if not peft.config_of(model).merges:
            return
        model, params = peft.merge_and_unload(model, params)
    models.save_pretrained(
        folder / "model", params=params, config=model.config, tokenizer=tokenizer, generation=generation
    )


def describe_run(settings: Settings, task: tasks.Task, params: Any) -> JsonObject:
    """The part of results.json that is known before training."""
    return {
        "model_name_or_path": settings.model.model_name_or_path,
        "task_name": settings.data.task_name,
        "data": describe_data(settings),
        "method": settings.method,
        "peft": settings.peft,
        "seed": settings.seed,
        "num_labels": task.num_labels,
        "num_parameters": sum(p.size for p in jax.tree.leaves(params)),
        "main_metric": task.main_metric,
        "versions": run_folder.versions(),
        "timing": {},
    }


def describe_scores(predictor: Predictor, records: list[JsonObject]) -> JsonObject:
    """The final and the best logged evaluation, and the score of a constant answer."""
    scores = [{"step": record["step"], "metrics": record["eval"]} for record in records if "eval" in record]
    return {
        "eval_examples": len(predictor.splits["validation"]),
        "majority_class": {"metrics": predictor.evaluate_majority()},
        "final": scores[-1],
        "best": max(scores, key=lambda score: score["metrics"][predictor.task.main_metric]),
    }


def examine(predictor: Predictor, trained: Trained) -> diagnosis.Examination:
    """The examination of the model that the run keeps on the validation split."""
    evaluated = next(record["step"] for record in reversed(trained.records) if "eval" in record)
    step = trained.facts.get("model_step")
    return diagnosis.examine(predictor, trained.params, model_step=step, evaluated_step=evaluated)


def default_folder(settings: Settings) -> str:
    """``runs/TASK-METHOD-seedSEED``; with an adapter ``runs/TASK-KIND-METHOD-seedSEED``."""
    name = settings.data.task_name or pathlib.Path(str(settings.data.own_name)).stem
    kind = f"{settings.peft}-" if settings.peft else ""
    return f"runs/{name}-{kind}{settings.method}-seed{settings.seed}"


def describe_data(settings: Settings) -> str:
    """Describes the data; the built-in data is never called GLUE."""
    if not settings.data.task_name:
        return str(settings.data.own_name)
    if settings.data.data_dir == "builtin":
        return f"built-in data in the form of {settings.data.task_name} (generated, not GLUE)"
    return f"{settings.data.task_name} from {settings.data.data_dir or 'nyu-mll/glue'}"


def draw(folder: pathlib.Path, results: JsonObject, records: list[JsonObject]) -> None:
    """Plots loss and main score from the lines of metrics.jsonl."""
    if "steps" not in results:
        return
    plots.plot_loss(folder / "plots" / "loss.png", records)
    if "final" in results:
        metric = results["main_metric"]
        majority = results["majority_class"]["metrics"][metric] if "majority_class" in results else None
        plots.plot_scores(folder / "plots" / "score.png", {results["method"]: records}, metric, majority)


def summary(results: JsonObject, folder: pathlib.Path) -> str:
    """A summary of the run in two lines."""
    kind = f"{results['peft']}, " if results.get("peft") else ""
    title = f"{kind}{results['method']} on {results['data']}"
    if "final" not in results:
        return f"{title}: done\nresults in {folder}"
    scores = dict(results["final"]["metrics"])
    scores |= {name: other["metrics"]["accuracy"] for name, other in results.get("out_of_domain", {}).items()}
    return f"{title}: {', '.join(f'{name} {score:.4f}' for name, score in scores.items())}\nresults in {folder}"


if __name__ == "__main__":
    import sys

    from pats_jax.programs.cli import main

    main(["glue", *sys.argv[1:]])
