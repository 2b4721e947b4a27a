"""Pretraining an encoder-decoder on texts: the loop, its checkpoints, the held-out loss and the curve.

`benchmarks.pretrain_tiny_t5` and `benchmarks.pretrain_small_bart` say which model learns what.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
import optax
import rich.console
import tyro

from benchmarks import report
from benchmarks.span_corruption import PackedRows
from pats_jax import models, train_state
from pats_jax.core import files
from pats_jax.data.prefetch import prefetch
from pats_jax.errors import InputError, Preempted
from pats_jax.run import run_folder, xla_flags
from pats_jax.training import preemption, runners
from pats_jax.training.checkpoints import Checkpoints
from pats_jax.training.loop import Hooks, Progress, Record, Rhythm, fit

_RECIPE, _CURVE, _PICTURE = "recipe.json", "loss_curve.json", "loss_curve.png"


class Recipe(Protocol):
    """What decides the numbers, a dataclass; a resumed run must have the same."""

    steps: int
    batch_size: int
    warmup_steps: int
    learning_rate: float
    seed: int

    def check(self) -> None:
        """Raises InputError if a number makes no sense."""


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """Where a run reads and writes, and when it stops."""

    data_dir: pathlib.Path  # folder of glue/, ood_nli/, text_classification/ and gym/
    output_dir: pathlib.Path  # folder for model, tokenizer, checkpoints and loss curve
    minutes: float | None = None  # stop after so many, save, and write the model as it is; none: after all steps
    resume: bool = False  # go on from the last checkpoint in output_dir
    save_steps: int = 100  # steps between checkpoints
    eval_steps: int = 100  # steps between measurements on the held-out texts
    results: pathlib.Path | None = None  # another copy of the loss curve's JSON
    plot: pathlib.Path | None = None  # another copy of the picture

    def check(self, recipe: Recipe) -> None:
        """Raises InputError if a flag has a wrong value, or output_dir does not fit the flags."""
        recipe.check()
        for name in ("save_steps", "eval_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"--minutes {self.minutes}: must be greater than 0")
        path = self.output_dir / _RECIPE
        if not self.resume:
            if path.exists():
                raise InputError(f"{self.output_dir}: holds a run; add --resume, or name another --output_dir")
            return
        saved = files.read_record(path, type(recipe))
        for field in dataclasses.fields(recipe):
            ours, theirs = getattr(recipe, field.name), getattr(saved, field.name)
            if ours != theirs:
                raise InputError(f"--{field.name} {ours}: the run in {self.output_dir} has {theirs}")

    def begin(self, recipe: Recipe, tokenizer: Any) -> None:
        """Writes the recipe and the tokenizer into the folder of a new run."""
        tokenizer.save_pretrained(self.output_dir)
        files.write_json(self.output_dir / _RECIPE, dataclasses.asdict(recipe))


def check_schedule(recipe: Recipe, whole_numbers: tuple[str, ...]) -> None:
    """Raises InputError if a number is not positive, or steps and learning rate make no schedule."""
    for name in ("steps", "batch_size", *whole_numbers):
        if getattr(recipe, name) < 1:
            raise InputError(f"--{name} {getattr(recipe, name)}: must be at least 1")
    if not 0 <= recipe.warmup_steps <= recipe.steps:
        raise InputError(f"--warmup_steps {recipe.warmup_steps}: must be at least 0 and at most --steps {recipe.steps}")
    if not 0 < recipe.learning_rate < float("inf"):
        raise InputError(f"--learning_rate {recipe.learning_rate}: must be greater than 0")


def schedule(recipe: Recipe) -> optax.Schedule:
    """The learning rate rises linearly and falls as a cosine."""
    return optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, recipe.warmup_steps, recipe.steps)


class Deadline(preemption.Preemption):
    """Asks a run to stop at a time, or when a signal does."""

    def __init__(self, asked: preemption.Preemption, minutes: float | None):
        super().__init__()
        self._asked = asked
        self._end = float("inf") if minutes is None else time.monotonic() + 60 * minutes

    def arrived(self, step: int) -> bool:
        signalled = self._asked.arrived(step)
        self.signal_number = self._asked.signal_number
        return signalled or time.monotonic() >= self._end


class PretrainingHooks(Hooks):
    """Prints lines, measures the loss of held-out texts, saves checkpoints and the curve."""

    metric, evaluates = "loss", True

    def __init__(
        self,
        measure: Callable[[Any], float],
        checkpoints: Checkpoints,
        write_curve: Callable[[list[Record]], None],
        console: rich.console.Console,
    ):
        self._measure, self._checkpoints, self._write_curve = measure, checkpoints, write_curve
        self._console = console

    def on_record(self, record):
        if "eval" in record:
            self._console.print(f"step {record['step']}: held-out loss {record['eval']['loss']:.4f}")
        else:
            rate = record["timing"]["tokens_per_second"]
            self._console.print(f"step {record['step']}: loss {record['loss']:.4f}, {rate:.0f} tokens/s")
        self._checkpoints.check()

    def evaluate(self, state):
        return {"loss": self._measure(state.all_params)}

    def save(self, state, progress):
        self._checkpoints.save(progress.step, state, dataclasses.asdict(progress))
        self._write_curve(progress.records)


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """What is trained, and on what.

    Attributes:
      title: of the picture.
      recipe: what decides the numbers.
      model: without dropout.
      params: its parameters.
      config: of the model, with the dropout of what follows.
      tx: the optimizer.
      tokenizer: Transformers' tokenizer.
      train: the rows to learn from.
      held_out: those to measure the loss on.
      facts: what the results file says of the texts.
      trainable: a tree of booleans like ``params``; None: all.
    """

    title: str
    recipe: Recipe
    model: Any
    params: Any
    config: models.T5Config | models.BartConfig
    tx: optax.GradientTransformation
    tokenizer: Any
    train: PackedRows
    held_out: PackedRows
    facts: dict[str, int]
    trainable: Any = None


def make_measure(model: Any, held_out: PackedRows, runner: runners.MeshRunner) -> Callable[..., float]:
    """Makes ``measure(params)``: the mean loss of the held-out texts, at most eight batches, always hidden alike.

    With ``other_sources=True``, each target has the source of the row before it: what is lost tells how much the model
    reads out of a source.
    """
    loss_fn = train_state.make_seq2seq_loss_fn(model.apply, deterministic=True)
    compiled = jax.jit(lambda params, batch: loss_fn(params, batch, None)[0])
    count = min(held_out.steps_per_epoch, 8)
    batches = [batch for batch, _ in itertools.islice(held_out.batches(0), count)]

    def measure(params: Any, other_sources: bool = False) -> float:
        shift = 1 if other_sources else 0
        rolled = [batch | {"input_ids": np.roll(batch["input_ids"], shift, axis=0)} for batch in batches]
        return float(np.mean([compiled(params, runner.put(batch)) for batch in rolled]))

    return measure


def carry_out(
    flags: RunFlags, pretraining: Pretraining, runner: runners.MeshRunner, console: rich.console.Console
) -> None:
    """Trains, and writes the folder.

    Raises:
      InputError: if the devices cannot share a batch.
    """
    if pretraining.recipe.batch_size % runner.num_devices:
        size, devices = pretraining.recipe.batch_size, runner.num_devices
        raise InputError(f"--batch_size {size}: must be a multiple of the number of devices, {devices}")
    recipe, model, config = pretraining.recipe, pretraining.model, pretraining.config
    facts = pretraining.facts | {"parameters": sum(x.size for x in jax.tree.leaves(pretraining.params))}
    console.print(", ".join(f"{value} {name}" for name, value in facts.items()))

    create = functools.partial(
        train_state.TrainState.create,
        apply_fn=model.apply,
        tx=pretraining.tx,
        key=recipe.seed,
        trainable=pretraining.trainable,
    )
    state = runner.create_state(create, pretraining.params)
    loss_fn = train_state.make_seq2seq_loss_fn(model.apply, deterministic=True)
    step = runner.compile_step(train_state.make_train_step(loss_fn, skip_nonfinite=True, norms=False), state)
    rhythm = Rhythm(
        recipe.steps, 10, flags.eval_steps, save_steps=min(flags.save_steps, recipe.steps), max_nonfinite_steps=5
    )
    write_curve = functools.partial(write_results, flags, recipe, facts)
    with Checkpoints(flags.output_dir / "checkpoints", 2) as checkpoints, preemption.watch() as asked:
        progress = Progress()
        if flags.resume and (restored := checkpoints.restore(state, Progress)):
            state, progress = restored
        measure = make_measure(model, pretraining.held_out, runner)
        hooks = PretrainingHooks(measure, checkpoints, write_curve, console)
        try:
            with prefetch(pretraining.train.batches(progress.step)) as batches:
                state, progress = fit(
                    state, step, batches, rhythm, hooks, progress=progress, preemption=Deadline(asked, flags.minutes)
                )
        except Preempted:
            checkpoints.wait()
            state, progress = checkpoints.restore(state, Progress) or (state, progress)
            console.print(f"stopped after step {progress.step} of {recipe.steps}; --resume goes on")
    models.save_pretrained(flags.output_dir, params=state.all_params, config=config, tokenizer=pretraining.tokenizer)
    end = {"held_out": measure(state.all_params), "other_sources": measure(state.all_params, True)}
    console.print(f"held-out loss {end['held_out']:.4f}, with the sources of other rows {end['other_sources']:.4f}")
    write_results(flags, recipe, facts, progress.records, {name: round(loss, 4) for name, loss in end.items()})
    draw(progress.records, pretraining.title, [flags.output_dir / _PICTURE, *([flags.plot] if flags.plot else [])])
    console.print(f"written to {flags.output_dir}")


def write_results(
    flags: RunFlags,
    recipe: Recipe,
    facts: dict[str, int],
    records: list[Record],
    end: dict[str, float] | None = None,
) -> None:
    """Writes the recipe, the machine and the losses, to the output folder and where ``--results`` says."""
    losses = [line for line in records if "loss" in line]
    written = {
        "recipe": dataclasses.asdict(recipe),
        "data": facts,
        "loss": [[line["step"], round(line["loss"], 4)] for line in losses],
        "held_out_loss": [[line["step"], round(line["eval"]["loss"], 4)] for line in records if "eval" in line],
        "loss_at_the_end": end,
        "minutes": round(sum(line["timing"]["seconds"] for line in losses) / 60, 1),
        "machine": report.machine(),
        "versions": run_folder.versions(),
    }
    for path in (flags.output_dir / _CURVE, *([flags.results] if flags.results else [])):
        files.make_folder(path.parent)
        files.write_text(path, json.dumps(written) + "\n")


def draw(records: list[Record], title: str, paths: list[pathlib.Path]) -> None:
    """Draws the training loss, and the held-out one above it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    losses = [(line["step"], line["loss"]) for line in records if "loss" in line]
    held_out = [(line["step"], line["eval"]["loss"]) for line in records if "eval" in line]
    if losses:
        axes.plot(*zip(*losses, strict=True), color="#9aa5b1", linewidth=1, label="training texts")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#0b6e99", marker=".", label="held-out texts")
    axes.set(title=title, xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    if losses:
        axes.legend()
    for path in paths:
        files.make_folder(path.parent)
        figure.savefig(path, dpi=120)


def split_texts(texts: list[str], tokenizer: Any, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The tokens of the texts to learn from and of those held out, one in fifty."""
    order = np.random.default_rng(seed).permutation(len(texts))
    tokens = [np.array(ids, np.int32) for ids in tokenizer(texts)["input_ids"]]
    count = len(order) // 50
    return [tokens[number] for number in order[count:]], [tokens[number] for number in order[:count]]


AnyFlags = TypeVar("AnyFlags", bound=RunFlags)


def main(
    kind: type[AnyFlags], pretrain: Callable[[AnyFlags, rich.console.Console], None], args: Sequence[str] | None
) -> None:
    """Runs a program by its flags; exits with code 2 and one line on stderr when the input is wrong."""
    flags = tyro.cli(kind, args=args, use_underscores=True)
    console = rich.console.Console(highlight=False, soft_wrap=True)
    try:
        xla_flags.set_defaults()
        pretrain(flags, console)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
