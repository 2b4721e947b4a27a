"""The interface of all PEFT methods: `PeftConfig`, which each of them implements.

A method adds a small tree of parameters, ``params["peft"]``, which changes the forward pass of a model; the model's own
parameters stay unchanged. The paths of the small tree mirror the model's, with the method's own leaves below the layer
that they change: ``params["peft"]["bert"]...["query"]["lora_A"]["kernel"]``.
"""

import abc
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pats_jax.core.files import JsonObject
from pats_jax.core.settings import check_fields, setting
from pats_jax.errors import InputError, shown
from pats_jax.models import convert
from pats_jax.models.config import HEAD_PARTS
from pats_jax.models.convert import ParameterPath, Parameters
from pats_jax.models.patterns import compile_pattern
from pats_jax.models.peft.saved import ALL_LINEAR, LM_HEAD, FieldRules, ModelConfig, SavedModules
from pats_jax.train_state import LossFn

Interceptor = Callable[[Callable, tuple, dict, nn.module.InterceptorContext], Any]
FlatTree = dict[ParameterPath, Any]  # path -> array

COLLECTION = "peft"  # of Flax variables, inside the forward pass
_LINEAR_LAYERS = {  # of a layer, by what precedes its number
    **dict.fromkeys(
        ("bert.encoder.layer", "roberta.encoder.layer", "electra.encoder.layer"),
        (
            *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
            *("intermediate.dense", "output.dense"),
        ),
    ),
    "distilbert.transformer.layer": (
        *(f"attention.{name}_lin" for name in ("q", "k", "v", "out")),
        *("ffn.lin1", "ffn.lin2"),
    ),
    "mpnet.encoder.layer": (*(f"attention.attn.{name}" for name in "qkvo"), "intermediate.dense", "output.dense"),
    "deberta.encoder.layer": (
        *(f"attention.self.{name}_proj" for name in ("query", "key", "value", "pos_key", "pos_query")),
        *("attention.output.dense", "intermediate.dense", "output.dense"),
    ),
    **dict.fromkeys(
        ("encoder.block", "decoder.block"),
        (
            *(f"layer.0.SelfAttention.{name}" for name in "qkvo"),
            *(f"layer.1.EncDecAttention.{name}" for name in "qkvo"),
            *(f"layer.{number}.DenseReluDense.{name}" for number in (1, 2) for name in ("wi", "wi_0", "wi_1", "wo")),
        ),
    ),
    **dict.fromkeys(
        ("model.encoder.layers", "model.decoder.layers"),
        (
            *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
            *(f"encoder_attn.{name}_proj" for name in ("q", "k", "v", "out")),
            *("fc1", "fc2"),
        ),
    ),
    "model.layers": ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"),
}
_MOST_LAYERS = 100  # whose names are tried; the largest encoders have 48
_PARAMETER_LEAVES = {"weight": "kernel", "bias": "bias"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig(abc.ABC):
    """A PEFT method and its settings, checked on construction.

    Attributes:
      train_pooler: whether to train and save BERT's pooler too; the head is always trained and saved.
      kind: the name of the method.
      summary: what the method does, in one line.
      source: the address of the paper.
      peft_type: the method's name in ``adapter_config.json``.
      merges: whether an adapter can be merged into the weights.
      kept_leaf: the name of the leaves of `kept_while_merged`.
      prefix: the prefix of every tensor's name in ``adapter_model.safetensors``.
      saved_fields: how the method treats the fields of ``adapter_config.json``.
      of_training: fields that say how the adapter is trained, not what it computes.
    """

    train_pooler: bool = setting(False, "with --peft: also train and save BERT's pooler", flag="peft_pooler")

    kind: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    peft_type: ClassVar[str]
    merges: ClassVar[bool] = False
    kept_leaf: ClassVar[str] = ""
    prefix: ClassVar[str] = "base_model.model."
    saved_fields: ClassVar[FieldRules] = FieldRules()
    of_training: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self):
        check_fields(self, prefix="")

    @property
    def differs_by_layer(self) -> bool:
        """Whether it may change layers differently from each other, which needs separate layers."""
        return False

    @property
    def reads_weights(self) -> bool:
        """Whether `draw` reads the values of the layers' weights, not only their shapes."""
        return False

    @property
    def virtual_tokens(self) -> int:
        """The number of positions that the adapter takes from the text."""
        return 0

    def file_type(self, config: ModelConfig) -> str:
        """The ``peft_type`` in the file of an adapter of a model with this config."""
        return self.peft_type

    @classmethod
    def file_types(cls) -> tuple[str, ...]:
        """Every ``peft_type`` that a file of this method may have."""
        return (cls.peft_type,)

    def trains_whole(self, path: ParameterPath) -> bool:
        """Whether a parameter of the model itself is trained and saved with the adapter: head and pooler."""
        return path[0] in HEAD_PARTS or (self.train_pooler and path[1] == "pooler")

    def in_training(self, total_steps: int) -> Self:
        """The config of an adapter that is trained for ``total_steps`` steps.

        Raises:
          InputError: if these are too few for the settings.
        """
        return self

    def last(self, total_steps: int) -> optax.GradientTransformation | None:
        """A transform that runs after the optimizer of a training of ``total_steps`` steps; None: there is none."""
        return None

    def add_to_loss(self, loss_fn: LossFn) -> LossFn:
        """The loss of a training, with what the method adds to it."""
        return loss_fn

    @abc.abstractmethod
    def draw(self, base: FlatTree, config: ModelConfig, key: jax.Array) -> FlatTree:
        """Draws the small tree, flat.

        Args:
          base: the model's parameters or their shapes, flat, without those that are trained whole.
          config: the model's config.
          key: a typed key.

        Returns:
          Path -> array, float32.

        Raises:
          InputError: if the settings do not fit the model, for instance if they name layers that it lacks.
        """

    @abc.abstractmethod
    def interceptor(self, config: ModelConfig, deterministic: bool) -> Interceptor:
        """The function that changes the forward pass; see `flax.linen.intercept_methods`.

        It reads each module's part of the small tree by `own_variable`.
        """

    def variables(self, tree: Parameters, config: ModelConfig, stacked: bool) -> Parameters:
        """The small tree as a Flax collection, whose paths are those of the modules that it changes."""
        return tree

    def merge(self, base: FlatTree, tree: FlatTree) -> FlatTree:
        """The model's own parameters with the small tree merged into them, both flat; only if ``merges``."""
        raise NotImplementedError

    def unmerge(self, base: FlatTree, tree: FlatTree) -> FlatTree:
        """The inverse of `merge`, up to rounding; only if ``merges``."""
        raise NotImplementedError

    def kept_while_merged(self, base: FlatTree, tree: FlatTree) -> FlatTree:
        """What `unmerge` needs besides the small tree; it is among that tree's leaves while the adapter is merged."""
        return {}

    @abc.abstractmethod
    def to_dict(self, tree: FlatTree, config: ModelConfig) -> JsonObject:
        """The method's own fields of ``adapter_config.json``."""

    @classmethod
    @abc.abstractmethod
    def from_saved(cls, saved: SavedModules) -> "PeftConfig":
        """Reads the settings in ``adapter_config.json`` and checks them against the saved tensors.

        Raises:
          InputError: if a field has a value that this library does not support, or that does not match the tensors.
        """

    def to_tensors(self, tree: FlatTree, config: ModelConfig) -> dict[str, np.ndarray]:
        """The small tree as named tensors, in the layout of ``adapter_model.safetensors``."""
        return {self.prefix + convert.tensor_name(path): convert.to_tensor(path, x) for path, x in tree.items()}

    def from_tensors(self, tensors: Mapping[str, np.ndarray], config: ModelConfig) -> FlatTree:
        """The inverse of `to_tensors`; names that the method does not use become paths that no model has."""
        tree = {}
        for name, tensor in tensors.items():
            *parents, leaf = name.removeprefix(self.prefix).split(".")
            path = (*parents, _PARAMETER_LEAVES.get(leaf, leaf))
            tree[path] = convert.to_tensor(path, tensor)  # the transpose is its own inverse
        return tree


