"""Saved adapters: ``adapter_config.json`` and ``adapter_model.safetensors``, in the layout of the library PEFT.

LoRA, AdaLoRA, IA3, prompts and prefixes are saved in PEFT's own format: the adapter, and a classifier's whole head,
with the tensor names of the base model in Transformers. What PEFT lacks is saved in the same way, with ``peft_type``
values of our own: BitFit, bottleneck adapters, and prefixes in every attention of an encoder-decoder.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pats_jax.core.files import JsonObject, write_json
from pats_jax.errors import InputError, shown
from pats_jax.models import convert, weights
from pats_jax.models.bart import Bart
from pats_jax.models.config import HEAD_PARTS, EncoderConfig, read_config
from pats_jax.models.encoders.table import read_encoder_config
from pats_jax.models.peft.adapted import PeftBart, PeftClassifier, PeftModel, PeftT5, PlainModel
from pats_jax.models.peft.config import FlatTree, PeftConfig, is_linear
from pats_jax.models.peft.model import (
    KINDS,
    Parameters,
    add_peft,
    config_of,
    draw,
    in_layout,
    own_shapes,
    small_tree,
)
from pats_jax.models.peft.saved import (
    CONFIG_FILE,
    SEQ2SEQ_TASK,
    WEIGHTS_FILE,
    SavedModules,
    check_fields,
    read_fields,
    saves_pooler,
    task_of,
)
from pats_jax.models.pretrained import check_problem_type, from_pretrained
from pats_jax.models.seq2seq import from_pretrained_seq2seq
from pats_jax.models.seq2seq_config import BartConfig, Seq2SeqConfig, T5Config
from pats_jax.models.sequence_classifier import SequenceClassifier
from pats_jax.models.sources import checkpoint_folder
from pats_jax.models.t5 import T5
from pats_jax.models.whole_folder import new_folder


def save_peft(
    directory: str | Path,
    *,
    model: PeftModel,
    params: Parameters,
    base_model_name_or_path: str | None = None,
    tokenizer: Any = None,
) -> None:
    """Writes the adapter and a classifier's head, without the base model.

    Besides PEFT's two files, the folder gets ``config.json``, the base model's with this head's labels, and the
    tokenizer.

    Args:
      directory: the folder; created if missing. Files with the same names are replaced.
      model: the model with the adapter.
      params: its parameters, with separate or stacked layers.
      base_model_name_or_path: what the base model was loaded from, for `load_peft_model` and PEFT.
      tokenizer: a Transformers tokenizer to save with it.

    Raises:
      ValueError: if the model has no adapter, or the adapter is merged.
      InputError: if the files cannot be written, for instance on a full disk; existing files are unchanged.
    """
    from safetensors.numpy import save_file

    config = config_of(model)
    if model.merged:
        raise ValueError("the adapter is merged; unmerge it first")
    tree = small_tree(model, params)
    head = {path: x for path, x in flatten_dict(params).items() if config.trains_whole(path)}
    tensors = config.to_tensors(tree, model.config)
    tensors |= {config.prefix + convert.tensor_name(path): convert.to_tensor(path, x) for path, x in head.items()}
    is_seq2seq = isinstance(model.config, Seq2SeqConfig)
    parts = sorted({path[0] if path[0] in HEAD_PARTS else path[1] for path in head})
    values = {
        "peft_type": config.file_type(model.config),
        "task_type": task_of(model.config),
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "modules_to_save": None if is_seq2seq else parts,
        **config.to_dict(tree, model.config),
    }
    with new_folder(directory) as made:
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        write_json(made / CONFIG_FILE, values)
        write_json(made / "config.json", model.config.to_dict())
        save_file(tensors, made / WEIGHTS_FILE, metadata={"format": "pt"})
        (made / WEIGHTS_FILE).chmod((made / CONFIG_FILE).stat().st_mode)  # save_file lets only the owner read it


@overload
def load_peft(
    directory: str | Path,
    model: SequenceClassifier,
    params: Parameters,
    *,
    base_model_name_or_path: str | None = None,
) -> tuple[PeftClassifier, Parameters]:
    """For a classifier; see below."""


@overload
def load_peft(
    directory: str | Path, model: T5 | Bart, params: Parameters, *, base_model_name_or_path: str | None = None
) -> tuple[PeftT5 | PeftBart, Parameters]:
    """For an encoder-decoder; see below."""


def load_peft(
    directory: str | Path,
    model: PlainModel,
    params: Parameters,
    *,
    base_model_name_or_path: str | None = None,
) -> tuple[PeftModel, Parameters]:
    """Adds a saved adapter to its base model, and loads a classifier's head.

    Args:
      directory: a folder that `save_peft` or PEFT wrote.
      model: the base model; of a classifier, with as many labels as the saved head.
      params: its parameters; the result shares them.
      base_model_name_or_path: what the base model was loaded from; if given, it must match the name in the folder.

    Returns:
      The model with the adapter and its parameters, of a classifier with the saved head.

    Raises:
      InputError: if the folder cannot be read, is not supported, or is for another base model.
    """
    folder = Path(directory)
    values = read_fields(folder)
    own_name = values.get("base_model_name_or_path")
    if None not in (base_model_name_or_path, own_name) and base_model_name_or_path != own_name:
        raise InputError(
            f"{folder}: is for the base model {shown(own_name, quoted=False)}, not for {base_model_name_or_path}; load "
            "that one, or omit base_model_name_or_path if both are the same"
        )
    kind, source = _kind(values, folder), folder / WEIGHTS_FILE
    check_fields(folder, values, kind.saved_fields)
    config, whole_names = _read_settings(folder, values, kind, model, params)
    tensors = weights.read_tensors(dict.fromkeys(weights.names(source), source))
    whole = {path: _to_parameter(path, params, tensors.pop(name), source) for path, name in whole_names.items()}
    tree = config.from_tensors({name: _as_float(name, x, source) for name, x in tensors.items()}, model.config)
    _check_shapes(config, tree, model, params, source)
    adapted, params = add_peft(model, params, config, key=0)
    loaded = flatten_dict(params) | {path: jnp.array(x) for path, x in whole.items()}
    return adapted, unflatten_dict(loaded) | {"peft": jax.tree.map(jnp.array, in_layout(model, tree))}


def load_peft_model(directory: str | Path, **options: Any) -> tuple[PeftClassifier, Parameters, EncoderConfig]:
    """Loads a saved adapter together with the base model that its folder names.

    Args:
      directory: a folder that `save_peft` or PEFT wrote.
      **options: for `from_pretrained`, such as ``dtype``.

    Returns:
      The model, its parameters and its config, as `from_pretrained` does.

    Raises:
      InputError: as from `load_peft` and `from_pretrained`; or if the folder names no base model, or an
        encoder-decoder.
    """
    folder = Path(directory)
    values, name, base_folder, options = _base_model(folder, options)
    if _is_seq2seq(values, base_folder):
        raise InputError(
            f"{folder}: is for an encoder-decoder, not a classifier; in Python, load it with load_peft_seq2seq"
        )
    count = _count_labels(folder)
    labels: Mapping[int, str] | None
    if (folder / "config.json").exists():
        of_head = read_encoder_config(folder)
        labels = of_head.id2label
        if len(labels) != count:
            raise InputError(f"{folder / 'config.json'}: has {len(labels)} labels, but the saved head has {count}")
    else:  # PEFT's own: the head is of the kind, and has the labels, that the base model's config says
        of_head = read_encoder_config(base_folder)
        labels = of_head.id2label if of_head.num_labels == count else None
    several = of_head.is_multi_label
    check_problem_type(of_head, count, str(folder), several)
    base, params, config = from_pretrained(
        name, num_labels=count, id2label=labels, new_head=True, multi_label=several, **options
    )
    _check_head(folder, base_folder, params)
    return *load_peft(folder, base, params), config


def load_peft_seq2seq(
    directory: str | Path, **options: Any
) -> tuple[PeftT5 | PeftBart, Parameters, T5Config | BartConfig]:
    """As `load_peft_model`, for an adapter of a T5 or BART.

    Args:
      directory: a folder that `save_peft` or PEFT wrote.
      **options: for `from_pretrained_seq2seq`, such as ``dtype``.

    Returns:
      The model, its parameters and its config, as `from_pretrained_seq2seq` does.

    Raises:
      InputError: as from `load_peft` and `from_pretrained_seq2seq`; or if the folder names no base model, or a
        classifier.
    """
    folder = Path(directory)
    values, name, base_folder, options = _base_model(folder, options)
    if not _is_seq2seq(values, base_folder):
        raise InputError(
            f"{folder}: is for a classifier, not an encoder-decoder; in Python, load it with load_peft_model"
        )
    base, params, config = from_pretrained_seq2seq(name, **options)
    return *load_peft(folder, base, params), config


def _check_head(folder: Path, base_folder: Path, params: Parameters) -> None:
    """Raises InputError if a part of a head is neither the adapter's nor the base model's: it was lost after training.

    Of DistilBERT's head, for instance, PEFT saves ``classifier`` but not ``pre_classifier``, unless it is told to.
    """
    saved = [name.split(".") for name in weights.names(folder / WEIGHTS_FILE)]
    of_base = [part for part in HEAD_PARTS if part in params and not any(part in names for names in saved)]
    in_base = {name.split(".")[0] for name in weights.tensor_files(base_folder)} if of_base else set()
    lost = next((part for part in of_base if part not in in_base), None)
    if lost is not None:
        raise InputError(
            f"{folder / WEIGHTS_FILE}: lacks {lost}, a part of the head that the base model lacks, too; train again "
            f"with modules_to_save=[{lost!r}] in PEFT"
        )


def _base_model(folder: Path, options: Mapping[str, Any]) -> tuple[JsonObject, str, Path, dict[str, Any]]:
    """What an adapter's config says, the base model's name and folder, and the options to load it with.

    Raises:
      InputError: if the config cannot be read or used, or there is no such model.
    """
    values = read_fields(folder)
    check_fields(folder, values, _kind(values, folder).saved_fields)
    name = values.get("base_model_name_or_path")
    if not name:
        raise InputError(
            f"{folder / CONFIG_FILE}: names no base model; set base_model_name_or_path to its name or folder"
        )
    own = {} if values.get("revision") is None else {"revision": values["revision"]}
    options = {**own, **options}
    try:
        base_folder = checkpoint_folder(name, revision=options.get("revision"), check_weights=False)
    except InputError as error:
        raise InputError(f"{folder / CONFIG_FILE}: base_model_name_or_path: {error}") from None
    return values, name, base_folder, options


def is_peft_folder(directory: str | Path) -> bool:
    """Whether a folder contains an adapter rather than a model."""
    try:
        return (Path(directory) / CONFIG_FILE).exists()
    except OSError:  # a name too long to be a folder's, which is said where the model is looked for
        return False


def _is_seq2seq(values: Mapping[str, Any], base_folder: Path) -> bool:
    """Whether an adapter is for an encoder-decoder: its config says so, or its base model's."""
    if values.get("task_type") is not None:
        return values["task_type"] == SEQ2SEQ_TASK
    return read_config(base_folder)[0].get("model_type") in (T5Config.model_type, BartConfig.model_type)


