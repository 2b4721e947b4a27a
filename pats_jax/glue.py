"""The GLUE program: ``python -m pats_jax.glue``, or `pats-jax glue`.

Reads a task, loads a pretrained encoder, trains it with the chosen method in one jitted step, evaluates with the task's
own metric and leaves a folder of results. `run` reads from top to bottom as the program does; every input is checked
before the folder is touched.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import os
import pathlib
import shlex
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress

from pats_jax import (
    concentration,
    methods,
    models,
    parallel,
    plots,
    preemption,
    run_folder,
    subnetworks,
    train_state,
    trees,
)
from pats_jax.checkpoints import Checkpoints
from pats_jax.data import batches, low_resource, out_of_domain, readers, tasks
from pats_jax.errors import InputError, Preempted
from pats_jax.evaluation import Predictor, true_labels, write_files
from pats_jax.journal import Journal, check_tensorboard
from pats_jax.methods import layer_mask, learning_rate_schedule
from pats_jax.objectives import with_objectives
from pats_jax.profiling import Profiler
from pats_jax.settings import Settings, read_config
from pats_jax.trainer import Hooks, Progress, Rhythm, fit

logger = logging.getLogger(__name__)


def run(settings: Settings, console: rich.console.Console | None = None) -> dict[str, Any]:
    """Runs the program.

    Args:
      settings: what to do; `Settings.check` is called first.
      console: where progress and scores go; none: nowhere.

    Returns:
      What results.json holds.

    Raises:
      InputError: on anything in settings, data or checkpoint that is wrong, before anything is written; or when
        training diverges, or the disk is full.
      Preempted: if the run was asked to end; it has been saved then.
    """
    settings.check()
    methods.get_methods(settings.method)
    keep_compiled_programs(settings.compilation_cache_dir)
    parallel.initialize(
        settings.coordinator_address, settings.num_processes, settings.process_id, settings.heartbeat_timeout_seconds
    )
    runner = parallel.make_runner(settings.parallel, fsdp=settings.fsdp, num_devices=settings.num_devices)
    console = console if console and parallel.is_first() else rich.console.Console(quiet=True)
    folder = pathlib.Path(settings.output_dir or default_folder(settings))
    settings = dataclasses.replace(settings, output_dir=str(folder))
    resuming = settings.resume and (folder / "config.json").exists()
    if resuming:
        settings = settings.resuming(read_config(str(folder / "config.json")))
        finished = run_folder.read_results(folder)
        if finished:
            say(console, f"finished already: {summary(finished, folder)}")
            return finished
    else:
        run_folder.check_free(folder, settings.overwrite)
    settings = settings.with_batch_size(runner.num_devices)
    if settings.report_to == "tensorboard":
        check_tensorboard()

    # data and model
    task, splits = load_data(settings)
    tokenizer = models.load_tokenizer(settings.model_name_or_path)
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
    max_length = sequence_length(settings.max_seq_length, config)
    tokens = {name: batches.tokenize(split, tokenizer, max_length) for name, split in splits.items()}
    results = {
        "model_name_or_path": settings.model_name_or_path,
        "task_name": settings.task_name,
        "data": describe_data(settings),
        "method": settings.method,
        "seed": settings.seed,
        "num_labels": task.num_labels,
        "num_parameters": sum(p.size for p in jax.tree.leaves(params)),
        "main_metric": task.main_metric,
        "versions": run_folder.versions(),
        "timing": {},
    }

    with preemption.watch() as asked:
        predict = runner.compile_predict(train_state.make_predict_step(model.apply))
        predictor = Predictor(predict, runner, task, splits, tokens, settings.per_device_eval_batch_size, asked.check)
        training = None
        if "train" in splits:
            training = Training(settings, runner, task, splits["train"], tokens["train"], model, params)
        checkpoints = Checkpoints(folder / "checkpoints", settings.save_total_limit)
        parallel.wait_for_all("every process has checked its input")
        if parallel.is_first():
            run_folder.remove_leftovers(folder) if resuming else run_folder.start(folder, settings.to_dict())
        parallel.wait_for_all("the run's folder is there")

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
                raise Preempted(how_to_go_on(folder), error.signal_number) from None
        params = runner.to_host(trained.params)

    # the folder that people read
    if "eval" in settings.phases:
        results["eval_examples"] = len(splits["validation"])
        results["majority_class"] = {"metrics": predictor.evaluate_majority()}
        scores = [{"step": r["step"], "metrics": r["eval"]} for r in trained.records if "eval" in r]
        results["final"] = scores[-1]
        results["best"] = max(scores, key=lambda score: score["metrics"][task.main_metric])
    if parallel.is_first():
        models.save_pretrained(folder / "model", params=params, config=config, tokenizer=tokenizer)
        if files:
            write_files(folder / "predictions", files)
        draw(folder, task, results, trained.records)
        run_folder.write_model_card(folder, settings.to_dict(), results)
        run_folder.write_results(folder, results)
    say(console, summary(results, folder))
    return results


def keep_compiled_programs(directory: str | None) -> None:
    """Turns on JAX's cache on disk, in a folder that nobody else can write: what lies in it will be executed.

    Raises:
      InputError: if the folder cannot be made, or others can write in it.
    """
    if directory is None:
        return
    path = pathlib.Path(directory).absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--compilation_cache_dir {directory}: {error.strerror}") from None
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(f"--compilation_cache_dir {directory}: others can write in it; chmod 700, or another folder")
    jax.config.update("jax_compilation_cache_dir", str(path))


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


def sequence_length(asked: int, config: models.EncoderConfig) -> int:
    """``--max_seq_length``, lowered with a warning to what the model has positions for."""
    if asked > config.max_length:
        warnings.warn(
            f"--max_seq_length {asked} is above the model's {config.max_length} positions; using {config.max_length}",
            stacklevel=2,
        )
    return min(asked, config.max_length)


def count_steps(settings: Settings, rows: int) -> int:
    """Optimizer steps of the training."""
    if settings.max_steps > 0:
        return settings.max_steps
    return math.ceil(settings.num_train_epochs * math.ceil(rows / (settings.train_batch_size or 1)))


def dropout_rates(settings: Settings, splits: dict[str, readers.Split]) -> dict[str, float | None]:
    """The rates for `models.from_pretrained`: as typed, else 0 where the method's authors do without, else None."""
    authors = None
    if "train" in splits and methods.turns_dropout_off(settings, count_steps(settings, len(splits["train"]))):
        authors = 0.0
    typed = {"hidden_dropout": settings.hidden_dropout, "attention_dropout": settings.attention_dropout}
    chosen = {name: authors if rate is None else rate for name, rate in typed.items()}
    return chosen | {"classifier_dropout": authors if settings.hidden_dropout is None else None}


