"""One tuning on a few-shot task: from a start, on one sample, scored on the task's test rows."""

import dataclasses
import functools
import itertools
import math
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pats_jax import methods, models
from pats_jax.data.few_shot import TEXT_TO_TEXT, FewShotTask, Row, Sample
from pats_jax.errors import InputError
from pats_jax.methods import OptimizerSettings
from pats_jax.priming import answerers, option_scoring
from pats_jax.priming.answering import Answering
from pats_jax.priming.gym_settings import GymSettings
from pats_jax.run import pe_modules
from pats_jax.run.records import Part, Stage, Tuned, TuningRecord
from pats_jax.train_state import TrainState, make_train_step
from pats_jax.training import preemption, runners


@dataclasses.dataclass(frozen=True)
class TuningStart:
    """Where a tuning starts, and what it trains.

    Attributes:
      algorithm: algorithm of the upstream stage; "direct" without one.
      trained: what the stage trained; None without one.
      seed: seed of the stage; None without one.
      model: name or folder of the encoder.
      adapter: folder of a primed adapter; None: a new one.
      base: name or folder of the model with the masked-language-model head, if any.
      kind: what is tuned: a PEFT method, or "full".
      digest: digest of the stage's results, which identifies its run; None without one.
    """

    algorithm: Stage
    trained: Part | None
    seed: int | None
    model: str
    adapter: str | None
    base: str
    kind: Tuned
    digest: str | None = None

    @property
    def name(self) -> str:
        """``direct-lora``, ``mtl-plm-seed1-lora``; names a folder of records."""
        stage = "direct" if self.trained is None else f"{self.algorithm}-{self.trained}-seed{self.seed}"
        return f"{stage}-{self.kind}"


class Tuner:
    """Tunes one start on any task and sample; model, optimizers and compiled programs are shared."""

    def __init__(self, settings: GymSettings, start: TuningStart, tokenizer: Any):
        """Loads the start.

        Args:
          settings: the settings of all tunings.
          start: where the tunings start, and what they train.
          tokenizer: the model's tokenizer.

        Raises:
          InputError: if the start's files are missing or do not match.
        """
        self._settings, self._start = settings, start
        self._answering, self._params = load_answering(settings, start, tokenizer)
        if start.kind != "full":
            pe_modules.check_methods(start.kind, settings.methods, self._params)
        part = "plm" if start.kind == "full" else "pe"
        self._trainable = self._answering.trainable_mask(self._params, part)
        trained = jax.tree.map(lambda keep, p: p if keep else None, self._trainable, self._params)
        adapter = None if start.kind == "full" else settings.adapter(start.kind)
        loss_fn = self._answering.make_loss()
        self._train_step = make_train_step(loss_fn if adapter is None else adapter.add_to_loss(loss_fn))
        self._optimizer_at = functools.partial(_make_optimizer, settings, trained, adapter)
        self._optimizer = self._optimizer_at(1.0)  # its state is that of the optimizer at any learning rate
        self._step = jax.jit(self._step_at)
        self._answer = jax.jit(self._answering.step)

    def tune(self, task: FewShotTask, sample: Sample, asked: preemption.Preemption) -> TuningRecord:
        """Makes one tuning and returns its record, for `relative_gain.summarise`."""
        since = time.perf_counter()
        answering, tuning = self._answering, self._settings.tuning
        asked_of, task = task, answering.prepare(task)
        sample = task.sample(sample.seed)
        shapes = self._shapes(task)
        rates = tuning.learning_rates(self._start.kind)
        grid = itertools.product(rates, tuning.batch_sizes)
        tried = [self._tune(rate, size, task, sample, shapes, asked) for rate, size in grid]
        best = max(tried, key=lambda one: one["place"])
        diverged = list(dict.fromkeys(one["learning_rate"] for one in tried if one["diverged"]))
        rows = rows_to_test(task, sample, self._settings.tuning.max_test_rows)
        answers = answering.answer(
            self._answer,
            best.pop("params"),
            rows,
            tuning.per_device_eval_batch_size,
            share_options=answering.shares_options(task),
        )
        found, start = answering.score(task, answers, rows), self._start
        return {
            "algorithm": start.algorithm,
            "trained": start.trained,
            "upstream_seed": start.seed,
            "upstream_digest": start.digest,
            "peft": start.kind,
            "task": task.name,
            "sample": sample.seed,
            "metric": answering.metric(task),
            "chance": chance(task, answering.metric(task)),
            "learning_rates": list(rates),
            "diverged": diverged,
            "learning_rate": best["learning_rate"],
            "batch_sizes": list(tuning.batch_sizes),
            "batch_size": best["batch_size"],
            "curve": best["curve"],
            "step": best["step"],
            "dev": best["dev"],
            "test": found.value,
            "test_rows": len(rows),
            "unparsable": found.unparsable,
            "crossfits_sampling": asked_of.is_crossfits_sampling,
            "seconds": time.perf_counter() - since,
        }

    def _tune(self, rate, size, task, sample, shapes, asked):
        """Tunes with one learning rate and batch size: the dev curve, and the parameters with the best dev score.

        *Ours*: among equal scores, the one with the lower dev loss is kept, because 16 rows have many ties; and if the
        loss is no longer finite, the tuning stops and keeps its best parameters so far.
        """
        settings = self._settings
        state = TrainState.create(
            apply_fn=self._answering.model.apply,
            params=self._params,
            tx=self._optimizer,
            key=settings.seed,
            trainable=self._trainable,
        )
        examine = self._answering.make_examination(self._answer, task, sample.dev, shapes)
        steps, scores, best, diverged = [], [], None, False
        max_steps, by_loss = settings.tuning.max_steps, settings.tuning.ties == "loss"
        for step, rows in enumerate(self._batches(task, sample, size)):
            if step % (settings.tuning.eval_steps or max_steps) == 0 or step == max_steps:
                asked.check()
                score, loss = examine(state.all_params)
                diverged = not math.isfinite(loss)
                if diverged:
                    break
                steps.append(step)
                scores.append(score)
                place = (score, -loss if by_loss else 0.0)
                if best is None or place > best["place"]:
                    best = {"place": place, "params": state.all_params, "step": step, "dev": score}
            if step < max_steps:
                state = self._step(state, rate, self._encode(task, rows, shapes))
        if best is None:
            raise InputError(f"{task.name}: the loss of {self._start.name} is not finite before the first step")
        found = {"learning_rate": rate, "batch_size": size, "diverged": diverged}
        return best | found | {"curve": {"step": steps, "dev": scores}}

    def _step_at(self, state, rate, batch):
        """A step at a learning rate, which is data: all rates of a grid share a program."""
        state, _ = self._train_step(state.replace(tx=self._optimizer_at(rate)), batch)
        return state.replace(tx=self._optimizer)

    def _batches(self, task, sample, size) -> Iterator[list[Row]]:
        """The rows of every step and one more, epoch by epoch; the order depends on seed, task and sample."""
        settings = self._settings
        entropy = [settings.seed, zlib.crc32(task.name.encode()), sample.seed]
        rng, of_answers = np.random.default_rng(entropy), np.random.default_rng([*entropy, 1])
        size, order = min(size, len(sample.train)), np.array([], np.int64)
        for _ in range(settings.tuning.max_steps + 1):
            if len(order) < size:
                order = np.concatenate([order, rng.permutation(len(sample.train))])
            rows = [sample.train[index] for index in order[:size]]
            yield [self._answering.simplify(row, len(row.options), of_answers) for row in rows]
            order = order[size:]

    def _encode(self, task, rows, shapes):
        encoded = self._answering.encode(rows, share_options=self._answering.shares_options(task))
        return option_scoring.pad_to(encoded, shapes)

    def _shapes(self, task):
        """Shapes that hold all rows of the task's samples, without the rows' axis."""
        rows = [row for sample in task.samples for row in (*sample.train, *sample.dev)]
        variants = [one for row in rows for one in self._answering.variants(row, len(row.options))]
        return self._answering.row_shapes(variants)


