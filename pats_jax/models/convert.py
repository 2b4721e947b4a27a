"""Converts Hugging Face tensor names and layouts to parameter paths and back; finds missing and surplus tensors.

The mapping is mechanical: ``a.b.dense.weight`` is ``("a", "b", "dense", "kernel")`` transposed (Flax keeps inputs
first, torch outputs first), an embedding's ``weight`` is ``embedding``, LayerNorm's ``weight`` is ``scale``.
Everything here works on names and NumPy arrays; files are read in ``weights.py``.
"""

import re
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from pats_jax.errors import InputError, shown
from pats_jax.models.config import HEAD_PARTS, EncoderConfig
from pats_jax.models.seq2seq_config import Seq2SeqConfig

ParameterPath = tuple[str, ...]
Parameters = dict[str, Any]  # nested dicts of arrays, whose paths mirror the tensors' names

_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
_OLD_LEAVES = {"gamma": "weight", "beta": "bias"}
FLOATS = ("float32", "float16", "bfloat16", "float64")
_INDEX_BUFFERS = r"(.*\.)?embeddings\.(position_ids|token_type_ids)"  # which old checkpoints hold


class Matched(NamedTuple):
    """Which checkpoint tensor fills which parameter.

    Attributes:
      sources: parameter path -> the tensor's name as the checkpoint has it.
      new: paths to initialise anew: the parts of the head and BERT's pooler that the checkpoint lacks.
      surplus: names of tensors that fill no parameter and are not known to be unused.
    """

    sources: dict[ParameterPath, str]
    new: list[ParameterPath]
    surplus: list[str]


def tensor_name(path: ParameterPath) -> str:
    """The Hugging Face name of a parameter, with the ``bert.`` or ``roberta.`` prefix."""
    return ".".join((*path[:-1], _LEAVES[path[-1]]))


def to_parameter(path: ParameterPath, shape: tuple[int, ...], tensor: np.ndarray, *, source: str) -> np.ndarray:
    """A tensor in the layout and dtype of its parameter: kernels transposed, float32.

    Raises:
      InputError: if the tensor does not hold floats, is not finite, or does not have the parameter's shape.
    """
    name = tensor_name(path)
    if tensor.dtype.name not in FLOATS:
        raise InputError(f"{source}: tensor {name} has type {tensor.dtype}, not {', '.join(FLOATS)}")
    value = np.asarray(tensor, np.float32)
    value = value.T if path[-1] == "kernel" else value
    if value.shape != shape:
        expected = shape[::-1] if path[-1] == "kernel" else shape
        raise other_shape(name, tensor.shape, expected, source)
    if not np.isfinite(value).all():
        raise InputError(f"{source}: tensor {name} has non-finite values; the file is damaged, download it again")
    return value


def to_tensor(path: ParameterPath, parameter: np.ndarray) -> np.ndarray:
    """The inverse of `to_parameter`, contiguous, as safetensors requires."""
    value = np.asarray(parameter, np.float32)
    return np.ascontiguousarray(value.T if path[-1] == "kernel" else value)


def canonical_name(name: str, config: EncoderConfig) -> str:
    """The current form of a checkpoint's tensor name: with prefix; ``weight`` and ``bias`` for gamma and beta."""
    head, _, leaf = name.rpartition(".")
    if leaf in _OLD_LEAVES:
        name = f"{head}.{_OLD_LEAVES[leaf]}"
    is_bare = name.startswith(tuple(f"{part}." for part in config.base_parts))
    return f"{config.base_prefix}.{name}" if is_bare else name


def by_canonical_name(names: Iterable[str], config: EncoderConfig, *, source: str) -> dict[str, str]:
    """Maps each `canonical_name` to the checkpoint's own name.

    Raises:
      InputError: if two tensors have the same canonical name.
    """
    own: dict[str, str] = {}
    for name in sorted(names):
        other = own.setdefault(canonical_name(name, config), name)
        if other != name:
            raise InputError(
                f"{source}: tensors {other} and {name} fill the same parameter; keep one of them in the checkpoint"
            )
    return own