# training


class Training:
    """Everything that one training needs, built and checked before anything is written."""

    def __init__(
        self,
        settings: Settings,
        runner: parallel.MeshRunner,
        task: tasks.Task,
        split: readers.Split,
        tokens: batches.Tokens,
        model,
        params,
    ):
        self.settings, self.runner, self.metric = settings, runner, task.main_metric
        self.batch_size = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        self.batch_size *= runner.num_devices
        self.labels, self.tokens = split.labels, tokens
        self.boundaries = batches.bucket_boundaries(tokens.lengths, settings.length_buckets)
        self.plan = self._plan(epoch=0)
        total = count_steps(settings, len(tokens))
        self.rhythm = Rhythm(
            total_steps=total,
            logging_steps=settings.logging_steps,
            eval_steps=settings.eval_steps or len(self.plan),
            save_steps=settings.save_steps,
            save_best=settings.load_best_model_at_end,
            patience=settings.early_stopping_patience,
            max_nonfinite_steps=settings.max_nonfinite_steps,
        )
        self.schedule = learning_rate_schedule(settings, total)
        self.mask = layer_mask(params, settings.noise_layers)
        self.num_parameters = sum(p.size for p in jax.tree.leaves(params))
        self.loss_without_dropout = train_state.make_loss_fn(
            model.apply, regression=task.is_regression, deterministic=True
        )
        params = runner.place(methods.starting_params(settings, params))
        trainable = methods.trainable_mask(settings, params)
        trained = params if trainable is None else trees.partition(trainable, params)[0]
        tx = methods.make_optimizer(settings, total, trained, functools.partial(self._fisher_mask, params))
        create = functools.partial(
            train_state.TrainState.create, apply_fn=model.apply, tx=tx, key=settings.seed, trainable=trainable
        )
        self.state = runner.create_state(create, params)
        self.step = runner.compile_step(
            train_state.make_train_step(
                with_objectives(model.apply, *methods.chosen_objectives(settings), regression=task.is_regression),
                axis_name=runner.axis_name,
                accumulation_steps=settings.gradient_accumulation_steps,
                skip_nonfinite=True,
            ),
            self.state,
        )
        self.statistics = jax.jit(functools.partial(methods.statistics, settings, self.schedule))

    def batches(self, first_step: int) -> Iterator[tuple[dict[str, np.ndarray], dict[str, float]]]:
        """This process's rows of every batch from a step (counted from 0) on, and counts of the global batch."""
        epoch, done = divmod(first_step, len(self.plan))
        for number in itertools.count(epoch):
            for rows, length in self._plan(number)[done:]:
                counts = {
                    "examples": float(len(rows)),
                    "tokens": float(self.tokens.lengths[rows].sum()),
                    "computed_tokens": float(self.batch_size * length),
                }
                yield self._fill(rows, length), counts
            done = 0

    def sensitivity(self, params: Any) -> dict[str, np.ndarray]:
        """Sensitivity of the layers that take noise, measured on some batches of the first epoch, all of one shape."""
        common, _ = collections.Counter(length for _, length in self.plan).most_common(1)[0]
        chosen = [rows for rows, length in self.plan if length == common][: self.settings.sensitivity_batches]
        sample = (self.runner.put(self._fill(rows, common)) for rows in chosen)
        measured = concentration.measure_sensitivity(self.loss_without_dropout, params, sample)
        return concentration.selected(self.runner.to_host(measured), self.mask)

    def _fisher_mask(self, params, keep_fraction, mask):
        """The mask of Child-Tuning D, from one pass over the training data."""
        everything = (self.runner.put(self._fill(rows, length)) for rows, length in self.plan)
        return subnetworks.fisher_mask(self.loss_without_dropout, params, everything, keep_fraction, mask=mask)

    def _plan(self, epoch):
        return batches.epoch_plan(
            self.tokens.lengths,
            self.batch_size,
            self.boundaries,
            seed=self.settings.seed,
            epoch=epoch,
        )

    def _fill(self, rows, length):
        own = self.runner.own_rows(self.batch_size)
        return batches.fill_batch(self.tokens, self.labels, rows, self.batch_size, length, own)


