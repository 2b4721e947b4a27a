"""Lanes: many trainings as one program, side by side on a leading axis that `jax.vmap` maps over, or in turns.

The lanes of a set share model, data and method. They differ in seed, in the numbers `LANE_NUMBERS` and in how noise
depends on sensitivity. Each lane has its own head, order of rows, dropout and noise, and gives the same result as its
run alone; frozen parameters are shared. Batches have the same shapes for all seeds, see
`pats_jax.data.batches.epoch_plan`.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pats_jax import methods, objectives, random, train_state, transforms, trees
from pats_jax.core.settings import Flat
from pats_jax.data import batches
from pats_jax.data.prefetch import prefetch
from pats_jax.errors import InputError
from pats_jax.methods import Method, OptimizerSettings
from pats_jax.models.peft import PeftConfig
from pats_jax.training.settings import LANE_NUMBERS, OF_A_LANE, LoopSettings

LANE = "lane"  # the axis of a mesh that lanes are dealt out to

Arrays = dict[str, Any]


class LaneSettings(Protocol):
    """The settings of a lane's run; a program's settings have them, among others."""

    @property
    def seed(self) -> Any: ...

    @property
    def optimizer(self) -> OptimizerSettings: ...

    @property
    def methods(self) -> Sequence[Method]: ...

    @property
    def loop(self) -> LoopSettings: ...

    def flat(self) -> Flat:
        """Every setting by its flag."""

    def replace(self, **changes: Any) -> Self:
        """A copy with changed settings, by their flags."""


class LaneState(NamedTuple):
    """The states of all lanes; every leaf has a leading axis of lanes, or is a `ByLane`.

    Attributes:
      step: steps made, skipped ones included, (lanes,) int32.
      skipped: steps that were skipped because loss or gradient was not finite, (lanes,) int32.
      params: the trained parameters.
      opt_state: the state of the optimizer.
    """

    step: jax.Array
    skipped: jax.Array
    params: Any
    opt_state: Any


@jax.tree_util.register_pytree_with_keys_class
class ByLane(tuple):
    """The arrays of the lanes, each its own, in the place of one array with a leading axis of lanes."""

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], None]:
        """See `jax.tree_util`."""
        return [(jax.tree_util.SequenceKey(lane), x) for lane, x in enumerate(self)], None

    @classmethod
    def tree_unflatten(cls, _: None, arrays: Iterable[Any]) -> Self:
        """See `jax.tree_util`."""
        return cls(arrays)


def _is_by_lane(x):
    return isinstance(x, ByLane)


def _is_stored_key(x):
    return isinstance(x, random.StoredKey)


def with_own(params: Any, own: Any) -> Any:
    """Parameters with some of them, a part of the tree, in the place of theirs."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(own))


def lane_of(tree: Any, lane: int) -> Any:
    """One lane's part of a tree that has a `ByLane` or an array with a leading axis of lanes for each leaf."""
    return jax.tree.map(lambda leaf: leaf[lane], tree, is_leaf=_is_by_lane)


class InTurns:
    """A function of one lane as a function of all: it is called for one lane after the other.

    It stands for what `jax.jit` returns, and its `lower` and `compile` for theirs.

    Attributes:
      of_lane: the jitted, lowered or compiled function.
      in_axes: by argument 0, if lanes have their own, see `lane_of`; None, if they share it. A result has a `ByLane`
        for each leaf.
    """

    def __init__(self, of_lane: Any, in_axes: Sequence[int | None]):
        self.of_lane, self.in_axes = of_lane, in_axes

    def __call__(self, *arguments: Any) -> Any:
        """The results of all lanes."""
        found = [self.of_lane(*self._of(lane, arguments)) for lane in range(self._lanes(arguments))]
        return jax.tree.map(lambda *leaves: ByLane(leaves), *found, is_leaf=_is_stored_key)

    def lower(self, *arguments: Any) -> "InTurns":
        """Lowers the function of one lane for arguments of all lanes, or their shapes."""
        shapes = jax.eval_shape(lambda *arguments: self._of(0, arguments), *arguments)
        return InTurns(self.of_lane.lower(*shapes), self.in_axes)

    def compile(self) -> "InTurns":
        """Compiles what has been lowered."""
        return InTurns(self.of_lane.compile(), self.in_axes)

    def memory_analysis(self) -> Any:
        """That of one lane."""
        return self.of_lane.memory_analysis()

    def _of(self, lane, arguments):
        pairs = zip(arguments, self.in_axes, strict=True)
        return [argument if axis is None else lane_of(argument, lane) for argument, axis in pairs]

    def _lanes(self, arguments):
        own = [argument for argument, axis in zip(arguments, self.in_axes, strict=True) if axis is not None]
        return len(jax.tree.leaves(own, is_leaf=_is_by_lane)[0])


