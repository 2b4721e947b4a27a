"""The interface of all methods of parameter-efficient fine-tuning: `PeftConfig`, which each of them implements.

A method adds a small tree of parameters under ``params["peft"]``, which changes the forward pass of a
`SequenceClassifier`; the model's own parameters stay unchanged. The paths of the small tree mirror the model's, with
the method's own leaves below the layer that they change: ``params["peft"]["bert"]...["query"]["lora_A"]["kernel"]``.
"""

import abc
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np

from pats_jax.core.files import JsonObject
from pats_jax.core.settings import check_fields, setting
from pats_jax.errors import InputError, shown
from pats_jax.models import convert
from pats_jax.models.config import EncoderConfig
from pats_jax.models.convert import ParameterPath, Parameters
from pats_jax.models.patterns import compile_pattern
from pats_jax.models.peft.saved import FieldRules, SavedModules

Interceptor = Callable[[Callable, tuple, dict, nn.module.InterceptorContext], Any]
FlatTree = dict[ParameterPath, Any]  # path -> array

COLLECTION = "peft"  # of Flax variables, inside the forward pass
_LINEAR_LAYERS = (
    *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    *("intermediate.dense", "output.dense"),
)
_MOST_LAYERS = 100  # whose names are tried; the largest encoders have 48
_PARAMETER_LEAVES = {"weight": "kernel", "bias": "bias"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig(abc.ABC):
    """A PEFT method and its settings, checked on construction.

    Attributes:
        train_pooler: Whether to train and save BERT's pooler as well; the head always is.

    Class attributes:
        kind: The name of the method.
        summary: What it does, in one line.
        source: The paper.
        peft_type: Its name in ``adapter_config.json``.
        merges: Whether it can be merged into the weights.
        prefix: The prefix of every tensor's name in ``adapter_model.safetensors``.
        saved_fields: How it treats the fields of ``adapter_config.json``.
    """

    train_pooler: bool = setting(False, "with --peft: also train and save BERT's pooler", flag="peft_pooler")

    kind: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    peft_type: ClassVar[str]
    merges: ClassVar[bool] = False
    prefix: ClassVar[str] = "base_model.model."
    saved_fields: ClassVar[FieldRules] = FieldRules()

    def __post_init__(self):
        check_fields(self, prefix="")

    @property
    def differs_by_layer(self) -> bool:
        """Whether it may change some encoder layers in other ways than others, which needs separate layers."""
        return False

    @property
    def virtual_tokens(self) -> int:
        """The number of positions that it takes from the text."""
        return 0

    def trains_whole(self, path: ParameterPath) -> bool:
        """Whether a parameter of the model itself is trained and saved with the adapter: head and pooler."""
        return path[0] == "classifier" or (self.train_pooler and path[1] == "pooler")

    @abc.abstractmethod
    def draw(self, base: FlatTree, config: EncoderConfig, key: jax.Array) -> FlatTree:
        """New parameters, flat, for the model's flat parameters ``base`` without those that are trained whole.

        Raises:
            InputError: The settings do not fit the model, for instance layers that it lacks.
        """

    @abc.abstractmethod
    def interceptor(self, config: EncoderConfig, deterministic: bool) -> Interceptor:
        """What changes the forward pass (see `flax.linen.intercept_methods`); each module's share is `own_variable`."""

    def variables(self, tree: Parameters, config: EncoderConfig, stacked: bool) -> Parameters:
        """The small tree as a collection of variables, whose paths are those of the modules that it changes."""
        return tree

    def merge(self, base: FlatTree, tree: FlatTree) -> FlatTree:
        """The model's own parameters with the small tree merged into them, both flat; only if ``merges``."""
        raise NotImplementedError

    def unmerge(self, base: FlatTree, tree: FlatTree) -> FlatTree:
        """The inverse of `merge`, up to rounding; only if ``merges``."""
        raise NotImplementedError

    @abc.abstractmethod
    def to_dict(self, tree: FlatTree, config: EncoderConfig) -> JsonObject:
        """Its own fields of ``adapter_config.json``."""

    @classmethod
    @abc.abstractmethod
    def from_saved(cls, saved: SavedModules) -> "PeftConfig":
        """The settings in ``adapter_config.json``, checked against the tensors saved with it.

        Raises:
            InputError: A field has a value that this library does not support, or that does not match the tensors.
        """

    def to_tensors(self, tree: FlatTree) -> dict[str, np.ndarray]:
        """The small tree with the names and layouts of ``adapter_model.safetensors``."""
        return {self.prefix + convert.tensor_name(path): convert.to_tensor(path, x) for path, x in tree.items()}

    def from_tensors(self, tensors: Mapping[str, np.ndarray]) -> FlatTree:
        """The inverse of `to_tensors`; names that are not of this kind come out as paths that no model has."""
        tree = {}
        for name, tensor in tensors.items():
            *parents, leaf = name.removeprefix(self.prefix).split(".")
            path = (*parents, _PARAMETER_LEAVES.get(leaf, leaf))
            tree[path] = convert.to_tensor(path, tensor)  # the transpose is its own inverse
        return tree


def own_variable(module: nn.Module, name: str) -> Any:
    """What the small tree holds for a module under a name (an array, or a dict of its leaves), or None."""
    return module.get_variable(COLLECTION, name)


def linear_layers(base: FlatTree, pattern: str, what: str) -> list[ParameterPath]:
    """The paths of the linear layers whose names, joined by dots, match a regex.

    Args:
        base: The model's parameters, flat.
        pattern: The regex, searched for.
        what: Its name in error messages.

    Raises:
        InputError: It is not a valid regex, takes too long, or matches no layer.
    """
    matches = compile_pattern(pattern, what)
    layers = [path[:-1] for path in base if path[-1] == "kernel"]
    found = [path for path in layers if matches(".".join(path))]
    if not found:
        raise InputError(f"{what} {shown(pattern)}: matches no linear layer; one is named {'.'.join(layers[0])}")
    return found


def differs_by_layer(pattern: str, what: str) -> bool:
    """Whether a regex for `linear_layers` can match other linear layers in one encoder layer than in another.

    Args:
        pattern: The regex.
        what: Its name in error messages.

    Raises:
        InputError: It is not a valid regex, or takes too long.
    """
    matches = compile_pattern(pattern, what)
    numbers = range(_MOST_LAYERS)
    return any(
        len({matches(f"{prefix}.encoder.layer.{number}.{layer}") for number in numbers}) > 1
        for prefix in ("bert", "roberta")
        for layer in _LINEAR_LAYERS
    )


def exactly(names: Iterable[str]) -> str:
    """A regex that matches these names and nothing else."""
    return f"^({'|'.join(map(re.escape, sorted(names)))})$"


def nodes_with(tree: FlatTree, leaf: str) -> dict[ParameterPath, dict[ParameterPath, Any]]:
    """Layer path -> its own leaves by their path below ``leaf``, for the layers that have something of that name."""
    nodes: dict[ParameterPath, dict[ParameterPath, Any]] = {}
    for path, value in tree.items():
        if leaf in path:
            cut = path.index(leaf)
            nodes.setdefault(path[:cut], {})[path[cut + 1 :]] = value
    return nodes
