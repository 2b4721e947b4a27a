"""The GLUE program: ``python -m pats_jax.glue``, or `pats-jax glue`.

Reads a task, loads a pretrained encoder, trains it with the chosen method in one jitted step, evaluates with the task's
own metric and leaves a folder of results. `run` reads from top to bottom as the program does; every input is checked
before the folder is touched.
"""

import concurrent.futures
import functools
import logging
import pathlib
import shlex
import warnings
from typing import Any

import jax
import rich.console

from pats_jax import (
    methods,
    model_card,
    models,
    parallel,
    pe_modules,
    plots,
    preemption,
    run_folder,
    run_start,
    train_state,
)
from pats_jax.checkpoints import Checkpoints
from pats_jax.console import say
from pats_jax.data import batches, low_resource, out_of_domain, readers, tasks
from pats_jax.errors import InputError, Preempted
from pats_jax.evaluation import Predictor, true_labels, write_files
from pats_jax.fine_tuning import GlueTraining, Trained, count_steps, train
from pats_jax.models import peft
from pats_jax.settings import Settings

logger = logging.getLogger(__name__)


def run(settings: Settings, console: rich.console.Console | None = None) -> dict[str, Any]:
    """Runs the program.

    Args:
      settings: what to do.
      console: where progress and scores go; none: nowhere.

    Returns:
      What results.json holds.

    Raises:
      InputError: on anything in settings, data or checkpoint that is wrong, before anything is written; or when
        training diverges, or the disk is full.
      Preempted: if the run was asked to end; it has been saved then.
    """
    start = run_start.begin(settings, default_folder(settings), console)
    settings, runner, folder, console = start.settings, start.runner, start.folder, start.console
    if start.finished:
        say(console, f"finished already: {summary(start.finished, folder)}")
        return start.finished

    # data and model; Transformers, which the tokenizer needs, is imported meanwhile
    with concurrent.futures.ThreadPoolExecutor(1) as background:
        loading = background.submit(models.load_tokenizer, settings.model_name_or_path)
        task, splits = load_data(settings)
        model, params, config = load_model(settings, task, splits)
        tokenizer = loading.result()
    max_length = sequence_length(settings.max_seq_length, model)
    for split in splits.values():
        batches.check_room(split, tokenizer, max_length)
    tokenize = functools.cache(lambda name: batches.tokenize(splits[name], tokenizer, max_length))
    results = describe_run(settings, task, params)

    with preemption.watch() as asked:
        predict = runner.compile_predict(train_state.make_predict_step(model.apply))
        predictor = Predictor(predict, runner, task, splits, tokenize, settings.per_device_eval_batch_size, asked.check)
        training = None
        if "train" in splits:
            training = GlueTraining(settings, runner, task, splits["train"], tokenize("train"), model, params)
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
                    if parallel.is_first():
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

    if "eval" in settings.phases:
        results |= describe_scores(predictor, trained.records)
    if parallel.is_first():  # the folder that people read
        save_model(folder, settings, model, params, tokenizer)
        if files:
            write_files(folder / "predictions", files)
        draw(folder, task, results, trained.records)
        model_card.write_fine_tuned(folder, settings.to_dict(), results)
        run_folder.write_results(folder, results)
    say(console, summary(results, folder))
    return results


# data


def load_data(settings: Settings) -> tuple[tasks.Task, dict[str, readers.Split]]:
    """The task and the splits that the phases need, cut to the first ``max_*_samples`` rows."""
    names = [name for phase, name in _SPLITS.items() if phase in settings.phases]
    if settings.task_name:
        task = tasks.get_task(settings.task_name)
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
    """The same from ``--train_file`` and the like; without training, the labels are those of the checkpoint's head."""
    paths = {name: getattr(settings, f"{name}_file") for name in names}
    for name, path in paths.items():
        if path is None:
            raise InputError(
                f"--{name}_file is missing: {', '.join(sorted(settings.phases))} need {', '.join(names)} data"
            )
    if "train" in names:
        splits = readers.load_files(paths)
        return tasks.own_task(splits["train"].label_names), splits
    config = models.EncoderConfig.from_folder(models.checkpoint_folder(settings.model_name_or_path))
    labels = None if config.num_labels == 1 else tuple(config.id2label.values())
    return tasks.own_task(labels), readers.load_files(paths, label_names=labels, regression=labels is None)


def load_out_of_domain(settings: Settings, task: tasks.Task) -> dict[str, readers.Split]:
    """The sets of ``--out_of_domain`` by name, cut like the validation split."""
    if not settings.out_of_domain:
        return {}
    if set(task.labels or ()) != set(out_of_domain.THREE_CLASSES):
        raise InputError(f"--out_of_domain: needs a model of the classes {', '.join(out_of_domain.THREE_CLASSES)}")
    folder, data_dir = settings.out_of_domain_dir, settings.data_dir
    found = {name: out_of_domain.load_out_of_domain(name, folder, data_dir) for name in settings.out_of_domain}
    return {name: split.first(settings.max_eval_samples) for name, split in found.items()}