@dataclasses.dataclass
class Trained:
    """What training leaves.

    Attributes:
      params: the parameters that the run keeps.
      records: the logged lines.
      save: saves a checkpoint of the end, where there is none yet.
    """

    params: Any
    records: list[dict[str, Any]]
    save: Callable[[], None] = lambda: None


class TrainingHooks(Hooks):
    """What the loop does for a run: progress bar, journal, evaluation, checkpoints, profile."""

    def __init__(
        self,
        training: Training,
        predictor: Predictor,
        checkpoints: Checkpoints,
        show: Callable[..., None],
        journal: Journal | None,
        profiler: Profiler | None,
    ):
        self.metric = training.metric
        self._training, self._predictor, self._checkpoints = training, predictor, checkpoints
        self._show, self._journal, self._profiler = show, journal, profiler

    def on_step(self, step, state):
        self._show(completed=step)
        if self._profiler:
            self._profiler.after(step, state)

    def describe(self, progress, state):
        made = progress.step - progress.skipped_steps
        figures = {"learning_rate": float(self._training.schedule(max(made - 1, 0)))}
        figures |= {name: float(x) for name, x in self._training.statistics(state.opt_state).items()}
        noisy = figures.pop("noisy_parameters", None)
        return figures if noisy is None else figures | {"noise_share": noisy / self._training.num_parameters}

    def on_record(self, record):
        if self._journal:
            self._journal.write(record)
        if "loss" in record:
            rate = record["timing"]["examples_per_second"]
            self._show(status=f"loss {record['loss']:.4f}, {rate:.0f} examples/s")
        self._checkpoints.check()

    def evaluate(self, state):
        if "eval" not in self._training.settings.phases:
            return None
        return self._predictor.evaluate(self._training.runner.view(state.all_params))

    def save(self, state, progress):
        best = progress.best(self.metric) if self._training.rhythm.save_best else None
        view = self._training.runner.view(state)
        self._checkpoints.save(progress.step, view, dataclasses.asdict(progress), best and best["step"])