def own_variable(module: nn.Module, name: str) -> Any:
    """What the small tree holds for a module under a name: an array, a dict of leaves, or None."""
    return module.get_variable(COLLECTION, name)


def with_dropout(layer: nn.Module, x: jax.Array, rate: float) -> jax.Array:
    """What a branch beside a layer reads: x, each entry dropped with probability ``rate``, the others scaled up."""
    kept = jax.random.bernoulli(layer.make_rng("dropout"), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def linear_layers(base: FlatTree, pattern: str, what: str) -> list[ParameterPath]:
    """The paths of the linear layers whose dotted names match a regex.

    Args:
      base: the model's parameters, flat.
      pattern: the regex; it may match any part of the name. See `layer_rule`.
      what: what to call the regex in error messages.

    Raises:
      InputError: if the regex is not valid, takes too long to match, or matches no layer.
    """
    matches = layer_rule(pattern, what)
    layers = [path[:-1] for path, leaf in base.items() if path[-1] == "kernel" and is_linear(leaf)]
    found = [path for path in layers if matches(".".join(path))]
    if not found:
        raise InputError(f"{what} {shown(pattern)}: matches no linear layer; one is named {'.'.join(layers[0])}")
    return found


def is_linear(kernel: Any) -> bool:
    """Whether a kernel is that of a linear layer, not of a convolution, by its shape (inputs, outputs)."""
    return len(kernel.shape) == 2


def differs_by_layer(pattern: str, what: str) -> bool:
    """Whether a regex for `linear_layers` can match different linear layers in different layers of a model.

    Args:
      pattern: the regex.
      what: what to call the regex in error messages.

    Raises:
      InputError: if the regex is not valid, or takes too long to match.
    """
    return varies_by_layer(layer_rule(pattern, what))


def varies_by_layer(value: Callable[[str], Any]) -> bool:
    """Whether a function of a linear layer's name can differ between the same linear layers of a model's layers."""
    numbers = range(_MOST_LAYERS)
    return any(
        len({value(f"{prefix}.{number}.{layer}") for number in numbers}) > 1
        for prefix, layers in _LINEAR_LAYERS.items()
        for layer in layers
    )


def layer_rule(pattern: str, what: str) -> Callable[[str], bool]:
    """A function that returns whether a regex matches a part of a linear layer's name.

    ``all-linear`` in place of a regex means what it does in PEFT's ``target_modules``: all but the output layer.

    Raises:
      InputError: if the regex is not valid; from the function, if matching takes too long.
    """
    if pattern.lower() == ALL_LINEAR:
        return lambda name: name != LM_HEAD
    return compile_pattern(pattern, what)


def exactly(names: Iterable[str]) -> str:
    """A regex that matches exactly these names."""
    return f"^({'|'.join(map(re.escape, sorted(names)))})$"


def nodes_with(tree: FlatTree, leaf: str) -> dict[ParameterPath, dict[ParameterPath, Any]]:
    """Layer path -> its leaves by their path below ``leaf``, for the layers that have a node of that name."""
    nodes: dict[ParameterPath, dict[ParameterPath, Any]] = {}
    for path, value in tree.items():
        if leaf in path:
            cut = path.index(leaf)
            nodes.setdefault(path[:cut], {})[path[cut + 1 :]] = value
    return nodes
