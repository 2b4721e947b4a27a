"""The settings of BERT or RoBERTa and its head, as in a Hugging Face ``config.json``; the base of all encoders'."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from pats_jax.core.files import JsonObject, read_json
from pats_jax.errors import InputError, shown

# The parts of a classifier that are not the encoder itself, in all families: together they are its head.
HEAD_PARTS = ("classifier", "pre_classifier", "pooler", "head")
_ROBERTA_DEFAULTS: JsonObject = {"pad_token_id": 1}
ACTIVATIONS = ("gelu", "gelu_new", "relu")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
MULTI_LABEL = "multi_label_classification"  # problem_type of heads that answer yes or no to each label
_PROBLEM_TYPES = ("regression", "single_label_classification", MULTI_LABEL)
_MOST_LABELS = 1_000_000  # that a number alone may ask for, without names
_LARGEST_FLOAT = 3.4e38  # of float32


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes, rates and labels of an encoder with a sequence classification or regression head.

    This class is that of BERT, RoBERTa and the models that are computed alike; other families derive theirs from it.
    The fields have the names that BERT's ``config.json`` uses, whatever the family's uses. Entries that this library
    does not use stay in ``extra``, and `to_dict` writes them back.

    Attributes:
      families: model type -> prefix of its classes in ``architectures``, and what Transformers takes where config.json
        is silent (it does not write a value that equals its class's default).
      file_names: fields that config.json calls differently -> their name there.
      unwritten: fields that the family's config.json does not have.
      activations: the values of ``hidden_act`` that are supported.
      base_parts: what tensors' names start with in a checkpoint of the encoder alone.
      surplus: the tensors, as a regex, that other kinds of checkpoint hold and a classifier has no place for.
      stack_path: where the layers are, below the encoder.
      words_path: where the word embeddings are, below the encoder.
      attention_path: the module of attention, below a layer.
      adapter_blocks: for each place of bottleneck adapters, the modules with one, below a layer.
      least_token_types: the least value of ``type_vocab_size``; 0 if the family has models without token types.
    """

    families: ClassVar[Mapping[str, tuple[str, JsonObject]]] = {
        "bert": ("Bert", {}),
        "roberta": ("Roberta", {"vocab_size": 50265, **_ROBERTA_DEFAULTS}),
        "xlm-roberta": ("XLMRoberta", _ROBERTA_DEFAULTS),
        "camembert": ("Camembert", _ROBERTA_DEFAULTS),
    }
    file_names: ClassVar[Mapping[str, str]] = {}
    unwritten: ClassVar[tuple[str, ...]] = ()
    activations: ClassVar[tuple[str, ...]] = ACTIVATIONS
    base_parts: ClassVar[tuple[str, ...]] = ("embeddings", "encoder", "pooler")
    surplus: ClassVar[str] = r"cls\.(predictions|seq_relationship)\..*|lm_head\..*|roberta\.pooler\..*"
    stack_path: ClassVar[tuple[str, ...]] = ("encoder", "layer")
    words_path: ClassVar[tuple[str, ...]] = ("embeddings", "word_embeddings")
    attention_path: ClassVar[tuple[str, ...]] = ("attention", "self")
    adapter_blocks: ClassVar[Mapping[str, tuple[tuple[str, ...], ...]]] = {
        "houlsby": (("attention", "output"), ("output",)),
        "pfeiffer": (("output",),),
    }
    least_token_types: ClassVar[int] = 1

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None: hidden_dropout_prob
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0
    problem_type: str | None = None
    id2label: Mapping[int, str] = field(default_factory=lambda: default_labels(2), hash=False)
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @property
    def is_multi_label(self) -> bool:
        """Whether the head answers yes or no to each label, by the logistic function of its logit."""
        return self.problem_type == MULTI_LABEL

    @property
    def label2id(self) -> dict[str, int]:
        return {label: index for index, label in self.id2label.items()}

    @property
    def is_roberta(self) -> bool:
        """Whether positions, head and tensor names are RoBERTa's."""
        return self.model_type in ("roberta", "xlm-roberta", "camembert")

    @property
    def base_prefix(self) -> str:
        """The first part of every encoder tensor's name, such as ``bert`` or ``roberta``."""
        return "roberta" if self.is_roberta else "bert"

    @property
    def embedding_size(self) -> int:
        """The width of the word embeddings."""
        return self.hidden_size

    @property
    def has_pooler(self) -> bool:
        """Whether the encoder itself, below ``base_prefix``, has a pooler, as BERT has."""
        return not self.is_roberta

    @property
    def reads_first_token(self) -> bool:
        """Whether the head reads the first token alone."""
        return True

    @property
    def unsaved(self) -> frozenset[tuple[str, ...]]:
        """The paths of parameters that no file holds, because nothing reads them: they make layers alike."""
        return frozenset()

    @property
    def head_dropout(self) -> float:
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    @property
    def max_length(self) -> int:
        """The length of the longest sequence, in tokens. RoBERTa counts positions from ``pad_token_id + 1``."""
        return self.max_position_embeddings - (self.pad_token_id + 1 if self.is_roberta else 0)

    @property
    def tensor_sizes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of some weights, by their names below ``base_prefix``: they show every size."""
        return {
            "embeddings.word_embeddings": (self.vocab_size, self.hidden_size),
            "embeddings.position_embeddings": (self.max_position_embeddings, self.hidden_size),
            "embeddings.token_type_embeddings": (self.type_vocab_size, self.hidden_size),
            "encoder.layer.0.intermediate.dense": (self.intermediate_size, self.hidden_size),
        }

    def word_embeddings(self, params: Mapping[str, Any]) -> Any:
        """The word embeddings among a model's parameters, (vocab_size, embedding_size)."""
        node = params[self.base_prefix]
        for name in self.words_path:
            node = node[name]
        return node["embedding"]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config.json") -> Self:
        """Reads the content of a ``config.json`` of this class's model types; `encoder_config` reads any.

        Args:
          values: the parsed JSON object.
          source: what to call it in error messages.

        Raises:
          InputError: if the model type is another, a setting that changes the forward pass is not supported, or a value
            has the wrong type or is out of range.
        """
        rest = dict(values)
        model_type = rest.pop("model_type", None)
        if not isinstance(model_type, str) or model_type not in cls.families:
            raise InputError(f"{source}: model_type {shown(model_type)} is not one of {', '.join(cls.families)}")
        cls.check_structure(rest, source)
        id2label = _read_labels(rest, source)
        names = [entry.name for entry in fields(cls)]
        for name, in_file in cls.file_names.items():
            if in_file in rest:
                rest[name] = rest.pop(in_file)
        own = {name: rest.pop(name) for name in names if name in rest}
        known = {name: value for name, value in own.items() if value is not None}  # null: the default
        config = cls(**{**cls.families[model_type][1], **known}, model_type=model_type, id2label=id2label, extra=rest)
        config._check(source)
        return config

    def to_dict(self) -> JsonObject:
        """The content of a ``config.json`` for Transformers' sequence classification class of this model type."""
        names = [entry.name for entry in fields(self) if entry.name not in ("extra", *self.unwritten)]
        own = {name: getattr(self, name) for name in names}
        return {
            **self.extra,
            **{self.file_names.get(name, name): value for name, value in own.items()},
            "architectures": [f"{self.families[self.model_type][0]}ForSequenceClassification"],
            "id2label": {str(index): label for index, label in self.id2label.items()},
            "label2id": self.label2id,
            "dtype": "float32",
        }

    @classmethod
    def check_structure(cls, values: Mapping[str, Any], source: str) -> None:
        """Raises InputError for variants with a different forward pass, and for other entries of a wrong type."""
        position_embedding = values.get("position_embedding_type")
        if position_embedding not in ("absolute", None):
            raise InputError(
                f"{source}: position_embedding_type {shown(position_embedding)} is not supported, only 'absolute'"
            )
        for flag in ("is_decoder", "add_cross_attention"):
            if values.get(flag) not in (False, None):
                raise InputError(f"{source}: {flag} is {shown(values[flag])}; only encoders are supported")
        classes = values.get("architectures")
        if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
            raise InputError(f"{source}: architectures must be a list of class names, got {shown(classes)}")

    def _check(self, source: str) -> None:
        """Raises InputError unless every field has its type and is in its range."""
        for name in _SIZES:
            value = getattr(self, name)
            self._require(name, is_whole(value) and value >= 1, "a positive whole number", source)
        least, token_types = self.least_token_types, self.type_vocab_size
        at_least = "a positive whole number" if least else "a whole number, 0 or more"
        self._require("type_vocab_size", is_whole(token_types) and token_types >= least, at_least, source)
        for name in _RATES:
            value = getattr(self, name)
            self._require(name, value is None or (is_number(value) and 0 <= value < 1), "a rate in [0, 1)", source)
        eps, deviation, pad = self.layer_norm_eps, self.initializer_range, self.pad_token_id
        self._require("layer_norm_eps", is_number(eps) and eps > 0, "a positive number", source)
        self._require("initializer_range", is_number(deviation) and deviation >= 0, "a number, 0 or more", source)
        self._require("pad_token_id", is_whole(pad) and pad >= 0, "a whole number, 0 or more", source)
        self._require("pad_token_id", pad < self.vocab_size, f"below vocab_size {shown(self.vocab_size)}", source)
        no_token = f"above pad_token_id {pad} + 1, or no token has a position"
        self._require("max_position_embeddings", self.max_length >= 1, no_token, source)
        types = ", ".join(_PROBLEM_TYPES)
        self._require("problem_type", self.problem_type in (*_PROBLEM_TYPES, None), f"one of {types}", source)
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"{source}: {self.file_name('hidden_size')} {shown(self.hidden_size)} is not a multiple of "
                f"{self.file_name('num_attention_heads')} {shown(self.num_attention_heads)}"
            )
        if self.hidden_act not in self.activations:
            raise InputError(
                f"{source}: {self.file_name('hidden_act')} {shown(self.hidden_act)} is not supported; use "
                f"{', '.join(self.activations)}"
            )

    def _require(self, name: str, holds: bool, expected: str, source: str) -> None:
        """Raises InputError unless a field is as expected."""
        if not holds:
            raise InputError(f"{source}: {self.file_name(name)} must be {expected}, got {shown(getattr(self, name))}")

    def file_name(self, field_name: str) -> str:
        """What config.json calls a field."""
        return self.file_names.get(field_name, field_name)


