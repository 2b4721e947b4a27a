"""A run on your own data: which files or data set it reads, what its labels are, what is held out for validation."""

import logging
from typing import Any, TypeVar, cast

import numpy as np

from pats_jax import models
from pats_jax.data import held_out, own_files, readers, tasks
from pats_jax.data.labels import class_names
from pats_jax.data.settings import OwnData, PairDataSettings
from pats_jax.data.tables import check_characters
from pats_jax.data.text_pairs import TextPairs, load_pair_files, load_pair_set
from pats_jax.errors import InputError
from pats_jax.models import labels
from pats_jax.run.settings import FineTuningSettings, Settings
from pats_jax.training import runners
from pats_jax.training.evaluation import true_labels

logger = logging.getLogger(__name__)

Rows = TypeVar("Rows", readers.Split, TextPairs)
Tuning = TypeVar("Tuning", bound=FineTuningSettings)


def load(settings: Settings, names: list[str]) -> tuple[tasks.Task, dict[str, readers.Split]]:
    """The task and the splits of a run on data of one's own.

    Without training, the labels are those of the checkpoint's head.

    Args:
      settings: the settings of the run.
      names: the splits that it needs.

    Raises:
      InputError: data is missing or invalid.
    """
    if "train" in names:
        splits = read_own(settings, names, regression=settings.data.do_regression)
        if "validation" in names and "validation" not in splits:
            train = splits["train"]
            stratified = train.label_names is not None and not train.is_multi_label
            splits |= hold_out(train, settings.data, settings.seed, true_labels(train) if stratified else None)
        train = splits["train"]
        return tasks.own_task(train.label_names, is_multi_label=train.is_multi_label), splits
    config = models.read_encoder_config(models.checkpoint_folder(settings.model.model_name_or_path))
    of_head = tuple(config.id2label.values())
    for name in of_head:
        check_characters(name, f"{settings.model.model_name_or_path}: a name in id2label")
    is_regression = config.num_labels == 1
    if settings.data.do_regression not in (None, is_regression):
        kind = "gives scores" if is_regression else f"has {len(of_head)} classes"
        raise InputError(f"--do_regression: the model of --model_name_or_path {kind}; omit the flag")
    if is_regression:
        return tasks.own_task(None), read_own(settings, names, regression=True)
    written = labels_written(settings, names) if "validation" in names else set()
    names_of_head = labels_of_head(of_head, written)
    task = tasks.own_task(names_of_head, is_multi_label=config.is_multi_label)
    splits = read_own(settings, names, label_names=names_of_head)
    for name, split in splits.items():
        if split.labels is not None and split.is_multi_label != task.is_multi_label:
            kinds = ("one label", "several labels")[:: -1 if task.is_multi_label else 1]
            raise InputError(f"--{name}_file: the model gives a text {kinds[0]}, but the data has {kinds[1]}")
    return task, splits


def check_files(settings: FineTuningSettings) -> None:
    """Raises InputError if the files of a run that trains and evaluates are missing or invalid; reads them."""
    names = ["train", "validation"]
    if isinstance(settings.data, PairDataSettings):
        load_pairs(settings.data, names, settings.seed)
    else:
        load(cast(Settings, settings), names)


def read_own(settings: Settings, names: list[str], **labels_as: Any) -> dict[str, readers.Split]:
    """The splits of one's own data; without validation data that is left out, if it can be held out."""
    data = settings.data
    if not data.dataset_name:
        return own_files.load_files(own_paths(data, names), columns=data.columns, **labels_as)
    return own_files.load_set(
        data.dataset_name, data.dataset_config_name, splits=names, columns=data.columns, **labels_as
    )


def load_pairs(data: PairDataSettings, names: list[str], seed: int) -> dict[str, TextPairs]:
    """The sources and targets of a run.

    Args:
      data: the settings that say where they are.
      names: the splits that it needs.
      seed: of the rows that are held out for validation, where there is no validation data.

    Raises:
      InputError: data is missing or invalid.
    """
    if data.dataset_name:
        splits = load_pair_set(data.dataset_name, data.dataset_config_name, names, data.columns)
    else:
        splits = load_pair_files(own_paths(data, names), data.columns)
    if "validation" in names and "validation" not in splits:
        splits |= hold_out(splits["train"], data, seed)
    return splits


