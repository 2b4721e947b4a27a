"""Safetensors files of a checkpoint: one file or shards with an index; pickled weights are refused."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pats_jax.errors import InputError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def tensor_files(folder: Path) -> dict[str, Path]:
    """Where each tensor of a checkpoint lies.

    Args:
        folder: A folder with ``model.safetensors``, or with shards and ``model.safetensors.index.json``.

    Returns:
        Tensor name -> its file. Headers are read, tensors are not.

    Raises:
        InputError: No safetensors, a missing shard, or a file that is damaged.
    """
    single = folder / WEIGHTS_FILE
    if single.is_file():
        return dict.fromkeys(names(single), single)
    index = folder / INDEX_FILE
    if not index.is_file():
        raise no_safetensors(str(folder), [path.name for path in folder.iterdir()])
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: folder / Path(shard).name for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index}: not an index of safetensors shards; download it again") from None
    for shard in sorted(set(files.values())):
        if not shard.is_file():
            raise InputError(f"{shard}: this shard is named by {INDEX_FILE} and is missing; download it again")
        absent = {name for name, path in files.items() if path == shard} - names(shard)
        if absent:
            raise InputError(f"{shard}: lacks tensor {min(absent)}, which {INDEX_FILE} places there; download it again")
    return files


def read_tensors(files: Mapping[str, Path]) -> dict[str, np.ndarray]:
    """Reads tensors, each from its file, in the dtype that they are stored in (bfloat16 included)."""
    tensors = {}
    for path in sorted(set(files.values())):
        with _open(path) as opened:
            tensors.update({name: opened.get_tensor(name) for name, home in files.items() if home == path})
    return tensors


def no_safetensors(where: str, file_names: Iterable[str]) -> InputError:
    """The error for a folder or repository without safetensors, given the names of the files that it has."""
    pickled = sorted(name for name in file_names if name.endswith(_PICKLED) and name != "training_args.bin")
    if not pickled:
        return InputError(
            f"{where}: holds no safetensors weights; a checkpoint has {WEIGHTS_FILE} or {INDEX_FILE} with shards"
        )
    return InputError(
        f"{where}: has only pickled weights ({', '.join(pickled[:3])}), which can run code when loaded; "
        "convert them to safetensors (in Transformers: save_pretrained) and give that folder"
    )


def names(path: Path) -> set[str]:
    """The names of the tensors in a file; only its header is read."""
    with _open(path) as opened:
        return set(opened.keys())


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: truncated or not a safetensors file ({reason}); download it again") from None
