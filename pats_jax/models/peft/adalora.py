r"""AdaLoRA: a low-rank branch in the form of a singular value decomposition, whose rank training allocates to layers.

::

    y = x W + b + alpha / (r + 1e-5) * (dropout(x) A * E) B      A (inputs, r), E (r,), B (r, outputs), r = init_r

A and B start normal with standard deviation 0.02, and E at zero, so the model starts unchanged. During training,
`pats_jax.adalora_allocation` sets the entries of E to zero that matter least in the whole model, until ``target_r`` are
left per matrix on average, and `pats_jax.with_orthogonality` keeps the columns of A and the rows of B orthonormal. The
scale, with its 1e-5, is that of the library PEFT, and so are the defaults, except alpha, which is that of our LoRA.

Files are PEFT's: they hold only the triplets whose E is not zero, which ``rank_pattern`` lists. When such a file is
loaded, zeros take the place of the others, at the end; an adapter that has not been trained is saved whole.

References:
  Zhang et al. 2023, Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (arXiv:2303.10512).
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pats_jax.companions.adalora import PARTS, adalora_allocation
from pats_jax.core.files import JsonObject
from pats_jax.core.settings import POSITIVE, PROBABILITY, Range, at_least, setting
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
    with_dropout,
)
from pats_jax.models.peft.saved import WEIGHTS_FILE, FieldRules, ModelConfig, SavedModules, TargetFields
from pats_jax.objectives.orthogonality import with_orthogonality
from pats_jax.train_state import LossFn

_LEAVES = {"lora_A": "kernel", "lora_B": "kernel", "lora_E": "scale"}
_RANK_AXES = {"lora_A": 0, "lora_B": 1, "lora_E": 0}  # in PEFT's tensors: A (r, inputs), B (outputs, r), E (r, 1)
_DEFAULT_TARGETS = {  # PEFT's
    "bert": ("query", "value"),
    "roberta": ("query", "key", "value", "dense"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
    "t5": ("q", "k", "v", "o", "wi", "wo"),
    "bart": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}
_LAYERS = (
    r"^(roberta|deberta).*\.((query|key|value)(_proj)?|dense)$|^(bert|electra).*\.(query|value)$"
    r"|\.([qkvo]|w[io]|([qkv]|out)_proj|fc[12]|[qv]_lin|Wqkv)$"
)
_DECAY = Range(lambda x: 0 < x < 1, "in (0, 1)")
# PEFT's AdaLoRA has these from LoRA's config without reading them; the *_config and the last ones as for LoRA.
_WITHOUT_EFFECT = (
    *("r", "use_rslora", "alpha_pattern", "init_lora_weights", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "qalora_group_size", "megatron_core", "runtime_config", "ensure_weight_tying"),
    "fan_in_fan_out",
)
_PLAIN = {"bias": "none", "use_dora": False, "lora_bias": False}


class _Fields(TargetFields, total=False):
    """The fields that are read from an AdaLoRA adapter's config."""

    init_r: int | None
    target_r: int | None
    tinit: int | None
    tfinal: int | None
    deltaT: int | None
    beta1: float | None
    beta2: float | None
    orth_reg_weight: float | None
    total_step: int | None
    rank_pattern: dict[str, list[bool]] | None
    lora_alpha: float | None
    lora_dropout: float | None
    layers_to_transform: int | list[int] | None
    layers_pattern: str | list[str] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(PeftConfig):
    """The settings of AdaLoRA.

    Attributes:
      init_r: rank of every matrix before the allocation: number of columns of A, entries of E and rows of B.
      target_r: mean rank of the matrices after it, at most init_r.
      tinit: number of first steps without allocation.
      tfinal: number of last steps with a fixed selection.
      delta_t: number of steps between allocations.
      beta1: decay of the moving average of sensitivity, in (0, 1).
      beta2: decay of the moving average of uncertainty, in (0, 1).
      orth_reg_weight: weight of the regulariser that keeps A and B orthonormal, at least 0.
      alpha: numerator of the branch's scale.
      dropout: dropout probability on the input of the branch, in [0, 1).
      layers: regex of the linear layers to adapt, over names such as
        ``bert.encoder.layer.0.attention.self.query``. The default selects PEFT's layers of each model.
      total_step: number of steps of the training, which the programs fill in; None: not known.
    """

    init_r: int = setting(12, "AdaLoRA: rank of the update at the start", at_least(1, 65_536), flag="adalora_init_r")
    target_r: int = setting(8, "AdaLoRA: mean rank in the end", at_least(1, 65_536), flag="adalora_target_r")
    tinit: int = setting(0, "AdaLoRA: number of first steps without allocation", at_least(0), flag="adalora_tinit")
    tfinal: int = setting(0, "AdaLoRA: number of last steps with the ranks fixed", at_least(0), flag="adalora_tfinal")
    delta_t: int = setting(1, "AdaLoRA: steps between allocations", at_least(1), flag="adalora_delta_t")
    beta1: float = setting(0.85, "AdaLoRA: decay rate of the average of sensitivity", _DECAY, flag="adalora_beta1")
    beta2: float = setting(0.85, "AdaLoRA: decay rate of the average of uncertainty", _DECAY, flag="adalora_beta2")
    orth_reg_weight: float = setting(
        0.5, "AdaLoRA: weight of the orthogonality term in the loss", at_least(0), flag="adalora_orth_reg_weight"
    )
    alpha: float = setting(
        16.0, "AdaLoRA: the update is scaled by alpha / initial rank", POSITIVE, flag="adalora_alpha"
    )
    dropout: float = setting(
        0.0, "AdaLoRA: dropout probability on the input of the low-rank branch", PROBABILITY, flag="adalora_dropout"
    )
    layers: str = setting(_LAYERS, "AdaLoRA: regex of the linear layers to adapt", flag="adalora_layers")
    total_step: int | None = None

    kind: ClassVar[str] = "adalora"
    summary: ClassVar[str] = "a low-rank branch whose rank is allocated to layers by sensitivity"
    source: ClassVar[str] = "https://arxiv.org/abs/2303.10512"
    peft_type: ClassVar[str] = "ADALORA"
    merges: ClassVar[bool] = True
    saved_fields: ClassVar[FieldRules] = FieldRules(_Fields, _WITHOUT_EFFECT, _PLAIN)
    of_training: ClassVar[frozenset[str]] = frozenset(
        ("target_r", "tinit", "tfinal", "delta_t", "beta1", "beta2", "orth_reg_weight")
    )

    def __post_init__(self):
        super().__post_init__()
        if self.target_r > self.init_r:
            raise InputError(f"adalora_target_r {self.target_r}: must be at most adalora_init_r {self.init_r}")
        if self.total_step is not None and self.tinit + self.tfinal >= self.total_step:
            raise InputError(
                f"adalora_tinit {self.tinit}, adalora_tfinal {self.tfinal}: leave none of {self.total_step} steps for "
                "the allocation; decrease them"
            )

    @property
    def scale(self) -> float:
        """The factor of the branch."""
        return self.alpha / (self.init_r + 1e-5)

    @property
    def differs_by_layer(self) -> bool:
        return differs_by_layer(self.layers, "adalora_layers")

    def in_training(self, total_steps: int) -> "AdaLoraConfig":
        return dataclasses.replace(self, total_step=total_steps)

    def last(self, total_steps: int) -> optax.GradientTransformationExtraArgs:
        known = self.in_training(total_steps)
        return adalora_allocation(
            known.target_r,
            total_steps,
            tinit=known.tinit,
            tfinal=known.tfinal,
            delta_t=known.delta_t,
            beta1=known.beta1,
            beta2=known.beta2,
        )

    def add_to_loss(self, loss_fn: LossFn) -> LossFn:
        return with_orthogonality(loss_fn, self.orth_reg_weight) if self.orth_reg_weight else loss_fn

    def draw(self, base: FlatTree, config: ModelConfig, key: jax.Array) -> FlatTree:
        tree = {}
        for path in linear_layers(base, self.layers, "adalora_layers"):
            key, of_a, of_b = jax.random.split(key, 3)
            inputs, outputs = base[*path, "kernel"].shape
            tree[*path, "lora_A", "kernel"] = 0.02 * jax.random.normal(of_a, (inputs, self.init_r))
            tree[*path, "lora_B", "kernel"] = 0.02 * jax.random.normal(of_b, (self.init_r, outputs))
            tree[*path, "lora_E", "scale"] = jnp.zeros(self.init_r)
        return tree

    def interceptor(self, config: ModelConfig, deterministic: bool) -> Interceptor:
        def add_branch(next_fun, args, kwargs, context):
            y = next_fun(*args, **kwargs)
            layer = context.module
            values = own_variable(layer, "lora_E") if isinstance(layer, nn.Dense) else None
            if values is None:
                return y
            (x,) = args
            if self.dropout and not deterministic:
                x = with_dropout(layer, x, self.dropout)
            a, b = (own_variable(layer, name)["kernel"].astype(y.dtype) for name in ("lora_A", "lora_B"))
            e = (self.scale * values["scale"]).astype(y.dtype)
            return y + (x.astype(y.dtype) @ a * e) @ b

        return add_branch

    def merge(self, base: FlatTree, tree: FlatTree) -> FlatTree:
        return self._added(base, tree, self.scale)

    def unmerge(self, base: FlatTree, tree: FlatTree) -> FlatTree:
        return self._added(base, tree, -self.scale)

    def _added(self, base, tree, scale):
        """The parameters with ``scale`` A diag(E) B added to the kernels."""
        changed = {}
        for path, (a, b, e) in _triplets(tree).items():
            product = jnp.matmul(a * e, b, precision="highest")
            changed[*path, "kernel"] = base[*path, "kernel"] + scale * product
        return base | changed

    def to_dict(self, tree: FlatTree, config: ModelConfig) -> JsonObject:
        kept = _kept(tree)
        pattern = {f"{'.'.join(path)}.lora_E": own.tolist() for path, own in kept.items()}
        return _PLAIN | {
            "init_r": self.init_r,
            "target_r": self.target_r,
            "tinit": self.tinit,
            "tfinal": self.tfinal,
            "deltaT": self.delta_t,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "orth_reg_weight": self.orth_reg_weight,
            "total_step": self.total_step or self.tinit + self.tfinal + 1,  # PEFT demands that it is possible
            "rank_pattern": None if all(own.all() for own in kept.values()) else pattern,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "fan_in_fan_out": False,
            "target_modules": sorted(".".join(path) for path in kept),
            "init_lora_weights": True,
        }

    @classmethod
    def from_saved(cls, saved: SavedModules) -> "AdaLoraConfig":
        targets = _DEFAULT_TARGETS.get(saved.model.model_type, _DEFAULT_TARGETS["bert"])
        layers = saved.changed_layers(".lora_A", targets)
        init_r = saved.get("init_r", 12)
        config = cls(
            init_r=init_r,
            target_r=min(saved.get("target_r", 8), init_r),  # PEFT allows more, which is for training only
            tinit=saved.get("tinit", 0),
            tfinal=saved.get("tfinal", 0),
            delta_t=saved.get("deltaT", 1),
            beta1=saved.get("beta1", 0.85),
            beta2=saved.get("beta2", 0.85),
            orth_reg_weight=saved.get("orth_reg_weight", 0.5),
            alpha=saved.get("lora_alpha", 8),
            dropout=saved.get("lora_dropout", 0.0),
            layers=exactly(layers),
            total_step=saved.get("total_step"),
        )
        _check_ranks(saved, layers, init_r)
        return config

    def to_tensors(self, tree: FlatTree, config: ModelConfig) -> dict[str, np.ndarray]:
        kept, tensors = _kept(tree), {}
        for path, (a, b, e) in _triplets(tree).items():
            whole = {"lora_A": np.transpose(a), "lora_B": np.transpose(b), "lora_E": np.reshape(e, (-1, 1))}
            for name, tensor in whole.items():
                chosen = np.compress(kept[path], np.asarray(tensor, np.float32), axis=_RANK_AXES[name])
                tensors[f"{self.prefix}{'.'.join(path)}.{name}"] = np.ascontiguousarray(chosen)
        return tensors

    def from_tensors(self, tensors: Mapping[str, np.ndarray], config: ModelConfig) -> FlatTree:
        others = {name: x for name, x in tensors.items() if name.rpartition(".")[2] not in _LEAVES or x.ndim != 2}
        tree = super().from_tensors(others, config)
        for name in tensors.keys() - others.keys():
            *layer, part = name.removeprefix(self.prefix).split(".")
            missing = max(0, self.init_r - tensors[name].shape[_RANK_AXES[part]])
            padding = [(0, missing if axis == _RANK_AXES[part] else 0) for axis in range(2)]
            whole = np.pad(tensors[name], padding)
            tree[*layer, part, _LEAVES[part]] = whole.reshape(-1) if part == "lora_E" else whole.T
        return tree


