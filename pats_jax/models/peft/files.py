"""PE modules in files: ``adapter_config.json`` and ``adapter_model.safetensors``, as the library PEFT has them.

LoRA, IA3, prompts and prefixes are in PEFT's own format, which names a tensor as its base model in Transformers does:
the modules, and the whole head under its plain name. BitFit and adapters, which PEFT does not have, are written the
same way under a ``peft_type`` of our own.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pats_jax.errors import InputError
from pats_jax.models import convert, weights
from pats_jax.models.bert import SequenceClassifier
from pats_jax.models.config import EncoderConfig
from pats_jax.models.peft.config import FlatTree, PeftConfig
from pats_jax.models.peft.model import KINDS, Parameters, PeftClassifier, add_peft, config_of, draw, own_parameters
from pats_jax.models.pretrained import from_pretrained

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_TASK = "SEQ_CLS"


def save_peft(
    directory: str | Path,
    *,
    model: PeftClassifier,
    params: Parameters,
    base_model_name_or_path: str | None = None,
    tokenizer: Any = None,
) -> None:
    """Writes the PE modules and the head, apart from the model that they belong to.

    Beside PEFT's two files stands ``config.json``, the base model's with this head's labels, and the tokenizer's files.

    Args:
        directory: The folder; made if need be. Files of the same names are replaced.
        model: The classifier.
        params: Its parameters.
        base_model_name_or_path: What the base model was loaded from, for `load_peft_model` and PEFT.
        tokenizer: A Transformers tokenizer to save along.

    Raises:
        ValueError: There are no modules, or they are merged.
    """
    from safetensors.numpy import save_file

    config = config_of(model)
    if model.merged:
        raise ValueError("the modules are merged; unmerge them first")
    tree = flatten_dict(params["peft"])
    head = {path: x for path, x in own_parameters(params).items() if config.trains_whole(path)}
    tensors = config.to_tensors(tree)
    tensors |= {config.prefix + convert.tensor_name(path): convert.to_tensor(path, x) for path, x in head.items()}
    values = {
        "peft_type": config.peft_type,
        "task_type": _TASK,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "modules_to_save": ["classifier", "pooler"] if config.train_pooler else ["classifier"],
        **config.to_dict(tree, model.config),
    }
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as name:
        made = Path(name)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        _write_json(made / CONFIG_FILE, values)
        _write_json(made / "config.json", model.config.to_dict())
        save_file(tensors, made / WEIGHTS_FILE, metadata={"format": "pt"})
        (made / WEIGHTS_FILE).chmod((made / CONFIG_FILE).stat().st_mode)  # save_file lets only the owner read it
        target.mkdir(exist_ok=True)
        for path in made.iterdir():
            os.replace(path, target / path.name)


def load_peft(
    directory: str | Path,
    model: SequenceClassifier,
    params: Parameters,
    *,
    base_model_name_or_path: str | None = None,
) -> tuple[PeftClassifier, Parameters]:
    """Adds saved PE modules to their base model, and takes its head from them too.

    Args:
        directory: A folder that `save_peft` or PEFT wrote.
        model: The base model, with as many labels as the head in the folder.
        params: Its parameters; the result shares them.
        base_model_name_or_path: What it was loaded from; if given, it must be the name that the folder has.

    Raises:
        InputError: The folder cannot be read, holds what this library does not have, or is for another base model.
    """
    folder = Path(directory)
    values = _read_config(folder)
    own_name = values.get("base_model_name_or_path")
    if None not in (base_model_name_or_path, own_name) and base_model_name_or_path != own_name:
        raise InputError(
            f"{folder}: is for the base model {own_name}, not for {base_model_name_or_path}; load that one, "
            "or give no base_model_name_or_path if both are the same"
        )
    kind, source = _kind(values, folder), folder / WEIGHTS_FILE
    tensors = weights.read_tensors(dict.fromkeys(weights.names(source), source))
    whole = _take_whole(tensors, kind, params, source)
    try:
        config = kind.from_dict(values, tensors, str(folder / CONFIG_FILE))
    except (TypeError, AttributeError) as error:
        raise InputError(f"{folder / CONFIG_FILE}: a field is of the wrong type ({error})") from None
    config = dataclasses.replace(config, train_pooler=any(path[0] != "classifier" for path in whole))
    tree = config.from_tensors({name: np.asarray(x, np.float32) for name, x in tensors.items()})
    _check_shapes(config, tree, model, params, source)
    model, params = add_peft(model, params, config, key=0)
    loaded = whole | {("peft", *path): x for path, x in tree.items()}
    return model, unflatten_dict(flatten_dict(params) | {path: jnp.array(x) for path, x in loaded.items()})


def load_peft_model(directory: str | Path, **options: Any) -> tuple[PeftClassifier, Parameters, EncoderConfig]:
    """Loads saved PE modules together with the base model that their folder names.

    Args:
        directory: A folder that `save_peft` wrote, or PEFT for a base model without labels' names.
        **options: For `from_pretrained`, such as ``dtype``.

    Returns:
        The model, its parameters and its config, as `from_pretrained` does.

    Raises:
        InputError: As from `load_peft` and `from_pretrained`, or no base model is named.
    """
    folder = Path(directory)
    values = _read_config(folder)
    name = values.get("base_model_name_or_path")
    if not name:
        raise InputError(
            f"{folder / CONFIG_FILE}: names no base model; write its name or folder there, as base_model_name_or_path"
        )
    labels = None
    if (folder / "config.json").exists():
        labels = EncoderConfig.from_folder(folder).id2label
    count = len(labels) if labels else _count_labels(folder)
    base, params, config = from_pretrained(name, num_labels=count, id2label=labels, new_head=True, **options)
    return *load_peft(folder, base, params), config


def is_peft_folder(directory: str | Path) -> bool:
    """Whether a folder holds PE modules rather than a model."""
    return (Path(directory) / CONFIG_FILE).exists()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{folder}: no {CONFIG_FILE}; give a folder with saved PE modules") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a JSON object")
    return values


def _kind(values: Mapping[str, Any], folder: Path) -> type[PeftConfig]:
    for kind in KINDS.values():
        if kind.peft_type == values.get("peft_type"):
            return kind
    raise InputError(
        f"{folder / CONFIG_FILE}: peft_type {values.get('peft_type')!r} is not supported; "
        f"there are {', '.join(kind.peft_type for kind in KINDS.values())}"
    )


def _take_whole(tensors: dict[str, np.ndarray], kind: type[PeftConfig], params: Parameters, source: Path) -> FlatTree:
    """Takes the head, and the pooler where it was trained, out of a file's tensors."""
    everything = kind(train_pooler=True)
    taken = {}
    for path, parameter in own_parameters(params).items():
        name = kind.prefix + convert.tensor_name(path)
        if everything.trains_whole(path) and name in tensors:
            try:
                taken[path] = convert.to_parameter(path, np.shape(parameter), tensors.pop(name), source=str(source))
            except InputError as error:
                raise InputError(f"{error}; it is for another base model or number of labels") from None
        elif path[0] == "classifier":
            raise InputError(
                f"{source}: lacks the head's tensor {name}; it is for another base model, or no {_TASK} adapter"
            )
    return taken


