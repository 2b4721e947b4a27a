r"""Bottleneck adapters: two small linear layers inside every encoder layer.

::

    A(h) = f(h D + d) U + u        D (hidden, size), U (size, hidden)

    houlsby:   LayerNorm(r + x + A(x))                      after attention and after feed-forward, f = GELU
    pfeiffer:  LayerNorm(r + x + A(LayerNorm(r + x)))       after feed-forward only, f = ReLU

x is the output of the block's projection and dropout, (batch, length, hidden), and r the residual. Entries of D and U
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
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from pats_jax.core.files import JsonObject
from pats_jax.core.settings import at_least, setting
from pats_jax.models.bert import ResidualOutput
from pats_jax.models.config import EncoderConfig
from pats_jax.models.peft.config import FlatTree, Interceptor, PeftConfig, own_variable
from pats_jax.models.peft.saved import CommonFields, FieldRules, SavedModules

_BLOCKS = {"houlsby": (("attention", "output"), ("output",)), "pfeiffer": (("output",),)}
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
    summary: ClassVar[str] = "two small linear layers inside every encoder layer"
    source: ClassVar[str] = "https://arxiv.org/abs/1902.00751"
    peft_type: ClassVar[str] = "PATS_JAX_ADAPTERS"
    saved_fields: ClassVar[FieldRules] = FieldRules(_Fields)

    def draw(self, base: FlatTree, config: EncoderConfig, key: jax.Array) -> FlatTree:
        tree = {}
        for index in range(config.num_hidden_layers):
            for block in _BLOCKS[self.place]:
                path = (config.base_prefix, "encoder", "layer", str(index), *block, "adapter")
                for name, shape in (
                    ("down", (config.hidden_size, self.size)),
                    ("up", (self.size, config.hidden_size)),
                ):
                    key, own = jax.random.split(key)
                    normal = jax.random.truncated_normal(own, -2.0, 2.0, shape)
                    tree[*path, name, "kernel"] = _STANDARD_DEVIATION * normal
                    tree[*path, name, "bias"] = jnp.zeros(shape[1])
        return tree

    def interceptor(self, config: EncoderConfig, deterministic: bool) -> Interceptor:
        def insert(next_fun, args, kwargs, context):
            block = context.module
            is_place = isinstance(block, ResidualOutput) and context.method_name == "adapt"
            adapter = own_variable(block, "adapter") if is_place else None
            if adapter is None:
                return next_fun(*args, **kwargs)
            x, residual, norm = args
            return x + self._bottleneck(adapter, x if self.place == "houlsby" else norm(residual + x))

        return insert

    def _bottleneck(self, node, h):
        """A(h), (batch, length, hidden)."""
        down, up = (jax.tree.map(lambda x: x.astype(h.dtype), node[name]) for name in ("down", "up"))
        inner = _ACTIVATIONS[self.place](h @ down["kernel"] + down["bias"])
        return inner @ up["kernel"] + up["bias"]

    def to_dict(self, tree: FlatTree, config: EncoderConfig) -> JsonObject:
        return {"size": self.size, "place": self.place}

    @classmethod
    def from_saved(cls, saved: SavedModules) -> "AdapterConfig":
        size = saved.get("size", 64)
        saved.check_size("size", size, ".adapter.down.bias", 0)
        return cls(size=size, place=saved.get("place", "houlsby"))