def lane_arrays(runs: Sequence[LaneSettings]) -> Arrays:
    """The settings of each lane as arrays (lanes, ...): `LANE_NUMBERS` float32, ``response`` int32, ``words`` of keys.

    Args:
      runs: the settings of each lane.

    Raises:
      InputError: if a setting differs that must not; the message names it.
    """
    flat = [run.flat() for run in runs]
    for other in flat[1:]:
        differing = [
            name
            for name in dict.fromkeys([*flat[0], *other])
            if name not in OF_A_LANE and other.get(name) != flat[0].get(name)
        ]
        if differing:
            raise InputError(f"lanes cannot differ in {', '.join(differing)}; train such runs one after the other")
    names = list(transforms.RESPONSES)
    words = np.stack(jax.device_get([jax.random.key_data(random.fast_key(run.seed)) for run in runs]))
    numbers = {name: np.array([own[name] for own in flat], np.float32) for name in LANE_NUMBERS if name in flat[0]}
    responses = [names.index(own.get("response", names[0])) for own in flat]
    return numbers | {"response": np.array(responses, np.int32), "words": words}


def rate_table(settings: OptimizerSettings, total_steps: int, capacity: int | None = None) -> np.ndarray:
    """The schedule of a run: the factor of the peak learning rate by step, float32 (capacity,), 0 after the end.

    As a table, the schedule is data, so trainings of different lengths can share a program.

    Args:
      settings: the settings of the optimizer, of which ``warmup_ratio`` is used.
      total_steps: number of optimizer steps.
      capacity: length of the table, at least total_steps; None means total_steps.
    """
    schedule = methods.learning_rate_schedule(dataclasses.replace(settings, learning_rate=1.0), total_steps)
    table = np.zeros(total_steps if capacity is None else capacity, np.float32)
    table[:total_steps] = jax.device_get(jax.jit(jax.vmap(schedule))(jnp.arange(total_steps)))
    return table


