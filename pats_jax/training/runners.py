"""Runners for the pure steps: jit over a device mesh (the default), pmap, and either of them over many processes.

A step is the same function in all of them. The runner decides where the training state is, how a batch is distributed
over the devices, and brings results back to the host. The mean over the global batch is the same however the batch is
split, up to rounding.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pats_jax.errors import InputError
from pats_jax.models.layers import Layout
from pats_jax.models.layout import is_stacked
from pats_jax.train_state import Batch, Metrics, TrainState

DATA, FSDP = "data", "fsdp"

Step = Callable[..., tuple[TrainState, Metrics]]  # of state and batch, and numbers if it takes them


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout_seconds: int = 100,
) -> None:
    """Connects to the other processes of this run, if any; call it before anything else uses a device.

    With an address, it connects to that run; without one, to the run that Slurm (`srun` with several tasks) or a TPU
    pod describes, if any. A second call does nothing.

    Args:
      coordinator_address: HOST:PORT of process 0.
      num_processes: the number of processes.
      process_id: the number of this process, at least 0.
      heartbeat_timeout_seconds: a process that is silent for this many seconds is considered dead, and the others end.

    Raises:
      InputError: if the address is given without the two numbers, or there is no answer from it.
    """
    described = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in described.items() if value is None]
    if 0 < len(missing) < 3:
        raise InputError(f"{', '.join(missing)}: missing; set all three together")
    if jax.distributed.is_initialized() or (missing and not _is_slurm_step() and not _has_tpu()):
        return
    try:
        jax.distributed.initialize(
            coordinator_address, num_processes, process_id, heartbeat_timeout_seconds=heartbeat_timeout_seconds
        )
    except (RuntimeError, ValueError) as error:
        if missing and not _is_slurm_step() and isinstance(error, ValueError):
            return  # a TPU machine that knows of no pod: JAX found no address
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot connect the processes of this run: {reason}") from None


def _is_slurm_step() -> bool:
    """Whether this process is one of several tasks that Slurm's `srun` started."""
    return "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1


def _has_tpu() -> bool:
    """Whether this machine has TPU chips that JAX can use; checked without touching them."""
    chips = any(pathlib.Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))
    allowed = "tpu" in os.environ.get("JAX_PLATFORMS", "tpu")
    return chips and allowed and importlib.util.find_spec("libtpu") is not None