def train(
    training: Training,
    predictor: Predictor,
    checkpoints: Checkpoints,
    folder: pathlib.Path,
    results: dict[str, Any],
    console: rich.console.Console,
    asked: preemption.Preemption,
) -> Trained:
    """Trains from the last checkpoint or the start, and fills in results."""
    settings, rhythm, runner = training.settings, training.rhythm, training.runner
    results |= {"train_examples": len(training.tokens), "steps": rhythm.total_steps}
    logger.info("%s", describe_batch(settings, runner))
    before = None
    if settings.sensitivity_batches:
        before = training.sensitivity(runner.view(training.state.all_params))
    state, progress = training.state, Progress()
    restored = checkpoints.restore(runner.view(state)) if settings.resume else None
    if restored:
        state, progress = restored[0], Progress(**restored[1])
        logger.info("going on after step %d of %d", progress.step, rhythm.total_steps)
    started, first_step = time.perf_counter(), progress.step
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress_bar(console))
        number = bar.add_task("training", total=rhythm.total_steps, completed=first_step, status="")
        journal = profiler = None
        if parallel.is_first():
            tensorboard = settings.report_to == "tensorboard"
            journal = stack.enter_context(Journal(folder, progress.records, tensorboard=tensorboard))
        if settings.profile:
            profiler = stack.enter_context(Profiler(folder / "profile", first_step, rhythm.total_steps))
        show = functools.partial(bar.update, number)
        hooks = TrainingHooks(training, predictor, checkpoints, show, journal, profiler)
        state, progress = fit(
            state,
            training.step,
            training.batches(progress.step),
            rhythm,
            hooks,
            progress=progress,
            preemption=asked,
        )
    seconds = time.perf_counter() - started
    results["steps"] = progress.step
    results["timing"] |= {"train_seconds": seconds, "steps_per_second": (progress.step - first_step) / seconds}
    params, results["model_step"] = runner.view(state.all_params), progress.step
    best = progress.best(training.metric) if settings.load_best_model_at_end else None
    if best is not None and best["step"] != progress.step:
        params, results["model_step"] = checkpoints.restore_params(best["step"], runner.view(state)), best["step"]
    if before is not None:
        after = training.sensitivity(params)
        everything = [np.concatenate(list(tensors.values())) for tensors in (before, after)]
        histograms = [concentration.log10_histogram(values) for values in everything]
        results["concentration"] = {
            "before": concentration.by_tensor(before),
            "after": concentration.by_tensor(after),
            "log10_histogram": {
                "edges": list(concentration.HISTOGRAM_EDGES),
                "before": histograms[0],
                "after": histograms[1],
            },
        }
        if parallel.is_first():
            plots.plot_sensitivity(folder / "plots" / "sensitivity.png", *everything)
    return Trained(params, progress.records, lambda: hooks.save(state, progress))


def progress_bar(console: rich.console.Console) -> rich.progress.Progress:
    """Bar, loss, examples/s and time left; nothing where the console is no terminal."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[status]}"),
        rich.progress.TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


# reports


def default_folder(settings: Settings) -> str:
    """``runs/TASK-METHOD-seedSEED``."""
    file = settings.train_file or settings.validation_file or settings.test_file
    name = settings.task_name or pathlib.Path(str(file)).stem
    return f"runs/{name}-{settings.method}-seed{settings.seed}"


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


def describe_batch(settings: Settings, runner: parallel.MeshRunner) -> str:
    """The global batch and what it is made of."""
    micro_batches = settings.gradient_accumulation_steps
    return (
        f"{settings.train_batch_size} rows a step: {settings.per_device_train_batch_size} "
        f"x {runner.num_devices} devices of {jax.process_count()} processes"
        + (f" x {micro_batches} micro-batches" if micro_batches > 1 else "")
    )


def how_to_go_on(folder: pathlib.Path) -> str:
    """What to type after an interruption."""
    return (
        f"interrupted and saved; go on with: pats-jax glue --config {shlex.quote(str(folder / 'config.json'))} --resume"
    )


def say(console: rich.console.Console, text: str) -> None:
    """Prints text as it is, without markup and line breaks."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def summary(results: dict[str, Any], folder: pathlib.Path) -> str:
    """The run in two lines."""
    title = f"{results['method']} on {results['data']}"
    if "final" not in results:
        return f"{title}: done\nresults in {folder}"
    scores = dict(results["final"]["metrics"])
    scores |= {name: other["metrics"]["accuracy"] for name, other in results.get("out_of_domain", {}).items()}
    return f"{title}: {', '.join(f'{name} {score:.4f}' for name, score in scores.items())}\nresults in {folder}"


if __name__ == "__main__":
    import sys

    from pats_jax.cli import main

    main(["glue", *sys.argv[1:]])
