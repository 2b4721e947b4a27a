r"""Bottleneck adapters: two small linear layers inside every layer.

::

    A(h) = f(h D + d) U + u        D (hidden, size), U (size, hidden)

    houlsby:   LayerNorm(r + x + A(x))                      after attention and after feed-forward, f = GELU
    pfeiffer:  LayerNorm(r + x + A(LayerNorm(r + x)))       after feed-forward only, f = ReLU

x is the output of the block's projection and dropout, (batch, length, hidden), and r the residual. In BART and T5,
encoder and decoder have adapters in the same places, and cross-attention has none, as in AdapterHub's configurations;
T5, which normalizes before its blocks, has no LayerNorm in these formulas. Entries of D and U
start normal with standard deviation 1e-3, truncated at two standard deviations; d and u start at zero. The model thus
starts nearly unchanged. Places, f and initialization of houlsby are those of the authors' code; place and f of pfeiffer
are those of AdapterHub's configuration of that name. *Ours*: pfeiffer has the same initialization, and the LayerNorms,
which Houlsby et al. train, stay frozen.

References:
  Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP (arXiv:1902.00751); Pfeiffer et al. 2020,
  MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer (arXiv:2005.00052).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from pats_jax.core.files import JsonObject
from pats_jax.core.settings import at_least, setting
from pats_jax.models import bart
from pats_jax.models.config import EncoderConfig
from pats_jax.models.convert import ParameterPath
from pats_jax.models.peft.config import FlatTree, Interceptor, PeftConfig, own_variable
from pats_jax.models.peft.saved import CommonFields, FieldRules, ModelConfig, SavedModules
from pats_jax.models.seq2seq_config import BartConfig, T5Config

_BART_PLACES = {"adapt_attention": "attention_adapter", "adapt_output": "output_adapter"}
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "houlsby": functools.partial(jax.nn.gelu, approximate=True),
    "pfeiffer": jax.nn.relu,
}
_STANDARD_DEVIATION = 1e-3


class _Fields(CommonFields, total=False):
    """The fields that are read from an adapter's config, besides the common ones."""

    size: int | None
    place: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig(PeftConfig):
    """The settings of bottleneck adapters.

    Attributes:
      size: number of units of the bottleneck.
      place: ``"houlsby"`` inserts them after both sublayers, ``"pfeiffer"`` only after the second.
    """

    size: int = setting(64, "adapters: bottleneck size", at_least(1, 65_536), flag="adapter_size")
    place: Literal["houlsby", "pfeiffer"] = setting(
        "houlsby", "adapters: after both sublayers, or only the second", flag="adapter_place"
    )

    kind: ClassVar[str] = "adapters"
    summary: ClassVar[str] = "two small linear layers inside every layer"
    source: ClassVar[str] = "https://arxiv.org/abs/1902.00751"
    peft_type: ClassVar[str] = "PATS_JAX_ADAPTERS"
    saved_fields: ClassVar[FieldRules] = FieldRules(_Fields)

    def draw(self, base: FlatTree, config: ModelConfig, key: jax.Array) -> FlatTree:
        tree = {}
        paths, width = self._places(config)
        for path in paths:
            for name, shape in (("down", (width, self.size)), ("up", (self.size, width))):
                key, own = jax.random.split(key)
                normal = jax.random.truncated_normal(own, -2.0, 2.0, shape)
                tree[*path, name, "kernel"] = _STANDARD_DEVIATION * normal
                tree[*path, name, "bias"] = jnp.zeros(shape[1])
        return tree

    def _places(self, config: ModelConfig) -> tuple[list[ParameterPath], int]:
        """The paths of all adapters, and the width of the states there."""
        both = self.place == "houlsby"
        paths: list[ParameterPath]
        if isinstance(config, T5Config):
            last = {"encoder": "1", "decoder": "2"}
            paths = [
                (side, "block", str(number), "layer", sublayer, "adapter")
                for side, count in config.num_layers_of.items()
                for number in range(count)
                for sublayer in (("0", last[side]) if both else (last[side],))
            ]
            return paths, config.d_model
        if isinstance(config, BartConfig):
            names = tuple(_BART_PLACES.values())
            paths = [
                ("model", side, "layers", str(number), name)
                for side, count in config.num_layers_of.items()
                for number in range(count)
                for name in (names if both else names[1:])
            ]
            return paths, config.d_model
        assert isinstance(config, EncoderConfig)
        paths = [
            (config.base_prefix, *config.stack_path, str(number), *block, "adapter")
            for number in range(config.num_hidden_layers)
            for block in config.adapter_blocks[self.place]
        ]
        return paths, config.hidden_size

    def interceptor(self, config: ModelConfig, deterministic: bool) -> Interceptor:
        def insert(next_fun, args, kwargs, context):
            adapter = _adapter_of(context.module, context.method_name)
            if adapter is None:
                return next_fun(*args, **kwargs)
            x, residual = args[:2]
            norm = _norm_of(context.module, args)
            return x + self._bottleneck(adapter, x if self.place == "houlsby" else norm(residual + x))

        return insert

    def _bottleneck(self, node, h):
        """A(h), (batch, length, hidden)."""
        down, up = (jax.tree.map(lambda x: x.astype(h.dtype), node[name]) for name in ("down", "up"))
        inner = _ACTIVATIONS[self.place](h @ down["kernel"] + down["bias"])
        return inner @ up["kernel"] + up["bias"]

    def to_dict(self, tree: FlatTree, config: ModelConfig) -> JsonObject:
        return {"size": self.size, "place": self.place}

    @classmethod
    def from_saved(cls, saved: SavedModules) -> "AdapterConfig":
        size = saved.get("size", 64)
        saved.check_size("size", size, "adapter.down.bias", 0)
        return cls(size=size, place=saved.get("place", "houlsby"))


def _adapter_of(module: nn.Module, method: str) -> Any:
    """The adapter that acts in a method of a module, or None."""
    if isinstance(module, bart.Layer):
        return own_variable(module, _BART_PLACES[method]) if method in _BART_PLACES else None
    return own_variable(module, "adapter") if method == "adapt" else None


def _norm_of(module: nn.Module, arguments: tuple[Any, ...]) -> Callable[[jax.Array], jax.Array]:
    """What normalizes the sum of a block's output and its residual; nothing does in T5 and ModernBERT."""
    if isinstance(module, bart.Layer):
        return module.final_layer_norm
    return arguments[2] if len(arguments) > 2 else lambda x: x
