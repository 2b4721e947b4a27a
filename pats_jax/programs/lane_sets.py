"""A set of runs that share their programs, trained side by side in lanes; `pats-jax compare` starts it.

Each run's folder is as when it was trained alone, but for ``checkpoints/``: those of the set are in the set's own
folder until all of its runs have ended. A run that fails costs no other; why it failed is written to its own log.

What a set does is the same for every program; `Shared` is what a program adds: its data, its model, its scores.
"""

import abc
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, Self

import jax
import numpy as np
import rich.console
from flax.traverse_util import flatten_dict
from typing_extensions import TypedDict

from pats_jax import glue, methods, models, train_state, trees
from pats_jax.core import files
from pats_jax.core.files import JsonObject
from pats_jax.errors import InputError, Preempted
from pats_jax.models import peft
from pats_jax.models.layout import unstack_layers
from pats_jax.reporting import plots
from pats_jax.reporting.console import say
from pats_jax.run import flags, own_data, pe_modules, run_folder, run_start, table_training, workers
from pats_jax.run.lane_training import LaneTraining, TrainedSet, train
from pats_jax.run.own_data import Tuning
from pats_jax.run.records import GridRun, LaneSetFile
from pats_jax.run.run_start import Start
from pats_jax.run.training_run import Trained
from pats_jax.training import fine_tuning, lanes, preemption, runners
from pats_jax.training.checkpoints import Checkpoints
from pats_jax.training.lane_evaluation import LaneEvaluator, OfLanes
from pats_jax.training.settings import LANES_ON_CPU
from pats_jax.training.table import TableSource, count_steps

logger = logging.getLogger(__name__)


class RunOfSet(TypedDict):
    """A run: its place in the grid, the arguments of its program, and the file for the reason if it fails."""

    run: GridRun
    arguments: list[str]
    log: str


class Request(TypedDict):
    """A set of runs.

    Attributes:
      folder: of the set.
      runs: see `RunOfSet`.
      lanes: how many are trained side by side; None: 4 on a CPU, elsewhere as many as fit into memory.
      keeps_models: whether each run keeps its model.
    """

    folder: str
    runs: list[RunOfSet]
    lanes: int | None
    keeps_models: bool


class Finish(Protocol):
    """What follows a training, see `training_run.Job`."""

    def use(self, trained: Trained) -> JsonObject:
        """Evaluates and predicts; returns its part of results.json. May raise `Preempted`."""

    def write(self, trained: Trained, params: Any, results: JsonObject) -> None:
        """Writes the folder but for results.json."""