@dataclasses.dataclass(frozen=True)
class LaneProgram:
    """The programs of a set of lanes: initialisation, training step and prediction, each for all lanes.

    Attributes:
      apply_fn: the model's apply function.
      settings: the settings that the lanes share.
      total_steps: number of optimizer steps, for methods that work in stages.
      responses: the names of the responses that lanes may have; all are computed, and each lane uses one.
      regression: whether the labels of a classifier are scores.
      accumulation_steps: micro-batches in a step.
      norms: whether the step measures the norms of parameters and update, see `make_train_step`.
      trainable: a tree of bools like the parameters, which are trained; None: what the methods say.
      mesh: devices that the lanes are dealt out to, with the one axis `LANE`, which divides their number; None: one.
      adapter: the config of the adapter that is trained; None: no adapter.
      loss_fn: the loss, without what the adapter adds; None: that of a classifier, with the methods' objectives.
      in_turns: whether each program is that of one lane and called for one after the other; a `LaneState` then has a
        `ByLane` for each leaf. This is faster where one lane keeps the device busy, as on a CPU.
    """

    apply_fn: Callable
    settings: LaneSettings
    total_steps: int
    responses: tuple[str, ...] = ("linear",)
    regression: bool = False
    accumulation_steps: int = 1
    norms: bool = False
    trainable: Any = None
    mesh: Mesh | None = None
    adapter: PeftConfig | None = None
    loss_fn: train_state.LossFn | None = None
    in_turns: bool = False

    @functools.cached_property
    def init(self) -> Callable[[Any, Any, Arrays, jax.Array], LaneState]:
        """``init(params, own, lanes, rates) -> LaneState``, jitted.

        ``params`` are the parameters that all lanes share; ``own`` is a part of that tree (the heads), with a leading
        axis of lanes, that replaces theirs; ``lanes`` come from `lane_arrays`, ``rates`` from `rate_table`.
        """

        def init(params, own, lane, rates):
            return self._init(params, own, lane, rates)

        return self._of_lanes(init, (None, 0, 0, None))

    @functools.cached_property
    def step(self) -> Callable[..., tuple[LaneState, train_state.Metrics]]:
        """``step(state, lanes, frozen, rates, batch) -> (state, metrics)``, jitted; the state is donated.

        The arrays of ``batch`` and of metrics have a leading axis of lanes; ``frozen`` is shared. A lane whose loss or
        gradient is not finite skips the step; after more than ``max_nonfinite_steps`` of them it stays as it is.
        """

        def step(state, lane, frozen, rates, batch):
            return self._step(state, lane, frozen, rates, batch)

        return self._of_lanes(step, (0, 0, None, None, 0), donate_argnums=0)

    @functools.cached_property
    def predict(self) -> Callable[[Any, Any, train_state.Batch], jax.Array]:
        """``predict(params, frozen, batch)``, jitted: logits (lanes, batch, num_labels) float32; all get one batch."""
        alone = train_state.make_predict_step(self.apply_fn)

        def predict(own, frozen, batch):
            return alone(trees.combine(own, frozen), batch)

        return self._of_lanes(predict, (0, None, None))

    @functools.cached_property
    def figures(self) -> Callable[[LaneState, Arrays, Any], dict[str, jax.Array]]:
        """``figures(state, lanes, rates)``, jitted: the learning rate of the last step, and what the methods did in it.

        By name, (lanes,).
        """

        def figures(state, lane, rates):
            optimizer, chosen = (settings := self._settings(lane)).optimizer, settings.methods

            def schedule(count):
                return optimizer.learning_rate * rates[count]

            rate = schedule(jnp.maximum(state.step - state.skipped - 1, 0))
            did = methods.statistics(chosen, schedule, optimizer.learning_rate, state.opt_state)
            return {"learning_rate": rate, **did}

        return self._of_lanes(figures, (0, 0, None))

    @functools.cached_property
    def choose(self) -> Callable[[jax.Array, Any, Any], Any]:
        """``choose(which, params, others)``, jitted: params of the lanes in which, bool (lanes,), of the rest others.

        The others are donated.
        """

        def choose(which, params, others):
            return jax.tree.map(lambda a, b: jnp.where(which, a, b), params, others)

        return self._of_lanes(choose, (0, 0, 0), donate_argnums=2)

    def split(self, params: Any) -> tuple[Any, Any]:
        """Trained and frozen parameters; the latter is None if all are trained."""
        trainable = self.trainable
        if trainable is None:
            trainable = methods.trainable_mask(self.settings.methods, params)
        return (params, None) if trainable is None else trees.partition(trainable, params)

    def shapes(self, tree: Any, axis: int | None = None) -> Any:
        """A tree of arrays, with a leading axis of lanes if ``axis`` is 0, as shapes that say where each lies."""
        sharding = self._sharding(axis)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def place(self, tree: Any, axis: int | None = None) -> Any:
        """Puts a tree of arrays, with a leading axis of lanes if ``axis`` is 0, on the devices; not if `in_turns`."""
        return tree if self.in_turns and axis == 0 else jax.device_put(tree, self._sharding(axis))

    def _sharding(self, axis):
        return None if self.mesh is None else NamedSharding(self.mesh, _spec(axis))

    def _of_lanes(self, function, in_axes, **options):
        """A function of one lane, jitted for all: under `jax.vmap`, each device its own ones, or in turns."""
        if self.in_turns:
            return InTurns(jax.jit(function, **options), in_axes)
        mapped = jax.vmap(function, in_axes)
        if self.mesh is not None:
            in_specs = tuple(map(_spec, in_axes))
            mapped = jax.shard_map(mapped, mesh=self.mesh, in_specs=in_specs, out_specs=_spec(0), check_vma=False)
        return jax.jit(functools.wraps(function)(lambda *arguments: mapped(*arguments)), **options)

    def _init(self, params, own, lane, rates):
        settings = self._settings(lane)
        params = with_own(params, own)
        params, _ = self.split(methods.starting_params(settings.methods, params, settings.seed))
        params = jax.tree.map(jnp.asarray, params)
        zero = jnp.zeros([], jnp.int32)
        return LaneState(zero, zero, params, self._optimizer(lane, rates, params).init(params))

    def _step(self, state, lane, frozen, rates, batch):
        settings = self._settings(lane)
        # Weights that are not numbers make a loss that is none: the step is skipped.
        frozen_lane = state.skipped > settings.loop.max_nonfinite_steps
        if "ended" in lane:
            frozen_lane |= lane["ended"]
        batch = batch | {"weights": jnp.where(frozen_lane, jnp.nan, batch["weights"])}
        loss_fn = self.loss_fn or objectives.with_objectives(
            self.apply_fn, *methods.chosen_objectives(settings.methods), regression=self.regression
        )
        if self.adapter is not None:
            loss_fn = self.adapter.add_to_loss(loss_fn)
        alone = train_state.TrainState(
            step=state.step,
            apply_fn=self.apply_fn,
            params=state.params,
            tx=self._optimizer(lane, rates, state.params),
            opt_state=state.opt_state,
            stored_key=random.StoredKey(lane["words"], random.NAME),
            frozen=frozen,
        )
        alone, metrics = train_state.make_train_step(
            loss_fn,
            accumulation_steps=self.accumulation_steps,
            skip_nonfinite=True,
            norms=self.norms,
            gradient=methods.chosen_gradient(settings.methods),
        )(alone, batch)
        skipped = state.skipped + metrics["skipped"].astype(jnp.int32)
        return LaneState(jnp.asarray(alone.step), skipped, alone.params, alone.opt_state), metrics

    def _settings(self, lane):
        """The settings of one lane: traced numbers, and a key instead of the seed."""
        own: Flat = {name: lane[name] for name in LANE_NUMBERS if name in lane}
        own["seed"] = random.key_from_data(lane["words"], random.NAME)
        return self.settings.replace(**own)

    def _optimizer(self, lane, rates, params):
        settings = self._settings(lane)
        return methods.make_optimizer(
            settings.optimizer,
            settings.methods,
            self.total_steps,
            params,
            seed=settings.seed,
            schedule=lambda count: settings.optimizer.learning_rate * rates[count],
            response=functools.partial(self._respond, lane["response"]),
            adapter=self.adapter,
        )

    def _respond(self, number, r):
        """The response w of one tensor, by the lane's own response."""
        names = list(transforms.RESPONSES)
        chosen, *others = self.responses
        w = transforms.RESPONSES[chosen](r)
        for name in others:
            w = jnp.where(number == names.index(name), transforms.RESPONSES[name](r), w)
        return w