def is_first() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has reached this point; ``name`` identifies it."""
    multihost_utils.sync_global_devices(name)


def first_says(value: bool) -> bool:
    """Gives every process the value of process 0; all processes must call it, and wait for each other."""
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def make_runner(
    kind: str = "jit", *, fsdp: int = 1, num_devices: int | None = None, devices: Sequence[jax.Device] | None = None
) -> "MeshRunner":
    """Makes the runner of a run.

    Args:
      kind: "jit" over a mesh, or "pmap".
      fsdp: number of devices that share one copy of parameters and optimizer state; with 1, every device has its own.
      num_devices: use only the first ``num_devices`` devices; None: all of them.
      devices: the devices to choose from; None: all devices of all processes.

    Raises:
      InputError: if fsdp does not divide the number of devices or is used with pmap, or there are too few devices.
    """
    devices = jax.devices() if devices is None else devices
    if num_devices is not None:
        if num_devices > len(devices):
            raise InputError(f"num_devices {num_devices}: only {len(devices)} available")
        if jax.process_count() > 1 and num_devices < len(devices):
            raise InputError(f"num_devices {num_devices}: several processes use all their devices; omit it")
        devices = devices[:num_devices]
    if len(devices) % fsdp:
        raise InputError(f"fsdp {fsdp}: must divide the number of devices, {len(devices)}")
    if kind == "pmap" and fsdp > 1:
        raise InputError("fsdp: pmap keeps all parameters on every device; use parallel jit")
    shape = (len(devices) // fsdp, fsdp)
    mesh = jax.make_mesh(shape, (DATA, FSDP), axis_types=(AxisType.Auto,) * 2, devices=devices)
    return {"jit": MeshRunner, "pmap": PmapRunner}[kind](mesh)


def default_form(platform: str) -> tuple[Layout, int]:
    """The defaults of ``--layers`` and ``--unroll`` on a platform ("cpu", "gpu" or "tpu").

    Measured for BERT-base: on an H100 a step with the loop takes 1.8 times as long as without
    (benchmarks/results/h100). TPUs, whose compiler is the slowest, use the loop.
    """
    forms: dict[str, tuple[Layout, int]] = {"cpu": ("separate", 1), "gpu": ("stacked", 0)}
    return forms.get(platform, ("stacked", 1))


class CompiledProgram:
    """A jitted function that another thread may compile before it is called."""

    def __init__(
        self,
        compiled: Any,
        deal: Callable[..., tuple] = lambda *arguments: arguments,
        in_turn: Callable[[Any], Any] = lambda result: result,
    ):
        """Wraps a function under `jax.jit`; the other arguments are as for `CompiledStep`."""
        self._compiled, self._deal, self._in_turn = compiled, deal, in_turn
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        arguments = self._deal(*arguments)
        with self._lock:  # while it is being compiled, a call would compile it, too
            result = self._compiled(*arguments)
        return self._in_turn(result)

    def compile(self, *arguments: Any) -> None:
        """Compiles the function for such arguments, arrays or shapes; computes nothing."""
        abstract = jax.tree.map(_abstract, self._deal(*arguments))
        with self._lock:
            self._compiled.lower(*abstract).compile()


class CompiledStep:
    """A training step whose programs, one per batch shape, can be compiled ahead."""

    def __init__(self, compiled: Any, deal: Callable[[TrainState, Batch], tuple], in_turn: Callable[[Any], Any]):
        """Wraps a runner's step.

        Args:
          compiled: the step under `jax.jit` or `jax.pmap`.
          deal: makes the step's arguments from the state and this process's own rows of a batch: state, batch and,
            if it takes them, numbers.
          in_turn: returns the step's result when the next program may start.
        """
        self._compiled, self._deal, self._in_turn = compiled, deal, in_turn
        self._announced: dict[tuple, Any] = {}  # by shapes: abstract arguments of programs that nobody has begun
        self._coming: dict[tuple, concurrent.futures.Future] = {}
        self._thread: concurrent.futures.Executor | None = None
        self._then: Sequence[Callable[[], None]] = ()

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        arguments = self._deal(state, batch)
        shapes = _shapes(arguments[1])
        self._announced.pop(shapes, None)
        if shapes in self._coming:
            self._coming.pop(shapes).result()  # JAX has the program now; the call before would compile it, too
        result = self._in_turn(self._compiled(*arguments))
        if self._thread and (self._announced or self._then):
            jax.block_until_ready(result)  # the first step is not to be held up by programs for later ones
            for shapes, arguments in self._announced.items():
                self._coming[shapes] = self._thread.submit(self._compile, arguments)
            self._announced.clear()
            for compile_it in self._then:
                self._thread.submit(compile_it)
            self._then = ()
        return result

    def compile(self, state: TrainState, batch: Batch) -> jax.stages.Compiled:
        """Compiles the program for arguments of such shapes, which later calls use; computes nothing."""
        return self._compile(jax.tree.map(_abstract, self._deal(state, batch)))

    def begin(self, state: TrainState, batch: Batch) -> None:
        """Starts to compile the program of the first step in a thread, which `compiling_ahead` must end.

        Args:
          state: the state's shapes, from `MeshRunner.state_shapes`.
          batch: the first batch.
        """
        arguments = jax.tree.map(_abstract, self._deal(state, batch))
        self._thread = _compiling_thread()
        self._coming[_shapes(arguments[1])] = self._thread.submit(self._compile, arguments)

    @contextlib.contextmanager
    def compiling_ahead(
        self, state: TrainState, batches: Iterable[Batch], then: Sequence[Callable[[], None]] = ()
    ) -> Iterator[None]:
        """After the first step, compiles the other programs in a thread; a step waits for its own program if necessary.

        Nothing is computed with them; they are the programs that the step would compile when called.

        Args:
          state: a state like the one that the step will get.
          batches: one batch of every shape, in the order in which they will be needed.
          then: functions that compile other programs needed later.
        """
        self._then = then
        for batch in batches:
            # abstract, for the step gives the state's buffers away meanwhile
            arguments = jax.tree.map(_abstract, self._deal(state, batch))
            if _shapes(arguments[1]) not in self._coming:
                self._announced[_shapes(arguments[1])] = arguments
        self._thread = self._thread or _compiling_thread()
        try:
            yield
        finally:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
            self._announced.clear()
            self._coming.clear()
            self._then = ()

    def _compile(self, arguments):
        return self._compiled.lower(*arguments).compile()


def _compiling_thread():
    return concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="compile")


def _shapes(batch):
    return tuple(sorted((name, x.shape) for name, x in batch.items()))


def _with_shape_of(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=x.weak_type)


def _abstract(x):
    """An array's shape, dtype and sharding, without its values."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    if not isinstance(x, jax.Array):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding, weak_type=x.aval.weak_type)


