"""The GLUE program: ``python -m pats_jax.glue``, or `pats-jax glue`.

Reads a task, loads a pretrained encoder, trains it with the chosen method in one jitted step, evaluates it with the
task's own metric and writes a folder of results. `carry_out` is the program from top to bottom; it checks every input
before it touches the folder.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import pathlib
import shlex
from typing import Any

import jax
import numpy as np
import rich.console

from pats_jax import methods, models, train_state
from pats_jax.data import batches, low_resource, out_of_domain, readers, tasks
from pats_jax.data.labels import class_names
from pats_jax.data.tables import check_characters
from pats_jax.errors import InputError, Preempted
from pats_jax.models import labels, peft
from pats_jax.reporting import plots
from pats_jax.reporting.console import say
from pats_jax.run import model_card, pe_modules, run_folder, run_start
from pats_jax.run.settings import Settings
from pats_jax.training import preemption, runners, shape_costs
from pats_jax.training.checkpoints import Checkpoints
from pats_jax.training.evaluation import Predictor, sequence_length, true_labels, write_files
from pats_jax.training.fine_tuning import GlueTraining, Trained, count_steps, train

logger = logging.getLogger(__name__)


def run(settings: Settings, console: rich.console.Console | None = None) -> dict[str, Any]:
    """Runs the program.

    Args:
      settings: the settings of the run.
      console: where to print progress and scores; None: nowhere.

    Returns:
      What results.json holds.

    Raises:
      InputError: on invalid settings, data or checkpoint, before anything is written; or if training diverges, or
        the disk is full.
      Preempted: if the run was asked to stop; it has been saved.
    """
    settings.check()
    with concurrent.futures.ThreadPoolExecutor(1) as background:
        # Transformers, which the tokenizer needs, is imported while the devices start and the model is loaded
        loading = background.submit(models.load_tokenizer, settings.model_name_or_path)
        with run_start.begin(settings, default_folder(settings), console) as start:
            if start.finished:
                say(start.console, f"already finished: {summary(start.finished, start.folder)}")
                return start.finished
            return carry_out(start, loading)


def carry_out(start: run_start.Start[Settings], loading: concurrent.futures.Future) -> dict[str, Any]:
    """The part of `run` after settings and devices are checked, with the tokenizer on its way."""
    settings, runner, folder, console = start.settings, start.runner, start.folder, start.console

    # data and model
    task, splits = load_data(settings)
    model, params, config = load_model(settings, task, splits)
    tokenizer = loading.result()
    max_length = sequence_length(settings.max_seq_length, model)
    tokenizer.model_max_length = max_length  # saved with the model: how long its texts were
    for split in splits.values():
        batches.check_room(split, tokenizer, max_length)
        batches.check_types(batches.largest_type(split, tokenizer), config.type_vocab_size)
    tokenize = functools.cache(lambda name: tokenize_split(name, splits[name], tokenizer, model, max_length))
    # a text that the tokenizer or the model cannot take must not cost a finished training its model
    if not batches.takes_any_text(tokenizer) or batches.largest_id(tokenizer) >= config.vocab_size:
        for name in splits:
            tokenize(name)
    order = None if task.labels is None else labels.match_labels(task.labels, list(config.id2label.values()))
    results = describe_run(settings, task, params)

    with preemption.watch() as asked:
        cost = shape_costs.shape_cost(params, runner.platform, 1, training=False)
        training = None
        if "train" in splits:
            of_head = in_order_of_head(splits["train"], order)
            training = GlueTraining(settings, runner, task, of_head, tokenize("train"), model, params)
            if settings.length_buckets is None:
                settings = dataclasses.replace(settings, length_buckets=len(training.boundaries))
                start = dataclasses.replace(start, settings=settings)  # a resumed run reads what was chosen
        predictor = Predictor(
            runner.compile_predict(train_state.make_predict_step(model.apply)),
            runner,
            task,
            splits,
            tokenize,
            settings.per_device_eval_batch_size,
            asked.check,
            order,
            cost,
            1 if training is None else training.rhythm.evaluations,
        )
        checkpoints = Checkpoints(folder / "checkpoints", settings.save_total_limit)
        start.open_folder()

        # train, evaluating on the way; predict
        files: dict[str, str] = {}
        with checkpoints:
            trained = Trained(runner.place(params) if training is None else params, [])
            try:
                if training:
                    trained = train(training, predictor, checkpoints, folder, results, console, asked)
                elif "eval" in settings.phases:
                    trained.records.append({"step": 0, "eval": predictor.evaluate(trained.params)})
                    if runners.is_first():
                        run_folder.write_metrics(folder, trained.records)
                if settings.out_of_domain:
                    names = settings.out_of_domain
                    results["out_of_domain"] = predictor.evaluate_out_of_domain(trained.params, names)
                if "predict" in settings.phases:
                    files = predictor.predictions(trained.params)
            except Preempted as error:
                trained.save()
                checkpoints.wait()
                raise Preempted(how_to_go_on(folder, training is not None), error.signal_number) from None
            params = runner.to_host(trained.params)

            # the folder that people read
            if "eval" in settings.phases:
                results |= describe_scores(predictor, trained.records)
            with trained.kept(checkpoints):
                if runners.is_first():
                    run_folder.check_links(folder)
                    save_model(folder, settings, model, params, tokenizer)
                    if files:
                        write_files(folder / "predictions", files)
                    trained.draw()
                    draw(folder, task, results, trained.records)
                    defaults = type(settings)().to_dict()
                    model_card.write_fine_tuned(folder, settings.to_dict(), results, defaults)
                    start.finish(results)
    say(console, summary(results, folder))
    return results


# data


def load_data(settings: Settings) -> tuple[tasks.Task, dict[str, readers.Split]]:
    """The task and the splits that the phases need, cut to the first ``max_*_samples`` rows."""
    names = [name for phase, name in _SPLITS.items() if phase in settings.phases]
    if settings.task_name:
        task = tasks.get_task(settings.task_name)
        if settings.do_regression not in (None, task.is_regression):
            kind = "scores" if task.is_regression else "classes"
            raise InputError(f"--do_regression: the labels of --task_name {task.name} are {kind}; omit the flag")
        splits = readers.load_task(task, settings.data_dir, splits=names)
        if task.name == "mnli" and "predict" in settings.phases:
            splits |= load_diagnostic(settings.data_dir)
    else:
        task, splits = load_own_data(settings, names)
    if settings.low_resource:
        train = splits["train"]
        rows = low_resource.stratified_rows(true_labels(train), settings.low_resource, settings.seed)
        splits["train"] = train.take(rows)
    limits = {"train": settings.max_train_samples, "validation": settings.max_eval_samples}
    limited = {
        name: split.first(limits.get(name.removesuffix("_mismatched"), settings.max_predict_samples))
        for name, split in splits.items()
    }
    return task, limited | load_out_of_domain(settings, task)


def load_own_data(settings: Settings, names: list[str]) -> tuple[tasks.Task, dict[str, readers.Split]]:
    """The same for ``--train_file`` and the like; without training, the labels are those of the checkpoint's head."""
    paths = {name: getattr(settings, f"{name}_file") for name in names}
    for name, path in paths.items():
        if path is None:
            raise InputError(f"--{name}_file is missing; this run needs {' and '.join(names)} data")
    if "train" in names:
        splits = readers.load_files(paths, regression=settings.do_regression)
        return tasks.own_task(splits["train"].label_names), splits
    config = models.EncoderConfig.from_folder(models.checkpoint_folder(settings.model_name_or_path))
    of_head = tuple(config.id2label.values())
    for name in of_head:
        check_characters(name, f"{settings.model_name_or_path}: a name in id2label")
    is_regression = config.num_labels == 1
    if settings.do_regression not in (None, is_regression):
        kind = "gives scores" if is_regression else f"has {len(of_head)} classes"
        raise InputError(f"--do_regression: the model of --model_name_or_path {kind}; omit the flag")
    if is_regression:
        return tasks.own_task(None), readers.load_files(paths, regression=True)
    written = readers.labels_in(paths["validation"]) if "validation" in paths else set()
    names_of_head = labels_of_head(of_head, written)
    return tasks.own_task(names_of_head), readers.load_files(paths, label_names=names_of_head)