def check_sizes(shapes: Mapping[str, tuple[int, ...]], config: EncoderConfig, *, source: str) -> None:
    """Compares the sizes in a config with a checkpoint's tensors, before a model of these sizes is created.

    Args:
      shapes: the shape of every tensor, by its name in the checkpoint.
      config: the checkpoint's config.
      source: what to call the checkpoint in error messages.

    Raises:
      InputError: if the checkpoint has fewer layers than the config says, or another vocabulary or width.
    """
    own = by_canonical_name(shapes, config, source=source)
    encoder = ".".join((config.base_prefix, *config.stack_path, ""))
    layers = {name.removeprefix(encoder).split(".")[0] for name in own if name.startswith(encoder)}
    if len(layers) < config.num_hidden_layers:  # more is allowed: the rest is not used, and named in the log
        raise InputError(
            f"{source}: the checkpoint has {len(layers)} encoder layers, but config.json "
            f"({config.file_name('num_hidden_layers')}) says {shown(config.num_hidden_layers)}"
        )
    for part, expected in config.tensor_sizes.items():
        name = f"{config.base_prefix}.{part}.weight"
        if name not in own:
            raise incomplete(name, config, source)
        if shapes[own[name]] != expected:
            raise other_shape(name, shapes[own[name]], expected, source)
    for name in own:
        if name.startswith("classifier.") and 0 in shapes[own[name]]:
            raise InputError(
                f"{source}: tensor {shown(name, quoted=False)} has no labels; a head has at least one label"
            )


def match(
    names: Iterable[str], paths: Iterable[ParameterPath], config: EncoderConfig, *, new_head: bool, source: str
) -> Matched:
    """Assigns a checkpoint's tensors to the model's parameters.

    Args:
      names: the tensor names in the checkpoint.
      paths: every parameter path of the model.
      config: the checkpoint's config.
      new_head: whether to ignore the checkpoint's own classifier, the head's last part, and start a new one.
      source: what to call the checkpoint in error messages.

    Raises:
      InputError: if a tensor is missing that is not initialised anew, or two tensors fill one parameter.
    """
    unused = by_canonical_name(names, config, source=source)
    by_path = {path: tensor_name(path) for path in paths}
    sources = {path: unused.pop(name) for path, name in by_path.items() if name in unused}

    parts = {name: [path for path in by_path if path[0] == name] for name in HEAD_PARTS}
    parts = {"own pooler": [path for path in by_path if path[1] == "pooler"]} | parts
    new = []
    for name, part in parts.items():
        is_replaced = new_head and name == "classifier"
        if is_replaced or not any(path in sources for path in part):
            new += part
    for path in new:
        sources.pop(path, None)
    filled = {*sources, *new, *config.unsaved}
    missing = [name for path, name in by_path.items() if path not in filled]
    if missing:
        raise incomplete(listing(missing), config, source)
    surplus = [name for canonical, name in unused.items() if not _is_known_surplus(canonical, config)]
    return Matched(sources, new, surplus)


def shapes_of(module: nn.Module, *inputs: Any, **named_inputs: Any) -> Mapping[ParameterPath, tuple[int, ...]]:
    """The shape of every parameter of a module by its path; computes nothing."""
    tree = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **named_inputs))["params"]
    return types.MappingProxyType({path: leaf.shape for path, leaf in flatten_dict(tree).items()})


def check_shapes(parameters: Mapping[ParameterPath, Any], shapes: Mapping[ParameterPath, tuple[int, ...]]) -> None:
    """Raises ValueError unless the parameters, by path, are those of a config, given their shapes."""
    own = {path: np.shape(value) for path, value in parameters.items()}
    if own != shapes:
        wrong = min(path for path in own.keys() | shapes.keys() if own.get(path) != shapes.get(path))
        raise ValueError(f"params do not match config at {'/'.join(wrong)}")


def other_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...], source: str) -> InputError:
    """The error for a tensor of another shape than the config implies."""
    return InputError(f"{source}: tensor {name} has shape {shown(shape)}, but config.json implies {shown(expected)}")


def incomplete(missing: str, config: EncoderConfig | Seq2SeqConfig, source: str) -> InputError:
    """The error for a checkpoint without a tensor, or a list of them, that its model has."""
    return InputError(f"{source}: the checkpoint lacks {missing}; it is incomplete or not a {config.model_type} model")


def _is_known_surplus(name: str, config: EncoderConfig) -> bool:
    return re.fullmatch(f"{_INDEX_BUFFERS}|{config.surplus}", name) is not None


def listing(names: list[str]) -> str:
    """At most five names, and how many more there are."""
    first = ", ".join(names[:5])
    return first if len(names) <= 5 else f"{first} and {len(names) - 5} more tensors"
