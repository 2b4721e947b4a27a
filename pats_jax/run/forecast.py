"""How long runs will take, said before they start: as long as finished ones did, else by a cost model.

The model counts what the runs have to do, and asks the machine for one rate, that of a matrix product:

    seconds = (processes * START_SECONDS + compilations) / jobs
              + operations / (devices * rate of a matrix product * EFFICIENCY)
    operations of a training step = 6 * encoder parameters * tokens + OPTIMIZER_OPERATIONS * parameters
    operations of a prediction    = 2 * encoder parameters * tokens

It leaves out attention scores, objectives' own work, checkpoints and the rest, so it is right within a factor of about
two, and says so. Processes that run side by side share the devices, so only starts and compilations gain from them.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pats_jax import methods
from pats_jax.data import batches
from pats_jax.models import checkpoint_folder
from pats_jax.models.weights import shapes, tensor_files
from pats_jax.reporting.progress import duration
from pats_jax.run.machine import Devices
from pats_jax.run.settings import Settings
from pats_jax.run.worker_settings import WorkerSettings
from pats_jax.training import runners, shape_costs
from pats_jax.training.table import bucket_boundaries, count_steps

START_SECONDS = 6.0  # of a process: imports, data, model; and at its end scores, plots and the model's files
OPTIMIZER_OPERATIONS = 600.0  # per parameter and step; the update is bound by memory
# The share of a matrix product's rate that a training step reaches: measured on two cores (MiniLM, 32 x 64), and from
# `shape_costs.RATES` and about 6e14 per second of a product in bfloat16 on one H100.
EFFICIENCY = {"cpu": 0.8, "gpu": 0.2, "tpu": 0.2}
REPEATED_COMPILATION = 0.3  # of the first: programs are kept on disk, but traced anew
SAMPLE = 512  # rows that are tokenised


@dataclasses.dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
      processes: how many processes start.
      compiling: seconds of all compilations.
      operations: floating-point operations.
    """

    processes: int = 0
    compiling: float = 0.0
    operations: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.processes + other.processes, self.compiling + other.compiling, self.operations + other.operations
        )


@dataclasses.dataclass(frozen=True)
class ModelCosts:
    """What a model costs on a platform.

    Attributes:
      params: the shapes of its tensors by name, in the layout that the platform's runs use.
      platform: "cpu", "gpu" or "tpu".
      frozen: whether only an adapter is trained: no gradients of the model's own parameters are computed.
    """

    params: dict[str, jax.ShapeDtypeStruct]
    platform: str
    frozen: bool = False

    @classmethod
    def of(cls, folder: Path, layers: str | None, platform: str, *, frozen: bool) -> "ModelCosts":
        """Reads the header of a checkpoint's files.

        Args:
          folder: the checkpoint's folder.
          layers: "separate" or "stacked"; None: as by default on the platform.
          platform: see above.
          frozen: see above.

        Raises:
          InputError: if the folder has no safetensors.
        """
        sizes = {name: math.prod(shape) for name, shape in shapes(tensor_files(folder)).items()}
        if (layers or runners.default_form(platform)[0]) == "stacked":
            stacked: dict[str, int] = {}
            for name, size in sizes.items():
                alike = re.sub(r"\.\d+\.", ".", name)
                stacked[alike] = stacked.get(alike, 0) + size
            sizes = stacked
        return cls({name: jax.ShapeDtypeStruct((n,), np.float32) for name, n in sizes.items()}, platform, frozen)

    @property
    def compiling(self) -> float:
        """Seconds to compile a training step."""
        return shape_costs.compile_seconds(self.params, self.platform)

    def training(self, tokens: float, steps: float) -> float:
        """Operations of so many steps over so many tokens in all."""
        updated = 0 if self.frozen else sum(leaf.size for leaf in self.params.values())
        each = (4.0 if self.frozen else 6.0) * shape_costs.num_encoder_parameters(self.params)
        return each * tokens + OPTIMIZER_OPERATIONS * updated * steps

    def predicting(self, tokens: float) -> float:
        """Operations of predictions for so many tokens."""
        return 2.0 * shape_costs.num_encoder_parameters(self.params) * tokens


@dataclasses.dataclass(frozen=True)
class TextLengths:
    """The number of a split's rows, and the tokens of some of them, int (n,)."""

    rows: int
    sample: np.ndarray

    @classmethod
    def of(cls, split: Any, rows: int, tokenizer: Any, max_length: int) -> "TextLengths":
        """Tokenises rows that are spread evenly over a `readers.Split`, of which ``rows`` are used."""
        chosen = np.unique(np.linspace(0, len(split) - 1, min(SAMPLE, len(split))).astype(int))
        return cls(rows, batches.tokenize(split.take(chosen), tokenizer, max_length).lengths)

    def padded(self, boundaries: Sequence[int]) -> float:
        """Mean tokens of a row in batches of these lengths."""
        return batches.padded_tokens(self.sample, boundaries) / len(self.sample)