@dataclasses.dataclass(frozen=True)
class Shared(abc.ABC, Generic[Tuning]):
    """What all runs of a set share: data and model, and what their program does with them.

    Attributes:
      plain: the model without an adapter, and its parameters.
      model: with the adapter, if there is one.
      params: its parameters; new layers and adapter are those of the first run.
      metric: the score that picks the best evaluation.
      runner: one device.
    """

    plain: tuple[Any, Any]
    model: Any
    params: Any
    metric: str
    runner: runners.MeshRunner

    @classmethod
    @abc.abstractmethod
    def load(cls, settings: Tuning, runner: runners.MeshRunner, tokenizer: Any) -> Self:
        """Loads and checks data and model, by the settings of the first run."""

    @property
    @abc.abstractmethod
    def train_rows(self) -> int:
        """The number of training rows."""

    @property
    @abc.abstractmethod
    def num_layers(self) -> int | Mapping[str, int]:
        """The model's number of layers, see `unstack_layers`."""

    @property
    def regression(self) -> bool:
        """See `LaneProgram`."""
        return False

    @property
    def loss_fn(self) -> train_state.LossFn | None:
        """See `LaneProgram`."""
        return None

    @abc.abstractmethod
    def data_of(self, settings: Tuning) -> Any:
        """The data of a run, for `source` and `evaluators`."""

    @abc.abstractmethod
    def source(self, settings: Tuning, data: Any) -> TableSource:
        """The batches of a run."""

    @abc.abstractmethod
    def evaluators(
        self, settings: Tuning, data: Sequence[Any], training: LaneTraining, interrupt: Callable[[], None]
    ) -> tuple[OfLanes, Sequence[LaneEvaluator]]:
        """What scores the lanes.

        Args:
          settings: of the first run.
          data: of each lane.
          training: of all lanes.
          interrupt: called between batches; what it raises ends the evaluation.

        Returns:
          What the evaluators share, and the evaluator of each lane.
        """

    @abc.abstractmethod
    def add_adapter(self, settings: Tuning, model: Any, params: Any) -> tuple[Any, Any]:
        """A plain model and its parameters, with the adapter of a run."""

    def new_layers(self, settings: Tuning, seeds: Sequence[int]) -> Any:
        """The layers that the checkpoint lacks, a part of the parameters, with a leading axis of seeds."""
        return {}

    @abc.abstractmethod
    def describe(self, settings: Tuning, params: Any) -> JsonObject:
        """The part of a run's results.json that is known before training."""

    @abc.abstractmethod
    def finish(self, start: Start[Tuning], model: Any, evaluator: Any, keeps_model: bool) -> Finish:
        """What follows the training of a run.

        Args:
          start: of the run.
          model: as it is saved.
          evaluator: of its lane.
          keeps_model: whether it is.
        """

    def own_layers(self, runs: Sequence[Tuning]) -> Any:
        """The parameters that the seed of each run draws, with a leading axis of runs: new layers and adapters."""
        own = self.new_layers(runs[0], [run.seed for run in runs])
        if runs[0].adapter is None:
            return own
        drawn = [self.add_adapter(run, *self.plain)[1]["peft"] for run in runs]
        return {**own, "peft": jax.tree.map(lambda *leaves: np.stack(jax.device_get(leaves)), *drawn)}


def main(text: str, console: rich.console.Console, kind: type[Tuning], shared_kind: type[Shared[Tuning]]) -> None:
    """Makes the runs of a set that are not finished.

    Args:
      text: a `Request` as JSON.
      console: for progress.
      kind: the settings of the program.
      shared_kind: what its runs share.

    Raises:
      InputError: on invalid input.
      Preempted: if the program was asked to stop; the set has been saved.
    """
    request = files.parse_record(text, Request, "standard input")
    parsed = [flags.parse(run["arguments"], f"pats-jax {kind.program}", kind) for run in request["runs"]]
    for settings in parsed:
        settings.check()
    with concurrent.futures.ThreadPoolExecutor(1) as background, contextlib.ExitStack() as stack:
        loading = background.submit(models.load_tokenizer, parsed[0].model.model_name_or_path)
        starts = [
            stack.enter_context(run_start.begin(one.replace(num_devices=1), str(one.folder.output_dir), None))
            for one in parsed
        ]
        devices = runners.make_runner(num_devices=parsed[0].devices.num_devices).mesh.devices.ravel()
        asked = stack.enter_context(preemption.watch())
        runs = [
            LaneRun(run["run"], dataclasses.replace(start, settings=start.settings.over(1)), pathlib.Path(run["log"]))
            for start, run in zip(starts, request["runs"], strict=True)  # a finished one's batches are not filled in
        ]
        shared = shared_kind.load(runs[0].settings, starts[0].runner, loading.result())
        if parsed[0].data.own_name and parsed[0].batches.train_batch_size is None:
            runs = [run.with_batch_of(shared.train_rows) for run in runs]
        group = Group(shared, runs, pathlib.Path(request["folder"]), devices, request["keeps_models"], console, asked)
        stack.callback(group.close)
        group.carry_out(request["lanes"])


