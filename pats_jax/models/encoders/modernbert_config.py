"""The settings of ModernBERT, as in a Hugging Face ``config.json``."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from pats_jax.core.files import JsonObject
from pats_jax.errors import InputError, shown
from pats_jax.models.config import EncoderConfig, is_number, is_whole

GLOBAL, LOCAL = "full_attention", "sliding_attention"  # Transformers' names in layer_types and rope_parameters
POOLINGS = ("cls", "mean")
_THETAS = {GLOBAL: "global_rope_theta", LOCAL: "local_rope_theta"}
_SWITCHES = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias", "decoder_bias")


@dataclass(frozen=True)
class ModernBertConfig(EncoderConfig):
    """Sizes, rates and labels of ModernBERT. It has no token types; tokenizers may give them, and nothing reads them.

    Attributes:
      embedding_dropout: the rate after the embeddings; ``hidden_dropout_prob`` is that inside feed-forward blocks.
      norm_bias: whether LayerNorms have biases.
      attention_bias: whether the linear layers of attention have them.
      mlp_bias: the same for feed-forward blocks.
      classifier_bias: the same for the dense layer of the heads.
      decoder_bias: whether the masked-language-model head has a bias for each word.
      classifier_activation: the activation in the heads.
      classifier_pooling: what the classifier reads: ``"cls"``, the first token, or ``"mean"``, the mean of all tokens.
      local_attention: the window of local layers, in tokens; a token sees half of it on either side.
      layer_types: for each layer, whether its attention is local; empty: global in every layer whose number is a
        multiple of ``global_attn_every_n_layers``.
      global_attn_every_n_layers: see there.
      global_rope_theta: the base of rotary frequencies in global layers.
      local_rope_theta: the same in local layers.
    """

    families: ClassVar[Mapping[str, tuple[str, JsonObject]]] = {"modernbert": ("ModernBert", {})}
    file_names: ClassVar[Mapping[str, str]] = {
        "hidden_act": "hidden_activation",
        "hidden_dropout_prob": "mlp_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "layer_norm_eps": "norm_eps",
    }
    unwritten: ClassVar[tuple[str, ...]] = ("type_vocab_size",)
    base_parts: ClassVar[tuple[str, ...]] = ("embeddings", "layers", "final_norm")
    surplus: ClassVar[str] = r"decoder\..*"
    stack_path: ClassVar[tuple[str, ...]] = ("layers",)
    words_path: ClassVar[tuple[str, ...]] = ("embeddings", "tok_embeddings")
    attention_path: ClassVar[tuple[str, ...]] = ("attn",)
    adapter_blocks: ClassVar[Mapping[str, tuple[tuple[str, ...], ...]]] = {
        "houlsby": (("attn",), ("mlp",)),
        "pfeiffer": (("mlp",),),
    }

    model_type: str = "modernbert"
    vocab_size: int = 50368
    num_hidden_layers: int = 22
    intermediate_size: int = 1152
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    classifier_dropout: float | None = 0.0
    max_position_embeddings: int = 8192
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 50283
    embedding_dropout: float = 0.0
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    classifier_bias: bool = False
    decoder_bias: bool = True
    classifier_activation: str = "gelu"
    classifier_pooling: str = "cls"
    local_attention: int = 128
    layer_types: tuple[str, ...] = ()
    global_attn_every_n_layers: int = 3
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0

    @property
    def base_prefix(self) -> str:
        return "model"

    @property
    def has_pooler(self) -> bool:
        return False

    @property
    def reads_first_token(self) -> bool:
        return self.classifier_pooling == "cls"

    @property
    def unsaved(self) -> frozenset[tuple[str, ...]]:
        """The norm before the first layer's attention, which does not exist: the embeddings are normalised already."""
        leaves = ("scale", "bias") if self.norm_bias else ("scale",)
        return frozenset((self.base_prefix, *self.stack_path, "0", "attn_norm", leaf) for leaf in leaves)

    @property
    def half_window(self) -> int:
        """How many tokens a token of a local layer sees on either side."""
        return self.local_attention // 2

    @property
    def types_of_layers(self) -> tuple[str, ...]:
        """`GLOBAL` or `LOCAL` for each layer."""
        every = self.global_attn_every_n_layers
        return self.layer_types or tuple(LOCAL if n % every else GLOBAL for n in range(self.num_hidden_layers))

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings

    @property
    def tensor_sizes(self) -> dict[str, tuple[int, ...]]:
        return {
            "embeddings.tok_embeddings": (self.vocab_size, self.hidden_size),
            "layers.0.mlp.Wi": (2 * self.intermediate_size, self.hidden_size),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config.json") -> Self:
        """Reads the content of a ``config.json``, of Transformers 4 or 5; see `EncoderConfig.from_dict`."""
        # Transformers 4 wrote layer_norm_eps, too, which nothing reads
        rest = {name: value for name, value in values.items() if name != "layer_norm_eps"}
        rest |= _read_thetas(rest.pop("rope_parameters", None), source)
        types = rest.get("layer_types")
        if types is not None:
            if not isinstance(types, list | tuple):
                raise InputError(f"{source}: layer_types must be a list, got {shown(types)}")
            rest["layer_types"] = tuple(types)
        config = super().from_dict(rest, source)
        by_number = replace(config, layer_types=())
        return by_number if by_number.types_of_layers == config.types_of_layers else config

    def to_dict(self) -> JsonObject:
        """As `EncoderConfig.to_dict`; Transformers 4 and 5 read the rotary settings under different names."""
        rope = {kind: {"rope_type": "default", "rope_theta": getattr(self, _THETAS[kind])} for kind in (LOCAL, GLOBAL)}
        return super().to_dict() | {"layer_types": list(self.types_of_layers), "rope_parameters": rope}

    @classmethod
    def check_structure(cls, values: Mapping[str, Any], source: str) -> None:
        own = {name: value for name, value in values.items() if name != "position_embedding_type"}  # nothing reads it
        super().check_structure(own, source)
        if values.get("rope_scaling") is not None:
            raise InputError(f"{source}: rope_scaling {shown(values['rope_scaling'])} is not supported")
        for name in (*_THETAS.values(), "global_attn_every_n_layers"):
            if name in values and values[name] is None:
                raise InputError(f"{source}: {name} is null; give a number")

    def _check(self, source: str) -> None:
        super()._check(source)
        for name in _SWITCHES:
            self._require(name, isinstance(getattr(self, name), bool), "true or false", source)
        for name in _THETAS.values():
            value = getattr(self, name)
            self._require(name, is_number(value) and value > 0, "a positive number", source)
        rate, window, every = self.embedding_dropout, self.local_attention, self.global_attn_every_n_layers
        self._require("embedding_dropout", is_number(rate) and 0 <= rate < 1, "a rate in [0, 1)", source)
        self._require("local_attention", is_whole(window) and window >= 1, "a positive whole number", source)
        self._require("global_attn_every_n_layers", is_whole(every) and every >= 1, "a positive whole number", source)
        poolings, activations = ", ".join(POOLINGS), ", ".join(self.activations)
        self._require("classifier_pooling", self.classifier_pooling in POOLINGS, f"one of {poolings}", source)
        is_known = self.classifier_activation in self.activations
        self._require("classifier_activation", is_known, f"one of {activations}", source)
        fits = not self.layer_types or len(self.layer_types) == self.num_hidden_layers
        self._require("layer_types", fits, f"a list of num_hidden_layers {self.num_hidden_layers} types", source)
        are_known = all(kind in (GLOBAL, LOCAL) for kind in self.layer_types)
        self._require("layer_types", are_known, f"a list of {GLOBAL} and {LOCAL}", source)
        width = self.hidden_size // self.num_attention_heads
        self._require("num_attention_heads", width % 2 == 0, "so that a head has an even number of units", source)


def _read_thetas(parameters: Any, source: str) -> JsonObject:
    """The rotary bases in ``rope_parameters``, of Transformers 5, by Transformers 4's names, which they override.

    Raises:
      InputError: if it has another form, or asks for another computation.
    """
    if parameters is None:
        return {}
    if not isinstance(parameters, Mapping) or not all(isinstance(value, Mapping) for value in parameters.values()):
        raise InputError(f"{source}: rope_parameters must have an object for each of {GLOBAL} and {LOCAL}")
    found = {}
    for kind, own in parameters.items():
        if kind not in _THETAS:
            raise InputError(f"{source}: rope_parameters: {shown(kind)} is not one of {GLOBAL} and {LOCAL}")
        form = own.get("rope_type", own.get("type", "default"))
        if form != "default":
            raise InputError(f"{source}: rope_parameters: rope_type {shown(form)} is not supported, only 'default'")
        if "rope_theta" in own:
            found[_THETAS[kind]] = own["rope_theta"]
    return found
