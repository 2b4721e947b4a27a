"""Saved adapters: ``adapter_config.json`` and ``adapter_model.safetensors``, in the layout of the library PEFT.

LoRA, IA3, prompts and prefixes are saved in PEFT's own format: the adapter, and the whole head, with the tensor names
of the base model in Transformers. BitFit and bottleneck adapters, which PEFT lacks, are saved in the same way, with
``peft_type`` values of our own.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pats_jax.core.files import JsonObject, write_json
from pats_jax.errors import InputError, shown
from pats_jax.models import convert, weights
from pats_jax.models.bert import SequenceClassifier
from pats_jax.models.config import EncoderConfig
from pats_jax.models.peft.config import FlatTree, PeftConfig
from pats_jax.models.peft.model import (
    KINDS,
    Parameters,
    PeftClassifier,
    add_peft,
    config_of,
    draw,
    in_layout,
    own_shapes,
    small_tree,
)
from pats_jax.models.peft.saved import (
    CONFIG_FILE,
    TASK,
    WEIGHTS_FILE,
    SavedModules,
    check_fields,
    read_fields,
    saves_pooler,
)
from pats_jax.models.pretrained import check_problem_type, from_pretrained
from pats_jax.models.sources import checkpoint_folder
from pats_jax.models.whole_folder import new_folder


def save_peft(
    directory: str | Path,
    *,
    model: PeftClassifier,
    params: Parameters,
    base_model_name_or_path: str | None = None,
    tokenizer: Any = None,
) -> None:
    """Writes the adapter and the head, without the base model.

    Besides PEFT's two files, the folder gets ``config.json``, the base model's with this head's labels, and the
    tokenizer.

    Args:
      directory: the folder; created if missing. Files with the same names are replaced.
      model: the classifier.
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
    tensors = config.to_tensors(tree)
    tensors |= {config.prefix + convert.tensor_name(path): convert.to_tensor(path, x) for path, x in head.items()}
    values = {
        "peft_type": config.peft_type,
        "task_type": TASK,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "modules_to_save": ["classifier", "pooler"] if config.train_pooler else ["classifier"],
        **config.to_dict(tree, model.config),
    }
    with new_folder(directory) as made:
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        write_json(made / CONFIG_FILE, values)
        write_json(made / "config.json", model.config.to_dict())
        save_file(tensors, made / WEIGHTS_FILE, metadata={"format": "pt"})
        (made / WEIGHTS_FILE).chmod((made / CONFIG_FILE).stat().st_mode)  # save_file lets only the owner read it