@dataclasses.dataclass(frozen=True)
class MeshRunner:
    """Runs steps by ``jax.jit`` over a mesh with the axes "data" and "fsdp".

    The rows of a batch are split across both axes. Parameters, and arrays of the same shape in the optimizer's state,
    are split along their largest dimension that "fsdp" divides; biases and other vectors, and everything else, are
    replicated. The axis of stacked layers is never split. XLA inserts the communication.

    Attributes:
      mesh: all devices of the run, over all processes.
    """

    mesh: Mesh

    @property
    def axis_name(self) -> str | None:
        """The argument ``axis_name`` for `make_train_step`."""
        return None

    @property
    def num_devices(self) -> int:
        """Number of devices that rows are split across."""
        return self.mesh.size

    @property
    def platform(self) -> str:
        """JAX's name for the kind of devices: "cpu", "gpu" or "tpu"."""
        return self.mesh.devices.flat[0].platform

    @property
    def rows(self) -> NamedSharding:
        """The sharding of the rows of a batch."""
        return NamedSharding(self.mesh, PartitionSpec((DATA, FSDP)))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding that replicates an array on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def own_rows(self, batch_size: int) -> np.ndarray:
        """The rows of a global batch that this process reads, int64, in increasing order."""
        slices = self.rows.addressable_devices_indices_map((batch_size,)).values()
        parts = {(part[0].start or 0, batch_size if part[0].stop is None else part[0].stop) for part in slices if part}
        return np.concatenate([np.arange(*part) for part in sorted(parts)])

    def put(self, batch: Batch) -> Batch:
        """Puts a global batch on the devices, from this process's own rows, without communication.

        Arrays that are already on the devices stay as they are.
        """
        return {
            name: x if isinstance(x, jax.Array) else jax.make_array_from_process_local_data(self.rows, x)
            for name, x in batch.items()
        }

    def put_ahead(self, batch: dict[str, np.ndarray]) -> Batch:
        """Moves a batch for the training step as close to the devices as is possible in another thread."""
        return self.put(batch)

    def place(self, tree: Any) -> Any:
        """Places a tree of arrays that every process holds in full, such as parameters, on the mesh."""
        return jax.tree.map(jax.device_put, tree, self.shardings_of(tree))

    def shardings_of(self, tree: Any) -> Any:
        """The sharding of every leaf of parameters, or of a training state that contains such trees."""
        return jax.tree_util.tree_map_with_path(lambda path, x: self.sharding_of(x, stacked=is_stacked(path)), tree)

    def sharding_of(self, leaf: Any, *, stacked: bool = False) -> NamedSharding:
        """The sharding of a leaf by its shape alone, so moments are placed like their parameters.

        Args:
          leaf: an array, or its shape.
          stacked: whether its first axis is that of stacked layers, which is not split.
        """
        parts = self.mesh.shape[FSDP]
        layers = [0] if stacked else []
        divisible = [size if size % parts == 0 else 0 for size in leaf.shape[len(layers) :]]
        if parts == 1 or len(divisible) < 2 or max(divisible) == 0:
            return self.replicated
        axes = [None] * leaf.ndim
        axes[len(layers) + int(np.argmax(divisible))] = FSDP  # type: ignore[call-overload]
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def create_state(self, create: Callable[..., TrainState], params: Any) -> TrainState:
        """Creates the state ``create(params=params)`` on the mesh; it takes over the buffers of params."""
        params, shapes = self.place(params), self.state_shapes(create, params)

        def create_state(params):  # named, for people read it in profiles and caches
            return create(params=params)

        return jax.jit(create_state, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))(params)

    def state_shapes(self, create: Callable[..., TrainState], params: Any) -> TrainState:
        """The result of `create_state`, as shapes with their shardings; computes nothing."""
        shapes = jax.eval_shape(lambda params: create(params=params), params)
        return jax.tree.map(_with_shape_of, shapes, self.shardings_of(shapes))

    def compile_step(self, step: Step, state: TrainState, numbers: Any = None) -> CompiledStep:
        """Compiles the step for states like this one and this process's rows of each batch; it donates the state.

        Args:
          step: ``step(state, batch) -> (state, metrics)``; with numbers, they are its third argument.
          state: a state, or its shapes.
          numbers: a tree of arrays that every process holds in full, the same in every step.
        """
        compiled = self.jit_step(step, state, with_numbers=numbers is not None)
        placed = () if numbers is None else (self.place_numbers(numbers),)
        return CompiledStep(compiled, lambda state, batch: (*self.deal(state, batch), *placed), self.in_turn)

    def place_numbers(self, numbers: Any) -> Any:
        """Puts the numbers of a step on the devices."""
        return jax.device_put(numbers, self.replicated)

    def deal(self, state: TrainState, batch: Batch) -> tuple[TrainState, Batch]:
        """The arguments of the jitted step, from the state and this process's rows of a batch."""
        return state, self.put(batch)

    def jit_step(self, step: Step, state: TrainState, *, with_numbers: bool = False) -> Any:
        """The step as JAX compiles it, for states like this one and batches from `batch_shapes`."""
        # Where parameters are cut for fsdp, XLA is left to choose how to compute: to gather them all first would take
        # the memory that cutting them saves. Only what comes out must lie where it lay.
        shardings = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(step, donate_argnums=0, out_shardings=(shardings, self.replicated))

    def batch_shapes(self, batch: Batch) -> Batch:
        """The shapes and shardings of a global batch for the jitted step; puts nothing on a device."""
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.rows) for name, x in batch.items()}

    def compile_predict(self, predict: Callable[[Any, Batch], Any]) -> CompiledProgram:
        """Compiles a prediction for this process's rows of a batch; every process gets the result for all rows."""
        compiled = jax.jit(predict, out_shardings=self.replicated)
        return CompiledProgram(compiled, lambda params, batch: (params, self.put(batch)), self.in_turn)

    def in_turn(self, result: Any) -> Any:
        """The result; with several CPU devices, waits until it is ready.

        CPU devices share one thread pool, in which the collectives of concurrent programs can starve each other until
        XLA aborts the process.
        """
        several_cpus = self.mesh.size > 1 and self.platform == "cpu"
        return jax.block_until_ready(result) if several_cpus else result

    def view(self, tree: Any) -> Any:
        """The result of a step, as arrays of the whole mesh, or their shapes."""
        return tree

    def to_host(self, tree: Any) -> Any:
        """A tree of complete NumPy arrays, on every process."""
        return jax.tree.map(_whole, tree)