def labels_of_head(names: tuple[str, ...], written: set[str]) -> tuple[str, ...]:
    """The names of a head's classes by index, as a file with some of these labels writes them.

    A head without names (``LABEL_0``, ...) must have as many labels as the file; these are numbered as in training, in
    numerical or alphabetical order.

    Examples:
      >>> labels_of_head(("NEGATIVE", "POSITIVE"), {"positive", "negative"})
      ('negative', 'positive')
      >>> labels_of_head(("LABEL_0", "LABEL_1"), {"spam", "ham"})
      ('ham', 'spam')
      >>> labels_of_head(("LABEL_0", "LABEL_1", "LABEL_2"), {"10.0", "9.0", "2.0"})
      ('2.0', '9.0', '10.0')
    """
    numbers = tuple(map(str, range(len(names))))
    if labels.is_nameless(names) and not written & set(names):
        if written and class_names({*numbers, *written}) == numbers:  # compared by value: 1.0 is 1
            return numbers
        if len(class_names(written)) == len(names):
            return class_names(written)
    return labels.respelled(names, sorted(written))


def load_out_of_domain(settings: Settings, task: tasks.Task) -> dict[str, readers.Split]:
    """The sets of ``--out_of_domain`` by name, cut like the validation split."""
    if not settings.out_of_domain:
        return {}
    if labels.match_labels(task.labels or (), out_of_domain.THREE_CLASSES) is None:
        raise InputError(f"--out_of_domain: needs a model with the classes {', '.join(out_of_domain.THREE_CLASSES)}")
    folder, data_dir = settings.out_of_domain_dir, settings.data_dir
    found = {name: out_of_domain.load_out_of_domain(name, folder, data_dir) for name in settings.out_of_domain}
    return {name: split.first(settings.max_eval_samples) for name, split in found.items()}


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
    settings = settings.with_layers(*runners.default_form(jax.default_backend()))
    model, params, config = models.from_pretrained(
        settings.model_name_or_path,
        num_labels=task.num_labels,
        dtype=settings.dtype,
        regression=task.is_regression,
        id2label=dict(enumerate(task.labels)) if task.labels else None,
        key=settings.seed,
        ignore_mismatched_sizes=settings.ignore_mismatched_sizes,
        strict_labels="train" not in splits,
        **dropout_rates(settings, splits),
        gradient_checkpointing=settings.gradient_checkpointing,
        layers=settings.layers,
        unroll=settings.unroll or 0,
        attention=settings.model_attention,
    )
    methods.check_layers(settings, config.num_hidden_layers)
    modules = pe_modules.chosen_config(settings)
    if modules:
        if not modules.train_pooler and models.lacks_pooler(settings.model_name_or_path):
            raise InputError(
                f"--peft {settings.peft}: the checkpoint has no pooler, so a new one must be trained and saved; "
                "set --peft_pooler"
            )
        model, params = peft.add_peft(model, params, modules, key=settings.seed)
        pe_modules.check_methods(settings, params)
    return model, params, config


