"""ELECTRA: BERT's layers on word embeddings of a width of their own, with a head of its own.

Modules are named after the Hugging Face tensors: ``params["electra"]["encoder"]["layer"]["0"]["attention"]["self"]
["query"]["kernel"]``. Discriminators and generators are read alike. Only a generator's checkpoint has a
masked-language-model head; a discriminator's own head, which tells replaced tokens, is not read.

References:
  Clark et al. 2020, ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators (arXiv:2003.10555).
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jax import Array
from jax.typing import DTypeLike

from pats_jax.core.files import JsonObject
from pats_jax.models.config import EncoderConfig, is_whole
from pats_jax.models.encoders import bert
from pats_jax.models.encoders.encoder import Encoder, MaskedLanguageModel
from pats_jax.models.encoders.model import EncoderModel
from pats_jax.models.layers import ACTIVATION_FUNCTIONS, dense


@dataclass(frozen=True)
class ElectraConfig(EncoderConfig):
    """Sizes, rates and labels of an ELECTRA.

    The settings ``summary_...`` are of Transformers' head for multiple choice, so they have no effect here.

    Attributes:
      embedding_size: the width of the word, position and token type embeddings.
    """

    families: ClassVar[Mapping[str, tuple[str, JsonObject]]] = {"electra": ("Electra", {})}
    base_parts: ClassVar[tuple[str, ...]] = ("embeddings", "embeddings_project", "encoder")
    surplus: ClassVar[str] = r"(discriminator_predictions|generator_predictions|generator_lm_head)\..*"

    model_type: str = "electra"
    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    embedding_size: int = 128

    @property
    def base_prefix(self) -> str:
        return "electra"

    @property
    def has_pooler(self) -> bool:
        return False

    @property
    def tensor_sizes(self) -> dict[str, tuple[int, ...]]:
        return {
            "embeddings.word_embeddings": (self.vocab_size, self.embedding_size),
            "embeddings.position_embeddings": (self.max_position_embeddings, self.embedding_size),
            "embeddings.token_type_embeddings": (self.type_vocab_size, self.embedding_size),
            "encoder.layer.0.intermediate.dense": (self.intermediate_size, self.hidden_size),
        }

    def _check(self, source: str) -> None:
        is_size = is_whole(self.embedding_size) and self.embedding_size >= 1
        self._require("embedding_size", is_size, "a positive whole number", source)
        super()._check(source)


class ElectraModel(EncoderModel):
    """Embeddings, their projection if their width is not the layers', and BERT's layers."""

    embeddings = bert.Embeddings
    layers = bert.BertLayers

    def projected(self, embedded: Array) -> Array:
        if self.config.embedding_size == self.config.hidden_size:
            return embedded
        return dense(self.config, self.config.hidden_size, self.dtype, "embeddings_project")(embedded)


def _head(
    config: EncoderConfig, dtype: DTypeLike, features: Array, attention_mask: Array, *, deterministic: bool
) -> Array:
    """ELECTRA's logits, from the first token: RoBERTa's head, with GELU whatever ``hidden_act`` is."""
    head = bert.RobertaHead(config, dtype, ACTIVATION_FUNCTIONS["gelu"], name="classifier")
    return head(features, deterministic=deterministic)


ELECTRA = Encoder(
    config=ElectraConfig,
    model=ElectraModel,
    head=_head,
    masked_lm=MaskedLanguageModel(
        functools.partial(bert.MaskedLanguageModelHead, activation="gelu"),
        prefix=(),
        own_names={
            ("dense",): ("generator_predictions", "dense"),
            ("LayerNorm",): ("generator_predictions", "LayerNorm"),
            ("bias",): ("generator_lm_head", "bias"),
        },
        decoder=("generator_lm_head",),
    ),
)
