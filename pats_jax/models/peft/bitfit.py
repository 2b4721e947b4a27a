r"""BitFit: trains only the biases.

::

    y = x W + (b + d)        for every linear layer;    the same for the bias of every LayerNorm

The small tree is d, the trained offset of the pretrained bias b; it starts at zero. *Ours*: the model's own biases stay
unchanged, so BitFit can be removed like an adapter. Gradients, and AdamW's steps without weight decay, are those of
training b itself.

References:
  Ben Zaken et al. 2021, BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models
  (arXiv:2106.10199).
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from pats_jax.core.files import JsonObject
from pats_jax.errors import InputError
from pats_jax.models import bart, layers
from pats_jax.models.peft.config import FlatTree, Interceptor, PeftConfig, nodes_with, own_variable
from pats_jax.models.peft.saved import ModelConfig, SavedModules

_CONSTANT = ("final_logits",)  # BART's, which is not trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFitConfig(PeftConfig):
    """The settings of BitFit, which has none of its own."""

    kind: ClassVar[str] = "bitfit"
    summary: ClassVar[str] = "a trained offset for every bias"
    source: ClassVar[str] = "https://arxiv.org/abs/2106.10199"
    peft_type: ClassVar[str] = "PATS_JAX_BITFIT"
    merges: ClassVar[bool] = True

    def draw(self, base: FlatTree, config: ModelConfig, key: jax.Array) -> FlatTree:
        biases = {path: x for path, x in base.items() if path[-1] == "bias" and path[0] not in _CONSTANT}
        if not biases:
            raise InputError(f"bitfit: a {config.model_type} model has no biases; take ia3 or lora")
        return {(*path[:-1], "bitfit", "bias"): jnp.zeros(x.shape) for path, x in biases.items()}

    def interceptor(self, config: ModelConfig, deterministic: bool) -> Interceptor:
        def add_to_bias(next_fun, args, kwargs, context):
            y = next_fun(*args, **kwargs)
            layer = context.module
            added = (
                own_variable(layer, "bitfit")
                if isinstance(layer, nn.Dense | layers.LayerNorm | bart.LayerNorm)
                else None
            )
            return y if added is None else y + added["bias"].astype(y.dtype)

        return add_to_bias

    def merge(self, base: FlatTree, tree: FlatTree) -> FlatTree:
        return base | {(*path, "bias"): base[*path, "bias"] + d["bias",] for path, d in _added(tree)}

    def unmerge(self, base: FlatTree, tree: FlatTree) -> FlatTree:
        return base | {(*path, "bias"): base[*path, "bias"] - d["bias",] for path, d in _added(tree)}

    def to_dict(self, tree: FlatTree, config: ModelConfig) -> JsonObject:
        return {}

    @classmethod
    def from_saved(cls, saved: SavedModules) -> "BitFitConfig":
        return cls()


def _added(tree):
    return nodes_with(tree, "bitfit").items()