def tokenize_split(
    name: str, split: readers.Split, tokenizer: Any, model: models.SequenceClassifier, max_length: int
) -> batches.Tokens:
    """Tokenizes a split; warns how many of its texts were truncated.

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
    return dataclasses.replace(split, labels=order[split.labels], label_names=None)


def dropout_rates(settings: Settings, splits: dict[str, readers.Split]) -> methods.DropoutRates:
    """The rates for `models.from_pretrained`: as set, else 0 if the method's authors use none, else None."""
    steps = count_steps(settings, len(splits["train"])) if "train" in splits else None
    return methods.dropout_rates(settings, steps)


# results


def save_model(
    folder: pathlib.Path, settings: Settings, model: models.SequenceClassifier, params: Any, tokenizer: Any
) -> None:
    """Writes ``model/``; with an adapter ``adapter/``, and ``model/`` too if it can be merged into the weights."""
    if isinstance(model, peft.PeftClassifier):
        name = settings.model_name_or_path
        peft.save_peft(
            folder / "adapter", model=model, params=params, base_model_name_or_path=name, tokenizer=tokenizer
        )
        if not peft.config_of(model).merges:
            return
        model, params = peft.merge_and_unload(model, params)
    models.save_pretrained(folder / "model", params=params, config=model.config, tokenizer=tokenizer)