@dataclasses.dataclass(frozen=True)
class LaneRun(Generic[Tuning]):
    """A run of the set: its place in the grid, its start, and the file for the reason if it fails."""

    place: GridRun
    start: Start[Tuning]
    log: pathlib.Path

    @property
    def settings(self) -> Tuning:
        """Its settings."""
        return self.start.settings

    def with_buckets(self, number: int) -> "LaneRun[Tuning]":
        """The same run with the number of padded lengths that it has chosen."""
        return self._with(self.settings.replace(length_buckets=number))

    def with_batch_of(self, rows: int) -> "LaneRun[Tuning]":
        """The same run with a batch of at most so many rows."""
        return self._with(own_data.with_batch_of(self.settings, rows, 1))

    def _with(self, settings):
        return dataclasses.replace(self, start=dataclasses.replace(self.start, settings=settings))

    def fail(self, reason: str) -> None:
        """Writes why the run failed to its log."""
        logger.warning("%s: %s", self.start.folder, reason)
        with workers.open_log(self.log) as file:
            file.write(f"pats-jax: error: {reason}\n".encode())


@dataclasses.dataclass
class Round(Generic[Tuning]):
    """The runs that are trained side by side.

    Attributes:
      runs: those of the first lanes; further lanes repeat the first one, so that all devices have as many.
      training: of all lanes.
      of_lanes: what the evaluators share.
      evaluators: of all lanes.
      measures: sensitivity of each lane by its parameters; None: it is not measured.
    """

    runs: list[LaneRun[Tuning]]
    training: LaneTraining
    of_lanes: OfLanes
    evaluators: Sequence[LaneEvaluator]
    measures: list[Any]


