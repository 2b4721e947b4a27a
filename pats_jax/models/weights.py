"""Reads the safetensors of a checkpoint, one file or shards with an index; refuses pickled weights."""

import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from pats_jax.core.files import checked_name, read_record
from pats_jax.errors import InputError, shown

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class _Index(TypedDict):
    weight_map: dict[str, str]  # tensor -> the shard that holds it


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of a checkpoint; reads only headers.

    Args:
      folder: a folder with ``model.safetensors``, or with shards and ``model.safetensors.index.json``.

    Returns:
      Tensor name -> its file.

    Raises:
      InputError: if the folder has no safetensors, or a shard is missing or damaged.
    """
    single = folder / WEIGHTS_FILE
    if single.exists():
        return dict.fromkeys(names(single), single)
    index = folder / INDEX_FILE
    if not index.exists():
        raise no_safetensors(str(folder), [path.name for path in folder.iterdir()])
    weight_map = read_record(index, _Index)["weight_map"]
    if not weight_map:
        raise InputError(f"{index}: weight_map is empty; download it again")
    files = {name: folder / checked_name(shard, str(index)) for name, shard in weight_map.items()}
    for shard in sorted(set(files.values())):
        if not shard.exists():
            raise InputError(f"{shard}: {INDEX_FILE} lists this shard, but it is missing; download it again")
        absent = {name for name, path in files.items() if path == shard} - names(shard)
        if absent:
            first = shown(min(absent), quoted=False)
            raise InputError(f"{shard}: lacks tensor {first}, which {INDEX_FILE} lists there; download it again")
    return files


def shapes(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, given its file; reads only headers.

    Raises:
      InputError: if a file is damaged.
    """
    found = {}
    for path in sorted(set(files.values())):
        with _open(path) as opened:
            own = sorted(name for name, home in files.items() if home == path)
            found.update({name: tuple(opened.get_slice(name).get_shape()) for name in own})
    return found


def read_tensors(files: Mapping[str, Path]) -> dict[str, np.ndarray]:
    """Reads tensors, each from its file, in their stored dtype (bfloat16 included).

    Raises:
      InputError: if a file is damaged, or has a tensor of a type or shape that NumPy lacks.
    """
    tensors = {}
    for path in sorted(set(files.values())):
        with _open(path) as opened:
            tensors.update({name: _read(opened, name, path) for name, home in files.items() if home == path})
    return tensors


def _read(opened: Any, name: str, path: Path) -> np.ndarray:
    try:
        return opened.get_tensor(name)
    except (AttributeError, TypeError, ValueError):  # as for float8, and for 0 x 2^62 x 2^62
        stored = opened.get_slice(name)
        raise InputError(
            f"{path}: tensor {shown(name, quoted=False)} of type {stored.get_dtype()} and shape "
            f"{shown(tuple(stored.get_shape()))} cannot be read"
        ) from None


def no_safetensors(where: str, file_names: Iterable[str]) -> InputError:
    """The error for a folder or repository without safetensors, given the names of its files."""
    pickled = sorted(name for name in file_names if name.endswith(_PICKLED) and name != "training_args.bin")
    if not pickled:
        return InputError(
            f"{where}: has no safetensors weights; a checkpoint has {WEIGHTS_FILE} or {INDEX_FILE} with shards"
        )
    return InputError(
        f"{where}: has only pickled weights ({', '.join(pickled[:3])}), which can run code when loaded; "
        "convert them to safetensors (in Transformers: save_pretrained) and use that folder"
    )


def names(path: Path) -> set[str]:
    """The names of the tensors in a file; reads only its header.

    Raises:
      InputError: if the file is damaged.
    """
    with _open(path) as opened:
        return set(opened.keys())


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe is to wait for ever
            raise InputError(f"{path}: not a regular file")
        with safe_open(path, framework="np") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        reason = shown(" ".join(str(error).split()), 200, quoted=False)
        raise InputError(f"{path}: truncated or not a safetensors file ({reason}); download it again") from None
