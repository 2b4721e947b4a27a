r"""IA3: rescales keys, values and the wide half of the feed-forward block, unit by unit.

::

    y = (x W + b) * l        l (outputs,), for layers rescaled at their output: keys and values
    y = (x * l) W + b        l (inputs,), for layers rescaled at their input: the second feed-forward layer

l starts at one, so the model starts unchanged. A trained l can be merged into W (and b). The rule is the paper's, and
so are the default layers, but of BART PEFT's: queries in place of keys. ModernBERT has one layer for queries, keys and
values, which is rescaled whole, as PEFT does in models like it.

References:
  Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning
  (arXiv:2205.05638).
"""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pats_jax.core.files import JsonObject
from pats_jax.core.settings import setting
from pats_jax.errors import InputError
from pats_jax.models.convert import ParameterPath
from pats_jax.models.patterns import compile_pattern
from pats_jax.models.peft.config import (
    FlatTree,
    Interceptor,
    PeftConfig,
    differs_by_layer,
    exactly,
    linear_layers,
    own_variable,
)
from pats_jax.models.peft.saved import FieldRules, ModelConfig, SavedModules, TargetFields

_INPUT, _OUTPUT = "ia3_input", "ia3_output"
_ENDING = ".ia3_l"
_DEFAULT_TARGETS = {  # PEFT's
    "t5": ("k", "v", "wo"),
    "bart": ("q_proj", "v_proj", "fc2"),
    "deberta-v2": ("key_proj", "value_proj", "output.dense"),
}
_DEFAULT_INPUTS = {"t5": ("wo",), "bart": ("fc2",)}
_TARGETS_OF_ENCODERS, _INPUTS_OF_ENCODERS = ("key", "value", "output.dense"), ("output.dense",)