class Group(Generic[Tuning]):
    """The runs of a set, in as many rounds as it takes."""

    def __init__(
        self,
        shared: Shared[Tuning],
        runs: Sequence[LaneRun[Tuning]],
        folder: pathlib.Path,
        devices: np.ndarray,
        keeps_models: bool,
        console: rich.console.Console,
        asked: preemption.Preemption,
    ):
        """Compiles nothing yet.

        Args:
          shared: data and model.
          runs: all runs.
          folder: of the set.
          devices: for the lanes.
          keeps_models: whether each run keeps its model.
          console: for progress.
          asked: tells that the program is asked to end.
        """
        self._shared, self._runs, self._folder, self._devices = shared, runs, folder, devices
        self._keeps_models, self._console, self._asked = keeps_models, console, asked
        self._compiled: dict[int, lanes.CompiledLanes] = {}  # by number of lanes

    def close(self) -> None:
        """Ends the threads that compile."""
        for compiled in self._compiled.values():
            compiled.close()

    def carry_out(self, asked_lanes: int | None) -> None:
        """Trains all runs that are not finished, and removes the folder of the set."""
        number = self._number_of_lanes(asked_lanes)
        for first in range(0, len(self._runs), number):
            part = list(self._runs[first : first + number])
            if any(run.start.finished is None for run in part):
                self._train(self._build(part), self._folder / f"round-{first // number + 1}")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _number_of_lanes(self, asked_lanes: int | None) -> int:
        """As the set was begun with; written at its first start."""
        path, layers = self._folder / "lanes.json", self._runs[0].settings.model.layers
        if os.path.lexists(path):
            found = files.read_record(path, LaneSetFile)
            if found["layers"] != layers:
                raise InputError(f"{path}: the runs were begun with --layers {found['layers']}; set that")
            if found.get("in_turns", False) != self._take_turns(found["lanes"]):
                raise InputError(
                    f"{path}: the runs were begun on other devices, or by an earlier version; resume there, or delete "
                    f"{self._folder} to begin them again"
                )
            return found["lanes"]
        most = len(self._runs)
        fitting = self._fitting(most) if asked_lanes is None else asked_lanes
        asked_lanes = min(fitting, self._fitting_on_host(fitting))
        files.make_folder(self._folder)
        number = min(asked_lanes, most)
        runs, in_turns = [run.place for run in self._runs], self._take_turns(number)
        files.write_json(path, LaneSetFile(runs=runs, lanes=number, layers=layers, in_turns=in_turns))
        return number

    def _take_turns(self, number):
        return take_turns(self._devices[0], _lanes_and_mesh(number, self._devices)[1])

    def _fitting(self, most):
        """The number of lanes that fit into the devices' memory, by XLA's own figures."""
        memory = memory_of(self._devices[0])
        if memory is None:
            return LANES_ON_CPU

        def needed(number):
            training = self._build(list(self._runs[:number])).training
            longest = max(training.one_of_each_shape(0), key=lambda batch: batch["input_ids"].size)
            return training.compiled.bytes_of_step(longest)

        return lanes.fitting_lanes(most, needed, _SHARE_OF_MEMORY * memory)

    def _fitting_on_host(self, most):
        """The number of lanes, at most ``most``, for which a CPU has memory free."""
        free = free_memory() if self._devices[0].platform == "cpu" else None
        if free is None:
            return most
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self._shared.params))
        number = max(1, min(most, int(_SHARE_OF_MEMORY * free / (_BYTES_ON_CPU * parameters))))
        if number < most:
            logger.warning("%d lanes at a time instead of %d: %.1f GB of memory are free", number, most, free / 1e9)
        return number

    def _build(self, runs: list[LaneRun[Tuning]]) -> Round[Tuning]:
        """The training of some runs."""
        shared, settings = self._shared, runs[0].settings
        number, mesh = _lanes_and_mesh(len(runs), self._devices)
        filled = [run.settings for run in (*runs, *[runs[0]] * (number - len(runs)))]
        data = [shared.data_of(run) for run in filled]
        sources = [shared.source(run, of_run) for run, of_run in zip(filled, data, strict=True)]
        runs = [run.with_buckets(len(source.boundaries)) for run, source in zip(runs, sources, strict=False)]
        steps = count_steps(settings.length, settings.batches.train_batch_size, sources[0].examples)
        own = shared.own_layers(filled)
        arrays = lanes.lane_arrays([run.replace(length_buckets=None) for run in filled])
        arrays["ended"] = np.zeros(number, bool)
        rates = lanes.rate_table(settings.optimizer, steps)
        if number not in self._compiled:
            program = self._program(settings, steps, mesh)
            check_own_layers(program, shared.params, own)
            self._compiled[number] = lanes.CompiledLanes(program, shared.params, own, arrays, rates)
        training = LaneTraining(
            self._compiled[number],
            shared.params,
            own,
            arrays,
            rates,
            sources,
            fine_tuning.make_rhythm(settings.loop, settings.saving, steps, len(sources[0].plan)),
            shared.metric,
            "eval" in settings.phases,
            sum(p.size for p in jax.tree.leaves(shared.params)),
        )
        of_lanes, evaluators = shared.evaluators(settings, data, training, self._asked.check)
        return Round(runs, training, of_lanes, evaluators, self._measures(settings, sources))

    def _program(self, settings, steps, mesh):
        model = self._shared.model
        return lanes.LaneProgram(
            model.apply,
            settings,
            steps,
            (settings.flat().get("response", "linear"),),
            self._shared.regression,
            settings.batches.gradient_accumulation_steps,
            norms=True,
            trainable=peft.trainable_mask(model, self._shared.params) if settings.adapter else None,
            mesh=mesh,
            adapter=settings.adapter,
            loss_fn=self._shared.loss_fn,
            in_turns=take_turns(self._devices[0], mesh),
        )

    def _measures(self, settings, sources):
        num_layers = self._shared.num_layers
        separate = jax.eval_shape(lambda tree: unstack_layers(tree, num_layers), self._shared.params)
        noisy = methods.layer_mask(separate, table_training.described_layers(settings))
        number = methods.sensitivity_batches(settings.length.sensitivity_batches, settings.methods)
        return [source.sensitivity_measure(number, num_layers, noisy) for source in sources]

    def _train(self, part: Round[Tuning], folder: pathlib.Path) -> None:
        """Trains a round, and writes the folders of its runs."""
        starts: list[Start | None] = [run.start if run.start.finished is None else None for run in part.runs]
        starts += [None] * (len(part.evaluators) - len(starts))
        for start in filter(None, starts):
            start.open_folder()
        limit = part.runs[0].settings.saving.save_total_limit
        with Checkpoints(folder / "checkpoints", limit) as checkpoints:
            trained: TrainedSet | None = None
            try:
                trained = train(
                    part.training, part.evaluators, part.of_lanes, starts, checkpoints, self._console, self._asked
                )
                part.of_lanes.use(trained.params)
                for lane, run in enumerate(part.runs):
                    self._asked.check()
                    if starts[lane] is not None:
                        self._finish(part, trained, lane, run)
            except Preempted as error:
                if trained is not None:
                    trained.save()
                checkpoints.wait()
                raise Preempted(
                    "interrupted and saved; repeat pats-jax compare to resume", error.signal_number
                ) from None
        shutil.rmtree(folder, ignore_errors=True)

    def _finish(self, part, trained, lane, run):
        """Writes the folder of a run, or why it failed."""
        reason = trained.progress.failures[lane]
        if reason is None:
            try:
                results = self._write(part, trained, lane, run)
                say(self._console, glue.summary(results, run.start.folder))
                return
            except InputError as error:
                reason = str(error)
        run.fail(reason)

    def _write(self, part, trained, lane, run) -> JsonObject:
        shared, training, settings, folder = self._shared, part.training, run.settings, run.start.folder
        frozen = training.program.split(training.params)[1]
        own = jax.device_get(lanes.lane_of(trained.params, lane))
        params = trees.combine(own, jax.device_get(frozen))
        facts, draw = trained.facts(training, lane), lambda: None
        if part.measures[lane] is not None:
            before = shared.runner.place(self._starting_params(part, lane, settings))
            after = shared.runner.place(params)
            facts["concentration"], everything = fine_tuning.measure_concentration(part.measures[lane], before, after)
            draw = functools.partial(plots.plot_sensitivity, folder / "plots" / "sensitivity.png", *everything)
        one = Trained(params, trained.progress.lanes[lane].records, facts, draw=draw)
        model = pe_modules.in_training(shared.model, training.rhythm.total_steps)
        finish = shared.finish(run.start, model, part.evaluators[lane], self._keeps_models)
        results = shared.describe(settings, params) | facts | finish.use(one)
        run_folder.check_links(folder)
        finish.write(one, params, results)
        run.start.finish(results)
        return results

    def _starting_params(self, part, lane, settings):
        """The parameters that a lane started from."""
        own = jax.tree.map(lambda x: x[lane], part.training.own)
        return methods.starting_params(settings.methods, lanes.with_own(part.training.params, own), settings.seed)


