"""What the models of most families share: embeddings, then layers below ``encoder``, of which a head reads a token."""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
from jax import Array
from jax.typing import DTypeLike

from pats_jax.errors import InputError
from pats_jax.models.attention import CUDNN
from pats_jax.models.config import EncoderConfig
from pats_jax.models.layers import Form, LayerStack, padding_bias


class Layers(nn.Module):
    """The layers, with parameters under ``layer``.

    Attributes:
      layer: the module of a layer, as `LayerStack` takes it; a class attribute.
    """

    layer: ClassVar[Callable[..., nn.Module]]

    config: EncoderConfig
    dtype: DTypeLike
    form: Form

    @nn.compact
    def __call__(self, hidden: Array, attention_mask: Array, **options: Any) -> tuple[Array, ...]:
        stack = LayerStack(type(self).layer, self.config, self.dtype, self.form, name="layer")
        return stack(hidden, padding_bias(attention_mask), *self.constants(hidden), **options)

    def constants(self, hidden: Array) -> tuple[Any, ...]:
        """What every layer gets besides the bias of padding."""
        return ()


class EncoderModel(nn.Module):
    """Embeddings and layers.

    Attributes:
      embeddings: the module of the embeddings, called with ids or word embeddings, mask and token types; a class
        attribute, like the following.
      layers: the module of all layers, called with the hidden state and the mask.
      layers_name: its name.
      positions: what cuDNN's attention cannot add to the scores, for an error message; empty if there is nothing.
    """

    embeddings: ClassVar[Callable[..., nn.Module]]
    layers: ClassVar[Callable[..., nn.Module]]
    layers_name: ClassVar[str] = "encoder"
    positions: ClassVar[str] = ""

    config: EncoderConfig
    dtype: DTypeLike
    form: Form

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        attention_mask: Array,
        token_type_ids: Array,
        *,
        hidden_state: int | None,
        deterministic: bool,
        **options: Any,
    ) -> tuple[Array, tuple[Array, ...]]:
        """Returns what the head reads, (batch, hidden), and the hidden states.

        ``tokens`` are ids, word embeddings or, if ``hidden_state`` is a number, the hidden state of that number.

        Raises:
          InputError: if attention is to be cuDNN's, and the scores depend on positions.
        """
        kind = type(self)
        if kind.positions and self.form.attention == CUDNN:
            raise InputError(f'attention="cudnn" cannot add {kind.positions}; use attention="auto"')
        if hidden_state is None:
            embed = kind.embeddings(self.config, self.dtype, name="embeddings")
            tokens = self.projected(embed(tokens, attention_mask, token_type_ids, deterministic=deterministic))
        layers = kind.layers(self.config, self.dtype, self.form, name=kind.layers_name)
        options |= {"first_layer": hidden_state or 0, "deterministic": deterministic}
        states = layers(tokens, attention_mask, **options)
        return self.features(states[-1]), states

    def projected(self, embedded: Array) -> Array:
        """Hidden state 0 from the embeddings, (batch, length, hidden)."""
        return embedded

    def features(self, hidden: Array) -> Array:
        """What the head reads of the last hidden state: the first token's, (batch, hidden)."""
        return hidden[:, 0]