def _check_shapes(
    config: PeftConfig, tree: FlatTree, model: SequenceClassifier, params: Parameters, source: Path
) -> None:
    """Raises InputError unless the tree is what the config gives this base model."""
    other_model = "it is for another base model"
    try:
        drawn = jax.eval_shape(lambda params: draw(model, params, config, jax.random.key(0)), params)
    except InputError:
        raise InputError(f"{source}: changes layers that this model does not have; {other_model}") from None
    expected = {path: leaf.shape for path, leaf in drawn.items()}
    for path in sorted(expected.keys() | tree.keys()):
        name, found, wanted = ".".join(path), tree.get(path), expected.get(path)
        if wanted is None:
            raise InputError(f"{source}: {name} fits nothing in this model; {other_model}")
        if found is None:
            raise InputError(f"{source}: lacks {name}; {other_model}, or the file is incomplete")
        if found.shape != wanted:
            raise InputError(f"{source}: {name} has shape {found.shape}, here it would be {wanted}; {other_model}")
        if not np.isfinite(found).all():
            raise InputError(f"{source}: {name} holds values that are not finite; the file is damaged")


def _count_labels(folder: Path) -> int:
    """Labels of the head in a folder without ``config.json``."""
    path = folder / WEIGHTS_FILE
    heads = [name for name in weights.names(path) if name.endswith(("classifier.weight", "classifier.out_proj.weight"))]
    if not heads:
        raise InputError(f"{path}: holds no head; save a {_TASK} adapter")
    return len(weights.read_tensors({heads[0]: path})[heads[0]])


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
