"""Orbax checkpoints: saved while training continues, committed atomically, and verified before use.

A checkpoint is a folder ``checkpoints/STEP``. Its item ``state`` is written by Orbax's standard handler: every array of
the `TrainState` under its path, keys by their words. Beside the arrays lies ``state/record.json``, written last, before
Orbax commits the folder by its name; it covers everything that a resumed run depends on:

- ``format``: the number of this layout, `FORMAT`; ``version``: the pats_jax that wrote it. One that reads another
  format refuses the checkpoint and says which version reads it.
- ``step``, and ``best_step``: the checkpoint with the best score so far, which this one needs.
- ``progress``: the `loop.Progress`.
- ``layers``: "separate" or "stacked", the layout of the model's layers; without it separate. A state of the other
  layout can be restored as well.
- ``checksums``: a number for each array, computed on the devices before anything is written. ``key_kinds``: the kinds
  of the keys, which an array file cannot hold.
- ``files``: the SHA-256 of every other file of the item.
- ``digest``: the SHA-256 of all of the above, as JSON with sorted keys. This and ``format`` stay in every format.

A checkpoint counts as damaged if the record is not JSON or does not match its digest, a file is missing or does not
match the record, or an array does not match its checksum. It is renamed, and the previous one is used. Other errors in
reading, such as a missing permission or too many open files, say nothing about the checkpoint: it stays.
Orbax reads files only once they are verified; what it makes of damaged ones ranges from tracebacks to other numbers.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import pats_jax
from pats_jax import random
from pats_jax.core import files
from pats_jax.core.files import JsonObject
from pats_jax.errors import InputError, shown
from pats_jax.train_state import TrainState, parameter_name
from pats_jax.training.checkpoint_layers import Arrays, OtherLayout, layers_of

logger = logging.getLogger(__name__)

FORMAT = 1

_ITEM, _RECORD = "state", "record.json"

Progress = TypeVar("Progress")
State = TypeVar("State")
Result = TypeVar("Result")


class _Damaged(Exception):
    """A checkpoint does not match what was saved; the message says how."""


@dataclasses.dataclass(frozen=True)
class _Record:
    """The content of record.json; see the module's docstring."""

    step: int
    best_step: int | None
    progress: Any
    checksums: dict[str, int]
    key_kinds: dict[str, str]
    files: dict[str, str]
    layers: Literal["separate", "stacked"] = "separate"


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save.

    With several processes, each of them calls every method, and all must see the same folder. Orbax, which is slow to
    import, is imported by the first save.
    """

    def __init__(self, folder: pathlib.Path, keep: int | None):
        """Opens the checkpoints of a folder, which the first save creates; removes what a killed save left.

        Args:
          folder: where the checkpoints are.
          keep: the number of newest checkpoints to keep, with the best ones that they name; None: all.

        Raises:
          InputError: if the path contains one of the characters ``*?[``, which Orbax takes for a pattern: it could not
            read what it saves there.
        """
        if any(character in str(folder.absolute()) for character in "*?["):
            raise InputError(f"output_dir {folder.parent}: cannot save checkpoints under a path with *, ? or [")
        self._folder, self._keep = folder, keep
        self._best_steps: dict[int, int | None] = {}  # which best one a checkpoint names, as far as asked for

    @functools.cached_property
    def _manager(self):
        import orbax.checkpoint as ocp

        policy = _NewestAndTheirBest(self._keep, self._best_step)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True)
        return ocp.CheckpointManager(self._folder.absolute(), options=options, item_handlers={_ITEM: _orbax_item()[0]})

    @property
    def _is_open(self):
        return "_manager" in vars(self)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if not self._is_open:
            return
        try:
            with _in_one_line(self._folder):
                self._manager.close()  # waits for the last save
        except InputError as failure:
            if error is None:
                raise
            logger.warning("%s", failure)  # what is on its way already says more

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints, in increasing order, once the last save is done.

        Raises:
          InputError: if that save failed, or the folder cannot be read.
        """
        self.wait()
        try:
            return _committed(self._folder)
        except OSError as error:
            raise InputError(f"{self._folder}: cannot be read ({error.strerror})") from None

    def save(self, step: int, state: Any, progress: Any, best_step: int | None = None) -> None:
        """Copies the state off the devices and writes it in the background; does nothing if it is already saved.

        Args:
          step: the number of the checkpoint.
          state: what to save, a `TrainState` or another tree, as arrays of the whole mesh.
          progress: anything that JSON can hold.
          best_step: the checkpoint with the best score so far, which must not go as long as this one is kept.

        Raises:
          InputError: if this save, or the one before it, could not be written.
        """
        import orbax.checkpoint as ocp

        arrays, kinds = _take_apart(state)
        arrays = {name: x for name, x in arrays.items() if x.size}  # an empty array has nothing to save
        sums = {name: int(value) for name, value in jax.device_get(_checksums(arrays)).items()}
        record = _Record(step, best_step, progress, sums, kinds, files={}, layers=layers_of(state))
        if step in self.steps:
            return
        with _in_one_line(self._folder):
            self._best_steps[step] = best_step
            item = _orbax_item()[1](arrays, record=json.dumps(dataclasses.asdict(record)))  # now: progress changes
            self._manager.save(step, args=ocp.args.Composite(**{_ITEM: item}))

    def check(self) -> None:
        """Raises InputError if a background save has failed."""
        if self._is_open:
            with _in_one_line(self._folder):
                self._manager.check_for_errors()

    def wait(self) -> None:
        """Waits until every save is committed; raises InputError if one failed."""
        if self._is_open:
            with _in_one_line(self._folder):
                self._manager.wait_until_finished()

    def restore(self, state: State, kind: type[Progress] = dict) -> tuple[State, Progress] | None:  # type: ignore[assignment]
        """Restores the newest checkpoint that is undamaged, as is the best checkpoint that it names.

        A damaged one is renamed STEP.damaged, with a warning. One whose best checkpoint is damaged or missing is
        renamed STEP.without_best: training from the checkpoint before it makes the same best one again. None is
        removed.

        Args:
          state: a state of the same tree, with separate or stacked layers; the arrays get its shardings.
          kind: the type of the progress, for `files.parse_record`.

        Returns:
          The saved state and progress, or None if there is no undamaged checkpoint.

        Raises:
          InputError: if a checkpoint cannot be read, or is undamaged but of another format, model or optimizer.
        """
        there_were = steps = self.steps
        while steps:
            step = steps[-1]
            try:
                record = self._verified(step)
                if self._has_its_best(step, record):
                    progress = files.parse_record(json.dumps(record.progress), kind, str(self._record_path(step)))
                    return self._arrays(step, state, record), progress
            except _Damaged as damage:
                self._set_aside(step, "damaged", f"is damaged: {damage}")
            steps = self.steps
        if there_were:
            logger.warning("%s has no valid checkpoint; training starts from the beginning", self._folder)
        return None

    def restore_params(self, step: int, state: TrainState) -> Any:
        """Restores the parameters of one checkpoint.

        Raises:
          InputError: if it is damaged, or cannot be read.
        """
        self.wait()
        try:
            return self._arrays(step, state, self._verified(step)).all_params
        except _Damaged as damage:
            raise InputError(f"checkpoint {self._path(step)} is damaged: {damage}; resume rebuilds it") from None

    def _has_its_best(self, step, record):
        """Whether the best checkpoint that a valid one names is valid; if not, both are set aside."""
        best = record.best_step
        if best in (None, step):
            return True
        try:
            self._verified(best)
            return True
        except _Damaged as damage:
            if os.path.lexists(self._path(best)):
                self._set_aside(best, "damaged", f"is damaged: {damage}")
        self._set_aside(step, "without_best", f"needs the best checkpoint so far, {self._path(best)}, which is damaged")
        return False

    def _set_aside(self, step, ending, reason):
        """Renames a checkpoint, with a warning, so that neither this library nor Orbax reads it."""
        path = self._path(step)
        names = itertools.chain([f"{step}.{ending}"], (f"{step}.{ending}.{number}" for number in itertools.count(2)))
        new = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))

        def rename():
            if jax.process_index() == 0:
                try:
                    path.rename(new)
                except OSError as error:
                    raise InputError(
                        f"checkpoint {path} {reason}; it cannot be renamed ({error.strerror}); move it elsewhere"
                    ) from None

        _agreed(rename)
        logger.warning("checkpoint %s %s; renamed to %s", path, reason, new.name)
        if self._is_open:
            self._manager.reload()

    def _verified(self, step) -> _Record:
        """The record of a checkpoint, after verifying it and all files."""

        def verify():
            record = self._read_record(step)
            if jax.process_index() == 0:  # one reads the files for all
                self._check_files(step, record)
            return record

        return _agreed(verify)

    def _path(self, step):
        return self._folder / str(step)

    def _record_path(self, step):
        return self._path(step) / _ITEM / _RECORD

    def _best_step(self, step):
        """The best checkpoint that a checkpoint names; None if the latter is too damaged."""
        if step not in self._best_steps:
            try:
                self._best_steps[step] = self._read_record(step).best_step
            except _Damaged:
                return None
        return self._best_steps[step]

    def _read_record(self, step) -> _Record:
        path = self._record_path(step)
        try:
            text = files.read_bytes(path)
        except files.NoSuchFile:
            if os.path.exists(self._path(step) / "progress" / "metadata"):  # as it was before formats had numbers
                raise InputError(_of_another_format(self._path(step), "has no format number", "0.1.0")) from None
            raise _Damaged(f"{_ITEM}/{_RECORD} is missing") from None
        try:
            value = files.parse_json(text, f"{_ITEM}/{_RECORD}")
            sound = isinstance(value, dict) and value.pop("digest", None) == _digest(value)
        except (InputError, RecursionError) as error:
            raise _Damaged(str(error)) from None
        if not sound:
            raise _Damaged(f"{_ITEM}/{_RECORD} does not match what was saved")
        if value.get("format") != FORMAT:
            what = f"has format {shown(value.get('format'))}"
            raise InputError(_of_another_format(self._path(step), what, value.get("version")))
        record = files.parse_record(text, _Record, str(path))
        if record.step != step:
            raise _Damaged(f"it belongs to step {record.step}")
        return record

    def _check_files(self, step, record):
        for name, digest in record.files.items():
            try:
                found = _digest_of_file(self._path(step) / _ITEM / name)
            except files.NoSuchFile:
                raise _Damaged(f"{_ITEM}/{name} is missing") from None
            if found != digest:
                raise _Damaged(f"{_ITEM}/{name} does not match what was saved")

    def _arrays(self, step, state: State, record) -> State:
        """The state in a verified checkpoint."""
        wanted, kinds = _take_apart(state)
        present = {name: x for name, x in wanted.items() if x.size}
        other = None if record.layers == layers_of(state) else OtherLayout(state, present, random.is_stored_key)
        self._check_structure(step, present, other, kinds, record)
        _check_room_for_files()
        if other is None:
            target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in present.items()}
        else:
            shapes = self._read(step, lambda reader, item: _shapes(reader.metadata(item)))
            if name := other.differing_shape(shapes):
                raise InputError(_of_another_model(self._path(step), name))
            target = other.targets(shapes)
        arrays = self._read(step, lambda reader, item: reader.restore(item, target))
        for name, value in jax.device_get(_checksums(arrays)).items():
            if int(value) != record.checksums[name]:
                raise _Damaged(f"{name} does not match what was saved")
        return _put_together(state, {**wanted, **(other.convert(arrays) if other else arrays)})

    def _read(self, step, read):
        """Calls ``read(checkpointer, path)`` on a checkpoint's arrays."""
        import orbax.checkpoint as ocp

        try:
            with ocp.StandardCheckpointer() as checkpointer:
                return read(checkpointer, (self._path(step) / _ITEM).absolute())
        except Exception as error:  # Orbax and TensorStore have many kinds for it; the files are what was saved
            raise InputError(f"checkpoint {self._path(step)} cannot be read: {_reason(error)}") from error

    def _check_structure(self, step, present, other, kinds, record):
        """Compares names before arrays are read: a difference means another model, not damage."""
        saved = record.checksums.keys()
        name = min(saved ^ present.keys(), default=None) if other is None else other.differing_name(saved)
        if name or record.key_kinds != kinds:
            raise InputError(_of_another_model(self._path(step), name or "a key"))


