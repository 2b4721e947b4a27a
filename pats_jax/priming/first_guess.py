"""The work of few-shot tunings, for a first guess of their time; see `run.forecast`."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pats_jax.data.few_shot import FewShotTask, Sample
from pats_jax.errors import InputError
from pats_jax.models import read_encoder_config
from pats_jax.priming import option_scoring
from pats_jax.priming.few_shot_tuning import TuningStart
from pats_jax.priming.gym_settings import GymSettings
from pats_jax.run import forecast
from pats_jax.run.forecast import ModelCosts, Work
from pats_jax.run.machine import Devices
from pats_jax.training.shape_costs import PREDICT_COMPILATION

_TEST_SHAPES = 4  # texts of a task's test rows are padded to about so many lengths


def guess_seconds(
    settings: GymSettings,
    tunings: Sequence[tuple[TuningStart, FewShotTask, Sample]],
    folder: Path,
    tokenizer: Any,
    devices: Devices,
) -> float | None:
    """The seconds that tunings take; None if they cannot be told. What is wrong with them, they say themselves.

    Args:
      settings: the settings of all tunings.
      tunings: start, task and sample of each.
      folder: the model's, whose size stands for that of primed ones.
      tokenizer: the model's.
      devices: of this machine.
    """
    if not devices.rates:
        return None
    try:
        work = work_of(settings, tunings, folder, tokenizer, devices.platform)
    except InputError:
        return None
    one_device = Devices(devices.text, min(devices.count, settings.workers.jobs), devices.platform, devices.rates)
    return forecast.rough_seconds(work, one_device, settings.model.dtype, settings.workers.jobs)


def work_of(
    settings: GymSettings,
    tunings: Sequence[tuple[TuningStart, FewShotTask, Sample]],
    folder: Path,
    tokenizer: Any,
    platform: str,
) -> Work:
    """The work of tunings: each process compiles the programs of all tasks."""
    length = min(settings.model.max_seq_length, read_encoder_config(folder).max_length)

    @functools.cache
    def costs(is_full: bool) -> ModelCosts:
        return ModelCosts.of(folder, settings.model.layers, platform, frozen=not is_full)

    tokens_of = {task.name: _Tokens(settings, task, tokenizer, length) for _, task, _ in tunings}
    operations, compiling, compiled = 0.0, 0.0, set[Any]()
    for start, task, sample in tunings:
        model, tokens = costs(start.kind == "full"), tokens_of[task.name]
        rates = len(settings.tuning.learning_rates(start.kind)) * len(settings.tuning.batch_sizes)
        operations += rates * model.training(tokens.steps, settings.tuning.max_steps)
        operations += model.predicting(rates * tokens.dev + tokens.test(sample))
        for program in ((start.kind, tokens.shapes), (start.name, tokens.shapes)):
            if program not in compiled:  # another start of the kind finds it on disk
                share = 1.0 if program[0] == start.kind else forecast.REPEATED_COMPILATION
                compiling += share * (rates + PREDICT_COMPILATION * (1 + _TEST_SHAPES)) * model.compiling
                compiled.add(program)
    jobs = settings.workers.jobs
    return Work(jobs, compiling * jobs, operations)


class _Tokens:
    """The padded tokens that a tuning on a task computes.

    Attributes:
      steps: of all steps, with one learning rate and the largest batch.
      dev: of all dev scores, with one learning rate and batch size.
      shapes: of the texts in a step.
    """

    def __init__(self, settings: GymSettings, task: FewShotTask, tokenizer: Any, length: int):
        self._settings, self._task, self._tokenizer, self._length = settings, task, tokenizer, length
        self._head = option_scoring.get_head(settings.tuning.head)
        tuning, sample = settings.tuning, task.samples[0]
        rows = [row for one in task.samples for row in (*one.train, *one.dev)]
        shapes = option_scoring.row_shapes(self._head, rows, tokenizer, length)
        train = option_scoring.pad_to(self._encode(sample.train[: max(tuning.batch_sizes)]), shapes)
        self.shapes = tuple(sorted((name, x.shape) for name, x in train.items()))
        evaluations = 1 + math.ceil(tuning.max_steps / (tuning.eval_steps or tuning.max_steps))
        self.steps = float(tuning.max_steps * _size(train))
        self.dev = float(evaluations * _size(option_scoring.pad_to(self._encode(sample.dev), shapes)))

    def test(self, sample: Sample) -> float:
        """Of the test rows of a sample, from a batch of them."""
        tuning = self._settings.tuning
        rows = min(len(sample.test), tuning.max_test_rows or len(sample.test))
        size = tuning.per_device_eval_batch_size
        chosen = sample.test[:: max(1, len(sample.test) // size)][:size]
        return _size(self._encode(chosen)) * math.ceil(rows / size) * size / len(chosen)

    def _encode(self, rows):
        share = self._task.options is not None
        return option_scoring.encode_rows(self._head, rows, self._tokenizer, self._length, share_options=share)


def _size(batch):
    return sum(x.size for name, x in batch.items() if name.endswith("input_ids"))
