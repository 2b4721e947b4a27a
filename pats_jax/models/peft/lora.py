r"""LoRA: a low-rank branch parallel to linear layers.

::

    y = x W + b + (alpha / rank) * dropout(x) A B        A (inputs, rank), B (rank, outputs)

A starts uniform on [-1/sqrt(inputs), 1/sqrt(inputs)], as in the authors' code, and B at zero, so the model starts
unchanged. A trained branch can be merged into the weights: W + (alpha / rank) A B. Rank-stabilized LoRA (rsLoRA) scales
by alpha / sqrt(rank) instead, so that a larger rank does not learn more slowly.

DoRA trains the length of each column of the weights (one per output) apart from its direction, as PEFT does::

    y = x W' + b        W' = m * (W + s A B) / ||W + s A B||        s = alpha / rank, norms per output, m (outputs,)

m starts at the norms of W. The norm in the denominator counts as a constant in the gradient (the paper's section 4.3).
With dropout, ``x W'`` is ``x W + dropout(x) (W' - W)``.

References:
  Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685).
  Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA (arXiv:2312.03732).
  Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation (arXiv:2402.09353).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pats_jax.core.files import JsonObject
from pats_jax.core.settings import POSITIVE, PROBABILITY, at_least, setting
from pats_jax.errors import InputError, shown
from pats_jax.models.convert import ParameterPath, Parameters
from pats_jax.models.layout import is_stacked, separate_names
from pats_jax.models.peft.config import (
    FlatTree,
    Interceptor,
    PeftConfig,
    exactly,
    layer_rule,
    linear_layers,
    nodes_with,
    own_variable,
    varies_by_layer,
    with_dropout,
)
from pats_jax.models.peft.layer_numbers import LayerNumbers, as_settings
from pats_jax.models.peft.saved import CONFIG_FILE, WEIGHTS_FILE, FieldRules, ModelConfig, SavedModules, TargetFields

# Variants of LoRA that PEFT's files can hold -> what the plain form has.
_PLAIN = {
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
}
_DEFAULT_TARGETS = {  # PEFT's
    "t5": ("q", "v"),
    "bart": ("q_proj", "v_proj"),
    "deberta-v2": ("query_proj", "value_proj"),
}
_TARGETS_OF_ENCODERS = ("query", "value")
_MAGNITUDE = "lora_magnitude_vector"  # of DoRA: m, as PEFT calls it
_NORM = "lora_weight_norm"  # of W + s A B, held while DoRA is merged
_SCALE = "lora_scale"  # of a layer, in the Flax collection only
_LARGEST_RANK = 65_536
# Values of init_lora_weights that leave the base model's weights alone, and beginnings of those that take what A and B
# start with out of them (and loftq, which quantises them), so that the adapter fits weights that no file holds.
_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


class _Fields(TargetFields, total=False):
    """The fields that are read from a LoRA adapter's config."""

    r: int | None
    lora_alpha: float | None
    lora_dropout: float | None
    use_rslora: bool | None
    use_dora: bool | None
    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, float] | None
    init_lora_weights: bool | str | None
    layers_to_transform: int | list[int] | None
    layers_pattern: str | list[str] | None