@dataclasses.dataclass(frozen=True)
class _NewestAndTheirBest:
    """Orbax's preservation policy: the newest `keep` checkpoints and every best one that these name."""

    keep: int | None
    best_step: Callable[[int], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = sorted(info.step for info in checkpoints)
        newest = steps[-self.keep :] if self.keep else steps
        try:
            kept = {*newest, *(map(self.best_step, newest) if self.keep else ())}
        except InputError:  # a record cannot be read now: nobody knows what it needs
            kept = set(steps)
        return [info.step in kept for info in checkpoints]


@functools.cache
def _orbax_item():
    """Orbax's handler for trees of arrays, which writes the record last, and its arguments."""
    import orbax.checkpoint as ocp

    class Handler(ocp.StandardCheckpointHandler):
        async def async_save(self, directory, item=None, save_args=None, args=None):
            self._record = args.record
            return await super().async_save(directory, item, save_args, args)

        def finalize(self, directory):
            super().finalize(directory)
            folder = pathlib.Path(directory)
            value = json.loads(self._record) | {"format": FORMAT, "version": pats_jax.__version__}
            value["files"] = {str(path.relative_to(folder)): _digest_of_file(path) for path in _files(folder)}
            files.write_json(folder / _RECORD, {"digest": _digest(value), **value})

    @ocp.args.register_with_handler(Handler, for_save=True)
    @dataclasses.dataclass
    class Save(ocp.args.StandardSave):
        record: str = ""  # JSON of a `_Record` without files

    @ocp.args.register_with_handler(Handler, for_restore=True)
    class Restore(ocp.args.StandardRestore):
        """Required by Orbax, but unused: `StandardCheckpointer` restores."""

    return Handler(), Save


def _shapes(metadata: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays in Orbax's description of an item, by name."""
    return {name: tuple(x.shape) for name, x in metadata.item_metadata.tree.items()}


def _check_room_for_files(number: int = 64):
    """Raises InputError if Orbax would run out of open files, which it reports only as tracebacks in its threads."""
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(number):
                stack.enter_context(open(os.devnull))
    except OSError as error:
        raise InputError(f"the checkpoint cannot be read ({error.strerror}); raise the limit with ulimit -n") from None


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest_of_file(path):
    with files.opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: JsonObject) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _of_another_format(path, what, version):
    return (
        f"checkpoint {path} {what}, but pats_jax {pats_jax.__version__} reads format {FORMAT}; "
        f"resume with pats_jax {shown(version, quoted=False)}"
    )


def _of_another_model(path, name):
    return f"checkpoint {path} belongs to another model or optimizer: {name} differs"


def _agreed(call: Callable[[], Result]) -> Result:
    """The result of a call in every process; if it fails in one, it fails in all with the same error."""
    result, failure = None, None
    try:
        result = call()
    except (_Damaged, InputError) as error:
        failure = error
    if jax.process_count() > 1:
        kind = 0 if failure is None else 1 if isinstance(failure, _Damaged) else 2
        worst = int(np.max(multihost_utils.process_allgather(np.int32(kind))))
        if worst > kind:
            failure = (_Damaged, InputError)[worst - 1]("another process finds so")
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def _committed(folder: pathlib.Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, in increasing order."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


@contextlib.contextmanager
def _in_one_line(folder: pathlib.Path) -> Iterator[None]:
    """Turns any failure of a save into an InputError that names the last good checkpoint."""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore have many kinds for it
        try:
            committed = _committed(folder)
        except OSError:
            committed = []
        left = f"the last good one is {folder / str(committed[-1])}" if committed else "there is no earlier one"
        raise InputError(f"a checkpoint could not be written: {_reason(error)}; {left}") from error


def _reason(error: Exception) -> str:
    """The system's own message within a long one, if there is one."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((words for words in _SYSTEM_WORDS if words in str(error)), shown(lines[0], 300, quoted=False))


_SYSTEM_WORDS = [
    os.strerror(getattr(errno, name))
    for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EMFILE ENFILE ENOMEM EIO ESTALE".split()
]


def _take_apart(state: Any) -> tuple[Arrays, dict[str, str]]:
    """The arrays by path (``params.bert.pooler.dense.kernel``), in the order of the tree, and the kinds of keys.

    The project's own states hold keys as `random.StoredKey`. Typed keys in Optax's states are replaced by their words.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=random.is_stored_key)
    arrays, kinds = {}, {}
    for path, leaf in leaves:
        name = parameter_name(path)
        if name in arrays:
            raise ValueError("two leaves of the state have the same path")
        if random.is_stored_key(leaf):
            arrays[name], kinds[name] = leaf.words, str(leaf.kind)
        elif jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            arrays[name], kinds[name] = random.key_to_data(leaf)
        else:
            arrays[name] = leaf
    return arrays, kinds


def _put_together(state: State, arrays: Arrays) -> State:
    """Puts the arrays of `_take_apart` into a state of the same structure."""
    leaves, tree = jax.tree.flatten(state, is_leaf=random.is_stored_key)

    def same_kind(leaf, array):
        if random.is_stored_key(leaf):
            return dataclasses.replace(leaf, words=array)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return random.key_from_data(array, random.key_to_data(leaf)[1])
        return array

    return jax.tree.unflatten(tree, map(same_kind, leaves, arrays.values()))


@jax.jit
def _checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A checksum of each array, () uint32, which changes with any element and does not depend on the sharding.

    It is the sum over elements of mix(bits ^ mix(i)) modulo 2**32, with i the row-major index. The mixing is
    one-to-one, so a change of one element is always detected; it is not linear, so changes of several elements (two
    signs, two swapped elements) cancel only with probability 2**-32.
    """
    return {name: _checksum(x) for name, x in arrays.items()}


def _checksum(x):
    width = np.dtype(x.dtype).itemsize * 8
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, f"uint{width}")
    mixed = random.mix(random.row_major_index(x.shape) + np.uint32(1))  # 0 would be mixed to 0
    for shift in range(0, width, 32):  # a 64-bit element has two words
        mixed = random.mix((bits >> shift).astype(jnp.uint32) ^ mixed)
    return jnp.sum(mixed, dtype=jnp.uint32)
