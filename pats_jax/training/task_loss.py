"""What a task's rows cost in training: the loss of a row, and how much it counts."""

import dataclasses
import logging

import numpy as np

from pats_jax.data.tasks import Task
from pats_jax.errors import InputError, shown
from pats_jax.objectives import Objective, View
from pats_jax.objectives.row_losses import smoothed_cross_entropy
from pats_jax.train_state import RowLoss
from pats_jax.training.settings import LossSettings

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TaskLoss:
    """The loss of a row, and how much it counts.

    Attributes:
      row_loss: see `pats_jax.make_loss_fn`; None: the task's plain loss.
      row_weights: float32 (rows,), by which rows count in means; None: all alike.
    """

    row_loss: RowLoss | None = None
    row_weights: np.ndarray | None = None


def check_loss(settings: LossSettings, task: Task, terms: list[Objective | View]) -> None:
    """Raises InputError if the loss of a task is not that which a setting or an objective is for."""
    kind = "a text has several labels" if task.is_multi_label else "the labels are scores"
    one_class = not (task.is_multi_label or task.is_regression)
    for name in ("class_weights", "label_smoothing_factor"):
        if getattr(settings, name) and not one_class:
            raise InputError(f"--{name}: is for classes, but {kind}; omit it")
    compared = next((term.name for term in terms if term.compares_classes), None)
    if compared and task.is_multi_label:
        raise InputError(f"--method {compared}: compares probabilities of classes, but {kind}; choose another method")


def make_task_loss(settings: LossSettings, labels: np.ndarray | None, names: tuple[str, ...]) -> TaskLoss:
    """The loss of a task.

    Args:
      settings: class weights and label smoothing.
      labels: of the training rows, (rows,).
      names: of the classes by index.
    """
    weights = None
    if settings.class_weights and labels is not None:
        weights = balanced_weights(labels, len(names))
        told = (f"{shown(name, 40, quoted=False)} {weight:.3g}" for name, weight in zip(names, weights, strict=True))
        logger.info("class weights: %s", ", ".join(list(told)[:10]) + (", ..." if len(names) > 10 else ""))
    smoothing = settings.label_smoothing_factor
    row_loss = smoothed_cross_entropy(smoothing, weights) if smoothing else None
    return TaskLoss(row_loss, None if weights is None or labels is None else weights[labels])


def balanced_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """scikit-learn's ``balanced`` class weights, float32 (num_classes,).

    ::

        w_c = n / (k * n_c)     n rows, k classes that occur, n_c rows of class c;  0 where a class does not occur

    Args:
      labels: class indices, (rows,).
      num_classes: of the head.

    Examples:
      >>> balanced_weights(np.array([0, 0, 0, 1]), 3)
      array([0.6666667, 2.       , 0.       ], dtype=float32)
    """
    from sklearn.utils.class_weight import compute_class_weight

    present = np.unique(labels)
    weights = np.zeros(num_classes, np.float32)
    weights[present] = compute_class_weight("balanced", classes=present, y=labels)
    return weights
