"""One tuning on a few-shot task: from a start, on one sample, scored on the task's test rows."""

import dataclasses
import functools
import math
import time
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pats_jax import methods
from pats_jax.data.few_shot import FewShotTask, Row, Sample
from pats_jax.errors import InputError
from pats_jax.methods import OptimizerSettings
from pats_jax.priming import option_scoring
from pats_jax.priming.gym_settings import GymSettings
from pats_jax.run import pe_modules
from pats_jax.run.records import Part, Stage, Tuned, TuningRecord
from pats_jax.train_state import TrainState, make_train_step
from pats_jax.training import metrics, preemption, runners


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
        self._settings, self._start, self._tokenizer = settings, start, tokenizer
        self._head = option_scoring.get_head(settings.tuning.head)
        self._model, self._params = load_start(settings, start)
        self._max_length = option_scoring.text_length(settings.model.max_seq_length, self._model)
        if start.kind != "full":
            pe_modules.check_methods(start.kind, settings.methods, self._params)
        part = "plm" if start.kind == "full" else "pe"
        self._trainable = option_scoring.trainable_mask(self._params, part, settings.tuning.head)
        trained = jax.tree.map(lambda keep, p: p if keep else None, self._trainable, self._params)
        loss_fn = option_scoring.make_option_loss(self._head, self._model)
        self._step = jax.jit(make_train_step(loss_fn))
        self._scores = jax.jit(functools.partial(option_scoring.option_scores, self._head, self._model))
        self._optimizers = {
            rate: methods.make_optimizer(
                OptimizerSettings.at(rate, settings.optimizer),
                settings.methods,
                settings.tuning.max_steps,
                trained,
                seed=settings.seed,
            )
            for rate in settings.tuning.learning_rates(start.kind)
        }

    def tune(self, task: FewShotTask, sample: Sample, asked: preemption.Preemption) -> TuningRecord:
        """Makes one tuning and returns its record, for `relative_gain.summarise`."""
        since = time.perf_counter()
        shapes = self._shapes(task)
        tried = [self._tune(rate, task, sample, shapes, asked) for rate in self._optimizers]
        best = max(tried, key=lambda one: one["place"])
        diverged = [one["learning_rate"] for one in tried if one["diverged"]]
        rows = self._test_rows(task, sample)
        chosen = option_scoring.choose(
            self._scores,
            self._head,
            best.pop("params"),
            rows,
            self._tokenizer,
            self._max_length,
            self._settings.tuning.per_device_eval_batch_size,
            share_options=task.options is not None,
        )
        start = self._start
        return {
            "algorithm": start.algorithm,
            "trained": start.trained,
            "upstream_seed": start.seed,
            "upstream_digest": start.digest,
            "peft": start.kind,
            "task": task.name,
            "sample": sample.seed,
            "metric": task.metric,
            "chance": chance(task),
            "learning_rates": list(self._optimizers),
            "diverged": diverged,
            "learning_rate": best["learning_rate"],
            "curve": best["curve"],
            "step": best["step"],
            "dev": best["dev"],
            "test": metrics.METRICS[task.metric](chosen, np.array([row.answer for row in rows])),
            "test_rows": len(rows),
            "seconds": time.perf_counter() - since,
        }

    def _tune(self, rate, task, sample, shapes, asked):
        """Tunes with one learning rate: the dev curve, and the parameters with the best dev score.

        *Ours*: among equal scores, the one with the lower dev loss is kept, because 16 rows have many ties; and if the
        loss is no longer finite, the tuning stops and keeps its best parameters so far.
        """
        settings = self._settings
        state = TrainState.create(
            apply_fn=self._model.apply,
            params=self._params,
            tx=self._optimizers[rate],
            key=settings.seed,
            trainable=self._trainable,
        )
        dev = self._encode(task, sample.dev, shapes)
        answers = np.array([row.answer for row in sample.dev])
        steps, scores, best, diverged = [], [], None, False
        max_steps = settings.tuning.max_steps
        for step, rows in enumerate(self._batches(task, sample)):
            if step % (settings.tuning.eval_steps or max_steps) == 0 or step == max_steps:
                asked.check()
                found = np.asarray(self._scores(state.all_params, dev))
                loss = float(optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(found), answers).mean())
                diverged = not math.isfinite(loss)
                if diverged:
                    break
                score = metrics.METRICS[task.metric](np.argmax(found, axis=1), answers)
                steps.append(step)
                scores.append(score)
                if best is None or (score, -loss) > best["place"]:
                    best = {"place": (score, -loss), "params": state.all_params, "step": step, "dev": score}
            if step < max_steps:
                state, _ = self._step(state, self._encode(task, rows, shapes))
        if best is None:
            raise InputError(f"{task.name}: the loss of {self._start.name} is not finite before the first step")
        return best | {"learning_rate": rate, "diverged": diverged, "curve": {"step": steps, "dev": scores}}

    def _batches(self, task, sample) -> Iterator[list[Row]]:
        """The rows of every step and one more, epoch by epoch; the order depends on seed, task and sample."""
        settings = self._settings
        rng = np.random.default_rng([settings.seed, zlib.crc32(task.name.encode()), sample.seed])
        size, order = min(settings.tuning.per_device_train_batch_size, len(sample.train)), np.array([], np.int64)
        for _ in range(settings.tuning.max_steps + 1):
            if len(order) < size:
                order = np.concatenate([order, rng.permutation(len(sample.train))])
            yield [sample.train[index] for index in order[:size]]
            order = order[size:]

    def _encode(self, task, rows, shapes):
        encoded = option_scoring.encode_rows(
            self._head, rows, self._tokenizer, self._max_length, share_options=task.options is not None
        )
        return option_scoring.pad_to(encoded, shapes)

    def _shapes(self, task):
        """Shapes that hold all rows of the task's samples, without the rows' axis."""
        rows = [row for sample in task.samples for row in (*sample.train, *sample.dev)]
        return option_scoring.row_shapes(self._head, rows, self._tokenizer, self._max_length)

    def _test_rows(self, task, sample):
        most = self._settings.tuning.max_test_rows
        if most is None or most >= len(sample.test):
            return sample.test
        rng = np.random.default_rng(zlib.crc32(task.name.encode()))
        return [sample.test[index] for index in sorted(rng.choice(len(sample.test), most, replace=False))]


def load_start(settings: GymSettings, start: TuningStart) -> tuple[Any, Any]:
    """The scorer of a start and its parameters."""
    adapter = settings.adapter(start.kind) if start.adapter is None else None
    settings = settings.with_layers(*runners.default_form(jax.default_backend()), adapter)
    model = settings.model
    return option_scoring.load_scorer(
        start.model,
        settings.tuning.head,
        adapter,
        key=settings.seed,
        adapter=start.adapter,
        mlm_head_from=start.base,
        dtype=model.dtype,
        gradient_checkpointing=model.gradient_checkpointing,
        layers=model.layers,
        unroll=model.unroll or 0,
        attention=settings.model_attention,
        ignore_mismatched_sizes=model.ignore_mismatched_sizes,
        **methods.dropout_rates(model, settings.methods, settings.tuning.max_steps),
    )


def chance(task: FewShotTask) -> float:
    """The expected score of a guess among the options: 0 for a correlation, else the mean of 1 / options."""
    if task.metric == "matthews_correlation":
        return 0.0
    return float(np.mean([1 / len(row.options) for row in task.samples[0].train]))
