"""The GLUE program: ``python -m pats_jax.glue``, or `pats-jax glue`.

Reads a task, loads a pretrained encoder, trains it with the chosen method in one jitted step, evaluates with the task's
own metric and leaves a folder of results. `run` reads from top to bottom as the program does; every input is checked
before the folder is touched.
"""

import collections
import dataclasses
import functools
import itertools
import logging
import math
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress

from pats_jax import concentration, metrics, models, plots, run_folder, train_state
from pats_jax.data import batches, readers, tasks
from pats_jax.errors import InputError
from pats_jax.methods import get_method, layer_mask, learning_rate_schedule, make_optimizer
from pats_jax.settings import Settings
from pats_jax.trainer import Rhythm, fit, predict_logits

logger = logging.getLogger(__name__)

EVAL_BUCKETS = 3  # sorted by length, rows need little padding, and every shape takes seconds to compile


def run(settings: Settings, console: rich.console.Console | None = None) -> dict[str, Any]:
    """Runs the program.

    Args:
      settings: what to do; `Settings.check` is called first.
      console: where progress and scores go; none: nowhere.

    Returns:
      What results.json holds.

    Raises:
      InputError: on anything in settings, data or checkpoint that is wrong, before anything is written; or when
        training diverges.
    """
    settings.check()
    get_method(settings.method)
    console = console or rich.console.Console(quiet=True)
    folder = pathlib.Path(settings.output_dir or default_folder(settings))
    settings = dataclasses.replace(settings, output_dir=str(folder))
    run_folder.check_free(folder, settings.overwrite)

    # data and model
    task, splits = load_data(settings)
    tokenizer = models.load_tokenizer(settings.model_name_or_path)
    model, params, config = models.from_pretrained(
        settings.model_name_or_path,
        num_labels=task.num_labels,
        regression=task.is_regression,
        id2label=dict(enumerate(task.labels)) if task.labels else None,
        key=settings.seed,
        hidden_dropout=settings.hidden_dropout,
        attention_dropout=settings.attention_dropout,
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

    predictor = Predictor(jax.jit(train_state.make_predict_step(model.apply)), task, splits, tokens, settings)
    training = Training(settings, task, splits["train"], tokens["train"], model, params) if "train" in splits else None
    run_folder.start(folder, settings.to_dict())

    # train, evaluating on the way
    if training:
        params = train(training, predictor, folder, results, console)
    if "eval" in settings.phases:
        results["eval_examples"] = len(splits["validation"])
        results["majority_class"] = {"metrics": predictor.evaluate_majority()}
        if not training:
            run_folder.append_metrics(folder, {"step": 0, "eval": predictor.evaluate(params)})
        evaluations = [r for r in run_folder.read_metrics(folder) if "eval" in r]
        scores = [{"step": r["step"], "metrics": r["eval"]} for r in evaluations]
        results["final"] = scores[-1]
        results["best"] = max(scores, key=lambda score: score["metrics"][task.main_metric])

    # the folder that people read
    models.save_pretrained(folder / "model", params=params, config=config, tokenizer=tokenizer)
    if "predict" in settings.phases:
        predictor.write_predictions(params, folder / "predictions")
    draw(folder, task, results)
    run_folder.write_results(folder, results)
    run_folder.write_model_card(folder, settings.to_dict(), results)
    console.print(summary(results, folder), markup=False, highlight=False, soft_wrap=True)
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
    limits = {"train": settings.max_train_samples, "validation": settings.max_eval_samples}
    limited = {
        name: split.first(limits.get(name.removesuffix("_mismatched"), settings.max_predict_samples))
        for name, split in splits.items()
    }
    return task, limited


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


# training


class Training:
    """Everything that one training needs, built and checked before anything is written."""

    def __init__(self, settings: Settings, task, split: readers.Split, tokens: batches.Tokens, model, params):
        self.settings, self.labels, self.tokens = settings, split.labels, tokens
        self.boundaries = batches.bucket_boundaries(tokens.lengths, settings.length_buckets)
        self.batch_size = settings.per_device_train_batch_size
        self.plan = self._plan(epoch=0)
        steps = len(self.plan)
        total = settings.max_steps if settings.max_steps > 0 else math.ceil(settings.num_train_epochs * steps)
        self.rhythm = Rhythm(total, settings.logging_steps, settings.eval_steps or steps)
        self.schedule = learning_rate_schedule(settings, total)
        self.mask = layer_mask(params, settings.noise_layers)
        tx = make_optimizer(settings, total, params)
        self.state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx, key=settings.seed)
        make_loss_fn = functools.partial(train_state.make_loss_fn, model.apply, regression=task.is_regression)
        self.loss_without_dropout = make_loss_fn(deterministic=True)
        self.step = jax.jit(train_state.make_train_step(make_loss_fn()), donate_argnums=0)

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Batches without end, epoch after epoch."""
        for epoch in itertools.count():
            for rows, length in self._plan(epoch):
                yield batches.fill_batch(self.tokens, self.labels, rows, self.batch_size, length)

    def sensitivity(self, params: Any) -> dict[str, np.ndarray]:
        """Sensitivity of the layers that take noise, measured on some batches of the first epoch, all of one shape."""
        common, _ = collections.Counter(length for _, length in self.plan).most_common(1)[0]
        chosen = [rows for rows, length in self.plan if length == common][: self.settings.sensitivity_batches]
        sample = (batches.fill_batch(self.tokens, self.labels, rows, self.batch_size, common) for rows in chosen)
        measured = concentration.measure_sensitivity(self.loss_without_dropout, params, sample)
        return concentration.selected(measured, self.mask)

    def _plan(self, epoch):
        return batches.epoch_plan(
            self.tokens.lengths, self.batch_size, self.boundaries, seed=self.settings.seed, epoch=epoch
        )


def train(training: Training, predictor: "Predictor", folder: pathlib.Path, results: dict[str, Any], console) -> Any:
    """Trains, logs to metrics.jsonl, fills in results and returns the trained parameters."""
    settings, rhythm = training.settings, training.rhythm
    results |= {"train_examples": len(training.tokens), "steps": rhythm.total_steps}
    before = training.sensitivity(training.state.params) if settings.sensitivity_batches else None
    started = time.perf_counter()
    with progress_bar(console) as progress:
        bar = progress.add_task("training", total=rhythm.total_steps, status="")

        def on_log(step, means, timing):
            for name, mean in means.items():
                if not math.isfinite(mean):
                    raise InputError(f"training stopped at step {step}: {name} is not finite; lower --learning_rate")
            record = {"step": step, "learning_rate": float(training.schedule(step - 1)), **means, "timing": timing}
            run_folder.append_metrics(folder, record)
            rate = timing["examples_per_second"]
            progress.update(bar, status=f"loss {means['loss']:.4f}, {rate:.0f} examples/s")

        def on_evaluate(step, params):
            if "eval" in settings.phases:
                run_folder.append_metrics(folder, {"step": step, "eval": predictor.evaluate(params)})

        state = fit(
            training.state,
            training.step,
            training.batches(),
            rhythm,
            on_step=lambda step: progress.update(bar, completed=step),
            on_log=on_log,
            on_evaluate=on_evaluate,
        )
    seconds = time.perf_counter() - started
    results["timing"] |= {"train_seconds": seconds, "steps_per_second": rhythm.total_steps / seconds}
    if before is not None:
        after = training.sensitivity(state.params)
        results["concentration"] = {
            "before": concentration.by_tensor(before),
            "after": concentration.by_tensor(after),
        }
        plots.plot_sensitivity(
            folder / "plots" / "sensitivity.png", *(np.concatenate(list(s.values())) for s in (before, after))
        )
    return state.params


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


# evaluation and prediction


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Scores parameters on the validation splits and writes predictions for the test splits."""

    step: Callable
    task: tasks.Task
    splits: dict[str, readers.Split]
    tokens: dict[str, batches.Tokens]
    settings: Settings

    def logits(self, params: Any, name: str) -> np.ndarray:
        """Logits (rows, num_labels) of a split.

        Raises:
          InputError: if the model has diverged, so that they are not finite.
        """
        tokens = self.tokens[name]
        boundaries = batches.bucket_boundaries(tokens.lengths, EVAL_BUCKETS)
        batch_size = min(self.settings.per_device_eval_batch_size, len(tokens))
        rows = batches.eval_batches(tokens, None, batch_size, boundaries)
        logits = predict_logits(self.step, params, rows, len(tokens))
        if not np.isfinite(logits).all():
            raise InputError("the model's answers are not finite; lower --learning_rate")
        return logits

    def evaluate(self, params: Any) -> dict[str, float]:
        """The task's metrics on the validation split; those of MNLI's mismatched split end in ``_mm``."""
        return self._scores(lambda name: decide(self.logits(params, name), self.task))

    def evaluate_majority(self) -> dict[str, float]:
        """The same when every row is given the most frequent class (or the mean score) of the training labels."""
        labels = true_labels(self.splits.get("train") or self.splits["validation"])
        answer = labels.mean() if self.task.is_regression else np.bincount(labels).argmax()
        return self._scores(lambda name: np.full(len(self.splits[name]), answer))

    def _scores(self, answer: Callable[[str], np.ndarray]) -> dict[str, float]:
        scores: dict[str, float] = {}
        for name, suffix in (("validation", ""), ("validation_mismatched", "_mm")):
            if name in self.splits:
                split_scores = metrics.compute_metrics(self.task.metrics, answer(name), true_labels(self.splits[name]))
                scores |= {f"{metric}{suffix}": score for metric, score in split_scores.items()}
        return scores

    def write_predictions(self, params: Any, folder: pathlib.Path) -> None:
        """Writes the GLUE server's files: a header, then index and prediction of each row, apart by a tab."""
        folder.mkdir()
        for name in ("test", "test_mismatched", "ax"):
            if name not in self.splits:
                continue
            task = tasks.get_task("ax") if name == "ax" else self.task
            predictions = decide(self.logits(params, name), task)
            rows = zip(self.splits[name].ids, predictions, strict=True)
            lines = ["index\tprediction", *(f"{index}\t{task.format_prediction(p)}" for index, p in rows)]
            file = folder / task.prediction_files["test" if name == "ax" else name]
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def true_labels(split: readers.Split) -> np.ndarray:
    """The labels (rows,) of a split that must have them."""
    if split.labels is None:
        raise InputError("the validation data has no labels to compare with: give a file with a label column")
    return split.labels


def decide(logits: np.ndarray, task: tasks.Task) -> np.ndarray:
    """Scores (rows,) of a regression, else the class index of each row, from logits (rows, num_labels)."""
    return logits[:, 0] if task.is_regression else np.argmax(logits, axis=1)


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


def draw(folder: pathlib.Path, task: tasks.Task, results: dict[str, Any]) -> None:
    """Draws loss and score from metrics.jsonl."""
    if "steps" not in results:
        return
    records = run_folder.read_metrics(folder)
    plots.plot_loss(folder / "plots" / "loss.png", records)
    if "final" in results:
        majority = results["majority_class"]["metrics"][task.main_metric]
        plots.plot_scores(folder / "plots" / "score.png", {results["method"]: records}, task.main_metric, majority)


def summary(results: dict[str, Any], folder: pathlib.Path) -> str:
    """The run in two lines."""
    title = f"{results['method']} on {results['data']}"
    if "final" not in results:
        return f"{title}: done\nresults in {folder}"
    scores = ", ".join(f"{name} {score:.4f}" for name, score in results["final"]["metrics"].items())
    return f"{title}: {scores}\nresults in {folder}"


if __name__ == "__main__":
    import sys

    from pats_jax.cli import main

    main(["glue", *sys.argv[1:]])