_SPLITS = {"train": "train", "eval": "validation", "predict": "test"}


def load_diagnostic(data_dir: str | None) -> dict[str, readers.Split]:
    """The diagnostic set AX, which a model trained on MNLI answers, where the data has it."""
    try:
        return {"ax": readers.load_task("ax", data_dir, splits=["test"])["test"]}
    except InputError as error:
        logger.warning("no predictions for AX: %s", error)
        return {}


def load_model(settings: Settings, task: tasks.Task, splits: dict[str, readers.Split]) -> tuple[Any, Any, Any]:
    """The model, its parameters and its config, for the task's labels, with the PE modules of ``--peft``."""
    model, params, config = models.from_pretrained(
        settings.model_name_or_path,
        num_labels=task.num_labels,
        dtype=settings.dtype,
        regression=task.is_regression,
        id2label=dict(enumerate(task.labels)) if task.labels else None,
        key=settings.seed,
        **dropout_rates(settings, splits),
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    methods.check_layers(settings, config.num_hidden_layers)
    modules = pe_modules.chosen_config(settings)
    if modules:
        model, params = peft.add_peft(model, params, modules, key=settings.seed)
        pe_modules.check_methods(settings, params)
    return model, params, config


def sequence_length(asked: int, model: models.SequenceClassifier) -> int:
    """``--max_seq_length``, lowered with a warning to what the model has positions for.

    Raises:
      InputError: if virtual tokens leave no room for a text.
    """
    longest = model.max_length
    if isinstance(model, peft.PeftClassifier) and longest < _SHORTEST_TEXT:
        raise InputError(
            f"--prompt_length, --prefix_length: of the model's positions they leave {longest} for the text"
        )
    if asked > longest:
        warnings.warn(
            f"--max_seq_length {asked} is above the model's {longest} positions; using {longest}", stacklevel=2
        )
    return min(asked, longest)


_SHORTEST_TEXT = 8  # tokens: a pair of sentences has three special ones


def dropout_rates(settings: Settings, splits: dict[str, readers.Split]) -> dict[str, float | None]:
    """The rates for `models.from_pretrained`: as typed, else 0 where the method's authors do without, else None."""
    steps = count_steps(settings, len(splits["train"])) if "train" in splits else None
    return methods.dropout_rates(settings, steps)


# results


def save_model(
    folder: pathlib.Path, settings: Settings, model: models.SequenceClassifier, params: Any, tokenizer: Any
) -> None:
    """Writes ``model/``; with PE modules ``adapter/``, and ``model/`` too where they can be merged into the weights."""
    if isinstance(model, peft.PeftClassifier):
        name = settings.model_name_or_path
        peft.save_peft(
            folder / "adapter", model=model, params=params, base_model_name_or_path=name, tokenizer=tokenizer
        )
        if not model.peft.merges:
            return
        model, params = peft.merge_and_unload(model, params)
    models.save_pretrained(folder / "model", params=params, config=model.config, tokenizer=tokenizer)


def describe_run(settings: Settings, task: tasks.Task, params: Any) -> dict[str, Any]:
    """What results.json says of a run before anything is trained."""
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
    """The final and the best of the logged evaluations, and what a constant answer scores."""
    scores = [{"step": record["step"], "metrics": record["eval"]} for record in records if "eval" in record]
    return {
        "eval_examples": len(predictor.splits["validation"]),
        "majority_class": {"metrics": predictor.evaluate_majority()},
        "final": scores[-1],
        "best": max(scores, key=lambda score: score["metrics"][predictor.task.main_metric]),
    }


def default_folder(settings: Settings) -> str:
    """``runs/TASK-METHOD-seedSEED``; with PE modules ``TASK-KIND-METHOD-...``."""
    file = settings.train_file or settings.validation_file or settings.test_file
    name = settings.task_name or pathlib.Path(str(file)).stem
    kind = f"{settings.peft}-" if settings.peft else ""
    return f"runs/{name}-{kind}{settings.method}-seed{settings.seed}"


def describe_data(settings: Settings) -> str:
    """What the run reads, in words; the built-in data is never called GLUE."""
    if not settings.task_name:
        return str(settings.train_file or settings.validation_file or settings.test_file)
    if settings.data_dir == "builtin":
        return f"built-in data in the form of {settings.task_name} (generated, not GLUE)"
    return f"{settings.task_name} from {settings.data_dir or 'nyu-mll/glue'}"


def draw(folder: pathlib.Path, task: tasks.Task, results: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Draws loss and score from the lines of metrics.jsonl."""
    if "steps" not in results:
        return
    plots.plot_loss(folder / "plots" / "loss.png", records)
    if "final" in results:
        majority = results["majority_class"]["metrics"][task.main_metric]
        plots.plot_scores(folder / "plots" / "score.png", {results["method"]: records}, task.main_metric, majority)


def how_to_go_on(folder: pathlib.Path, saved: bool) -> str:
    """What to type after an interruption."""
    config = shlex.quote(str(folder / "config.json"))
    return f"interrupted{' and saved' if saved else ''}; go on with: pats-jax glue --config {config} --resume"


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