def _kind(values: Mapping[str, Any], folder: Path) -> type[PeftConfig]:
    for kind in KINDS.values():
        if values.get("peft_type") in kind.file_types():
            return kind
    raise InputError(
        f"{folder / CONFIG_FILE}: peft_type {shown(values.get('peft_type'))} is not supported; "
        f"use {', '.join(name for kind in KINDS.values() for name in kind.file_types())}"
    )


def _read_settings(
    folder: Path, values: JsonObject, kind: type[PeftConfig], model: PlainModel, params: Parameters
) -> tuple[PeftConfig, dict[convert.ParameterPath, str]]:
    """The settings of a saved adapter, and path -> tensor name of head and pooler; reads only headers.

    Raises:
      InputError: if the tensors do not fit the settings or the base model.
    """
    source, with_pooler = folder / WEIGHTS_FILE, saves_pooler(values, model.config, folder)
    shapes = weights.shapes(dict.fromkeys(weights.names(source), source))
    twice = next((name for name in shapes if kind.prefix + name in shapes), None)
    if twice is not None:
        raise InputError(f"{source}: tensor {shown(twice, quoted=False)} appears with and without {kind.prefix}")
    saved_task = task_of(model.config)
    own, plain = own_shapes(model, params), kind(train_pooler=with_pooler)
    whole = {path: kind.prefix + convert.tensor_name(path) for path in own if plain.trains_whole(path)}
    # PEFT saves the head's last part alone; the others are then those of the base model.
    found = {path[:1] for path, name in whole.items() if name in shapes}
    whole = {path: name for path, name in whole.items() if path[0] not in HEAD_PARTS[1:] or path[:1] in found}
    lacking = next((name for name in whole.values() if name not in shapes), None)
    if lacking:
        raise InputError(
            f"{source}: lacks the head's tensor {lacking}; it is for another base model, or not a {saved_task} adapter"
        )
    saved = SavedModules(
        fields=values,
        shapes={name.removeprefix(kind.prefix): x for name, x in shapes.items() if name not in whole.values()},
        layers=[
            ".".join(path[:-1])
            for path, kernel in own.items()
            if path[-1] == "kernel" and is_linear(kernel) and path not in whole
        ],
        model=model.config,
        folder=folder,
    )
    try:
        config = kind.from_saved(saved)
    except InputError as error:
        named = str(error).startswith(str(folder))
        raise InputError(str(error) if named else f"{saved.source}: {error}") from None
    return dataclasses.replace(config, train_pooler=plain.train_pooler), whole