def _spec(axis):
    """How arrays with a leading axis of lanes (axis 0), or without one (None), are dealt out to the devices."""
    return PartitionSpec() if axis is None else PartitionSpec(LANE)


def lane_batches(
    tokens: batches.Tokens,
    labels: np.ndarray,
    batch_size: int,
    boundaries: Sequence[int],
    seeds: Sequence[int],
    total_steps: int,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The batches of all lanes, step by step: each lane's own rows, in the order of its run alone.

    Args:
      tokens: the tokenised rows.
      labels: int32 classes or float32 scores, (rows,).
      batch_size: number of rows in a lane's batch.
      boundaries: bucket lengths.
      seeds: the seeds of the lanes.
      total_steps: number of batches.

    Yields:
      The padded length, and a batch whose arrays have a leading axis of lanes.
    """
    made = 0
    for epoch in itertools.count():
        plans = [batches.epoch_plan(tokens.lengths, batch_size, boundaries, seed=s, epoch=epoch) for s in seeds]
        for parts in zip(*plans, strict=True):
            if made == total_steps:
                return
            made += 1
            yield parts[0][1], _fill(tokens, labels, [rows for rows, _ in parts], batch_size, parts[0][1])


def _fill(tokens, labels, rows_of_lanes, batch_size, length):
    """As `fill_batch`, for all lanes at once."""
    filler = batch_size - len(rows_of_lanes[0])
    filled = np.stack([np.concatenate([rows, np.full(filler, rows[0])]) for rows in rows_of_lanes])
    batch = batches.fill_batch(tokens, labels, filled.ravel(), filled.size, length)
    batch = {name: x.reshape(*filled.shape, *x.shape[1:]) for name, x in batch.items()}
    batch["weights"][:, batch_size - filler :] = 0.0
    return batch


class CompiledLanes:
    """The programs of lanes, compiled in threads, one per batch shape.

    The programs can be used for every set of lanes of the same number, with the same sizes of model and rate table.
    `close` ends the threads.

    Attributes:
      program: the programs to compile.
      lanes: the number of lanes.
      state: the shapes of a `LaneState`.
    """

    def __init__(self, program: LaneProgram, params: Any, own: Any, lanes: Arrays, rates: np.ndarray):
        """Starts to compile the initialisation.

        Args:
          program: the programs to compile.
          params: the shared parameters, or their shapes.
          own: the lanes' own parameters, as for `LaneProgram.init`.
          lanes: from `lane_arrays`.
          rates: from `rate_table`.
        """
        self.program, self.lanes = program, len(lanes["words"])
        self._pool = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="compile")
        self._params, self._own = program.shapes(params), program.shapes(own, 0)
        self._arguments = program.shapes(lanes, 0), program.shapes(rates)
        state = jax.eval_shape(program.init, self._params, self._own, *self._arguments)
        self.state: LaneState = program.shapes(state, 0)
        self._frozen = program.shapes(program.split(self._params)[1])
        self._programs: dict[tuple, concurrent.futures.Future] = {}
        self.begin(("init",), program.init, self._params, self._own, *self._arguments)

    def expect_step(self, batch: Arrays) -> None:
        """Starts to compile the step for batches of that shape, (lanes, rows, length), unless already done."""
        lanes, rates = self._arguments
        key = ("step", *batch["input_ids"].shape)
        self.begin(key, self.program.step, self.state, lanes, self._frozen, rates, self.program.shapes(batch, 0))

    def expect_predict(self, batch: Arrays) -> None:
        """Starts to compile the prediction for batches of that shape, (rows, length), unless already done."""
        key = ("predict", *batch["input_ids"].shape)
        self.begin(key, self.program.predict, self.state.params, self._frozen, self.program.shapes(batch))

    def init(self, *arguments: Any) -> LaneState:
        """`LaneProgram.init`."""
        return self.call(("init",), *arguments)

    def step(self, state: LaneState, lanes: Arrays, frozen: Any, rates: Any, batch: Arrays) -> tuple[LaneState, Any]:
        """`LaneProgram.step`; waits for its program."""
        self.expect_step(batch)
        return self.call(("step", *batch["input_ids"].shape), state, lanes, frozen, rates, batch)

    def predict(self, params: Any, frozen: Any, batch: Arrays) -> jax.Array:
        """`LaneProgram.predict`; waits for its program."""
        self.expect_predict(batch)
        return self.call(("predict", *batch["input_ids"].shape), params, frozen, batch)

    def expect_figures(self) -> None:
        """Begins to compile `figures`, unless it has been."""
        self.begin(("figures",), self.program.figures, self.state, *self._arguments)

    def figures(self, state: LaneState, lanes: Arrays, rates: Any) -> dict[str, jax.Array]:
        """`LaneProgram.figures`; waits for its program."""
        self.expect_figures()
        return self.call(("figures",), state, lanes, rates)

    def bytes_of_step(self, batch: Arrays) -> int:
        """The memory of one device that the step for batches of that shape takes, by XLA's own figures."""
        self.expect_step(batch)
        found = self._programs[("step", *batch["input_ids"].shape)].result().memory_analysis()
        parts = (found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)
        return (sum(parts) - found.alias_size_in_bytes) * (self.lanes if self.program.in_turns else 1)

    def close(self) -> None:
        """Ends the threads; waits for what they are compiling, and leaves out what they have not begun."""
        self._pool.shutdown(cancel_futures=True)

    def compile_other(self, compile_it: Callable[[], None]) -> None:
        """Calls a function that compiles another program in a thread of these."""
        self._pool.submit(compile_it)

    def call(self, key: tuple, *arguments: Any) -> Any:
        """Calls the program of a key; waits until it is compiled."""
        return self._programs[key].result()(*arguments)

    def begin(self, key: tuple, function: Any, *arguments: Any) -> None:
        """Starts to compile a jitted function under a key, for arguments or their shapes, unless already done."""
        if key not in self._programs:
            self._programs[key] = self._pool.submit(lambda: function.lower(*arguments).compile())


def fitting_lanes(most: int, needed: Callable[[int], int], limit: float) -> int:
    """The largest number of lanes, at least 1, that is found to fit into memory.

    Args:
      most: of interest.
      needed: the bytes that so many lanes take; each call may compile a program.
      limit: bytes that there are.
    """
    number = most
    while number > 1 and (bytes_needed := needed(number)) > limit:
        number = max(1, min(number - 1, int(number * limit / bytes_needed)))
    return number


@dataclasses.dataclass
class TrainedLanes:
    """The result of `fit`.

    Attributes:
      state: the state after the last step.
      metrics: name -> values, (steps, lanes).
      logits: number of steps made -> logits of the evaluation rows, (lanes, rows, num_labels).
      diverged: whether a lane was frozen because loss or gradient was not finite too often, (lanes,) bool.
    """

    state: LaneState
    metrics: dict[str, np.ndarray]
    logits: dict[int, np.ndarray]
    diverged: np.ndarray


def fit(
    compiled: CompiledLanes,
    state: LaneState,
    lanes: Arrays,
    frozen: Any,
    rates: np.ndarray,
    data: Iterator[tuple[int, Arrays]],
    evaluation: Sequence[tuple[np.ndarray, Arrays]],
    eval_steps: int,
) -> TrainedLanes:
    """Trains all lanes on all batches; evaluates every ``eval_steps`` steps and after the last one.

    Args:
      compiled: the programs.
      state: the state to start from; it is donated.
      lanes: from `lane_arrays`.
      frozen: parameters that are not trained, or None.
      rates: from `rate_table`.
      data: from `lane_batches`.
      evaluation: from `pats_jax.data.batches.eval_batches`.
      eval_steps: number of steps between evaluations.
    """
    lanes, frozen, rates = jax.device_put((lanes, frozen, rates))
    evaluation = [(rows, jax.device_put(batch)) for rows, batch in evaluation]
    pending: list[train_state.Metrics] = []
    logits: dict[int, np.ndarray] = {}

    def evaluate():
        parts = [(rows, compiled.predict(state.params, frozen, batch)) for rows, batch in evaluation]
        logits[len(pending)] = in_order(jax.device_get(parts))

    with prefetch(jax.device_put(batch) for _, batch in data) as ready:
        for batch in ready:
            state, metrics = compiled.step(state, lanes, frozen, rates, batch)
            pending.append(metrics)
            if len(pending) % eval_steps == 0:
                evaluate()
    if len(pending) not in logits:
        evaluate()
    fetched = jax.device_get(pending)
    stacked = {name: np.stack([step[name] for step in fetched]) for name in fetched[0]}
    diverged = np.asarray(state.skipped) > compiled.program.settings.loop.max_nonfinite_steps
    return TrainedLanes(state, stacked, logits, diverged)


def in_order(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Logits (lanes, rows, num_labels) in the order of the rows, from batches of row numbers and logits."""
    order = np.concatenate([rows for rows, _ in parts])
    logits = np.concatenate([np.asarray(part)[:, : len(rows)] for rows, part in parts], axis=1)
    result = np.empty_like(logits)
    result[:, order] = logits
    return result