def load_peft(
    directory: str | Path,
    model: SequenceClassifier,
    params: Parameters,
    *,
    base_model_name_or_path: str | None = None,
) -> tuple[PeftClassifier, Parameters]:
    """Adds a saved adapter to its base model, and loads its head.

    Args:
      directory: a folder that `save_peft` or PEFT wrote.
      model: the base model, with as many labels as the saved head.
      params: its parameters; the result shares them.
      base_model_name_or_path: what the base model was loaded from; if given, it must match the name in the folder.

    Returns:
      The classifier with the adapter and its parameters, with the saved head.

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
    tree = config.from_tensors({name: _as_float(name, x, source) for name, x in tensors.items()})
    _check_shapes(config, tree, model, params, source)
    model, params = add_peft(model, params, config, key=0)
    loaded = flatten_dict(params) | {path: jnp.array(x) for path, x in whole.items()}
    return model, unflatten_dict(loaded) | {"peft": jax.tree.map(jnp.array, in_layout(model, tree))}


def load_peft_model(directory: str | Path, **options: Any) -> tuple[PeftClassifier, Parameters, EncoderConfig]:
    """Loads a saved adapter together with the base model that its folder names.

    Args:
      directory: a folder that `save_peft` or PEFT wrote.
      **options: for `from_pretrained`, such as ``dtype``.

    Returns:
      The model, its parameters and its config, as `from_pretrained` does.

    Raises:
      InputError: as from `load_peft` and `from_pretrained`; or if the folder names no base model.
    """
    folder = Path(directory)
    values = read_fields(folder)
    check_fields(folder, values, _kind(values, folder).saved_fields)
    name = values.get("base_model_name_or_path")
    if not name:
        raise InputError(
            f"{folder / CONFIG_FILE}: names no base model; set base_model_name_or_path to its name or folder"
        )
    if values.get("revision") is not None:
        options = {"revision": values["revision"], **options}
    try:
        base_folder = checkpoint_folder(name, revision=options.get("revision"), check_weights=False)
    except InputError as error:
        raise InputError(f"{folder / CONFIG_FILE}: base_model_name_or_path: {error}") from None
    count = _count_labels(folder)
    labels: Mapping[int, str] | None
    if (folder / "config.json").exists():
        of_head = EncoderConfig.from_folder(folder)
        labels = of_head.id2label
        if len(labels) != count:
            raise InputError(f"{folder / 'config.json'}: has {len(labels)} labels, but the saved head has {count}")
    else:  # PEFT's own: the head is of the kind, and has the labels, that the base model's config says
        of_head = EncoderConfig.from_folder(base_folder)
        labels = of_head.id2label if of_head.num_labels == count else None
    several = of_head.is_multi_label
    check_problem_type(of_head, count, str(folder), several)
    base, params, config = from_pretrained(
        name, num_labels=count, id2label=labels, new_head=True, multi_label=several, **options
    )
    return *load_peft(folder, base, params), config


def is_peft_folder(directory: str | Path) -> bool:
    """Whether a folder contains an adapter rather than a model."""
    try:
        return (Path(directory) / CONFIG_FILE).exists()
    except OSError:  # a name too long to be a folder's, which is said where the model is looked for
        return False


def _kind(values: Mapping[str, Any], folder: Path) -> type[PeftConfig]:
    for kind in KINDS.values():
        if kind.peft_type == values.get("peft_type"):
            return kind
    raise InputError(
        f"{folder / CONFIG_FILE}: peft_type {shown(values.get('peft_type'))} is not supported; "
        f"use {', '.join(kind.peft_type for kind in KINDS.values())}"
    )


def _read_settings(
    folder: Path, values: JsonObject, kind: type[PeftConfig], model: SequenceClassifier, params: Parameters
) -> tuple[PeftConfig, dict[convert.ParameterPath, str]]:
    """The settings of a saved adapter, and path -> tensor name of head and pooler; reads only headers.

    Raises:
      InputError: if the tensors do not fit the settings or the base model.
    """
    source, with_pooler = folder / WEIGHTS_FILE, saves_pooler(values, folder)
    shapes = weights.shapes(dict.fromkeys(weights.names(source), source))
    twice = next((name for name in shapes if kind.prefix + name in shapes), None)
    if twice is not None:
        raise InputError(f"{source}: tensor {shown(twice, quoted=False)} appears with and without {kind.prefix}")
    own, plain = own_shapes(model, params), kind(train_pooler=with_pooler and not model.config.is_roberta)
    whole = {path: kind.prefix + convert.tensor_name(path) for path in own if plain.trains_whole(path)}
    lacking = next((name for name in whole.values() if name not in shapes), None)
    if lacking:
        raise InputError(
            f"{source}: lacks the head's tensor {lacking}; it is for another base model, or not a {TASK} adapter"
        )
    saved = SavedModules(
        fields=values,
        shapes={name.removeprefix(kind.prefix): x for name, x in shapes.items() if name not in whole.values()},
        layers=[".".join(path[:-1]) for path in own if path[-1] == "kernel" and path not in whole],
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


def _check_shapes(
    config: PeftConfig, tree: FlatTree, model: SequenceClassifier, params: Parameters, source: Path
) -> None:
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
    heads = [name for name in weights.names(path) if name.endswith(("classifier.weight", "classifier.out_proj.weight"))]
    if not heads:
        raise InputError(f"{path}: has no head; save a {TASK} adapter")
    shape = weights.shapes({heads[0]: path})[heads[0]]
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{path}: tensor {heads[0]} has shape {shown(shape)}, which is not that of a head")
    return shape[0]