def _to_parameter(path: convert.ParameterPath, params: Parameters, tensor: np.ndarray, source: Path) -> np.ndarray:
    """A tensor of head or pooler as a parameter.

    Raises:
      InputError: if it does not fit the model.
    """
    try:
        return convert.to_parameter(path, np.shape(flatten_dict(params)[path]), tensor, source=str(source))
    except InputError as error:
        raise InputError(f"{error}; it is for another base model or number of labels") from None


def _as_float(name: str, tensor: np.ndarray, source: Path) -> np.ndarray:
    if tensor.dtype.name not in convert.FLOATS:
        raise InputError(
            f"{source}: tensor {shown(name, quoted=False)} has type {tensor.dtype}, not {', '.join(convert.FLOATS)}"
        )
    return np.asarray(tensor, np.float32)


def _check_shapes(config: PeftConfig, tree: FlatTree, model: PlainModel, params: Parameters, source: Path) -> None:
    """Raises InputError unless the tree matches the config and the base model."""
    other_model = "it is for another base model"
    try:
        drawn = jax.eval_shape(lambda params: draw(model, params, config, jax.random.key(0)), params)
    except InputError:
        raise InputError(f"{source}: changes layers that this model does not have; {other_model}") from None
    expected = {path: leaf.shape for path, leaf in drawn.items()}
    for path in sorted(expected.keys() | tree.keys()):
        name, found, wanted = shown(".".join(path), 200, quoted=False), tree.get(path), expected.get(path)
        if wanted is None:
            raise InputError(f"{source}: {name} matches nothing in this model; {other_model}")
        if found is None:
            raise InputError(f"{source}: lacks {name}; {other_model}, or the file is incomplete")
        if found.shape != wanted:
            raise InputError(f"{source}: {name} has shape {found.shape}, expected {wanted}; {other_model}")
        if not np.isfinite(found).all():
            raise InputError(f"{source}: {name} has non-finite values; the file is damaged")


def _count_labels(folder: Path) -> int:
    """The number of labels of the head in a folder; reads only headers.

    Raises:
      InputError: if the file has no head, or a damaged one.
    """
    path = folder / WEIGHTS_FILE
    endings = (".classifier.weight", ".classifier.out_proj.weight")  # "pre_classifier" is not the head's last part
    heads = [name for name in weights.names(path) if f".{name}".endswith(endings)]
    if not heads:
        raise InputError(f"{path}: has no head; save a SEQ_CLS adapter")
    shape = weights.shapes({heads[0]: path})[heads[0]]
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{path}: tensor {heads[0]} has shape {shown(shape)}, which is not that of a head")
    return shape[0]
