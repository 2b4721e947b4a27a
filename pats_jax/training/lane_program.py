"""What lanes compute: the settings of each as arrays, and the programs of all."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pats_jax import methods, objectives, random, train_state, transforms, trees
from pats_jax.core.settings import Flat
from pats_jax.errors import InputError
from pats_jax.methods import Method, OptimizerSettings
from pats_jax.models.peft import PeftConfig
from pats_jax.training.by_lane import InTurns
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


def with_own(params: Any, own: Any) -> Any:
    """Parameters with some of them, a part of the tree, in the place of theirs."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(own))


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
        return self._of_lanes(self._init, (None, 0, 0, None))

    @functools.cached_property
    def step(self) -> Callable[..., tuple[LaneState, train_state.Metrics]]:
        """``step(state, lanes, frozen, rates, batch) -> (state, metrics)``, jitted; the state is donated.

        The arrays of ``batch`` and of metrics have a leading axis of lanes; ``frozen`` is shared. A lane whose loss or
        gradient is not finite skips the step; after more than ``max_nonfinite_steps`` of them it stays as it is.
        """
        return self._of_lanes(self._step, (0, 0, None, None, 0), donate_argnums=0)

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
