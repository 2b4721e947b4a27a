"""Checks the content of a folder with a saved adapter before it is used.

Every field of ``adapter_config.json`` is *read*, is *without effect* on a saved adapter's outputs, or is *unsupported*:
then any value but null, false, an empty one or PEFT's plain value is an error.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

from typing_extensions import TypedDict

from pats_jax.core.files import JsonObject, parse_json, parse_record, read_bytes
from pats_jax.errors import InputError, shown
from pats_jax.models.config import HEAD_PARTS, EncoderConfig
from pats_jax.models.patterns import compile_pattern
from pats_jax.models.seq2seq_config import Seq2SeqConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
SEQ2SEQ_TASK = "SEQ_2_SEQ_LM"

ModelConfig: TypeAlias = EncoderConfig | Seq2SeqConfig


def task_of(config: ModelConfig) -> str:
    """PEFT's name for what a model does."""
    return SEQ2SEQ_TASK if isinstance(config, Seq2SeqConfig) else "SEQ_CLS"


class CommonFields(TypedDict, total=False):
    """The fields that every method reads; each method adds its own."""

    peft_type: str
    peft_version: str | None
    task_type: str | None
    base_model_name_or_path: str | None
    revision: str | None  # of the base model
    modules_to_save: list[str] | None


class TargetFields(CommonFields, total=False):
    """The fields by which methods that change layers select them."""

    target_modules: str | list[str] | None
    exclude_modules: str | list[str] | None


# Fields of every kind that change nothing: whether training continues, and the classes that built the base model.
_WITHOUT_EFFECT = ("inference_mode", "auto_mapping")
ALL_LINEAR = "all-linear"  # target_modules, for all linear layers but the output layer
LM_HEAD = "lm_head"  # T5's, which PEFT does not count among all linear layers
# Parts that modules_to_save may name: the parts of heads, PEFT's other name for the last of them, and BERT's pooler.
_HEAD_NAMES, _POOLER_NAME = (*HEAD_PARTS, "score"), "pooler"


class FieldRules(NamedTuple):
    """How a method treats the fields of ``adapter_config.json``.

    Attributes:
      read: a ``TypedDict`` of the fields that are read, with their types.
      without_effect: fields that do not change what a saved adapter computes.
      plain: unsupported field -> its plain value, where that is not null, false or empty.
    """

    read: Any = CommonFields
    without_effect: tuple[str, ...] = ()
    plain: Mapping[str, Any] = {}