# PEFT reads each *_config only for the way of init_lora_weights of that name, and qalora_group_size only with
# use_qalora, megatron_core only with megatron_config. runtime_config says where to compute; ensure_weight_tying is of
# embeddings, which cannot have modules here; merge_weights, of old versions, says when to merge; and fan_in_fan_out is
# set to what a layer has, with a warning.
_WITHOUT_EFFECT = (
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core"),
    *("runtime_config", "ensure_weight_tying", "merge_weights", "fan_in_fan_out"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(PeftConfig):
    """The settings of LoRA.

    Attributes:
      rank: number of columns of A and rows of B.
      alpha: numerator of the branch's scale, alpha / rank.
      dropout: dropout probability on the input of the branch, in [0, 1).
      layers: regex of the linear layers to adapt, over names such as
        ``bert.encoder.layer.0.attention.self.query``. By default queries and values, in whatever model; in ModernBERT
        they are one layer with the keys. ``all-linear`` means all of them but those of the head, as in PEFT.
      rank_stabilized: whether the scale is alpha / sqrt(rank) (rsLoRA).
      dora: whether the lengths of the weights' columns are trained apart from their directions (DoRA).
      rank_pattern: ranks of some layers, as ``REGEX=RANK``. As in PEFT, a regex matches the end of a layer's name, from
        the start or a dot on, and the first that matches counts.
      alpha_pattern: alphas of some layers, as ``REGEX=ALPHA``.
    """

    rank: int = setting(8, "LoRA: rank of the update", at_least(1, _LARGEST_RANK), flag="lora_rank")
    alpha: float = setting(16.0, "LoRA: the update is scaled by alpha / rank", POSITIVE, flag="lora_alpha")
    dropout: float = setting(
        0.0, "LoRA: dropout probability on the input of the low-rank branch", PROBABILITY, flag="lora_dropout"
    )
    layers: str = setting(
        r"\.(query|value|q|v|q_proj|v_proj|q_lin|v_lin|query_proj|value_proj|Wqkv)$",
        "LoRA: regex of the linear layers to adapt, or all-linear: all but the head's",
        flag="lora_layers",
    )
    rank_stabilized: bool = setting(
        False, "LoRA: scale the update by alpha / sqrt(rank) instead (rsLoRA)", flag="lora_rank_stabilized"
    )
    dora: bool = setting(False, "LoRA: train the norms of the weights, too (DoRA)", flag="lora_dora")
    rank_pattern: tuple[str, ...] = setting(
        (), "LoRA: other ranks of some layers, REGEX=RANK, such as query=16", flag="lora_rank_pattern"
    )
    alpha_pattern: tuple[str, ...] = setting(
        (), "LoRA: other alphas of some layers, REGEX=ALPHA, such as query=32", flag="lora_alpha_pattern"
    )

    kind: ClassVar[str] = "lora"
    summary: ClassVar[str] = "a low-rank branch parallel to linear layers"
    source: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    peft_type: ClassVar[str] = "LORA"
    merges: ClassVar[bool] = True
    kept_leaf: ClassVar[str] = _NORM
    saved_fields: ClassVar[FieldRules] = FieldRules(_Fields, _WITHOUT_EFFECT, _PLAIN)

    def __post_init__(self):
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)  # the model hashes it
        super().__post_init__()
        self.scales()  # raises InputError if a pattern is not valid

    @property
    def scale(self) -> float:
        """The factor of the branch, where no pattern says otherwise."""
        return self._scale(self.rank, self.alpha)

    @property
    def differs_by_layer(self) -> bool:
        matches, ranks = layer_rule(self.layers, "lora_layers"), self._ranks()
        return varies_by_layer(lambda name: ranks(name) if matches(name) else None)

    @property
    def reads_weights(self) -> bool:
        return self.dora

    def scales(self) -> Callable[[str], float]:
        """A function that returns the factor of a layer's branch, by the layer's name."""
        ranks, alphas = self._ranks(), self._alphas()
        return lambda name: self._scale(int(ranks(name)), alphas(name))

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (rank**0.5 if self.rank_stabilized else rank)

    def _ranks(self) -> LayerNumbers:
        return LayerNumbers(self.rank_pattern, self.rank, "lora_rank_pattern", int, _LARGEST_RANK)

    def _alphas(self) -> LayerNumbers:
        return LayerNumbers(self.alpha_pattern, self.alpha, "lora_alpha_pattern", float)

    def draw(self, base: FlatTree, config: ModelConfig, key: jax.Array) -> FlatTree:
        tree = {}
        layers = linear_layers(base, self.layers, "lora_layers")
        ranks = self._ranks()
        for numbers in (ranks, self._alphas()):
            numbers.check_used(".".join(path) for path in layers)
        for path in layers:
            key, own = jax.random.split(key)
            inputs, outputs = base[*path, "kernel"].shape
            rank, bound = int(ranks(".".join(path))), inputs**-0.5
            tree[*path, "lora_A", "kernel"] = jax.random.uniform(own, (inputs, rank), minval=-bound, maxval=bound)
            tree[*path, "lora_B", "kernel"] = jnp.zeros((rank, outputs))
            if self.dora:
                tree[*path, _MAGNITUDE] = _norms(jnp.asarray(base[*path, "kernel"]))
        return tree

    def variables(self, tree: Parameters, config: ModelConfig, stacked: bool) -> Parameters:
        if not (self.rank_pattern or self.alpha_pattern):
            return tree
        scale_of, flat = self.scales(), flatten_dict(tree)
        for path, leaf in list(flat.items()):
            if path[-2:] == ("lora_B", "kernel"):
                keys = tuple(map(jax.tree_util.DictKey, path[:-2]))
                scales = np.array([scale_of(name) for name in separate_names(keys, leaf)], np.float32)
                flat[*path[:-2], _SCALE] = scales if is_stacked(keys) else scales[0]
        return unflatten_dict(flat)

    def interceptor(self, config: ModelConfig, deterministic: bool) -> Interceptor:
        def add_branch(next_fun, args, kwargs, context):
            y = next_fun(*args, **kwargs)
            layer = context.module
            down = own_variable(layer, "lora_A") if isinstance(layer, nn.Dense) else None
            if down is None:
                return y
            (x,) = args
            drops = bool(self.dropout) and not deterministic
            if drops:
                x = with_dropout(layer, x, self.dropout)
            x, own = x.astype(y.dtype), own_variable(layer, _SCALE)
            scale: Any = self.scale if own is None else own
            a, b = (node["kernel"] for node in (down, own_variable(layer, "lora_B")))
            branch = (x @ a.astype(y.dtype)) @ b.astype(y.dtype) * jnp.asarray(scale, y.dtype)
            if not self.dora:
                return y + branch
            kernel, bias = (layer.get_variable("params", name) for name in ("kernel", "bias"))
            norms = jax.lax.stop_gradient(_norms(kernel + scale * (a @ b)))
            factor = (own_variable(layer, _MAGNITUDE) / norms).astype(y.dtype)
            plain = x @ kernel.astype(y.dtype) if drops else y if bias is None else y - bias.astype(y.dtype)
            return y + (factor - 1) * plain + factor * branch

        return add_branch

    def merge(self, base: FlatTree, tree: FlatTree) -> FlatTree:
        changed = {}
        for path, added in self._products(tree).items():
            whole = base[*path, "kernel"] + added
            changed[*path, "kernel"] = whole * (tree[*path, _MAGNITUDE] / _norms(whole)) if self.dora else whole
        return base | changed

    def unmerge(self, base: FlatTree, tree: FlatTree) -> FlatTree:
        changed = {}
        for path, added in self._products(tree).items():
            kernel = base[*path, "kernel"]
            if self.dora:
                magnitudes = tree[*path, _MAGNITUDE]
                if not np.all(magnitudes):
                    name = ".".join((*path, _MAGNITUDE))
                    raise ValueError(f"{name} contains a zero: the original weights cannot be recovered")
                kernel = kernel * (tree[*path, _NORM] / magnitudes)
            changed[*path, "kernel"] = kernel - added
        return base | changed

    def kept_while_merged(self, base: FlatTree, tree: FlatTree) -> FlatTree:
        """The norms that DoRA divides by, which cannot be found from the merged weights."""
        products = self._products(tree) if self.dora else {}
        return {(*path, _NORM): _norms(base[*path, "kernel"] + added) for path, added in products.items()}

    def _products(self, tree: FlatTree) -> dict[ParameterPath, Any]:
        """Layer path -> its scale times A B."""
        up, scale_of = nodes_with(tree, "lora_B"), self.scales()
        return {
            path: scale_of(".".join(path)) * jnp.matmul(node["kernel",], up[path]["kernel",], precision="highest")
            for path, node in nodes_with(tree, "lora_A").items()
        }

    def to_dict(self, tree: FlatTree, config: ModelConfig) -> JsonObject:
        return _PLAIN | {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rank_stabilized,
            "use_dora": self.dora,
            "rank_pattern": self._ranks().by_pattern,
            "alpha_pattern": self._alphas().by_pattern,
            "target_modules": sorted(".".join(path) for path in nodes_with(tree, "lora_A")),
            "init_lora_weights": True,
        }

    @classmethod
    def from_saved(cls, saved: SavedModules) -> "LoraConfig":
        start = saved.get("init_lora_weights", True)
        if (start.lower() if isinstance(start, str) else start) not in _STARTS:
            advice = "; it changes the base model's weights; in PEFT, use merge_and_unload and save the whole model"
            raise InputError(
                f"{saved.source}: init_lora_weights is {shown(start)}, which is not supported"
                f"{advice if str(start).lower().startswith(_CHANGES_BASE) else ''}"
            )
        layers = saved.changed_layers(
            ".lora_A.weight", _DEFAULT_TARGETS.get(saved.model.model_type, _TARGETS_OF_ENCODERS)
        )
        dora, rank = saved.get("use_dora", False), saved.get("r", 8)
        ranks = LayerNumbers(as_settings(saved.get("rank_pattern", {})), rank, "rank_pattern", int, _LARGEST_RANK)
        alphas = LayerNumbers(as_settings(saved.get("alpha_pattern", {})), 0.0, "alpha_pattern", float)
        _check_ranks(saved, layers, ranks)
        _check_magnitudes(saved, layers, dora)
        return cls(
            rank=rank,
            alpha=saved.get("lora_alpha", 8),
            dropout=saved.get("lora_dropout", 0.0),
            layers=exactly(layers),
            rank_stabilized=saved.get("use_rslora", False),
            dora=dora,
            rank_pattern=ranks.used(layers),
            alpha_pattern=alphas.used(layers),
        )

    def to_tensors(self, tree: FlatTree, config: ModelConfig) -> dict[str, np.ndarray]:
        magnitudes = {path: m for path, m in tree.items() if path[-1] == _MAGNITUDE}
        tensors = super().to_tensors({path: x for path, x in tree.items() if path not in magnitudes}, config)
        return tensors | {self.prefix + ".".join(path): np.asarray(m, np.float32) for path, m in magnitudes.items()}


def _norms(kernel: jax.Array) -> jax.Array:
    """The norm of each column, (outputs,); where it is 0, the smallest number, so that nothing is divided by 0."""
    squares = jnp.sum(jnp.square(kernel), axis=0)
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))


