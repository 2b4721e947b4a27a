r"""LoRA: a low-rank branch parallel to linear layers.

::

    y = x W + b + (alpha / rank) * dropout(x) A B        A (inputs, rank), B (rank, outputs)

A starts uniform on [-1/sqrt(inputs), 1/sqrt(inputs)], as in the authors' code, and B at zero, so the model starts
unchanged. A trained branch can be merged into the weights: W + (alpha / rank) A B. Rank-stabilized LoRA (rsLoRA) scales
by alpha / sqrt(rank) instead, so that a larger rank does not learn more slowly.

References:
  Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685).
  Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA (arXiv:2312.03732).
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from pats_jax.core.files import JsonObject
from pats_jax.core.settings import POSITIVE, PROBABILITY, at_least, setting
from pats_jax.errors import InputError, shown
from pats_jax.models.peft.config import (
    FlatTree,
    Interceptor,
    PeftConfig,
    differs_by_layer,
    exactly,
    linear_layers,
    nodes_with,
    own_variable,
)
from pats_jax.models.peft.saved import FieldRules, ModelConfig, SavedModules, TargetFields

# Variants of LoRA that PEFT's files can hold -> what the plain form has.
_PLAIN = {
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}
_DEFAULT_TARGETS = {"t5": ("q", "v"), "bart": ("q_proj", "v_proj")}  # PEFT's
_TARGETS_OF_ENCODERS = ("query", "value")
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
        ``bert.encoder.layer.0.attention.self.query``. By default queries and values, in whatever model; ModernBERT has
        one layer for queries, keys and values.
      rank_stabilized: whether the scale is alpha / sqrt(rank) (rsLoRA).
    """

    rank: int = setting(8, "LoRA: rank of the update", at_least(1, 65_536), flag="lora_rank")
    alpha: float = setting(16.0, "LoRA: the update is scaled by alpha / rank", POSITIVE, flag="lora_alpha")
    dropout: float = setting(
        0.0, "LoRA: dropout probability on the input of the low-rank branch", PROBABILITY, flag="lora_dropout"
    )
    layers: str = setting(
        r"\.(query|value|q|v|q_proj|v_proj|Wqkv)$", "LoRA: regex of the linear layers to adapt", flag="lora_layers"
    )
    rank_stabilized: bool = setting(
        False, "LoRA: scale the update by alpha / sqrt(rank) instead (rsLoRA)", flag="lora_rank_stabilized"
    )

    kind: ClassVar[str] = "lora"
    summary: ClassVar[str] = "a low-rank branch parallel to linear layers"
    source: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    peft_type: ClassVar[str] = "LORA"
    merges: ClassVar[bool] = True
    saved_fields: ClassVar[FieldRules] = FieldRules(_Fields, _WITHOUT_EFFECT, _PLAIN)

    @property
    def scale(self) -> float:
        """The factor of the branch."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    @property
    def differs_by_layer(self) -> bool:
        return differs_by_layer(self.layers, "lora_layers")

    def draw(self, base: FlatTree, config: ModelConfig, key: jax.Array) -> FlatTree:
        tree = {}
        for path in linear_layers(base, self.layers, "lora_layers"):
            key, own = jax.random.split(key)
            inputs, outputs = base[*path, "kernel"].shape
            bound = inputs**-0.5
            tree[*path, "lora_A", "kernel"] = jax.random.uniform(own, (inputs, self.rank), minval=-bound, maxval=bound)
            tree[*path, "lora_B", "kernel"] = jnp.zeros((self.rank, outputs))
        return tree

    def interceptor(self, config: ModelConfig, deterministic: bool) -> Interceptor:
        def add_branch(next_fun, args, kwargs, context):
            y = next_fun(*args, **kwargs)
            layer = context.module
            down = own_variable(layer, "lora_A") if isinstance(layer, nn.Dense) else None
            if down is None:
                return y
            (x,) = args
            if self.dropout and not deterministic:
                kept = jax.random.bernoulli(layer.make_rng("dropout"), 1 - self.dropout, x.shape)
                x = jnp.where(kept, x / (1 - self.dropout), 0)
            a, b = (node["kernel"].astype(y.dtype) for node in (down, own_variable(layer, "lora_B")))
            return y + (x.astype(y.dtype) @ a) @ b * self.scale

        return add_branch

    def merge(self, base: FlatTree, tree: FlatTree) -> FlatTree:
        return self._added(base, tree, self.scale)

    def unmerge(self, base: FlatTree, tree: FlatTree) -> FlatTree:
        return self._added(base, tree, -self.scale)

    def _added(self, base, tree, scale):
        """The parameters with ``scale`` A B added to the kernels."""
        up = nodes_with(tree, "lora_B")
        changed = {}
        for path, node in nodes_with(tree, "lora_A").items():
            product = jnp.matmul(node["kernel",], up[path]["kernel",], precision="highest")
            changed[*path, "kernel"] = base[*path, "kernel"] + scale * product
        return base | changed

    def to_dict(self, tree: FlatTree, config: ModelConfig) -> JsonObject:
        return _PLAIN | {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rank_stabilized,
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
        rank = saved.get("r", 8)
        saved.check_size("r", rank, ".lora_A.weight", 0)
        return cls(
            rank=rank,
            alpha=saved.get("lora_alpha", 8),
            dropout=saved.get("lora_dropout", 0.0),
            layers=exactly(layers),
            rank_stabilized=saved.get("use_rslora", False),
        )
