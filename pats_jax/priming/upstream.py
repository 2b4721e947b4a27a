"""The upstream stage, `pats-jax prime`: trains an encoder, its adapters or both on the upstream tasks of a gym.

The loop, logging, checkpoints, resuming and early stopping are those of the GLUE program (`fine_tuning.train`); this
file adds the batches of tasks, the dev score, and what the stage saves.
"""

import dataclasses
import functools
import itertools
import pathlib
import shlex
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
import rich.console

from pats_jax import methods, models
from pats_jax.data import load_partitioned_gym
from pats_jax.data.few_shot import FewShotTask, Row
from pats_jax.data.gym import SHOTS
from pats_jax.errors import InputError, Preempted
from pats_jax.models import peft
from pats_jax.priming import meta_losses, option_scoring
from pats_jax.reporting import plots
from pats_jax.reporting.console import say
from pats_jax.run import model_card, pe_modules, run_folder, run_start
from pats_jax.run.settings import TrainingSettings, check_value, counted
from pats_jax.training import preemption, runners
from pats_jax.training.checkpoints import Checkpoints
from pats_jax.training.fine_tuning import Training, train
from pats_jax.training.metrics import accuracy

_DEV_ROWS = 64  # of every dev task
_MOST_ROWS = 2**20  # of a step, which is drawn whole in memory


@dataclasses.dataclass(frozen=True)
class PrimingSettings(TrainingSettings):
    """Prime a pretrained encoder, its adapters or both on the upstream tasks of a few-shot gym."""

    learning_rate: float = 3e-5  # peak rate of the outer optimizer: linear warmup, then linear decay to 0
    max_grad_norm: float = 0.1  # clip gradients to this global norm
    max_steps: int = 1000  # outer steps
    eval_steps: int | None = None  # evaluate every N steps; if unset, about five times in all
    data_dir: str = "builtin"  # folder of few-shot tasks, or "builtin" for generated ones
    partition: str = "builtin"  # builtin, metaicl or a JSON file with train (upstream), dev and test lists
    share_sources: bool = False  # allow lists of a partition to contain tasks built from the same dataset
    shots: int = SHOTS  # shots, as in the names of the task files
    algorithm: Literal["mtl", "maml", "fomaml", "reptile"] = "mtl"  # multi-task learning (mtl), or a meta-learner
    train: Literal["plm", "pe", "plm+pe"] = "plm"  # what to train: model, adapter (--peft), or both
    head: Literal["embedding", "pair", "mlm"] = "embedding"  # how to score the options
    max_options: int = 6  # if a training row has more, keep the right one and draw the others at random
    tasks_per_step: int = 4  # tasks per step, over all devices and micro-batches
    task_batch_size: int = 8  # rows per task: mtl trains on them; maml and fomaml test adapted parameters on them
    inner_learning_rate: float = 1e-5  # meta-learners: learning rate of the inner steps (plain SGD)
    inner_steps: int = 1  # meta-learners: inner steps on each task's training rows
    inner_batch_size: int = 16  # meta-learners: rows per inner step

    def check(self) -> None:
        super().check()
        check_value("max_steps", self.max_steps, lambda x: x >= 1, "at least 1")
        rows = self.tasks_per_step * (self.task_batch_size + self.inner_steps * self.inner_batch_size)
        if rows > _MOST_ROWS:
            raise InputError(
                f"--tasks_per_step, --task_batch_size, --inner_steps, --inner_batch_size: a step has {rows} rows; "
                f"reduce it to at most {_MOST_ROWS}"
            )
        if ("pe" in self.train.split("+")) != (self.peft is not None):
            missing = "needs an adapter; set --peft" if self.peft is None else "trains no adapter; omit --peft"
            raise InputError(f"--train {self.train}: {missing}")
        for name in self.method.split("+"):
            method = methods.get_methods(name)[0]
            if method.objective or method.trainable or method.around:
                raise InputError(f"--method {name}: not available for priming; it works only with pats-jax glue")
        if self.attention == "cudnn":
            raise InputError("--attention cudnn: not available for priming; omit the flag")
        if self.per_device_train_batch_size != TrainingSettings.per_device_train_batch_size or self.train_batch_size:
            raise InputError(
                "--per_device_train_batch_size, --train_batch_size: use --tasks_per_step, --task_batch_size"
            )

    def with_batch_size(self, num_devices: int) -> "PrimingSettings":
        parts = num_devices * self.gradient_accumulation_steps
        if self.tasks_per_step % parts:
            raise InputError(
                f"--tasks_per_step {self.tasks_per_step}: cannot be split evenly across "
                f"{counted(num_devices, 'device')} "
                f"with --gradient_accumulation_steps {self.gradient_accumulation_steps}"
            )
        return self