def read_config(folder: Path) -> tuple[JsonObject, str]:
    """The content of ``folder/config.json``, and its path, for error messages.

    Raises:
      InputError: if the file is missing or damaged.
    """
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"{folder}: no config.json; use the folder of a Hugging Face checkpoint")
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a JSON object")
    return values, str(path)


def default_labels(num_labels: int) -> dict[int, str]:
    """The names that Transformers gives to unnamed labels: ``LABEL_0``, ``LABEL_1``, ..."""
    return {index: f"LABEL_{index}" for index in range(num_labels)}


def _read_labels(rest: JsonObject, source: str) -> dict[int, str]:
    """Takes the labels out of ``rest``: those of ``id2label``, else ``num_labels`` unnamed ones, else two.

    Raises:
      InputError: if the labels or their number are not valid.
    """
    count = rest.pop("num_labels", rest.pop("_num_labels", None))
    rest.pop("label2id", None)
    labels = rest.pop("id2label", None)
    if count is not None and not (is_whole(count) and 1 <= count <= _MOST_LABELS):
        raise InputError(f"{source}: num_labels must be a whole number from 1 to {_MOST_LABELS}, got {shown(count)}")
    if labels is None:
        return default_labels(2 if count is None else count)
    if not isinstance(labels, Mapping) or not all(map(_is_label, labels, labels.values())):
        raise InputError(f"{source}: id2label must map class indices to names, got {shown(labels)}")
    by_index = {int(index): label for index, label in labels.items()}
    if not by_index or sorted(by_index) != list(range(len(labels))):
        raise InputError(f"{source}: id2label must number its classes 0, 1, ..., got {shown(sorted(by_index))}")
    return dict(sorted(by_index.items()))


def _is_label(index: Any, name: Any) -> bool:
    """Whether index and name have the types that they have in JSON or Python."""
    is_index = is_whole(index) or (isinstance(index, str) and index.isascii() and index.isdigit() and len(index) < 20)
    return is_index and isinstance(name, str)


def is_whole(value: Any) -> bool:
    """Whether value is an int, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether value is a finite number in the range of float32."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST_FLOAT < value < _LARGEST_FLOAT
