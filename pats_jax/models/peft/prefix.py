r"""Prefix tuning: trained keys and values before the text's own, in every layer.

::

    keys   = [k_1, ..., k_length, keys of the text]        k_i, v_i (hidden,), different in each layer
    values = [v_1, ..., v_length, values of the text]      all queries attend to both

The small tree is one matrix, (length, 2 * layers * hidden): for each virtual token, its key and value in layer 0, then
in layer 1, and so on. As in PEFT, positions of the text start after the prefix. Entries start normal with standard
deviation ``initializer_range``, and are trained directly: the network through which Li and Liang train them (PEFT's
``prefix_projection``) is not supported. PEFT saves the resulting keys and values, so its files load in either case.

References:
  Li and Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation (arXiv:2101.00190); Liu et al. 2021,
  P-Tuning v2 (arXiv:2110.07602), for encoders.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from pats_jax.core.files import JsonObject
from pats_jax.core.settings import at_least, setting
from pats_jax.models.bert import Embeddings, Encoder
from pats_jax.models.config import EncoderConfig
from pats_jax.models.convert import Parameters
from pats_jax.models.peft.config import FlatTree, Interceptor, own_variable
from pats_jax.models.peft.virtual_tokens import EMBEDDINGS, VirtualTokensConfig

_PARTS = ("key", "value")
_PREFIX = "prefix"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixConfig(VirtualTokensConfig):
    """The settings of prefix tuning.

    Attributes:
      length: number of virtual tokens; each takes one position from the text.
    """

    length: int = setting(
        20,
        "prefix tuning: number of virtual tokens; each takes one position from the text",
        at_least(1, 8192),
        flag="prefix_length",
    )

    kind: ClassVar[str] = "prefix"
    summary: ClassVar[str] = "trained keys and values before the text's own, in every layer"
    source: ClassVar[str] = "https://arxiv.org/abs/2101.00190"
    peft_type: ClassVar[str] = "PREFIX_TUNING"

    def draw(self, base: FlatTree, config: EncoderConfig, key: jax.Array) -> FlatTree:
        shape = (self.length, config.num_hidden_layers * 2 * config.hidden_size)
        return {EMBEDDINGS: config.initializer_range * jax.random.normal(key, shape)}

    def variables(self, tree: Parameters, config: EncoderConfig, stacked: bool) -> Parameters:
        matrix = tree[EMBEDDINGS[0]].reshape(self.length, config.num_hidden_layers, len(_PARTS), config.hidden_size)

        def of_layer(vectors):  # (..., length, parts, hidden)
            parts = {part: {_PREFIX: vectors[..., number, :]} for number, part in enumerate(_PARTS)}
            return {"attention": {"self": parts}}

        by_layer = matrix.swapaxes(0, 1)
        numbers = range(config.num_hidden_layers)
        layers = of_layer(by_layer) if stacked else {str(number): of_layer(by_layer[number]) for number in numbers}
        return {config.base_prefix: {"encoder": {"layer": layers}}}

    def interceptor(self, config: EncoderConfig, deterministic: bool) -> Interceptor:
        def prepend(next_fun, args, kwargs, context):
            module, method = context.module, context.method_name
            if isinstance(module, Embeddings) and method == "first_position":
                (length,) = args
                if length + self.length > config.max_length:
                    raise ValueError(
                        f"sequences have {length} tokens and the prefix {self.length}, "
                        f"but the model has {config.max_length} positions"
                    )
                return next_fun(length) + self.length
            if isinstance(module, Encoder):
                hidden, bias = args
                return next_fun(hidden, jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (self.length, 0))), **kwargs)
            y = next_fun(*args, **kwargs)
            vectors = own_variable(module, _PREFIX) if isinstance(module, nn.Dense) else None
            if vectors is None:
                return y
            vectors = jnp.broadcast_to(vectors, (len(y), *vectors.shape)).astype(y.dtype)
            return jnp.concatenate([vectors, y], axis=1)

        return prepend

    @classmethod
    def sizes(cls, model: EncoderConfig) -> dict[str, int]:
        layers = {"num_layers": model.num_hidden_layers, "num_attention_heads": model.num_attention_heads}
        return super().sizes(model) | layers

    def to_dict(self, tree: FlatTree, config: EncoderConfig) -> JsonObject:
        plain = {"encoder_hidden_size": config.hidden_size, "prefix_projection": False}
        return super().to_dict(tree, config) | plain
