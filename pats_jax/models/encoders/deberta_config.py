"""The settings of a DeBERTa-v2 or v3 encoder and its head, as in a Hugging Face ``config.json``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pats_jax.core.files import JsonObject
from pats_jax.errors import InputError, shown
from pats_jax.models.config import ACTIVATIONS, EncoderConfig, is_number, is_whole

_TERMS = ("c2p", "p2c")
_MORE_ACTIVATIONS = (*ACTIVATIONS, "tanh")  # of the convolution and the pooler
_FLAGS = ("relative_attention", "share_att_key", "position_biased_input")


@dataclass(frozen=True)
class DebertaConfig(EncoderConfig):
    """Sizes, rates and labels of a DeBERTa-v2 or v3.

    ``legacy``, Transformers' choice between two names of the masked-language-model head, stays in ``extra``.

    Attributes:
      relative_attention: whether scores depend on the distance of two tokens.
      pos_att_type: how they do: ``c2p`` for the query's content and the distance, ``p2c`` for the key's; a list, or a
        string ``"c2p|p2c"``; None for neither.
      position_buckets: number of buckets of distances in each direction; 0 or less: each distance has its own.
      max_relative_positions: the distance of the last bucket; less than 1: ``max_position_embeddings``.
      share_att_key: whether relative embeddings are projected by the layers of keys and queries themselves.
      norm_rel_ebd: ``"layer_norm"`` if relative embeddings are normalised, else ``"none"``.
      position_biased_input: whether position embeddings are added to the word embeddings.
      embedding_size: the width of the word embeddings; None for ``hidden_size``, which replaces it.
      conv_kernel_size: width, in tokens, of the convolution beside the first layer; 0 for none.
      conv_act: its activation.
      conv_groups: its number of groups.
      pooler_hidden_act: the activation of the head's pooler.
      pooler_dropout: the dropout rate before the pooler.
    """

    families: ClassVar[Mapping[str, tuple[str, JsonObject]]] = {"deberta-v2": ("DebertaV2", {})}
    file_names: ClassVar[Mapping[str, str]] = {"classifier_dropout": "cls_dropout"}
    base_parts: ClassVar[tuple[str, ...]] = ("embeddings", "encoder")
    surplus: ClassVar[str] = (
        r"(cls\.predictions|lm_predictions|mask_predictions)\..*|deberta\.embeddings\.position_embeddings\..*"
    )
    least_token_types: ClassVar[int] = 0

    model_type: str = "deberta-v2"
    vocab_size: int = 128100
    hidden_size: int = 1536
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-7
    relative_attention: bool = False
    pos_att_type: str | tuple[str, ...] | None = None
    position_buckets: int = -1
    max_relative_positions: int = -1
    share_att_key: bool = False
    norm_rel_ebd: str = "none"
    position_biased_input: bool = True
    embedding_size: int = None  # type: ignore[assignment]  # __post_init__ replaces it
    conv_kernel_size: int = 0
    conv_act: str = "tanh"
    conv_groups: int = 1
    pooler_hidden_act: str = "gelu"
    pooler_dropout: float = 0.0

    def __post_init__(self):
        if self.embedding_size is None:
            object.__setattr__(self, "embedding_size", self.hidden_size)
        if isinstance(self.pos_att_type, list):  # as JSON has it; a model hashes its config
            object.__setattr__(self, "pos_att_type", tuple(self.pos_att_type))

    @property
    def base_prefix(self) -> str:
        return "deberta"

    @property
    def has_pooler(self) -> bool:
        return False

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings

    @property
    def position_terms(self) -> frozenset[str]:
        """The terms of scores that depend on distances: ``c2p``, ``p2c``, both or none."""
        kinds = self.pos_att_type or ()
        return (
            frozenset(kind.strip() for kind in kinds.lower().split("|")) if isinstance(kinds, str) else frozenset(kinds)
        )

    @property
    def num_terms(self) -> int:
        """The number of terms of a score, which is divided by its root."""
        return 1 + len(self.position_terms)

    @property
    def normalises_relative(self) -> bool:
        """Whether relative embeddings are normalised."""
        return "layer_norm" in [kind.strip() for kind in self.norm_rel_ebd.lower().split("|")]

    @property
    def longest_distance(self) -> int:
        """The distance of the last bucket."""
        return self.max_relative_positions if self.max_relative_positions >= 1 else self.max_position_embeddings

    @property
    def relative_span(self) -> int:
        """The number of relative embeddings in each direction."""
        return self.position_buckets if self.position_buckets > 0 else self.longest_distance

    @property
    def tensor_sizes(self) -> dict[str, tuple[int, ...]]:
        sizes: dict[str, tuple[int, ...]] = {"embeddings.word_embeddings": (self.vocab_size, self.embedding_size)}
        if self.position_biased_input:
            sizes["embeddings.position_embeddings"] = (self.max_position_embeddings, self.embedding_size)
        if self.type_vocab_size:
            sizes["embeddings.token_type_embeddings"] = (self.type_vocab_size, self.embedding_size)
        if self.relative_attention:
            sizes["encoder.rel_embeddings"] = (2 * self.relative_span, self.hidden_size)
        sizes["encoder.layer.0.intermediate.dense"] = (self.intermediate_size, self.hidden_size)
        return sizes

    def to_dict(self) -> JsonObject:
        kinds = self.pos_att_type
        return super().to_dict() | {"pos_att_type": list(kinds) if isinstance(kinds, tuple) else kinds}

    def _check(self, source: str) -> None:
        for name in _FLAGS:
            self._require(name, isinstance(getattr(self, name), bool), "true or false", source)
        for name in ("embedding_size", "conv_groups"):
            value = getattr(self, name)
            self._require(name, is_whole(value) and value >= 1, "a positive whole number", source)
        for name in ("position_buckets", "max_relative_positions"):
            self._require(name, is_whole(getattr(self, name)), "a whole number", source)
        rate = self.pooler_dropout
        self._require("pooler_dropout", is_number(rate) and 0 <= rate < 1, "a rate in [0, 1)", source)
        for name in ("conv_act", "pooler_hidden_act"):
            known = ", ".join(_MORE_ACTIVATIONS)
            self._require(name, getattr(self, name) in _MORE_ACTIVATIONS, f"one of {known}", source)
        self._require("norm_rel_ebd", isinstance(self.norm_rel_ebd, str), "'layer_norm' or 'none'", source)
        fits = self.relative_attention or not self.normalises_relative
        self._require("norm_rel_ebd", fits, "'none' without relative_attention", source)
        kinds = self.pos_att_type
        are_names = kinds is None or isinstance(kinds, str)
        are_names = are_names or (isinstance(kinds, tuple) and all(isinstance(kind, str) for kind in kinds))
        only = "c2p, p2c, both or neither"
        self._require("pos_att_type", are_names and self.position_terms <= {*_TERMS, ""}, only, source)
        super()._check(source)
        self._check_sizes(source)

    def _check_sizes(self, source: str) -> None:
        """Raises InputError for sizes that do not fit each other; each is valid by itself."""
        size, groups = self.conv_kernel_size, self.conv_groups
        is_odd = is_whole(size) and (size <= 0 or size % 2 == 1)
        self._require("conv_kernel_size", is_odd, "an odd number, or 0 for no convolution", source)
        self._require("conv_groups", self.hidden_size % groups == 0, f"a divisor of {self.hidden_size}", source)
        buckets, longest = self.position_buckets, self.longest_distance
        fit = buckets <= 0 or (buckets >= 4 and longest - 1 > buckets // 2)
        self._require("position_buckets", fit, f"4 or more, and less than twice {longest} - 1", source)
        for name, usual in self._implied().items():
            value = self.extra.get(name, usual)
            if value != usual:
                raise InputError(f"{source}: {name} {shown(value)} is not supported, only {usual}")

    def _implied(self) -> Mapping[str, Any]:
        """Sizes that a config may give, and the only ones that fit."""
        width = self.hidden_size // self.num_attention_heads
        return {"attention_head_size": width, "pooler_hidden_size": self.hidden_size}
