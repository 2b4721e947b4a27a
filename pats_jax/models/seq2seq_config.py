"""What a Hugging Face ``config.json`` says about an encoder-decoder: T5 or BART."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from pats_jax.core.files import JsonObject
from pats_jax.errors import InputError, shown
from pats_jax.models.config import ACTIVATIONS, is_number, is_whole

# What is taken for T5 or BART and is not, and why.
_LOOKALIKES = {
    "mbart": "it normalizes before its blocks, and once more after them",
    "pegasus": "it normalizes before its blocks, and its positions are fixed",
    "marian": "its positions are fixed",
    "led": "its attention is local",
    "longt5": "its attention is local",
    "umt5": "each of its layers has relative positions of its own",
    "mt5": "it is not tested",
}
_ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert")


@dataclass(frozen=True)
class Seq2SeqConfig:
    """What `T5Config` and `BartConfig` have in common.

    The fields carry the names of ``config.json``. Everything in that file that we have no use for stays in ``extra``
    and is written back by `to_dict`.
    """

    model_type: ClassVar[str] = ""
    architecture: ClassVar[str] = ""
    sizes: ClassVar[tuple[str, ...]] = ("vocab_size", "d_model")
    rates: ClassVar[tuple[str, ...]] = ()
    tokens: ClassVar[tuple[str, ...]] = ("pad_token_id", "decoder_start_token_id")

    vocab_size: int = 0
    d_model: int = 0
    pad_token_id: int = 0
    eos_token_id: int | tuple[int, ...] = 0
    decoder_start_token_id: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False, kw_only=True)

    @property
    def num_layers_of(self) -> dict[str, int]:
        """How many layers the ``"encoder"`` and the ``"decoder"`` have."""
        raise NotImplementedError

    @property
    def heads_of(self) -> dict[str, int]:
        """How many heads the layers of the ``"encoder"`` and the ``"decoder"`` have."""
        raise NotImplementedError

    @property
    def head_width(self) -> int:
        """The units of a head of the decoder."""
        raise NotImplementedError

    @property
    def max_length(self) -> int | None:
        """The longest sequence in tokens; None if there is none."""
        return None

    @property
    def generation_defaults(self) -> JsonObject:
        """What Transformers takes for generation where neither of a checkpoint's two files says it."""
        return {name: getattr(self, name) for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config.json") -> Self:
        """Reads the content of a ``config.json``.

        Args:
          values: the parsed JSON object.
          source: what to call it in error messages.

        Raises:
          InputError: if a variant that we do not have, or a value of a wrong type or out of range.
        """
        rest = {name: value for name, value in values.items() if name not in ("model_type", "torch_dtype")}
        for name, expected in (("is_decoder", False), ("is_encoder_decoder", True)):
            if rest.get(name) not in (expected, None):
                raise InputError(f"{source}: {name} is {shown(rest[name])}; only whole encoder-decoders are supported")
        rest = cls._changed(rest, source)
        names = [entry.name for entry in dataclasses.fields(cls) if entry.name != "extra"]
        own = {name: rest.pop(name) for name in names if name in rest}
        eos = own.get("eos_token_id")
        if isinstance(eos, list):
            own["eos_token_id"] = tuple(eos)
        config = cls(**{name: value for name, value in own.items() if value is not None}, extra=rest)
        config._check(source)
        return config

    def to_dict(self) -> JsonObject:
        """The content of a ``config.json`` for Transformers' class of this model type."""
        own = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.name != "extra"}
        return {
            **self.extra,
            **own,
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "is_encoder_decoder": True,
            "dtype": "float32",
        }

    @classmethod
    def _changed(cls, values: JsonObject, source: str) -> JsonObject:
        """The values with what this class derives from several of them; refuses other models."""
        return values

    def _check(self, source: str) -> None:
        """Raises InputError unless every field is of its type and in its range."""
        for name in self.sizes:
            value = getattr(self, name)
            self._require(name, is_whole(value) and value >= 1, "a positive whole number", source)
        for name in self.rates:
            value = getattr(self, name)
            self._require(name, is_number(value) and 0 <= value < 1, "a rate in [0, 1)", source)
        for name in self.tokens:
            value = getattr(self, name)
            is_token = is_whole(value) and 0 <= value < self.vocab_size
            self._require(name, is_token, f"a token, from 0 to vocab_size - 1 ({self.vocab_size - 1})", source)
        eos = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        self._require("eos_token_id", bool(eos) and all(map(is_whole, eos)), "a token or a list of tokens", source)

    def _require(self, name: str, holds: bool, expected: str, source: str) -> None:
        if not holds:
            raise InputError(f"{source}: {name} must be {expected}, got {shown(getattr(self, name))}")