def _triplets(tree):
    """Layer path -> A, B and E."""
    nodes = [nodes_with(tree, name) for name in PARTS]
    return {
        path: tuple(node[path][_LEAVES[name],] for name, node in zip(PARTS, nodes, strict=True)) for path in nodes[0]
    }


def _kept(tree):
    """Layer path -> bools (init_r,): the triplets to save, which are those with an E; all if no E has been trained."""
    values = {path: np.asarray(e) != 0 for path, (_, _, e) in _triplets(tree).items()}
    if any(own.any() for own in values.values()):
        return values
    return {path: np.ones_like(own) for path, own in values.items()}


def _check_ranks(saved: SavedModules, layers: list[str], init_r: int) -> None:
    """Raises InputError unless each tensor has as many triplets as ``rank_pattern`` or ``init_r`` says."""
    pattern = saved.get("rank_pattern", {})
    stray = next((name for name in pattern if name.removesuffix(".lora_E") not in layers), None)
    if stray is not None:
        raise InputError(f"{saved.source}: rank_pattern names {shown(stray)}, for which the file has no tensors")
    for layer in layers:
        chosen = pattern.get(f"{layer}.lora_E")
        if chosen is not None and len(chosen) != init_r:
            wrong = f"{layer} has {len(chosen)} entries, but init_r is {init_r}"
            raise InputError(f"{saved.source}: rank_pattern of {wrong}")
        rank = init_r if chosen is None else sum(chosen)
        for part, axis in _RANK_AXES.items():
            shape = saved.shapes.get(f"{layer}.{part}")
            if shape is None:
                raise InputError(f"{saved.folder / WEIGHTS_FILE}: lacks {layer}.{part}; the file is incomplete")
            if len(shape) != 2 or shape[axis] != rank:
                wrong = f"{layer} has rank {rank}, but tensor {layer}.{part} has shape {shown(shape)}"
                raise InputError(f"{saved.source}: by init_r and rank_pattern {wrong}")
