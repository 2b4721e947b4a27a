"""DistilBERT: BERT without token types and pooler, with half its layers.

Modules are named after the Hugging Face tensors: ``params["distilbert"]["transformer"]["layer"]["0"]["attention"]
["q_lin"]["kernel"]``. The model has no token types; it accepts and ignores those that a tokenizer gives, as
Transformers' model does.

References:
  Sanh et al. 2019, DistilBERT, a distilled version of BERT (arXiv:1910.01108).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pats_jax.core.files import JsonObject
from pats_jax.models.config import EncoderConfig
from pats_jax.models.encoders import bert
from pats_jax.models.encoders.encoder import Encoder, MaskedLanguageModel
from pats_jax.models.encoders.model import EncoderModel, Layers
from pats_jax.models.layers import (
    ACTIVATION_FUNCTIONS,
    LayerNorm,
    attend,
    dense,
    embedding_table,
    look_up,
    pad_front,
    project_to_heads,
)

# BERT's names that Transformers does not read in DistilBERT's config.json. The other three are read under both names.
_NOT_READ = (
    *("intermediate_size", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    *("layer_norm_eps", "type_vocab_size"),
)


@dataclass(frozen=True)
class DistilbertConfig(EncoderConfig):
    """Sizes, rates and labels of a DistilBERT.

    ``sinusoidal_pos_embds`` only says how Transformers draws the position embeddings of a new model, so it has no
    effect here.
    """

    families: ClassVar[Mapping[str, tuple[str, JsonObject]]] = {"distilbert": ("DistilBert", {})}
    file_names: ClassVar[Mapping[str, str]] = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "classifier_dropout": "seq_classif_dropout",
    }
    unwritten: ClassVar[tuple[str, ...]] = ("layer_norm_eps", "type_vocab_size")  # under whatever name: eps is 1e-12
    base_parts: ClassVar[tuple[str, ...]] = ("embeddings", "transformer")
    surplus: ClassVar[str] = r"vocab_(transform|layer_norm|projector)\..*"
    stack_path: ClassVar[tuple[str, ...]] = ("transformer", "layer")
    attention_path: ClassVar[tuple[str, ...]] = ("attention",)
    adapter_blocks: ClassVar[Mapping[str, tuple[tuple[str, ...], ...]]] = {
        "houlsby": (("attention",), ("ffn",)),
        "pfeiffer": (("ffn",),),
    }

    model_type: str = "distilbert"
    num_hidden_layers: int = 6
    classifier_dropout: float | None = 0.2

    @property
    def base_prefix(self) -> str:
        return "distilbert"

    @property
    def has_pooler(self) -> bool:
        return False

    @property
    def tensor_sizes(self) -> dict[str, tuple[int, ...]]:
        return {
            "embeddings.word_embeddings": (self.vocab_size, self.hidden_size),
            "embeddings.position_embeddings": (self.max_position_embeddings, self.hidden_size),
            "transformer.layer.0.ffn.lin1": (self.intermediate_size, self.hidden_size),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config.json") -> Self:
        unread = {name: value for name, value in values.items() if name in _NOT_READ}
        config = super().from_dict({name: x for name, x in values.items() if name not in unread}, source)
        return replace(config, extra={**config.extra, **unread})


class Embeddings(nn.Module):
    """Sum of word and position embeddings, normalised. Rows are looked up and summed in float32, as in BERT."""

    config: DistilbertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, tokens: Array, attention_mask: Array, token_type_ids: Array, *, deterministic: bool) -> Array:
        """Embeds ids (batch, length), or word embeddings (batch, length, hidden), as (batch, length, hidden).

        Mask and token types change nothing.
        """
        config = self.config

        def table(count: int, name: str) -> Array:
            return embedding_table(config, count, config.hidden_size, name)

        if tokens.ndim == 2:
            hidden = look_up(table(config.vocab_size, "word_embeddings"), tokens, padding=config.pad_token_id)
        else:
            hidden = tokens.astype(jnp.float32)
        first, length = self.first_position(hidden.shape[1]), hidden.shape[1]
        hidden += table(config.max_position_embeddings, "position_embeddings")[first : first + length]
        hidden = LayerNorm(config, self.dtype, name="LayerNorm")(hidden)
        return nn.Dropout(config.hidden_dropout_prob)(hidden, deterministic=deterministic)

    def first_position(self, length: int) -> int:
        """The position of the first of ``length`` tokens: 0, unless a prefix comes before it."""
        return 0


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention and its output projection, which has no dropout."""

    config: DistilbertConfig
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(self, queries_from: Array, hidden: Array, bias: Array, *, deterministic: bool) -> Array:
        """Attends from the query tokens to all tokens; shapes as in `bert.SelfAttention`."""
        config = self.config

        def project(tokens: Array, name: str) -> Array:
            return project_to_heads(config, tokens, self.dtype, name)

        query = project(queries_from, "q_lin")
        key, value = self.attended_to(project(hidden, "k_lin"), project(hidden, "v_lin"))
        bias = pad_front(bias, key.shape[1] - hidden.shape[1])
        attended = attend(config, self.attention, query, key, value, bias, deterministic=deterministic)
        return dense(config, config.hidden_size, self.dtype, "out_lin")(attended)

    def attended_to(self, key: Array, value: Array) -> tuple[Array, Array]:
        """Returns keys and values, (batch, length, heads, width). Prefix tuning acts here."""
        return key, value

    def adapt(self, x: Array, residual: Array, norm: LayerNorm) -> Array:
        """Returns x, (batch, length, hidden). Bottleneck adapters act here."""
        return x