def _check_ranks(saved: SavedModules, layers: list[str], ranks: LayerNumbers) -> None:
    """Raises InputError unless the tensors have the ranks in the config, before anything of that size is created."""
    if not layers:
        saved.check_size("r", ranks(""), ".lora_A.weight", 0)
    for layer in layers:
        name, rank = f"{layer}.lora_A.weight", ranks(layer)
        shape = saved.shapes[name]
        if not shape or shape[0] != rank:
            field = ranks.source_of(layer, "r", "rank_pattern")
            raise InputError(
                f"{saved.source}: {field} is {shown(rank)}, but tensor {shown(name, quoted=False)} has shape "
                f"{shown(shape)}"
            )


def _check_magnitudes(saved: SavedModules, layers: list[str], dora: bool) -> None:
    """Raises InputError unless every layer has magnitudes with ``use_dora``, and none without it."""
    for layer in layers:
        name = f"{layer}.{_MAGNITUDE}"
        if dora and name not in saved.shapes:
            raise InputError(
                f"{saved.folder / WEIGHTS_FILE}: lacks {shown(name, quoted=False)}, which use_dora of {CONFIG_FILE} "
                "asks for; the file is incomplete"
            )
        if not dora and name in saved.shapes:
            raise InputError(f"{saved.source}: use_dora is not true, but the file has {shown(name, quoted=False)}")
