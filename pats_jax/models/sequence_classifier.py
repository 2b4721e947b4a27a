"""`SequenceClassifier`: any of the encoders, with its sequence classification or regression head."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from pats_jax.models.attention import ATTENTIONS, EINSUM
from pats_jax.models.config import EncoderConfig
from pats_jax.models.encoders.table import encoder_of
from pats_jax.models.layers import LAYOUTS, SEPARATE, Form, Perturb, look_up


class SequenceClassifier(nn.Module):
    """An encoder with a classification or regression head; `pats_jax.models.encoders.table` lists the model types.

    Attributes:
      config: sizes, rates and labels.
      dtype: the dtype of computation; parameters are always float32.
      first_token_only: whether the last layer computes only the first token's query, attention output and feed-forward,
        because nothing else reaches the head. Logits and gradients are the same up to rounding; ``False`` is for
        comparison.
      gradient_checkpointing: whether to keep only the inputs of the layers for the backward pass and recompute the
        rest: less memory, about a third more work. Logits and gradients are the same up to rounding.
      layers: ``"separate"`` gives each encoder layer a subtree of parameters, ``encoder.layer.0``, ...; ``"stacked"``
        gives the leaves under ``encoder.layer`` a leading axis of layers, (layers, ...), and runs `jax.lax.scan` over
        it: one program for all layers, and few arrays for the optimizer. `pats_jax.models.stack_layers` and
        `unstack_layers` convert parameters; outputs are the same up to rounding.
      unroll: number of layers per iteration of that scan; 0 means all of them, without a loop.
      attention: ``"einsum"``; ``"cudnn"``, the fused kernel for NVIDIA GPUs, which needs bfloat16 or float16, no
        attention dropout, heads of at most 128 units in multiples of 8, and even lengths; or ``"auto"``: cuDNN where it
        works and is faster, for at least 128 tokens. Other platforms, and the single query of ``first_token_only``,
        always use einsum, as do MPNet and DeBERTa, whose biases of positions cuDNN cannot add. cuDNN supports neither
        second derivatives nor `jax.vmap`, and may refuse parameters that are sharded over devices.
    """

    config: EncoderConfig
    dtype: DTypeLike = jnp.float32
    first_token_only: bool = True
    gradient_checkpointing: bool = False
    layers: str = SEPARATE
    unroll: int = 1
    attention: str = EINSUM

    def __post_init__(self):
        if self.layers not in LAYOUTS:
            raise ValueError(f"layers={self.layers!r} is not one of {', '.join(map(repr, LAYOUTS))}")
        if self.unroll < 0:
            raise ValueError(f"unroll={self.unroll} must be at least 0")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention={self.attention!r} is not one of {', '.join(map(repr, ATTENTIONS))}")
        super().__post_init__()

    @property
    def max_length(self) -> int:
        """The length of the longest text, in tokens."""
        return self.config.max_length

    @nn.compact
    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
        *,
        inputs_embeds: ArrayLike | None = None,
        continue_from: tuple[int, ArrayLike] | None = None,
        output_hidden_states: bool = False,
        perturb: Perturb | None = None,
        deterministic: bool = True,
    ) -> Array | tuple[Array, tuple[Array, ...]]:
        """Computes float32 logits, (batch, num_labels), from one of input_ids, inputs_embeds and continue_from.

        Hidden state 0 is the output of the embeddings, hidden state k the output of the k-th layer.

        Args:
          input_ids: token ids, (batch, length).
          attention_mask: 1 for tokens and 0 for padding, (batch, length); None means 1 everywhere.
          token_type_ids: 0 for the first sentence, 1 for the second, (batch, length); None means 0 everywhere. Models
            without token types (DistilBERT, MPNet, ModernBERT) ignore them.
          inputs_embeds: word embeddings (see `embed`) in place of ids, (batch, length, embedding_size); positions and
            token types are added as usual. RoBERTa and MPNet then count positions over the tokens of
            ``attention_mask``, or over all tokens without a mask, as Transformers does.
          continue_from: ``(k, states)`` computes only the layers after the k-th, 0 <= k < num_hidden_layers, from
            hidden state k, (batch, length, hidden). With the same key, their dropout is that of a whole pass.
          output_hidden_states: whether to return the hidden states too, from 0 (or k) to the last; with
            ``first_token_only`` the last one has the first token alone.
          perturb: ``perturb(number, hidden)`` returns what a layer reads in place of its input ``hidden``, (batch,
            length, hidden), by the layer's number from 0, () int32; hidden states are returned as they were.
          deterministic: whether dropout is off. If it is on, ``apply`` needs ``rngs={"dropout": key}``.

        Returns:
          The logits; with ``output_hidden_states``, the logits and a tuple of hidden states, (batch, length, hidden)
          each in ``dtype``.

        Raises:
          ValueError: if none or several of the three inputs are given, k is out of range, or the sequences are longer
            than the model has positions.
        """
        config = self.config
        hidden_state, tokens = self._tokens(input_ids, inputs_embeds, continue_from)
        shape = tokens.shape[:2]
        if shape[1] > config.max_length:
            raise ValueError(f"sequences have {shape[1]} tokens, but the model has {config.max_length} positions")
        attention_mask = jnp.ones(shape, jnp.int32) if attention_mask is None else jnp.asarray(attention_mask)
        if token_type_ids is None:
            token_type_ids = jnp.zeros(shape, jnp.int32)
        encoder, form = encoder_of(config), Form(self.layers, self.unroll, self.gradient_checkpointing, self.attention)
        features, states = encoder.model(config, self.dtype, form, name=config.base_prefix)(
            tokens,
            attention_mask,
            jnp.asarray(token_type_ids),
            hidden_state=hidden_state,
            deterministic=deterministic,
            first_token_only=self.first_token_only and config.reads_first_token,
            output_hidden_states=output_hidden_states,
            perturb=perturb,
        )
        logits = encoder.head(config, self.dtype, features, attention_mask, deterministic=deterministic)
        logits = logits.astype(jnp.float32)
        return (logits, states) if output_hidden_states else logits

    def embed(self, input_ids: ArrayLike) -> Array:
        """The word embeddings of ids (batch, length), as ``inputs_embeds`` takes them.

        They are float32, (batch, length, embedding_size). Positions, token types and dropout are not yet applied. Call
        it by ``model.apply({"params": params}, input_ids, method="embed")``.
        """
        words = self.config.word_embeddings(self.variables["params"])
        return look_up(jnp.asarray(words), jnp.asarray(input_ids), padding=self.config.pad_token_id)

    def _tokens(self, input_ids, inputs_embeds, continue_from) -> tuple[int | None, Array]:
        """The number of the hidden state that is given, else None; and the one input that is given.

        Raises:
          ValueError: if none or several inputs are given, or there is no such hidden state.
        """
        if sum(x is not None for x in (input_ids, inputs_embeds, continue_from)) != 1:
            raise ValueError("pass exactly one of input_ids, inputs_embeds and continue_from")
        if input_ids is not None:
            return None, jnp.asarray(input_ids)
        if inputs_embeds is not None:
            return None, jnp.asarray(inputs_embeds, jnp.float32)
        number, layers = continue_from[0], self.config.num_hidden_layers
        if not 0 <= number < layers:
            raise ValueError(f"hidden state {number}: must be 0 to {layers - 1}, which have a layer above")
        return number, jnp.asarray(continue_from[1], self.dtype)