def own_paths(data: OwnData, names: list[str]) -> dict[str, str]:
    """The files of these splits; the validation file may be missing if rows can be held out."""
    found = {}
    for name in names:
        path = getattr(data, f"{name}_file")
        can_hold_out = name == "validation" and "train" in names
        if path is not None:
            found[name] = path
        elif not (can_hold_out and data.validation_split_percentage):
            other = ", or --validation_split_percentage" if can_hold_out else ""
            raise InputError(f"--{name}_file is missing{other}; this run needs {' and '.join(names)} data")
    return found


def labels_written(settings: Settings, names: list[str]) -> set[str]:
    """The labels of the validation data as they stand there."""
    data = settings.data
    if data.dataset_name:
        return own_files.labels_in_set(data.dataset_name, data.dataset_config_name, data.columns)
    return own_files.labels_in(own_paths(data, names)["validation"], data.columns)


def hold_out(split: Rows, data: OwnData, seed: int, classes: np.ndarray | None = None) -> dict[str, Rows]:
    """Training and validation rows, of the training rows, as ``--validation_split_percentage`` says.

    Args:
      split: the training rows.
      data: the settings that say how many to hold out.
      seed: of the draw.
      classes: the class of each row, (rows,), to hold out so many of each; None: rows at random.

    Raises:
      InputError: nothing says how many rows to hold out, or there are too few.
    """
    percentage, name = data.validation_split_percentage, data.own_name
    if percentage is None:
        raise InputError(f"{name}: has no validation data; set --validation_split_percentage")
    held = held_out.held_out_rows(
        np.arange(len(split)) if classes is None else classes,
        percentage / 100,
        seed,
        stratified=classes is not None,
        otherwise="give validation data",
    )
    how = "at random" if classes is None else "each class in proportion"
    told = "%s: %d of %d rows (%g %%) are held out for validation, %s, drawn with seed %d"
    logger.info(told, name, len(held), len(split), percentage, how, seed)
    rest = np.setdiff1d(np.arange(len(split)), held)
    return {"train": split.take(rest), "validation": split.take(held)}


def labels_of_head(names: tuple[str, ...], written: set[str]) -> tuple[str, ...]:
    """The names of a head's classes by index, as a file with some of these labels writes them.

    A head without names (``LABEL_0``, ...) must have as many labels as the file; these are numbered as in training, in
    numerical or alphabetical order.

    Examples:
      >>> labels_of_head(("NEGATIVE", "POSITIVE"), {"positive", "negative"})
      ('negative', 'positive')
      >>> labels_of_head(("LABEL_0", "LABEL_1"), {"spam", "ham"})
      ('ham', 'spam')
      >>> labels_of_head(("LABEL_0", "LABEL_1", "LABEL_2"), {"10.0", "9.0", "2.0"})
      ('2.0', '9.0', '10.0')
    """
    numbers = tuple(map(str, range(len(names))))
    if labels.is_nameless(names) and not written & set(names):
        if written and class_names({*numbers, *written}) == numbers:  # compared by value: 1.0 is 1
            return numbers
        if len(class_names(written)) == len(names):
            return class_names(written)
    return labels.respelled(names, sorted(written))


def with_batch_of(settings: Tuning, rows: int, num_devices: int) -> Tuning:
    """The same settings with a batch of at most so many rows, if they can be split evenly; the log says so."""
    batch, before = settings.batches, settings.batches.train_batch_size or 0
    parts = num_devices * batch.gradient_accumulation_steps
    total = rows // parts * parts
    if before <= rows or not total:
        return settings
    if runners.is_first():
        logger.info("%d rows per step, not %d: there are only %d training rows", total, before, rows)
    return settings.replace(train_batch_size=total, per_device_train_batch_size=total // parts)