def costs_of(settings: Settings, platform: str) -> ModelCosts:
    """The costs of the model that a run trains."""
    folder = checkpoint_folder(settings.model.model_name_or_path, check_weights=False)
    return ModelCosts.of(folder, settings.model.layers, platform, frozen=settings.adapter is not None)


def work_of_run(
    settings: Settings, costs: ModelCosts, train: TextLengths, validation: TextLengths, num_devices: int
) -> Work:
    """The work of a run that trains and evaluates.

    Args:
      settings: of the run.
      costs: of its model.
      train: its training texts.
      validation: its validation texts.
      num_devices: over which a step is split.
    """
    batch = settings.batches.over(num_devices).train_batch_size or 1
    if settings.data.own_name:
        batch = min(batch, train.rows)
    steps, epoch = count_steps(settings.length, batch, train.rows), math.ceil(train.rows / batch)
    boundaries = bucket_boundaries(settings.batches, costs.platform, costs.params, train.sample, steps * batch)
    evaluations = math.ceil(steps / (settings.loop.eval_steps or epoch))
    passes = evaluations * validation.rows / len(validation.sample)
    cost = shape_costs.shape_cost(costs.params, costs.platform, passes, training=False)
    scored = batches.bucket_boundaries(validation.sample, shape_costs.MOST_BUCKETS, shape_cost=cost)
    measured = methods.sensitivity_batches(settings.length.sensitivity_batches, settings.methods)
    times = 1 + sum(method.has("objective") for method in settings.methods)  # an objective adds a pass
    tokens = (times * steps + 2 * min(measured, epoch)) * batch * train.padded(boundaries)
    programs = len(boundaries) + bool(measured) + shape_costs.PREDICT_COMPILATION * len(scored)
    return Work(
        processes=1,
        compiling=programs * costs.compiling,
        operations=costs.training(tokens, steps)
        + costs.predicting(evaluations * validation.rows * validation.padded(scored)),
    )


def rough_seconds(work: Work, devices: Devices, dtype: str, jobs: int) -> float | None:
    """The seconds that work takes by the formula above; None if the machine's rate is not known.

    Args:
      work: what is to be done.
      devices: what does it.
      dtype: of the computation.
      jobs: how many processes run at a time.
    """
    rate = devices.rate(dtype)
    if rate is None:
        return None
    count = 1 if devices.platform == "cpu" else devices.count  # several on a CPU share its cores
    share = EFFICIENCY.get(devices.platform, EFFICIENCY["gpu"])
    side_by_side = max(1, min(jobs, work.processes))
    waiting = (work.processes * START_SECONDS + work.compiling) / side_by_side
    return waiting + work.operations / (count * rate * share)


def describe(count: int, things: str, finished: Sequence[float], guess: float | None, settings: WorkerSettings) -> str:
    """What some runs will take, in one line.

    Args:
      count: how many there are.
      things: what they are called, in the plural.
      finished: the seconds that finished ones took.
      guess: the seconds that all take by `rough_seconds`, if known; finished ones tell more.
      settings: where they run; a cluster's workers may come and go, so nothing is said of their time.

    Examples:
      >>> describe(6, "runs", [110.0, 130.0], None, WorkerSettings(jobs=2))
      '6 runs to do: about 6 min 0 s, if each takes 2 min 0 s as the finished ones did'
      >>> describe(6, "runs", [], 700.0, WorkerSettings())
      '6 runs to do: very roughly 12 min, a guess from the size of the model and the speed of this machine'
      >>> describe(6, "runs", [], None, WorkerSettings())
      '6 runs to do; the time left is shown as soon as it can be told'
    """
    start = f"{count} {things} to do"
    if settings.executor == "local" and finished:
        each = sum(finished) / len(finished)
        whole = duration(each * -(-count // settings.jobs))
        return f"{start}: about {whole}, if each takes {duration(each)} as the finished ones did"
    if settings.executor == "local" and guess is not None:
        said = roughly(guess)
        return f"{start}: very roughly {said}, a guess from the size of the model and the speed of this machine"
    return f"{start}; the time left is shown as soon as it can be told"


def roughly(seconds: float) -> str:
    """A number of seconds to two digits at most.

    Examples:
      >>> roughly(3), roughly(44), roughly(700), roughly(11_000), roughly(500_000)
      ('10 s', '40 s', '12 min', '3.1 h', '140 h')
    """
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 10 else f"{float(f'{hours:.2g}'):.0f} h"