class FeedForward(nn.Module):
    """The feed-forward block, ``dropout(lin2(activation(lin1(x))))``."""

    config: DistilbertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Array, *, deterministic: bool) -> Array:
        config = self.config
        wide = dense(config, config.intermediate_size, self.dtype, "lin1")(hidden)
        narrow = dense(config, config.hidden_size, self.dtype, "lin2")(ACTIVATION_FUNCTIONS[config.hidden_act](wide))
        return nn.Dropout(config.hidden_dropout_prob)(narrow, deterministic=deterministic)

    def adapt(self, x: Array, residual: Array, norm: LayerNorm) -> Array:
        """Returns x, (batch, length, hidden). Bottleneck adapters act here."""
        return x


class Layer(nn.Module):
    """One layer: ``h = norm(x + attention(x))``, then ``norm(h + feed_forward(h))``."""

    config: DistilbertConfig
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(self, hidden: Array, bias: Array, *, deterministic: bool, first_token_only: bool) -> Array:
        """Maps (batch, length, hidden) to the same shape, or to (batch, 1, hidden) with ``first_token_only``."""
        queries_from = hidden[:, :1] if first_token_only else hidden
        attention = SelfAttention(self.config, self.dtype, self.attention, name="attention")
        norm = LayerNorm(self.config, self.dtype, name="sa_layer_norm")
        x = attention(queries_from, hidden, bias, deterministic=deterministic)
        attended = norm(queries_from + attention.adapt(x, queries_from, norm))

        feed_forward = FeedForward(self.config, self.dtype, name="ffn")
        norm = LayerNorm(self.config, self.dtype, name="output_layer_norm")
        x = feed_forward(attended, deterministic=deterministic)
        return norm(attended + feed_forward.adapt(x, attended, norm))


class DistilbertLayers(Layers):
    """DistilBERT's layers."""

    layer = Layer


class DistilbertModel(EncoderModel):
    """Embeddings and layers."""

    embeddings = Embeddings
    layers = DistilbertLayers
    layers_name = "transformer"


def _head(
    config: EncoderConfig, dtype: DTypeLike, features: Array, attention_mask: Array, *, deterministic: bool
) -> Array:
    """DistilBERT's logits: a ReLU layer on the first token, dropout and a linear layer."""
    features = jax.nn.relu(dense(config, config.hidden_size, dtype, "pre_classifier")(features))
    features = nn.Dropout(config.head_dropout)(features, deterministic=deterministic)
    return dense(config, config.num_labels, dtype, "classifier")(features)


DISTILBERT = Encoder(
    config=DistilbertConfig,
    model=DistilbertModel,
    head=_head,
    masked_lm=MaskedLanguageModel(
        bert.MaskedLanguageModelHead,
        prefix=(),
        own_names={
            ("dense",): ("vocab_transform",),
            ("LayerNorm",): ("vocab_layer_norm",),
            ("bias",): ("vocab_projector", "bias"),
        },
        decoder=("vocab_projector",),
    ),
)
