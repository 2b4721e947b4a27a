"""Checkpoints by Orbax: saved while training goes on, committed whole or not at all, checked when they are read.

A checkpoint is a folder `checkpoints/STEP` with two items: ``state``, every array of the `TrainState` under its
path, and ``progress``, a JSON object: the `trainer.Progress`, a checksum of every array, and the kinds of the keys,
which an array file cannot hold.
"""

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pats_jax import random
from pats_jax.errors import InputError
from pats_jax.train_state import TrainState, parameter_name

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save.

    With many processes every one of them calls every method; the folder is one that all of them see. Orbax, which
    takes its time to import, is imported by the first save.
    """

    def __init__(self, folder: pathlib.Path, keep: int | None):
        """The checkpoints of a folder, which is made by the first save; what a killed save left in it is removed.

        Args:
          folder: where the checkpoints are.
          keep: how many of the newest are kept, and beside them the best one that each of these names; None: all.

        Raises:
          InputError: if the path has one of the characters ``*?[``: Orbax takes them for a pattern, and what it saves
            under such a path cannot be read.
        """
        if any(character in str(folder.absolute()) for character in "*?["):
            raise InputError(f"--output_dir {folder.parent}: no checkpoints can be kept under a path with *, ? or [")
        self._folder, self._keep = folder, keep

    @functools.cached_property
    def _manager(self):
        import orbax.checkpoint as ocp

        policy = _NewestAndTheirBest(self._keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True)
        return ocp.CheckpointManager(self._folder.absolute(), options=options)

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
        """The steps that there are checkpoints of, in increasing order."""
        return sorted(self._manager.all_steps()) if self._folder.exists() else []

    def save(self, step: int, state: TrainState, progress: dict[str, Any], best_step: int | None = None) -> None:
        """Copies the state off the devices and writes it while the caller goes on; nothing if it is there already.

        Args:
          step: the number of the checkpoint.
          state: what to save, as arrays of the whole mesh.
          progress: anything that JSON can hold.
          best_step: the checkpoint with the best score so far, which must not go as long as this one is kept.

        Raises:
          InputError: if this save, or the one before it, could not be written.
        """
        import orbax.checkpoint as ocp

        arrays, kinds = _unwrap_keys(_flatten(state))
        arrays = {name: x for name, x in arrays.items() if x.size}  # an empty array has nothing to save
        sums = {name: int(value) for name, value in jax.device_get(_checksums(arrays)).items()}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            progress=ocp.args.JsonSave({"progress": progress, "key_kinds": kinds, "checksums": sums}),
        )
        self.check()
        if step in self._manager.all_steps():
            return
        with _in_one_line(self._folder):
            self._manager.save(step, args=items, metrics={"best_step": best_step})

    def check(self) -> None:
        """Raises InputError if a save in the background has failed since."""
        if self._is_open:
            with _in_one_line(self._folder):
                self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when every save is committed; raises InputError if one could not be."""
        if self._is_open:
            with _in_one_line(self._folder):
                self._manager.wait_until_finished()

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest whole checkpoint; a damaged one is named in a warning, removed, and the one before it taken.

        Args:
          state: a state of the same tree; its shardings are where the arrays go.

        Returns:
          The state and the progress that were saved, or None where there is no whole checkpoint.

        Raises:
          InputError: if the newest checkpoint is sound, but that of another model or optimizer.
        """
        for step in reversed(self.steps):
            try:
                return self._restore_step(step, state)
            except InputError:
                raise
            except Exception as error:  # whatever Orbax and TensorStore make of a damaged file
                logger.warning("checkpoint %s is damaged and is removed: %s", self._folder / str(step), _reason(error))
                self._manager.delete(step)
        return None

    def restore_params(self, step: int, state: TrainState) -> Any:
        """The parameters of one checkpoint.

        Raises:
          InputError: if it is damaged.
        """
        try:
            return self._restore_step(step, state)[0].all_params
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"checkpoint {self._folder / str(step)} is damaged: {error}") from None

    def _restore_step(self, step, state):
        import orbax.checkpoint as ocp

        progress_args = ocp.args.Composite(progress=ocp.args.JsonRestore())
        saved = self._manager.restore(step, args=progress_args).progress
        wanted, kinds = _unwrap_keys(_flatten(state))
        present = {name: x for name, x in wanted.items() if x.size}
        self._check_structure(step, present, kinds, saved)
        target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in present.items()}
        items = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        arrays = self._manager.restore(step, args=items).state
        for name, value in jax.device_get(_checksums(arrays)).items():
            if int(value) != saved["checksums"][name]:
                raise ValueError(f"{name} is not what was saved")
        leaves = {**wanted, **arrays}
        leaves |= {name: random.key_from_data(leaves[name], kind) for name, kind in kinds.items()}
        return jax.tree.unflatten(jax.tree.structure(state), leaves.values()), saved["progress"]

    def _check_structure(self, step, present, kinds, saved):
        """The names are compared before arrays are read: a difference is no damage."""
        names = saved["checksums"].keys() ^ present.keys()
        if names or saved["key_kinds"] != kinds:
            example = min(names) if names else "a key"
            raise InputError(
                f"checkpoint {self._folder / str(step)} is of another model or optimizer: {example} differs"
            )


@dataclasses.dataclass(frozen=True)
class _NewestAndTheirBest:
    """Orbax's preservation policy: the newest `keep` checkpoints and every best one that these name."""

    keep: int | None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        newest = checkpoints[-self.keep :] if self.keep else checkpoints
        kept = {info.step for info in newest} | {(info.metrics or {}).get("best_step") for info in newest}
        return [info.step in kept for info in checkpoints]


@contextlib.contextmanager
def _in_one_line(folder: pathlib.Path) -> Iterator[None]:
    """Turns whatever a failed save raises into an InputError that says what is left."""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore have many kinds for it
        committed = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
        left = f"the last good one is {folder / str(max(committed))}" if committed else "there is none before it"
        raise InputError(f"a checkpoint could not be written: {_reason(error)}; {left}") from error


def _reason(error: Exception) -> str:
    """The system's own words out of a long message, if they are in it."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((words for words in _SYSTEM_WORDS if words in str(error)), lines[0])


_SYSTEM_WORDS = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)]


def _flatten(state: TrainState) -> dict[str, Any]:
    """Leaves by their path: ``params.bert.pooler.dense.kernel``, in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    named = {parameter_name(path): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same path")
    return named


def _unwrap_keys(leaves: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The leaves with the words of each typed key in its place, and the kinds of the keys by name."""
    kinds = {}
    for name, leaf in leaves.items():
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaves[name], kinds[name] = random.key_to_data(leaf)
    return leaves, kinds


@jax.jit
def _checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A number for each array, () uint32, that any change of one element changes, whatever the sharding.

    Sum over the elements of bits * (2 i + 1) modulo 2**32, i the row-major index: odd factors are one-to-one.
    """
    return {name: _checksum(x) for name, x in arrays.items()}


def _checksum(x):
    width = np.dtype(x.dtype).itemsize * 8
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, f"uint{width}").astype(jnp.uint32)
    return jnp.sum(bits * (2 * random.row_major_index(x.shape) + 1), dtype=jnp.uint32)