_SHARE_OF_MEMORY = 0.8  # the rest is for the evaluation, and for what the allocator cannot use
_BYTES_ON_CPU = 40  # of a lane, per parameter; 8 lanes of MiniLM with PATS took 32


def memory_of(device: jax.Device) -> int | None:
    """The bytes that JAX may use on a device; None on a CPU, which does not say."""
    found = device.memory_stats()
    return None if found is None else found["bytes_limit"]


def free_memory() -> int | None:
    """The bytes that the system could give to a new process, page cache included; None if it does not say."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0][1]) if found else None


def check_own_layers(program: lanes.LaneProgram, params: Any, own: Any) -> None:
    """Raises InputError if layers that the seed draws are not trained: lanes share those."""
    frozen = flatten_dict(program.split(params)[1] or {})
    for path in flatten_dict(own):
        if frozen.get(path) is not None:
            raise InputError(f"{'.'.join(path)}: new, so drawn by seed, but not trained; set --lanes 1")


def take_turns(device: jax.Device, mesh: jax.sharding.Mesh | None) -> bool:
    """Whether lanes take turns on a device, which is best where one lane keeps it busy."""
    return mesh is None and device.platform == "cpu"


def _lanes_and_mesh(runs: int, devices: np.ndarray) -> tuple[int, jax.sharding.Mesh | None]:
    """The number of lanes for so many runs, and the devices that they are dealt out to, each as many."""
    used = min(runs, len(devices))
    mesh = jax.sharding.Mesh(devices[:used], (lanes.LANE,)) if used > 1 else None
    return -(-runs // used) * used, mesh