class SavedModules(NamedTuple):
    """A saved adapter, and the model that it is added to.

    Attributes:
      fields: the content of ``adapter_config.json``; the types of fields that are read have been checked.
      shapes: the shape of each tensor in ``adapter_model.safetensors``, except head and pooler.
      layers: the names of the model's linear layers that an adapter may change.
      model: the model's config.
      folder: the folder, for error messages.
    """

    fields: JsonObject
    shapes: dict[str, tuple[int, ...]]
    layers: list[str]
    model: ModelConfig
    folder: Path

    @property
    def source(self) -> str:
        """The config file, for error messages."""
        return str(self.folder / CONFIG_FILE)

    @property
    def task(self) -> str:
        """PEFT's name for what the model does."""
        return task_of(self.model)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field, or the default if it is missing or null."""
        value = self.fields.get(name)
        return default if value is None else value

    def check_size(self, field: str, value: Any, ending: str, axis: int) -> None:
        """Checks a size in the config against the tensors, before anything of that size is created.

        Args:
          field: the field's name.
          value: its value.
          ending: the tensors' names end with it.
          axis: the axis along which they must have ``value`` entries.

        Raises:
          InputError: if there is no such tensor, or one of another size.
        """
        ended = {name: shape for name, shape in self.shapes.items() if name.endswith(ending)}
        if not ended:
            raise InputError(f"{self.folder / WEIGHTS_FILE}: lacks tensors named ...{ending}; the file is incomplete")
        for name, shape in ended.items():
            if len(shape) <= axis or shape[axis] != value:
                raise InputError(
                    f"{self.source}: {field} is {shown(value)}, but tensor {shown(name, quoted=False)} has shape "
                    f"{shown(shape)}"
                )

    def changed_layers(self, ending: str, default_targets: Iterable[str]) -> list[str]:
        """The names of the layers that have tensors with this ending; they must be the layers that the config selects.

        Raises:
          InputError: if the two differ: the file is incomplete, or PEFT would ignore a part of it.
        """
        in_file = [name.removesuffix(ending) for name in self.shapes if name.endswith(ending)]
        named = named_layers(self.fields, self.layers, default_targets, self.source)
        for layer in self.layers:
            if layer in in_file and layer not in named:
                raise InputError(f"{self.source}: target_modules omits {layer}, but the file has tensors for it")
            if layer in named and layer not in in_file:
                raise InputError(
                    f"{self.folder / WEIGHTS_FILE}: lacks {layer}{ending}, which target_modules of {CONFIG_FILE} "
                    "lists; the file is incomplete, or it is for another base model"
                )
        return in_file


def named_layers(fields: Mapping[str, Any], layers: list[str], default_targets: Iterable[str], source: str) -> set[str]:
    """The layers that a config selects, by the rule of PEFT's ``check_target_module_exists``.

    Args:
      fields: the config, of which target_modules, exclude_modules, layers_to_transform and layers_pattern are read.
      layers: the names of the model's linear layers that an adapter may change.
      default_targets: the value of target_modules if it is null.
      source: what to call the config in error messages.

    Raises:
      InputError: if a pattern is not valid or not supported.
    """
    targets, excluded = fields.get("target_modules"), fields.get("exclude_modules")
    targets = list(default_targets) if targets is None else targets
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        named = {layer for layer in layers if layer != LM_HEAD}
    else:
        named = _matching(targets, layers, f"{source}: target_modules")
    indices, patterns = fields.get("layers_to_transform"), fields.get("layers_pattern") or []
    if indices not in (None, []) and not isinstance(targets, str):
        indices = [indices] if isinstance(indices, int) else indices
        patterns = [patterns] if isinstance(patterns, str) else patterns
        named = {layer for layer in named if layer in targets or _layer_number(layer, patterns, source) in indices}
    return named - (_matching(excluded, layers, f"{source}: exclude_modules") if excluded else set())


def _matching(modules: str | list[str], layers: list[str], source: str) -> set[str]:
    """The layers that a field selects: by a regex for the whole name, or by a list of names or their endings."""
    if isinstance(modules, str):
        return set(filter(compile_pattern(modules, source, whole=True), layers))
    endings = tuple(f".{name}" for name in modules)
    return {layer for layer in layers if layer in modules or layer.endswith(endings)}


def _layer_number(layer: str, patterns: list[str], source: str) -> int | None:
    """The N of ``bert.encoder.layer.N.output.dense``, if layers_pattern allows the word before it; else None.

    Raises:
      InputError: if a pattern is not a plain name.
    """
    for pattern in patterns:
        if not pattern.isidentifier():  # PEFT takes regexes; names are all that people give
            raise InputError(f"{source}: layers_pattern {shown(pattern)} is not supported, only a name")
    words = layer.split(".")
    for before, word in zip(words[1:], words[2:], strict=False):
        if word.isdigit():
            return int(word) if not patterns or before in patterns else None
    return None


def read_fields(folder: Path) -> JsonObject:
    """Reads ``adapter_config.json`` and checks the types of `CommonFields`; `check_fields` checks the other fields.

    Raises:
      InputError: if the file is missing or damaged.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise InputError(f"{folder}: no {CONFIG_FILE}; use a folder with a saved adapter")
    text = read_bytes(path)
    values = parse_json(text, str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a JSON object")
    parse_record(text, CommonFields, str(path))
    return values


def check_fields(folder: Path, values: Mapping[str, Any], rules: FieldRules) -> None:
    """Raises InputError if a field has a wrong type, or asks for something that this library does not support."""
    path = folder / CONFIG_FILE
    parse_record(read_bytes(path), cast(type, rules.read), str(path))
    known = {*rules.read.__annotations__, *rules.without_effect, *_WITHOUT_EFFECT}
    version = values.get("peft_version")
    end = f"; PEFT {shown(version, quoted=False)} wrote it" if version else ""
    for name, value in values.items():
        if name in known or value is None or value is False or value in ({}, []):
            continue
        if name not in rules.plain:
            raise InputError(f"{path}: {shown(name, quoted=False)} is {shown(value)}, which is not supported{end}")
        if value != rules.plain[name]:
            only = repr(rules.plain[name])
            raise InputError(f"{path}: {name} is {shown(value)}, which is not supported, only {only}{end}")


def saves_pooler(values: Mapping[str, Any], model: ModelConfig, folder: Path) -> bool:
    """Whether the pooler is saved with the adapter; a classifier's head must be, and an encoder-decoder has neither.

    Raises:
      InputError: if the adapter is for another task than the model's, or other parts of the model are saved with it.
    """
    source, task, parts = folder / CONFIG_FILE, values.get("task_type"), values.get("modules_to_save") or []
    own = task_of(model)
    if task not in (own, None):
        raise InputError(
            f"{source}: task_type is {shown(task)}, which is not supported, only {own!r} "
            f"with a {model.model_type} model"
        )
    if isinstance(model, Seq2SeqConfig):
        if parts:
            raise InputError(
                f"{source}: modules_to_save names {shown(parts[0])}; only a classifier's head is supported"
            )
        return False
    if task is None and _HEAD_NAMES[0] not in parts:
        raise InputError(f"{source}: task_type is null and modules_to_save names no head; save a {own} adapter")
    others = [name for name in parts if name not in _HEAD_NAMES]
    if others:
        raise InputError(f"{source}: modules_to_save names {shown(others[0])}; only head and pooler are supported")
    return _POOLER_NAME in parts and has_pooler(model)


def has_pooler(model: ModelConfig) -> bool:
    """Whether a model has a pooler that is not of its head, as BERT has."""
    return isinstance(model, EncoderConfig) and model.has_pooler