def run(settings: PrimingSettings, console: rich.console.Console | None = None) -> dict[str, Any]:
    """Runs the stage; see `pats_jax.glue.run` for the exceptions.

    Returns:
      What results.json holds.
    """
    with run_start.begin(settings, default_folder(settings), console) as start:
        if start.finished:
            say(start.console, f"already finished: {summary(start.finished, start.folder)}")
            return start.finished
        return carry_out(start)


def carry_out(start: run_start.Start[PrimingSettings]) -> dict[str, Any]:
    """The part of `run` after settings and devices are checked."""
    settings, runner, folder = start.settings, start.runner, start.folder
    gym, partition = load_partitioned_gym(
        settings.data_dir, settings.partition, shots=settings.shots, share_sources=settings.share_sources
    )
    tokenizer = models.load_tokenizer(settings.model_name_or_path)
    dropout = methods.dropout_rates(settings, settings.max_steps)
    model, params = option_scoring.load_scorer(
        settings.model_name_or_path,
        settings.head,
        pe_modules.chosen_config(settings),
        key=settings.seed,
        dtype=settings.dtype,
        gradient_checkpointing=settings.gradient_checkpointing,
        layers=settings.layers,
        unroll=settings.unroll or 0,
        attention="einsum",  # tasks are mapped over, and meta-learning takes second derivatives
        ignore_mismatched_sizes=settings.ignore_mismatched_sizes,
        **dropout,
    )
    used = [gym[name] for name in (*partition.train, *partition.dev)]
    option_scoring.check_tokens(settings.head, tokenizer, model.config, used)
    tokenizer.model_max_length = option_scoring.text_length(settings.max_seq_length, model)  # saved with the model
    if settings.train == "pe":
        pe_modules.check_methods(settings, params)
    results: dict[str, Any] = {
        "model_name_or_path": settings.model_name_or_path,
        "data_dir": settings.data_dir,
        **{name: getattr(settings, name) for name in ("algorithm", "train", "peft", "head", "method", "seed")},
        "upstream_tasks": list(partition.train),
        "num_parameters": sum(p.size for p in jax.tree.leaves(params)),
        "versions": run_folder.versions(),
        "timing": {},
    }
    with preemption.watch() as asked:
        training = UpstreamTraining(settings, runner, [gym[name] for name in partition.train], tokenizer, model, params)
        score = UpstreamScore(training, [gym[name] for name in partition.dev], asked)
        checkpoints = Checkpoints(folder / "checkpoints", settings.save_total_limit)
        start.open_folder()
        with checkpoints:
            try:
                trained = train(training, score, checkpoints, folder, results, start.console, asked)
            except Preempted as error:
                checkpoints.wait()
                config = shlex.quote(str(folder / "config.json"))
                raise Preempted(
                    f"interrupted and saved; to resume, run: pats-jax prime --config {config} --resume",
                    error.signal_number,
                ) from None
            primed = runner.to_host(trained.params)
            scores = [{"step": line["step"], "metrics": line["eval"]} for line in trained.records if "eval" in line]
            if scores:
                results |= {"final": scores[-1], "best": max(scores, key=lambda line: line["metrics"]["accuracy"])}
            with trained.kept(checkpoints):
                if runners.is_first():
                    run_folder.check_links(folder)
                    save(folder, settings, model, primed, tokenizer)
                    plots.plot_loss(folder / "plots" / "loss.png", trained.records)
                    defaults = type(settings)().to_dict()
                    model_card.write_primed(folder, settings.to_dict(), results, defaults)
                    start.finish(results)
    say(start.console, summary(results, folder))
    return results


