"""MPNet: BERT's layers without token types, with RoBERTa's positions and T5's bias of relative positions.

Modules are named after the Hugging Face tensors: ``params["mpnet"]["encoder"]["layer"]["0"]["attention"]["attn"]
["q"]["kernel"]``. One table of relative positions, ``params["mpnet"]["encoder"]["relative_attention_bias"]``, serves
all layers. The model has no token types; it accepts and ignores those that a tokenizer gives, as Transformers' model
does.

References:
  Song et al. 2020, MPNet: Masked and Permuted Pre-training for Language Understanding (arXiv:2004.09297).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pats_jax.core.files import JsonObject
from pats_jax.models import relative_positions
from pats_jax.models.attention import EINSUM
from pats_jax.models.config import EncoderConfig, is_whole
from pats_jax.models.encoders import bert
from pats_jax.models.encoders.model import EncoderModel, Layers
from pats_jax.models.layers import (
    LayerNorm,
    attend,
    dense,
    embedding_table,
    look_up,
    pad_front,
    positions_after_padding,
    project_to_heads,
)

_PADDING = 1  # the number of the padding token, and of the position of padding
_BUCKETS, _FARTHEST = 32, 128  # of relative positions, however many rows the table has


@dataclass(frozen=True)
class MpnetConfig(EncoderConfig):
    """Sizes, rates and labels of an MPNet.

    Attributes:
      relative_attention_num_buckets: number of rows of the table of relative positions. The model uses the first 32,
        as Transformers does.
    """

    families: ClassVar[Mapping[str, tuple[str, JsonObject]]] = {"mpnet": ("MPNet", {})}
    base_parts: ClassVar[tuple[str, ...]] = ("embeddings", "encoder", "pooler")
    surplus: ClassVar[str] = r"lm_head\..*|mpnet\.pooler\..*"
    attention_path: ClassVar[tuple[str, ...]] = ("attention", "attn")
    adapter_blocks: ClassVar[Mapping[str, tuple[tuple[str, ...], ...]]] = {
        "houlsby": (("attention",), ("output",)),
        "pfeiffer": (("output",),),
    }
    unwritten: ClassVar[tuple[str, ...]] = ("type_vocab_size",)

    model_type: str = "mpnet"
    vocab_size: int = 30527
    pad_token_id: int = _PADDING
    relative_attention_num_buckets: int = _BUCKETS

    @property
    def base_prefix(self) -> str:
        return "mpnet"

    @property
    def has_pooler(self) -> bool:
        return False

    @property
    def max_length(self) -> int:
        """The length of the longest sequence, in tokens, whose positions are counted from 2."""
        return self.max_position_embeddings - (_PADDING + 1)

    @property
    def tensor_sizes(self) -> dict[str, tuple[int, ...]]:
        return {
            "embeddings.word_embeddings": (self.vocab_size, self.hidden_size),
            "embeddings.position_embeddings": (self.max_position_embeddings, self.hidden_size),
            "encoder.relative_attention_bias": (self.relative_attention_num_buckets, self.num_attention_heads),
            "encoder.layer.0.intermediate.dense": (self.intermediate_size, self.hidden_size),
        }

    def _check(self, source: str) -> None:
        buckets = self.relative_attention_num_buckets
        is_enough = is_whole(buckets) and buckets >= _BUCKETS
        self._require("relative_attention_num_buckets", is_enough, f"at least {_BUCKETS}, which are used", source)
        self._require("pad_token_id", self.pad_token_id == _PADDING, f"{_PADDING}, as positions imply", source)
        super()._check(source)


class Embeddings(nn.Module):
    """Sum of word and position embeddings, normalised. Rows are looked up and summed in float32, as in BERT.

    Padding has position 1, and tokens are counted from 2 on. Word and position embeddings of padding get no gradient.
    """

    config: MpnetConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, tokens: Array, attention_mask: Array, token_type_ids: Array, *, deterministic: bool) -> Array:
        """Embeds ids (batch, length), or word embeddings (batch, length, hidden), as (batch, length, hidden).

        Token types change nothing.
        """
        config = self.config

        def table(count: int, name: str) -> Array:
            return embedding_table(config, count, config.hidden_size, name)

        if tokens.ndim == 2:
            is_token = tokens != _PADDING
            hidden = look_up(table(config.vocab_size, "word_embeddings"), tokens, padding=_PADDING)
        else:
            hidden, is_token = tokens.astype(jnp.float32), attention_mask != 0
        first = self.first_position(hidden.shape[1])
        positions = positions_after_padding(is_token, padding=_PADDING, first=first)
        hidden += look_up(table(config.max_position_embeddings, "position_embeddings"), positions, padding=_PADDING)
        hidden = LayerNorm(config, self.dtype, name="LayerNorm")(hidden)
        return nn.Dropout(config.hidden_dropout_prob)(hidden, deterministic=deterministic)

    def first_position(self, length: int) -> int:
        """The position of the first of ``length`` tokens, less 2: 0, unless a prefix comes before it."""
        return 0


class RelativePositions(nn.Module):
    """The learned bias of scores by relative position, one table for all layers."""

    config: MpnetConfig

    @nn.compact
    def __call__(self, length: int) -> Array:
        """The bias of the scores of as many keys as queries, float32 (1, heads, queries, keys)."""
        config = self.config
        shape = (config.relative_attention_num_buckets, config.num_attention_heads)
        table = self.param("embedding", nn.initializers.normal(config.initializer_range), shape)
        rows = relative_positions.buckets(
            relative_positions.distances(length), bidirectional=True, count=_BUCKETS, farthest=_FARTHEST
        )
        return relative_positions.spread(relative_positions.choose(table, rows), length)


class SelfAttention(nn.Module):
    """Multi-head attention with a bias by relative position, ``softmax(Q K^T / sqrt(width) + bias) V``, projected."""

    config: MpnetConfig
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(
        self, queries_from: Array, hidden: Array, bias: Array, positions: Array, *, deterministic: bool
    ) -> Array:
        """Attends from the query tokens to all tokens.

        Args:
          queries_from: the tokens that attend, the first ones of ``hidden``: (batch, queries, hidden).
          hidden: the tokens attended to, (batch, length, hidden).
          bias: float32 (batch, 1, 1, length): 0 for tokens, a large negative number for padding.
          positions: the bias by relative position, float32 (1, heads, length, length).
          deterministic: whether dropout is off.

        Returns:
          The attended values, projected: (batch, queries, hidden).
        """
        config = self.config

        def project(tokens: Array, name: str) -> Array:
            return project_to_heads(config, tokens, self.dtype, name)

        query = project(queries_from, "q")
        key, value = self.attended_to(project(hidden, "k"), project(hidden, "v"))
        bias = pad_front(bias + positions[:, :, : query.shape[1]], key.shape[1] - hidden.shape[1])
        attended = attend(config, EINSUM, query, key, value, bias, deterministic=deterministic)
        return dense(config, config.hidden_size, self.dtype, "o")(attended)

    def attended_to(self, key: Array, value: Array) -> tuple[Array, Array]:
        """Returns keys and values, (batch, length, heads, width). Prefix tuning acts here."""
        return key, value


class Attention(nn.Module):
    """Self-attention and its residual: ``LayerNorm(residual + dropout(attention(x)))``."""

    config: MpnetConfig
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(
        self, queries_from: Array, hidden: Array, bias: Array, positions: Array, *, deterministic: bool
    ) -> Array:
        x = SelfAttention(self.config, self.dtype, self.attention, name="attn")(
            queries_from, hidden, bias, positions, deterministic=deterministic
        )
        x = nn.Dropout(self.config.hidden_dropout_prob)(x, deterministic=deterministic)
        norm = LayerNorm(self.config, self.dtype, name="LayerNorm")
        return norm(queries_from + self.adapt(x, queries_from, norm))

    def adapt(self, x: Array, residual: Array, norm: LayerNorm) -> Array:
        """Returns x, (batch, length, hidden). Bottleneck adapters act here."""
        return x


class Layer(nn.Module):
    """One layer: attention, then feed-forward."""

    config: MpnetConfig
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(
        self, hidden: Array, bias: Array, positions: Array, *, deterministic: bool, first_token_only: bool
    ) -> Array:
        """Maps (batch, length, hidden) to the same shape, or to (batch, 1, hidden) with ``first_token_only``."""
        queries_from = hidden[:, :1] if first_token_only else hidden
        attended = Attention(self.config, self.dtype, self.attention, name="attention")(
            queries_from, hidden, bias, positions, deterministic=deterministic
        )
        wide = bert.Intermediate(self.config, self.dtype, name="intermediate")(attended)
        return bert.ResidualOutput(self.config, self.dtype, name="output")(wide, attended, deterministic=deterministic)


class MpnetLayers(Layers):
    """The table of relative positions, and the layers."""

    layer = Layer

    def constants(self, hidden: Array) -> tuple[Any, ...]:
        assert isinstance(self.config, MpnetConfig)
        return (RelativePositions(self.config, name="relative_attention_bias")(hidden.shape[1]),)


class MpnetModel(EncoderModel):
    """Embeddings and layers."""

    embeddings = Embeddings
    layers = MpnetLayers
    positions = "the bias of MPNet's relative positions"


MPNET = bert.ROBERTA._replace(config=MpnetConfig, model=MpnetModel)  # its heads are RoBERTa's