def _make_optimizer(settings, trained, adapter, rate):
    return methods.make_optimizer(
        OptimizerSettings.at(rate, settings.optimizer),
        settings.methods,
        settings.tuning.max_steps,
        trained,
        seed=settings.seed,
        adapter=adapter,
    )


def rows_to_test(task: FewShotTask, sample: Sample, most: int | None) -> Sequence[Row]:
    """The test rows of a sample, or ``most`` of them, the same in every run."""
    if most is None or most >= len(sample.test):
        return sample.test
    rng = np.random.default_rng(zlib.crc32(task.name.encode()))
    return [sample.test[index] for index in sorted(rng.choice(len(sample.test), most, replace=False))]


def load_start(settings: GymSettings, start: TuningStart) -> tuple[Any, Any]:
    """The model of a start and its parameters."""
    answering, params = load_answering(settings, start, models.load_tokenizer(settings.model.model_name_or_path))
    return answering.model, params


def load_answering(settings: GymSettings, start: TuningStart, tokenizer: Any) -> tuple[Answering, Any]:
    """The model of a start and how it answers, and its parameters."""
    adapter = settings.adapter(start.kind) if start.adapter is None else None
    settings = settings.with_layers(*runners.default_form(jax.default_backend()), adapter)
    return answerers.load(
        settings.tuning.head,
        settings.model,
        settings.text,
        settings.methods,
        settings.tuning.max_steps,
        tokenizer,
        key=settings.seed,
        source=start.model,
        base=start.base,
        config=adapter,
        adapter=start.adapter,
        attention=settings.model_attention,
    )


def chance(task: FewShotTask, metric: str) -> float:
    """The expected score of a guess among the options: 0 for a correlation or without options, else mean 1 / options.

    Args:
      task: the task.
      metric: the name of its score.
    """
    if metric in ("matthews_correlation", "pearson") or task.kind == TEXT_TO_TEXT:
        return 0.0
    return float(np.mean([1 / len(row.options) for row in task.samples[0].train]))