class _Fields(TargetFields, total=False):
    """The fields that are read from an IA3 adapter's config."""

    feedforward_modules: str | list[str] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ia3Config(PeftConfig):
    """The settings of IA3: regexes over names such as ``bert.encoder.layer.0.attention.self.key``.

    Attributes:
      output_layers: regex of the linear layers to rescale at their output; if empty, none.
      input_layers: regex of the linear layers to rescale at their input; if empty, none. A layer that both match is
        rescaled at its input.
    """

    output_layers: str = setting(
        r"\.(self\.key|self\.value|k|v|q_proj|v_proj|k_lin|v_lin|key_proj|value_proj|Wqkv)$",
        "IA3: regex of linear layers whose outputs are rescaled",
        flag="ia3_output_layers",
    )
    input_layers: str = setting(
        r"\.(\d+\.output\.dense|wo|fc2|lin2|mlp\.Wo)$",
        "IA3: regex of linear layers whose inputs are rescaled",
        flag="ia3_input_layers",
    )

    kind: ClassVar[str] = "ia3"
    summary: ClassVar[str] = "trained scales for keys, values and wide feed-forward units"
    source: ClassVar[str] = "https://arxiv.org/abs/2205.05638"
    peft_type: ClassVar[str] = "IA3"
    merges: ClassVar[bool] = True
    # PEFT sets fan_in_fan_out to what a layer has, with a warning
    saved_fields: ClassVar[FieldRules] = FieldRules(_Fields, ("init_ia3_weights", "fan_in_fan_out"))

    @property
    def differs_by_layer(self) -> bool:
        return any(
            differs_by_layer(pattern, flag)
            for pattern, flag in ((self.input_layers, "ia3_input_layers"), (self.output_layers, "ia3_output_layers"))
        )

    def draw(self, base: FlatTree, config: ModelConfig, key: jax.Array) -> FlatTree:
        scaled_inputs = _layers(base, self.input_layers, "ia3_input_layers")
        scaled_outputs = _layers(base, self.output_layers, "ia3_output_layers")
        tree = {(*path, _INPUT): jnp.ones(base[*path, "kernel"].shape[0]) for path in scaled_inputs}
        scaled_outputs = [path for path in scaled_outputs if path not in scaled_inputs]
        return tree | {(*path, _OUTPUT): jnp.ones(base[*path, "kernel"].shape[1]) for path in scaled_outputs}

    def interceptor(self, config: ModelConfig, deterministic: bool) -> Interceptor:
        def rescale(next_fun, args, kwargs, context):
            layer = context.module
            if not isinstance(layer, nn.Dense):
                return next_fun(*args, **kwargs)
            of_inputs, of_outputs = own_variable(layer, _INPUT), own_variable(layer, _OUTPUT)
            if of_inputs is not None:
                (x,) = args
                return next_fun(x * of_inputs.astype(x.dtype))
            y = next_fun(*args, **kwargs)
            return y if of_outputs is None else y * of_outputs.astype(y.dtype)

        return rescale

    def merge(self, base: FlatTree, tree: FlatTree) -> FlatTree:
        return base | _rescaled(base, tree, operator.mul)

    def unmerge(self, base: FlatTree, tree: FlatTree) -> FlatTree:
        zeros = [path for path, scale in tree.items() if not np.all(scale)]
        if zeros:
            raise ValueError(f"{'.'.join(zeros[0])} contains a zero: the original weights cannot be recovered")
        return base | _rescaled(base, tree, operator.truediv)

    def to_dict(self, tree: FlatTree, config: ModelConfig) -> JsonObject:
        return {
            "fan_in_fan_out": False,
            "target_modules": sorted(".".join(path[:-1]) for path in tree),
            "feedforward_modules": sorted(".".join(path[:-1]) for path in tree if path[-1] == _INPUT),
            "init_ia3_weights": True,
        }

    @classmethod
    def from_saved(cls, saved: SavedModules) -> "Ia3Config":
        model_type = saved.model.model_type
        layers = saved.changed_layers(_ENDING, _DEFAULT_TARGETS.get(model_type, _TARGETS_OF_ENCODERS))
        inputs = saved.get("feedforward_modules", list(_DEFAULT_INPUTS.get(model_type, _INPUTS_OF_ENCODERS)))
        is_input = _input_rule(inputs, saved.source)
        inputs = [layer for layer in layers if is_input(layer)]
        for layer in layers:
            shape = saved.shapes[layer + _ENDING]
            if len(shape) != 2 or shape[0 if layer in inputs else 1] != 1:
                raise InputError(
                    f"{saved.source}: by feedforward_modules {layer} is rescaled at its "
                    f"{'inputs' if layer in inputs else 'outputs'}, but its tensor has shape {shape}"
                )
        return cls(input_layers=_regex(inputs), output_layers=_regex(layer for layer in layers if layer not in inputs))

    def to_tensors(self, tree: FlatTree, config: ModelConfig) -> dict[str, np.ndarray]:
        tensors = {}
        for (*layer, leaf), scale in tree.items():
            shape = (1, -1) if leaf == _INPUT else (-1, 1)
            tensors[f"{self.prefix}{'.'.join(layer)}.ia3_l"] = np.asarray(scale, np.float32).reshape(shape)
        return tensors

    def from_tensors(self, tensors: Mapping[str, np.ndarray], config: ModelConfig) -> FlatTree:
        tree: FlatTree = {}
        for name, tensor in tensors.items():
            path = tuple(name.removeprefix(self.prefix).split("."))
            if path[-1] == "ia3_l":
                path = (*path[:-1], _INPUT if tensor.shape[0] == 1 else _OUTPUT)
            tree[path] = tensor.reshape(-1)
        return tree


def _input_rule(modules: str | list[str], source: str) -> Callable[[str], bool]:
    """PEFT's rule for feedforward_modules: a regex for the whole name of a layer, or a list of endings of names."""
    if isinstance(modules, str):
        return compile_pattern(modules, f"{source}: feedforward_modules", whole=True)
    return lambda layer: layer.endswith(tuple(modules))


def _layers(base: FlatTree, pattern: str, what: str) -> list[ParameterPath]:
    """As `linear_layers`; an empty pattern selects no layer."""
    return linear_layers(base, pattern, what) if pattern else []


def _regex(layers: Iterable[str]) -> str:
    layers = list(layers)
    return exactly(layers) if layers else ""


def _rescaled(base, tree, operation):
    """The kernels and biases that a small tree changes, after ``operation`` with its scales."""
    changed = {}
    for (*layer, leaf), scale in tree.items():
        kernel, bias = (*layer, "kernel"), (*layer, "bias")
        if leaf == _INPUT:
            changed[kernel] = operation(base[kernel], scale[:, None])
        else:
            changed[kernel] = operation(base[kernel], scale)
            if bias in base:
                changed[bias] = operation(base[bias], scale)
    return changed