@dataclass(frozen=True)
class T5Config(Seq2SeqConfig):
    """Sizes and rates of T5 1.0, T5 1.1 and Flan-T5.

    ``tie_word_embeddings`` says whether the head is the table of words, as it is in the checkpoint, and
    ``scale_decoder_outputs`` whether the decoder's states are multiplied by ``d_model ** -0.5`` before it. Transformers
    4 writes one key for both, which `from_dict` reads so.
    """

    model_type: ClassVar[str] = "t5"
    architecture: ClassVar[str] = "T5ForConditionalGeneration"
    sizes: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "d_model",
        "d_kv",
        "d_ff",
        "num_layers",
        "num_decoder_layers",
        "num_heads",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
    )
    rates: ClassVar[tuple[str, ...]] = ("dropout_rate",)

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True
    pad_token_id: int = 0
    eos_token_id: int | tuple[int, ...] = 1
    decoder_start_token_id: int = 0

    @property
    def num_layers_of(self) -> dict[str, int]:
        return {"encoder": self.num_layers, "decoder": self.num_decoder_layers}

    @property
    def heads_of(self) -> dict[str, int]:
        return {"encoder": self.num_heads, "decoder": self.num_heads}

    @property
    def head_width(self) -> int:
        return self.d_kv

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward blocks multiply their activation by a second projection."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """Its name; "gated-gelu" means the approximation by tanh."""
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else self.feed_forward_proj.removeprefix("gated-")

    @classmethod
    def _changed(cls, values: JsonObject, source: str) -> JsonObject:
        tied = values.get("tie_word_embeddings", True) is not False
        scaled = values.get("scale_decoder_outputs")
        layers = values.get("num_layers") or cls.num_layers
        decoder_layers = values.get("num_decoder_layers")
        return {
            **{name: value for name, value in values.items() if name not in ("dense_act_fn", "is_gated_act")},
            "tie_word_embeddings": tied,
            "scale_decoder_outputs": tied if scaled is None else scaled,
            "num_decoder_layers": layers if decoder_layers is None else decoder_layers,
        }

    def _check(self, source: str) -> None:
        super()._check(source)
        eps, factor, proj = self.layer_norm_epsilon, self.initializer_factor, self.feed_forward_proj
        self._require("layer_norm_epsilon", is_number(eps) and eps > 0, "a positive number", source)
        self._require("initializer_factor", is_number(factor) and factor >= 0, "a number, 0 or more", source)
        self._require("scale_decoder_outputs", isinstance(self.scale_decoder_outputs, bool), "true or false", source)
        known = [f"{gate}{name}" for gate in ("", "gated-") for name in ACTIVATIONS]
        if not isinstance(proj, str) or proj not in known:
            raise InputError(f"{source}: feed_forward_proj {shown(proj)} is not supported; use {', '.join(known)}")
        buckets, farthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        self._require("relative_attention_num_buckets", buckets >= 4, "at least 4", source)
        self._require("relative_attention_max_distance", farthest > buckets // 2, f"above {buckets // 2}", source)


@dataclass(frozen=True)
class BartConfig(Seq2SeqConfig):
    """Sizes and rates of BART."""

    model_type: ClassVar[str] = "bart"
    architecture: ClassVar[str] = "BartForConditionalGeneration"
    sizes: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "d_model",
        "max_position_embeddings",
        "encoder_layers",
        "encoder_ffn_dim",
        "encoder_attention_heads",
        "decoder_layers",
        "decoder_ffn_dim",
        "decoder_attention_heads",
    )
    rates: ClassVar[tuple[str, ...]] = ("dropout", "attention_dropout", "activation_dropout")

    vocab_size: int = 50265
    d_model: int = 1024
    max_position_embeddings: int = 1024
    encoder_layers: int = 12
    encoder_ffn_dim: int = 4096
    encoder_attention_heads: int = 16
    decoder_layers: int = 12
    decoder_ffn_dim: int = 4096
    decoder_attention_heads: int = 16
    activation_function: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02
    scale_embedding: bool = False
    pad_token_id: int = 1
    bos_token_id: int = 0
    eos_token_id: int | tuple[int, ...] = 2
    decoder_start_token_id: int = 2

    @property
    def num_layers_of(self) -> dict[str, int]:
        return {"encoder": self.encoder_layers, "decoder": self.decoder_layers}

    @property
    def heads_of(self) -> dict[str, int]:
        return {"encoder": self.encoder_attention_heads, "decoder": self.decoder_attention_heads}

    @property
    def head_width(self) -> int:
        return self.d_model // self.decoder_attention_heads

    @property
    def max_length(self) -> int | None:
        return self.max_position_embeddings

    @property
    def generation_defaults(self) -> JsonObject:
        return {**super().generation_defaults, "bos_token_id": self.bos_token_id, "forced_eos_token_id": 2}

    @classmethod
    def _changed(cls, values: JsonObject, source: str) -> JsonObject:
        for name in ("normalize_before", "add_final_layer_norm", "static_position_embeddings"):
            if values.get(name):
                raise InputError(f"{source}: {name} is true, as in mBART or Marian; only BART itself is supported")
        if values.get("normalize_embedding") is False:
            raise InputError(f"{source}: normalize_embedding is false; only BART itself is supported, where it is true")
        if values.get("tie_word_embeddings") is False:
            raise InputError(f"{source}: tie_word_embeddings is false; BART's head is its table of words")
        for name in ("encoder_layerdrop", "decoder_layerdrop"):
            if values.get(name):
                raise InputError(f"{source}: {name} {shown(values[name])} is not supported; set it to 0")
        return values

    def _check(self, source: str) -> None:
        super()._check(source)
        deviation, activation = self.init_std, self.activation_function
        self._require("init_std", is_number(deviation) and deviation >= 0, "a number, 0 or more", source)
        self._require("scale_embedding", isinstance(self.scale_embedding, bool), "true or false", source)
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise InputError(
                f"{source}: activation_function {shown(activation)} is not supported; use {', '.join(ACTIVATIONS)}"
            )
        for side, heads in self.heads_of.items():
            if self.d_model % heads:
                raise InputError(
                    f"{source}: d_model {self.d_model} is not a multiple of {side}_attention_heads {heads}"
                )


_KINDS: dict[str, type[T5Config] | type[BartConfig]] = {"t5": T5Config, "bart": BartConfig}


def config_from_dict(values: Mapping[str, Any], source: str = "config.json") -> T5Config | BartConfig:
    """Reads the content of a ``config.json`` as that of the model that it names.

    Args:
      values: the parsed JSON object.
      source: what to call it in error messages.

    Raises:
      InputError: if another model type, or as from `Seq2SeqConfig.from_dict`.
    """
    model_type = values.get("model_type")
    if isinstance(model_type, str) and model_type in _KINDS:
        return _KINDS[model_type].from_dict(values, source)
    reason = ""
    if isinstance(model_type, str) and model_type in _LOOKALIKES:
        reason = f" ({_LOOKALIKES[model_type]})"
    if isinstance(model_type, str) and model_type in _ENCODERS:
        reason = " (an encoder, which cannot write)"
    raise InputError(f"{source}: model_type {shown(model_type)} is not supported{reason}; use a t5 or bart checkpoint")
