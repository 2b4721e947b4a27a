"""The upstream stage, `pats-jax prime`: trains an encoder, its adapters or both on the upstream tasks of a gym.

The loop, logging, checkpoints, resuming and early stopping are those of the GLUE program (`run.training_run`); this
file adds the batches of tasks, the dev score, and what the stage saves.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import rich.console

from pats_jax import methods, models
from pats_jax.core.files import JsonObject
from pats_jax.data import few_shot, load_partitioned_gym
from pats_jax.data.few_shot import FewShotTask
from pats_jax.errors import InputError
from pats_jax.models import peft
from pats_jax.priming import answerers, meta_losses, option_scoring, text_answering
from pats_jax.priming.answering import Answering, count_rows
from pats_jax.priming.text_answering import TEXT_HEADS
from pats_jax.priming.upstream_settings import PrimingSettings
from pats_jax.reporting import plots
from pats_jax.reporting.console import say
from pats_jax.run import hub, model_card, pe_modules, run_folder, run_start, training_run
from pats_jax.training import fine_tuning, preemption, runners
from pats_jax.training.fine_tuning import Training

_DEV_ROWS = 64  # of every dev task
_SCORE = "score"  # the name of the mean over dev tasks


def run(settings: PrimingSettings, console: rich.console.Console | None = None) -> JsonObject:
    """Runs the stage; see `pats_jax.glue.run` for the exceptions.

    Returns:
      The content of results.json.
    """
    with run_start.begin(settings, default_folder(settings), console) as start:
        if start.finished:
            say(start.console, f"already finished: {summary(start.finished, start.folder)}")
            hub.publish(start.settings, start.folder, start.console)
            return start.finished
        return carry_out(start)


def carry_out(start: run_start.Start[PrimingSettings]) -> JsonObject:
    """Carries out `run` after settings and devices have been checked."""
    settings, runner = start.settings, start.runner
    gym, partition = load_partitioned_gym(
        settings.data.data_dir,
        settings.data.partition,
        shots=settings.data.shots,
        share_sources=settings.data.share_sources,
    )
    answerers.tell_about_data(start.console, gym, partition, settings.data.partition)
    head = settings.upstream.head
    answerers.check_model(head, settings.model)
    learnt, watched = ([gym[name] for name in names] for names in (partition.train, partition.dev))
    answerers.check_tasks(head, watched if head in TEXT_HEADS else [*learnt, *watched], settings.data.partition)
    answering, params = load_model(settings)
    model, tokenizer = answering.model, answering.tokenizer
    learnt, watched = (list(map(answering.prepare, tasks)) for tasks in (learnt, watched))
    answerers.check_tokens(head, tokenizer, model.config, [*learnt, *watched])
    tokenizer.model_max_length = answering.max_length  # saved with the model
    if settings.upstream.train == "pe":
        pe_modules.check_methods(settings.peft, settings.methods, params)
    results = describe_run(settings, partition.train, params) | {"sampling": few_shot.other_sampling(learnt)}
    with preemption.watch() as asked:
        source = UpstreamSource(settings, runner, learnt, answering)
        training = make_training(settings, source, runner, params, evaluates=bool(partition.dev))
        score = UpstreamScore(source, watched, asked, training)

        def use(trained):
            scores = [{"step": line["step"], "metrics": line["eval"]} for line in trained.records if "eval" in line]
            best = max(scores, key=lambda line: line["metrics"][_SCORE], default=None)
            return {"final": scores[-1], "best": best} if scores else {}

        def write(trained, primed, results):
            saved = pe_modules.in_training(model, training.rhythm.total_steps)
            save(start.folder, settings, saved, primed, tokenizer)
            plots.plot_loss(start.folder / "plots" / "loss.png", trained.records)
            model_card.write_primed(start.folder, settings.to_dict(), results, settings.defaults())

        job = training_run.Job("prime", training, score, None, use, write)
        results = training_run.carry_out(start, job, results, asked)
    say(start.console, summary(results, start.folder))
    return results


def load_model(settings: PrimingSettings) -> tuple[Answering, Any]:
    """The model and how it answers, and its parameters."""
    return answerers.load(
        settings.upstream.head,
        settings.model,
        settings.text,
        settings.methods,
        settings.upstream.max_steps,
        models.load_tokenizer(settings.model.model_name_or_path),
        key=settings.seed,
        config=settings.adapter,
        attention="einsum",  # tasks are mapped over, and meta-learning takes second derivatives
        max_options=settings.upstream.max_options,
    )


def describe_run(settings: PrimingSettings, upstream_tasks: Sequence[str], params: Any) -> JsonObject:
    """What results.json records before training."""
    return {
        "model_name_or_path": settings.model.model_name_or_path,
        "data_dir": settings.data.data_dir,
        "algorithm": settings.upstream.algorithm,
        "train": settings.upstream.train,
        "peft": settings.peft,
        "head": settings.upstream.head,
        "method": settings.method,
        "seed": settings.seed,
        "upstream_tasks": list(upstream_tasks),
        "num_parameters": sum(p.size for p in jax.tree.leaves(params)),
        "versions": run_folder.versions(),
        "timing": {},
    }


def make_training(
    settings: PrimingSettings, source: "UpstreamSource", runner: runners.MeshRunner, params: Any, *, evaluates: bool
) -> Training:
    """The training of the upstream stage."""
    upstream = settings.upstream
    added = {name: params[name] for name in ("peft", "mlm") if name in params}
    own = {name: tree for name, tree in params.items() if name not in added}  # NoisyTune is for pretrained weights
    params = runner.place({**methods.starting_params(settings.methods, own, settings.seed), **added})
    trainable = source.answering.trainable_mask(params, upstream.train)
    loss_fn = meta_losses.make_meta_loss(
        upstream.algorithm,
        source.loss_fn,
        inner_learning_rate=upstream.inner_learning_rate,
        trainable=trainable,
        remat=settings.model.gradient_checkpointing,
    )
    return fine_tuning.make_training(
        settings,
        source,
        runner,
        source.model,
        params,
        loss_fn,
        trainable,
        metric=_SCORE,
        evaluates=evaluates,
        total_steps=upstream.max_steps,
        eval_steps=max(1, upstream.max_steps // 5),
        accumulation_steps=upstream.gradient_accumulation_steps,
    )


class UpstreamSource:
    """Batches of upstream tasks; see `pats_jax.training.fine_tuning.Source`."""

    def __init__(
        self,
        settings: PrimingSettings,
        runner: runners.MeshRunner,
        tasks: Sequence[FewShotTask],
        answering: Answering,
    ):
        """Groups the tasks by the shape of their rows.

        Args:
          settings: the settings of the stage.
          runner: puts the batches on the devices.
          tasks: the upstream tasks, prepared for the model.
          answering: the model and how it answers.
        """
        self.seed, self.settings = settings.seed, settings.upstream
        self.runner, self.answering, self.model = runner, answering, answering.model
        self.groups = self._by_shape(tasks)
        self.examples = sum(len(s.train) + len(s.dev) for task in tasks for s in task.samples)
        self.loss_fn = answering.make_loss()

    def batches(self, first_step):
        for step in itertools.count(first_step):
            batch = self._draw(step)
            masks = [x for name, x in batch.items() if name.endswith("attention_mask")]
            counts = {
                "examples": float(count_rows(batch)),
                "tokens": float(sum(x.sum() for x in masks)),
                "computed_tokens": float(sum(x.size for x in masks)),
            }
            yield self._put(batch), counts

    def one_of_each_shape(self, first_step, last_step):
        steps = range(first_step, last_step)
        makers = ((self._group(self._rng(step)), lambda n=step: self._put(self._draw(n))) for step in steps)
        return fine_tuning.first_of_each(makers, len(self.groups))

    def fisher_measure(self, trained, frozen):
        return None

    def describe_batch(self):
        settings = self.settings
        micro_batches = settings.gradient_accumulation_steps
        return (
            f"{settings.tasks_per_step} tasks per step, on {self.runner.num_devices} devices of {jax.process_count()} "
            "processes" + (f" in {micro_batches} micro-batches" if micro_batches > 1 else "")
        )

    def _by_shape(self, tasks):
        """Groups of tasks with the same padding: (tasks, shapes of their arrays without the rows' axis).

        Options that a batch holds only once cost little, so those of all tasks are padded to one length.
        """
        most = self.settings.max_options
        groups: dict[tuple, tuple[list[FewShotTask], dict[str, tuple[int, ...]]]] = {}
        for task in tasks:
            rows = [  # with every option once, for any of them may be drawn
                variant
                for sample in task.samples
                for row in (*sample.train, *sample.dev)
                for variant in self.answering.variants(row, most)
            ]
            shapes = self.answering.row_shapes(rows)
            shared = self.answering.shares_options(task)
            deciding = sorted(item for item in shapes.items() if not (shared and item[0].startswith("option_")))
            members, widest = groups.setdefault((shared, *deciding), ([], shapes))
            members.append(task)
            widest |= {name: tuple(map(max, shape, widest[name])) for name, shape in shapes.items()}
        return list(groups.values())

    def _put(self, batch):
        """Puts this process's own tasks of a batch on the devices."""
        own = self.runner.own_rows(self.settings.tasks_per_step)
        return self.runner.put_ahead({name: x[own] for name, x in batch.items()})

    def _rng(self, step):
        return np.random.default_rng([self.seed, step])

    def _group(self, rng):
        """Draws the group of a step, in proportion to its number of tasks."""
        sizes = np.array([len(members) for members, _ in self.groups], float)
        return int(rng.choice(len(sizes), p=sizes / sizes.sum()))

    def _draw(self, step):
        """The batch of a step, a pure function of the seed and its number."""
        rng = self._rng(step)
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
        share = self.answering.shares_options(task)
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
        rows = [self.answering.simplify(row, self.settings.max_options, rng) for row in rows]
        return option_scoring.pad_to(self.answering.encode(rows, share_options=share_options), shapes)


class UpstreamScore:
    """The dev score of the stage: the mean over dev tasks, each by its own metric.

    Multi-task learning scores the primed parameters as they are, meta-learners after the inner steps on each task's
    training rows.
    """

    def __init__(
        self, source: UpstreamSource, tasks: Sequence[FewShotTask], asked: preemption.Preemption, training: Training
    ):
        """Compiles nothing yet.

        Args:
          source: has the model and how it answers.
          tasks: the dev tasks, prepared for the model; if empty, nothing is scored.
          asked: signals that the run should stop.
          training: the training to score.

        Raises:
          InputError: if early stopping or the best model needs dev tasks and there are none; or if the tokenizer
            rejects one of their texts, which would otherwise stop the training later.
        """
        if not tasks and (training.rhythm.patience or training.rhythm.save_best):
            raise InputError("--early_stopping_patience, --load_best_model_at_end: the partition has no dev tasks")
        self._source, self._tasks, self._asked = source, tasks, asked
        for task in tasks:
            source.answering.encode((*task.samples[0].train, *task.samples[0].test[:_DEV_ROWS]))
        answering, settings = source.answering, source.settings
        trainable = answering.trainable_mask(training.shapes.all_params, settings.train)
        self._step = source.runner.compile_predict(answering.step)
        self._adapt = jax.jit(
            lambda params, rows: meta_losses.adapt(
                answering.make_loss(deterministic=True),
                params,
                jax.tree.map(lambda x: x[None].repeat(settings.inner_steps, axis=0), rows),
                jax.random.key(0),
                learning_rate=settings.inner_learning_rate,
                trainable=trainable,
            )[0]
        )

    def evaluate(self, params: Any) -> dict[str, float]:
        """The mean over the dev tasks."""
        mean = float(np.mean([self._score(params, task) for task in self._tasks]))
        return {_SCORE: mean}

    def programs(self, params: Any) -> list[Callable[[], None]]:
        """An empty list: programs are compiled when first used."""
        return []

    def _score(self, params, task):
        self._asked.check()
        source, sample = self._source, task.samples[0]
        rows = sample.test[:_DEV_ROWS]
        if source.settings.algorithm != "mtl":
            answering = source.answering
            batch = answering.encode(sample.train, share_options=answering.shares_options(task))
            params = self._adapt(params, batch)
        devices = source.runner.num_devices
        size = -(-source.settings.per_device_eval_batch_size // devices) * devices
        own = source.runner.own_rows(size)
        answers = source.answering.answer(
            lambda params, batch: self._step(params, {name: x[own] for name, x in batch.items()}), params, rows, size
        )
        return source.answering.score(task, answers, rows).value


def save(folder: pathlib.Path, settings: PrimingSettings, model: Any, params: Any, tokenizer: Any) -> None:
    """Writes what was trained: ``model/``, the primed model, which Transformers loads; ``adapter/``, the adapter.

    Args:
      folder: the run's folder.
      settings: its settings.
      model: the scorer.
      params: its parameters on the host.
      tokenizer: the tokenizer to save with them.
    """
    params = {name: tree for name, tree in params.items() if name != "mlm"}  # the base model's own, not trained
    base = settings.model.model_name_or_path
    if settings.upstream.train != "pe":
        base = str(folder / "model")
        plain = {name: tree for name, tree in params.items() if name != "peft"}
        config = _with_dropout_of(settings, model.config)
        is_text = settings.upstream.head in TEXT_HEADS
        generation = models.GenerationConfig.from_pretrained(settings.model.model_name_or_path) if is_text else None
        models.save_pretrained(
            folder / "model", params=plain, config=config, tokenizer=tokenizer, generation=generation
        )
    if settings.peft:
        peft.save_peft(
            folder / "adapter", model=model, params=params, base_model_name_or_path=base, tokenizer=tokenizer
        )


def default_folder(settings: PrimingSettings) -> str:
    """``runs/prime-ALGORITHM-TRAIN[-KIND]-seedSEED``."""
    kind = f"-{settings.peft}" if settings.peft else ""
    return f"runs/prime-{settings.upstream.algorithm}-{settings.upstream.train}{kind}-seed{settings.seed}"


def summary(results: JsonObject, folder: pathlib.Path) -> str:
    """A summary of the stage in two lines."""
    kind = f" ({results['peft']})" if results["peft"] else ""
    title = f"{results['algorithm']} of {results['train']}{kind} on {len(results['upstream_tasks'])} tasks"
    scores = results["final"]["metrics"] if "final" in results else {}
    score = "".join(f": dev {name} {value:.4f}" for name, value in scores.items())
    return f"{title}{score}\nresults in {folder}"


def _with_dropout_of(settings, config):
    """The config with the checkpoint's own dropout, so that tuning does not inherit that of the upstream stage."""
    name_or_dir = settings.model.model_name_or_path
    if settings.upstream.head in TEXT_HEADS:
        own = text_answering.checkpoint_config(name_or_dir)
        return dataclasses.replace(config, **{name: getattr(own, name) for name in own.rates})
    own = models.read_encoder_config(models.checkpoint_folder(name_or_dir))
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    return dataclasses.replace(config, **{name: getattr(own, name) for name in names})


def _named(prefix, batch):
    return {prefix + name: x for name, x in batch.items()}


def _take(rng, rows, count):
    """Takes ``count`` rows in random order; starts over if there are fewer."""
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(-(-count // len(rows)))])
    return [rows[index] for index in order[:count]]