def describe_run(settings: Settings, task: tasks.Task, params: Any) -> dict[str, Any]:
    """What results.json records before training."""
    return {
        "model_name_or_path": settings.model_name_or_path,
        "task_name": settings.task_name,
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


def describe_scores(predictor: Predictor, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The final and the best logged evaluation, and the score of a constant answer."""
    scores = [{"step": record["step"], "metrics": record["eval"]} for record in records if "eval" in record]
    return {
        "eval_examples": len(predictor.splits["validation"]),
        "majority_class": {"metrics": predictor.evaluate_majority()},
        "final": scores[-1],
        "best": max(scores, key=lambda score: score["metrics"][predictor.task.main_metric]),
    }


def default_folder(settings: Settings) -> str:
    """``runs/TASK-METHOD-seedSEED``; with an adapter ``runs/TASK-KIND-METHOD-seedSEED``."""
    file = settings.train_file or settings.validation_file or settings.test_file
    name = settings.task_name or pathlib.Path(str(file)).stem
    kind = f"{settings.peft}-" if settings.peft else ""
    return f"runs/{name}-{kind}{settings.method}-seed{settings.seed}"


def describe_data(settings: Settings) -> str:
    """Describes the data; the built-in data is never called GLUE."""
    if not settings.task_name:
        return str(settings.train_file or settings.validation_file or settings.test_file)
    if settings.data_dir == "builtin":
        return f"built-in data in the form of {settings.task_name} (generated, not GLUE)"
    return f"{settings.task_name} from {settings.data_dir or 'nyu-mll/glue'}"


def draw(folder: pathlib.Path, task: tasks.Task, results: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Plots loss and score from the lines of metrics.jsonl."""
    if "steps" not in results:
        return
    plots.plot_loss(folder / "plots" / "loss.png", records)
    if "final" in results:
        majority = results["majority_class"]["metrics"][task.main_metric]
        plots.plot_scores(folder / "plots" / "score.png", {results["method"]: records}, task.main_metric, majority)


def how_to_go_on(folder: pathlib.Path, saved: bool) -> str:
    """The message after an interruption, with the command that resumes the run."""
    config = shlex.quote(str(folder / "config.json"))
    return f"interrupted{' and saved' if saved else ''}; to resume, run: pats-jax glue --config {config} --resume"


def summary(results: dict[str, Any], folder: pathlib.Path) -> str:
    """The run in two lines."""
    kind = f"{results['peft']}, " if results.get("peft") else ""
    title = f"{kind}{results['method']} on {results['data']}"
    if "final" not in results:
        return f"{title}: done\nresults in {folder}"
    scores = dict(results["final"]["metrics"])
    scores |= {name: other["metrics"]["accuracy"] for name, other in results.get("out_of_domain", {}).items()}
    return f"{title}: {', '.join(f'{name} {score:.4f}' for name, score in scores.items())}\nresults in {folder}"


if __name__ == "__main__":
    import sys

    from pats_jax.cli import main

    main(["glue", *sys.argv[1:]])