class UpstreamTraining(Training):
    """Training on upstream tasks: each step takes a batch of tasks."""

    def __init__(
        self,
        settings: PrimingSettings,
        runner: runners.MeshRunner,
        tasks: Sequence[FewShotTask],
        tokenizer,
        model,
        params,
    ):
        self.settings: PrimingSettings = settings
        self.runner, self.tokenizer, self.model = runner, tokenizer, model
        self.head = option_scoring.get_head(settings.head)
        self.max_length = option_scoring.text_length(settings.max_seq_length, model)
        self.groups = self._by_shape(tasks)
        self.examples = sum(len(s.train) + len(s.dev) for task in tasks for s in task.samples)
        self.loss_fn = option_scoring.make_option_loss(self.head, model)
        added = {name: params[name] for name in ("peft", "mlm") if name in params}
        own = {name: tree for name, tree in params.items() if name not in added}  # NoisyTune is for pretrained weights
        params = runner.place({**methods.starting_params(settings, own), **added})
        self.trainable = option_scoring.trainable_mask(params, settings.train, settings.head)
        super().__init__(
            settings,
            runner,
            model,
            params,
            meta_losses.make_meta_loss(
                settings.algorithm,
                self.loss_fn,
                inner_learning_rate=settings.inner_learning_rate,
                trainable=self.trainable,
                remat=settings.gradient_checkpointing,
            ),
            self.trainable,
            metric="accuracy",
            total_steps=settings.max_steps,
            eval_steps=max(1, settings.max_steps // 5),
        )

    def batches(self, first_step):
        for step in itertools.count(first_step):
            batch = self._draw(step)
            masks = [x for name, x in batch.items() if name.endswith("attention_mask")]
            counts = {
                "examples": float(sum(x.size for name, x in batch.items() if name.endswith("answers"))),
                "tokens": float(sum(x.sum() for x in masks)),
                "computed_tokens": float(sum(x.size for x in masks)),
            }
            yield self._put(batch), counts

    def one_of_each_shape(self, first_step):
        met: set[int] = set()
        for step in range(first_step, self.rhythm.total_steps):
            group = self._group(np.random.default_rng([self.settings.seed, step]))
            if group not in met:
                met.add(group)
                yield self._put(self._draw(step))
            if len(met) == len(self.groups):
                return

    def describe_batch(self):
        settings = self.settings
        micro_batches = settings.gradient_accumulation_steps
        return (
            f"{settings.tasks_per_step} tasks per step, on {self.runner.num_devices} devices of {jax.process_count()} "
            "processes" + (f" in {micro_batches} micro-batches" if micro_batches > 1 else "")
        )

    def encode(self, rows: Sequence[Row], share_options: bool = False) -> dict[str, np.ndarray]:
        """A batch of rows, padded as `option_scoring.encode_rows` does."""
        return option_scoring.encode_rows(self.head, rows, self.tokenizer, self.max_length, share_options=share_options)

    def share_options(self, task: FewShotTask) -> bool:
        """Whether all rows in a batch of the task have the same options."""
        return task.options is not None and len(task.options) <= self.settings.max_options

    def _by_shape(self, tasks):
        """Groups of tasks with the same padding: (tasks, shapes of their arrays without the rows' axis).

        Options that a batch holds only once cost so little that those of all tasks are padded to one length.
        """
        most = self.settings.max_options
        groups: dict[tuple, tuple[list[FewShotTask], dict[str, tuple[int, ...]]]] = {}
        for task in tasks:
            rows = [  # with every option once, for any of them may be drawn
                Row(row.input, row.options[first : first + most], 0)
                for sample in task.samples
                for row in (*sample.train, *sample.dev)
                for first in range(0, len(row.options), most)
            ]
            shapes = option_scoring.row_shapes(self.head, rows, self.tokenizer, self.max_length)
            shared = self.share_options(task)
            deciding = sorted(item for item in shapes.items() if not (shared and item[0].startswith("option_")))
            members, widest = groups.setdefault((shared, *deciding), ([], shapes))
            members.append(task)
            widest |= {name: tuple(map(max, shape, widest[name])) for name, shape in shapes.items()}
        return list(groups.values())

    def _put(self, batch):
        """Sends this process's own tasks of a batch to the devices."""
        own = self.runner.own_rows(self.settings.tasks_per_step)
        return self.runner.put_ahead({name: x[own] for name, x in batch.items()})

    def _group(self, rng):
        """Draws the group of a step, in proportion to its number of tasks."""
        sizes = np.array([len(members) for members, _ in self.groups], float)
        return int(rng.choice(len(sizes), p=sizes / sizes.sum()))

    def _draw(self, step):
        """The batch of a step, a pure function of the seed and its number."""
        rng = np.random.default_rng([self.settings.seed, step])
        members, shapes = self.groups[self._group(rng)]
        count = self.settings.tasks_per_step
        chosen = rng.choice(len(members), count, replace=len(members) < count)
        parts = [self._task(rng, members[index], shapes) for index in chosen]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def _task(self, rng, task, shapes):
        """One task's part of a batch, without the axis of tasks: rows of one of its samples.

        A meta-learner takes its inner rows from the training rows and is evaluated on dev rows; multi-task learning
        uses both.
        """
        settings = self.settings
        sample = task.samples[rng.integers(len(task.samples))]
        share = self.share_options(task)
        if settings.algorithm == "mtl":
            rows = _take(rng, (*sample.train, *sample.dev), settings.task_batch_size)
            return _named(meta_losses.QUERY, self._padded(rows, rng, shapes, share))
        rows = _take(rng, sample.train, settings.inner_steps * settings.inner_batch_size)
        steps = [
            self._padded(rows[first :: settings.inner_steps], rng, shapes, share)
            for first in range(settings.inner_steps)
        ]
        part = _named(meta_losses.SUPPORT, {name: np.stack([step[name] for step in steps]) for name in steps[0]})
        if settings.algorithm == "reptile":
            return part
        rows = _take(rng, sample.dev, settings.task_batch_size)
        return part | _named(meta_losses.QUERY, self._padded(rows, rng, shapes, share))

    def _padded(self, rows, rng, shapes, share_options):
        rows = [option_scoring.with_fewer_options(row, self.settings.max_options, rng) for row in rows]
        return option_scoring.pad_to(self.encode(rows, share_options), shapes)


class UpstreamScore:
    """The dev score of the stage: accuracy on dev tasks, of the primed parameters as they are (multi-task learning), or
    after the inner steps on each task's training rows (meta-learners)."""

    def __init__(self, training: UpstreamTraining, tasks: Sequence[FewShotTask], asked: preemption.Preemption):
        """Compiles nothing yet.

        Args:
          training: the training to score; its ``evaluates`` is set.
          tasks: the dev tasks; if empty, nothing is scored.
          asked: signals that the run should stop.

        Raises:
          InputError: early stopping or the best model need dev tasks and there are none; or the tokenizer rejects a
            text of theirs, which must not happen in the middle of training.
        """
        settings = training.settings
        training.evaluates = bool(tasks)
        if not tasks and (settings.early_stopping_patience or settings.load_best_model_at_end):
            raise InputError("--early_stopping_patience, --load_best_model_at_end: the partition has no dev tasks")
        self._training, self._tasks, self._asked = training, tasks, asked
        for task in tasks:
            training.encode((*task.samples[0].train, *task.samples[0].test[:_DEV_ROWS]))
        head, model = training.head, training.model
        runner = training.runner
        self._scores = runner.compile_predict(functools.partial(option_scoring.option_scores, head, model))
        self._adapt = jax.jit(
            lambda params, rows: meta_losses.adapt(
                option_scoring.make_option_loss(head, model, deterministic=True),
                params,
                jax.tree.map(lambda x: x[None].repeat(settings.inner_steps, axis=0), rows),
                jax.random.key(0),
                learning_rate=settings.inner_learning_rate,
                trainable=training.trainable,
            )[0]
        )

    def evaluate(self, params: Any) -> dict[str, float]:
        """``accuracy``, the mean over the dev tasks."""
        return {"accuracy": float(np.mean([self._score(params, task) for task in self._tasks]))}

    def programs(self, params: Any) -> list[Callable[[], None]]:
        """None: they are compiled as they come."""
        return []

    def _score(self, params, task):
        self._asked.check()
        training, sample = self._training, task.samples[0]
        rows = sample.test[:_DEV_ROWS]
        if training.settings.algorithm != "mtl":
            params = self._adapt(params, training.encode(sample.train, training.share_options(task)))
        devices = training.runner.num_devices
        size = -(-training.settings.per_device_eval_batch_size // devices) * devices
        own = training.runner.own_rows(size)
        chosen = option_scoring.choose(
            lambda params, batch: self._scores(params, {name: x[own] for name, x in batch.items()}),
            training.head,
            params,
            rows,
            training.tokenizer,
            training.max_length,
            size,
        )
        return accuracy(chosen, np.array([row.answer for row in rows]))


def save(folder: pathlib.Path, settings: PrimingSettings, model: Any, params: Any, tokenizer: Any) -> None:
    """Writes what was trained: ``model/``, the primed model, which Transformers loads; ``adapter/``, the adapter.

    Args:
      folder: the run's.
      settings: its settings.
      model: the scorer.
      params: its parameters on the host.
      tokenizer: saved with them.
    """
    params = {name: tree for name, tree in params.items() if name != "mlm"}  # the base model's own, not trained
    base = settings.model_name_or_path
    if settings.train != "pe":
        base = str(folder / "model")
        plain = {name: tree for name, tree in params.items() if name != "peft"}
        config = _with_dropout_of(settings.model_name_or_path, model.config)
        models.save_pretrained(folder / "model", params=plain, config=config, tokenizer=tokenizer)
    if settings.peft:
        peft.save_peft(
            folder / "adapter", model=model, params=params, base_model_name_or_path=base, tokenizer=tokenizer
        )


def default_folder(settings: PrimingSettings) -> str:
    """``runs/prime-ALGORITHM-TRAIN[-KIND]-seedSEED``."""
    kind = f"-{settings.peft}" if settings.peft else ""
    return f"runs/prime-{settings.algorithm}-{settings.train}{kind}-seed{settings.seed}"


def summary(results: dict[str, Any], folder: pathlib.Path) -> str:
    """The stage in two lines."""
    kind = f" ({results['peft']})" if results["peft"] else ""
    title = f"{results['algorithm']} of {results['train']}{kind} on {len(results['upstream_tasks'])} tasks"
    score = f": dev accuracy {results['final']['metrics']['accuracy']:.4f}" if "final" in results else ""
    return f"{title}{score}\nresults in {folder}"


def _with_dropout_of(name_or_dir, config):
    """The config with the checkpoint's own dropout, so that tuning does not inherit that of the upstream stage."""
    own = models.EncoderConfig.from_folder(models.checkpoint_folder(name_or_dir))
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    return dataclasses.replace(config, **{name: getattr(own, name) for name in names})


def _named(prefix, batch):
    return {prefix + name: x for name, x in batch.items()}


def _take(rng, rows, count):
    """Takes ``count`` rows in random order; starts over if there are fewer."""
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(-(-count // len(rows)))])
    return [rows[index] for index in order[:count]]