class PmapRunner(MeshRunner):
    """Runs training steps by ``jax.pmap``: every device has all parameters and works on its own rows.

    Only the batch has a leading axis of devices: ``in_axes`` and ``out_axes`` of the state are None.
    """

    @property
    def axis_name(self) -> str | None:
        return DATA

    def create_state(self, create: Callable[..., TrainState], params: Any) -> TrainState:
        return jax.device_put(create(params=self._narrow(params)), self._local)

    def state_shapes(self, create: Callable[..., TrainState], params: Any) -> TrainState:
        shapes = jax.eval_shape(lambda params: create(params=params), params)
        return jax.tree.map(lambda x: _with_shape_of(x, self._local), shapes)

    def put_ahead(self, batch: dict[str, np.ndarray]) -> Batch:
        return batch  # pmap itself deals it out

    def place_numbers(self, numbers: Any) -> Any:
        return jax.device_put(numbers, self._local)

    def deal(self, state: TrainState, batch: Batch) -> tuple[TrainState, Batch]:
        return self._narrow(state), {name: x.reshape(self._dealt(x)) for name, x in batch.items()}

    def jit_step(self, step: Step, state: TrainState, *, with_numbers: bool = False) -> Any:
        return jax.pmap(
            step,
            axis_name=DATA,
            in_axes=(None, 0, None) if with_numbers else (None, 0),
            out_axes=(None, None),
            donate_argnums=0,
            devices=None if jax.process_count() > 1 else self._local_devices,
        )

    def batch_shapes(self, batch: Batch) -> Batch:
        return {name: jax.ShapeDtypeStruct(self._dealt(x), x.dtype) for name, x in batch.items()}

    def _dealt(self, x):
        devices = len(self._local_devices)
        return devices, x.shape[0] // devices, *x.shape[1:]

    def view(self, tree: Any) -> Any:
        return jax.tree.map(functools.partial(_with_sharding, self.replicated), tree)

    def _narrow(self, tree):
        """A tree as arrays of this process's devices, as pmap requires; arrays of the whole mesh share them."""
        if all(not isinstance(x, jax.Array) or x.is_fully_addressable for x in jax.tree.leaves(tree)):
            return tree
        return jax.tree.map(functools.partial(_with_sharding, self._local), tree)

    @functools.cached_property
    def _local(self):
        return NamedSharding(Mesh(np.array(self._local_devices), (DATA,)), PartitionSpec())

    @functools.cached_property
    def _local_devices(self):
        return [device for device in self.mesh.devices.flat if device.process_index == jax.process_index()]


def _with_sharding(sharding, x):
    """This process's copies of a replicated array, as an array with another sharding; no data moves."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return _with_shape_of(x, sharding)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        words = _with_sharding(sharding, jax.random.key_data(x))
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
    parts = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)


def _whole(x):
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
